"""
The experiments behind the board and the notes: runs from plans, and the tables and pictures of their logs.

    python records/sweeps.py           train every run of the plans that has no log yet (hours), then as below
    python records/sweeps.py --table   read the logs alone; write the tables, baselines.json and the pictures

baselines/DATASET/plan.txt: the plain recipe on more and more tokens, from which data efficiency is read; also
with look-up inputs, which shows how much of it is copying.
ablations/DATASET/plan.txt: techniques on and off, three seeds each. A title in equals signs begins a table.

A line of a plan is a run: NAME, a colon, and the options that it gives to train_gpt.py. "NAME x3:" stands for
three seeds, NAME_s0 to NAME_s2. "NAME vs OTHER x3:" names the runs to compare them with. "all: OPTIONS" are
given to every run below it, before its own. "patch: FILE" applies a patch beside the plan to train_gpt.py for
all runs below it: techniques that were tried and are not in the script.

Killed at any time, this goes on where it stopped. Started twice, the two share the work (one core each:
taskset -c 0, taskset -c 1). A run's log is kept without the sources; their headers have the sha256 of the
train_gpt.py and the harness.py that ran, as the repository's history holds them, with the patch where there
is one.
"""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import Spread, paired_test
from pictures import INK, figure, save_picture
from reading import (
    HERE,
    ROOT,
    SOURCE_END,
    Done,
    Refused,
    Score,
    Size,
    Trained,
    read_json,
    read_log,
    read_npy,
    split_log,
    write_json,
)

DATASETS = ("pocket", "prose")

PLAN_LINE = re.compile(r"(\S+)(?: vs (\S+))?(?: x(\d+))?: ?(.*)")


# ---- training ----------------------------------------------------------------------------------------------


def read_plan(folder):
    """What plan.txt asks for, in order, each a dict:

    title (of its table), name, control (a name, or None), options, patch (a file, or None), and runs, {name
    of the run: its options}.
    """
    entries = []
    title = ""
    common = ""
    patch = None
    for line in (folder / "plan.txt").read_text().splitlines():
        heading = re.fullmatch(r"== (.*) ==", line)
        if heading:
            title = heading[1]
        elif line.startswith("all: "):
            common = line[5:]
        elif line.startswith("patch: "):
            patch = folder / line[7:]
        elif line.strip() and not line.startswith("#"):
            found = PLAN_LINE.fullmatch(line)
            if not found:
                raise Refused(f"{folder / 'plan.txt'}: {line!r} is not NAME: OPTIONS")
            name, control, seeds, options = found.groups()
            given = f"{common} {options}".split()
            if seeds:
                runs = {f"{name}_s{seed}": [*given, "--seed", str(seed)] for seed in range(int(seeds))}
            else:
                runs = {name: given}
            entries.append(
                dict(title=title, name=name, control=control, options=options, patch=patch, runs=runs)
            )
    return entries


def planned(kind):
    """The folders of this kind, baselines or ablations, that have a plan: one for each dataset."""
    folders = [HERE / kind / dataset for dataset in DATASETS]
    return [folder for folder in folders if (folder / "plan.txt").exists()]


def name_of(folder, name):
    """A run's name in runs/, where the runs of all plans are."""
    return f"{folder.parent.name}_{folder.name}_{name}"


def train_missing():
    """Train what has no log yet, one run after the other."""
    # The plans are read again after each run, so lines that were added in the meantime are found.
    while train_one():
        pass


def train_one():
    """Train the first run without a log that no other process trains. Returns whether there is one."""
    locks = ROOT / "runs" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    for folder in planned("baselines") + planned("ablations"):
        for entry in read_plan(folder):
            for name, options in entry["runs"].items():
                log = folder / f"{name}.log"
                if log.exists():
                    continue
                with open(locks / name_of(folder, name), "w") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    if not log.exists():
                        train(folder, name, options, log, entry["patch"])
                    return True
    return False


def patched_script(patch):
    """train_gpt.py with a patch, in a folder of its own beside the same data."""
    folder = ROOT / "runs" / "patched" / patch.stem
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "train_gpt.py"
    for name in ("train_gpt.py", "harness.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    if not (folder / "data").exists():
        (folder / "data").symlink_to(ROOT / "data")
    # Outside of any repository, for otherwise git looks for the file from its root on.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    if subprocess.run(["git", "apply", patch], cwd=folder, env=env).returncode:
        raise Refused(f"{patch}: does not fit train_gpt.py; check out the commit that added it")
    return script


def train_run(run, options, script=ROOT / "train_gpt.py"):
    """Train a run with these options, or the rest of it, unless it is finished. Refused where that fails."""
    if (run / "record.json").exists():
        return
    # The path is in the log, so it is relative.
    where = os.path.relpath(run, ROOT)
    if (run / "config.json").exists():
        how = ["--resume", where]
    else:
        how = ["--run_dir", where, *options]
    print(f"==== {' '.join(how)}", flush=True)
    if subprocess.run([sys.executable, os.path.relpath(script, ROOT), *how], cwd=ROOT).returncode:
        raise Refused(f"{run}: its training failed, see above; the same command goes on")


def train(folder, name, options, kept, patch):
    """Train a run of a plan, and keep its log."""
    run = ROOT / "runs" / name_of(folder, name)
    if patch:
        train_run(run, options, patched_script(patch))
    else:
        train_run(run, options)
    log = (run / "log.txt").read_bytes()
    sources, rest = split_log(log)
    if folder.parent.name == "ablations":
        # There are many short runs: every fiftieth step is enough. Their losses are compared block by block.
        rest = re.sub(rb"^(?:member \d+ )?step (\d+)/.*\n", every_fiftieth, rest, flags=re.MULTILINE)
        np.save(folder / f"{name}.npy", read_npy(run / "val_nll.npy", 1 << 24))
    # A log that is there is complete.
    tmp = kept.with_suffix(".tmp")
    heads = []
    for source in sources:
        heads.append(f"==== source {source.name} bytes={len(source.content)} sha256={source.sha256}".encode())
    tmp.write_bytes(b"".join(head + SOURCE_END for head in heads) + rest)
    tmp.replace(kept)


def every_fiftieth(line):
    return line[0] if int(line[1]) % 50 == 0 else b""


# ---- logs --------------------------------------------------------------------------------------------------


def read_result(path):
    """The config of a finished run, and what the log says of its result."""
    log = read_log(path)
    score = log.of(Score)[-1]
    trained = log.of(Trained)[-1]
    return log.config | {
        "name": path.stem,
        "val_loss": score.val_loss,
        "tokens": score.val_tokens,
        "flops": trained.flops,
        "parameters": log.of(Size)[0].parameters,
        # Of each member: its loss alone, and that of the members so far together.
        "done": [(done.alone, done.together) for done in log.of(Done)],
    }


def write_table(folder, title, lines):
    """Put a dataset's table between its marker lines, in the README beside its folder."""
    page = folder.parent / "README.md"
    write_between(page, f"{folder.name}, {title}", "python records/sweeps.py --table", lines)


def write_between(page, title, command, lines):
    """Put lines that this command makes between the two marker lines with this title."""
    begin = f"<!-- {title}: {command} -->"
    end = f"<!-- end of {title} -->"
    text = page.read_text()
    before = text.split(begin)[0]
    after = text.split(end)[1]
    page.write_text("\n".join([before + begin, *lines, end + after]))


def table_head(*names):
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


# ---- the baseline's curve ----------------------------------------------------------------------------------


def write_curves(folder):
    """A dataset's tables, and the best recipe at each number of tokens into baselines.json: of the plain
    baseline, and of that with look-up inputs. folder: HERE / "baselines" / DATASET."""
    recipes = {}
    for path in folder.glob("*.log"):
        run = read_result(path)
        # Runs of several epochs measure the spread of seeds; they are of no curve.
        if run["epochs"] == 1:
            name = re.sub(r"_s\d+$", "", run["name"])
            recipes.setdefault(name, []).append(run)
    plain = {}
    with_look_ups = {}
    for name, runs in recipes.items():
        runs.sort(key=lambda run: run["seed"])
        # The first logs are of a script that had no look-ups.
        if runs[0].get("recall"):
            with_look_ups[name] = runs
        else:
            plain[name] = runs

    path = HERE / "baselines.json"
    baselines = read_json(path)
    dataset = baselines[folder.name]
    dataset["points"] = write_curve(plain, folder, "plain")
    dataset["with_look_ups"]["points"] = write_curve(with_look_ups, folder, "with look-ups")
    write_json(path, baselines)


def write_curve(recipes, folder, title):
    """Write the table with this title. recipes: {name: runs}. Returns the points for baselines.json."""
    rows = []
    points = {}
    for name, runs in recipes.items():
        loss = sum(run["val_loss"] for run in runs) / len(runs)
        first = runs[0]
        tokens = first["train_tokens"]
        rows.append((tokens, loss, name, runs))
        if tokens not in points or loss < points[tokens]["val_loss"]:
            points[tokens] = {
                "train_tokens": tokens,
                "val_loss": round(loss, 6),
                "train_flops": first["flops"],
                "parameters": first["parameters"],
                "run": name,
                "seeds": len(runs),
            }

    lines = table_head(
        "tokens",
        "val loss",
        "seeds",
        "layers x width",
        "parameters",
        "batch",
        "muon_lr",
        "embed_lr, head_lr, scalar_lr",
        "FLOPs",
        "log",
    )
    for tokens, loss, name, runs in sorted(rows, key=lambda row: row[:3]):
        lines.append(curve_row(folder, tokens, loss, name, runs, is_best=points[tokens]["run"] == name))
    if not rows:
        lines = ["Not measured yet."]
    write_table(folder, title, lines)
    return [points[tokens] for tokens in sorted(points)]


def curve_row(folder, tokens, loss, name, runs, is_best):
    c = runs[0]
    loss_cell = f"{loss:.4f}"
    if is_best:
        loss_cell = f"**{loss_cell}**"
    seeds = "1"
    if len(runs) > 1:
        seeds = " ".join(f"{run['val_loss']:.4f}" for run in runs)
    cells = [
        f"{tokens // 10**6}M",
        loss_cell,
        seeds,
        f"{c['n_layer']} x {c['n_embd']}",
        f"{c['parameters']:,}",
        f"{c['batch_tokens']:,}",
        f"{c['muon_lr']:g}",
        f"{c['embed_lr']:g}, {c['head_lr']:g}, {c['scalar_lr']:g}",
        f"{c['flops']:.3g}",
        f"[{name}]({folder.name}/{c['name']}.log)",
    ]
    return "| " + " | ".join(cells) + " |"


# ---- the ablations -----------------------------------------------------------------------------------------


def read_groups(folder):
    """The entries of a plan whose runs all have logs, {name: entry}, each with two more: logs, of
    read_result(), and scores, as paired_test() takes them."""
    groups = {}
    for entry in read_plan(folder):
        paths = [folder / f"{name}.log" for name in entry["runs"]]
        if all(path.exists() for path in paths):
            logs = [read_result(path) for path in paths]
            sums = [read_npy(path.with_suffix(".npy"), 1 << 24) for path in paths]
            losses = np.array([log["val_loss"] for log in logs])
            scores = (np.mean(sums, axis=0), losses, logs[0]["tokens"])
            groups[entry["name"]] = entry | {"logs": logs, "scores": scores}
    return groups


def difference(group, control):
    """What paired_test() says of two groups, with the spread of the seeds of both."""
    _, losses, _ = group["scores"]
    _, control_losses, _ = control["scores"]
    sd = np.sqrt((losses.var(ddof=1) + control_losses.var(ddof=1)) / 2)
    spread = Spread(float(sd), len(losses) + len(control_losses) - 2, "of both groups")
    return paired_test(group["scores"], control["scores"], spread, spread)


def write_ablations(folder):
    """A dataset's tables in records/ablations/README.md: each group of runs, and its difference to its
    control. Returns the groups, by name. folder: HERE / "ablations" / DATASET."""
    groups = read_groups(folder)
    head = table_head(
        "run", "options", "val loss", "seeds", "difference", "95% interval", "p", "FLOPs", "log"
    )
    lines = []
    title = None
    for group in groups.values():
        if group["title"] != title:
            title = group["title"]
            lines += ["", f"**{title}**", "", *head]
        lines.append(ablation_row(folder, group, groups.get(group["control"])))
    write_table(folder, "techniques", lines)
    return groups


def draw_ablations(groups):
    """The pictures of records/ablations/README.md, from pocket's groups of runs."""
    for name, draw in (("decay", draw_decay), ("epochs", draw_epochs), ("chain", draw_chain)):
        for theme in INK:
            picture = draw(groups, theme)
            if picture:
                save_picture(HERE / "ablations" / f"{name}_{theme}.svg", picture, "the logs")


def ablation_row(folder, group, control):
    _, losses, _ = group["scores"]
    compared = ["", "", ""]
    if control:
        c = difference(group, control)
        low, high = c["interval"]
        compared = [
            f"{c['mean']:+.4f} to {control['name']}",
            f"{low:+.4f} to {high:+.4f}",
            f"{c['p']:.1g}",
        ]
    links = []
    for log in group["logs"]:
        seed = log["name"].rpartition("_")[2]
        links.append(f"[{seed}]({folder.name}/{log['name']}.log)")
    flops = np.mean([log["flops"] for log in group["logs"]])
    cells = [
        group["name"],
        group["options"],
        f"{losses.mean():.4f}",
        " ".join(f"{loss:.4f}" for loss in losses),
        *compared,
        f"{flops:.3g}",
        " ".join(links),
    ]
    return "| " + " | ".join(cells) + " |"


def draw_decay(groups, theme):
    """Validation loss over weight decay, a line for each width; None without these runs."""
    by_width = {}
    for name, group in groups.items():
        if re.fullmatch(r"plain|(w\d+_)?wd[\d.]+", name):
            c = group["logs"][0]
            _, losses, _ = group["scores"]
            by_width.setdefault(c["n_embd"], []).append((c["weight_decay"], losses.mean()))
    if not by_width:
        return None
    fig, [[ax]] = figure(theme, 1, 4)
    shades = np.linspace(0.4, 1, len(by_width))
    for shade, (width, points) in zip(shades, sorted(by_width.items())):
        x, y = zip(*sorted(points))
        ax.plot(x, y, "o-", color=INK[theme]["blue"], alpha=shade, label=f"width {width}")
        best = int(np.argmin(y))
        ax.plot(x[best], y[best], "o", markersize=11, color=INK[theme]["orange"])
    ax.set(xscale="log", xlabel="weight decay", ylabel="validation loss (nats per token)")
    ticks = sorted({x for points in by_width.values() for x, _ in points})
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.minorticks_off()
    ax.legend()
    return fig


def draw_epochs(groups, theme):
    """Validation loss over epochs: of an ensemble's members, and of all together; None without these runs."""
    runs = []
    for name, group in groups.items():
        if re.fullmatch(r"epochs\d+", name):
            runs.append((int(name[6:]), group["logs"][0]["done"]))
    if not runs:
        return None
    runs.sort()
    epochs = [n for n, _ in runs]
    alone = [np.mean([loss for loss, _ in done]) for _, done in runs]
    together = [done[-1][1] for _, done in runs]
    members = len(runs[0][1])
    fig, [[ax]] = figure(theme, 1, 4)
    label = "a single model, mean of the members"
    ax.plot(epochs, alone, "o-", color=INK[theme]["orange"], label=label)
    ax.plot(epochs, together, "o-", color=INK[theme]["blue"], label=f"{members} members together")
    ax.set(xscale="log", xlabel="epochs", ylabel="validation loss (nats per token)")
    ax.set_xticks(epochs, epochs)
    ax.minorticks_off()
    ax.legend()
    return fig


def draw_chain(groups, theme):
    """Validation loss over the number of members, independent ones and a chain; None without these runs."""
    if not {"chain4", "independent4"} <= groups.keys():
        return None
    fig, [[ax]] = figure(theme, 1, 4)
    for name, ink in (("independent4", "orange"), ("chain4", "blue")):
        # [members, (alone, together)]
        done = np.mean([log["done"] for log in groups[name]["logs"]], axis=0)
        members = list(range(1, len(done) + 1))
        kind = name[:-1]
        ax.plot(members, done[:, 0], "o:", color=INK[theme][ink], label=f"{kind}: each alone")
        ax.plot(members, done[:, 1], "o-", color=INK[theme][ink], label=f"{kind}: together")
    ax.set(xlabel="members", ylabel="validation loss (nats per token)", xticks=members)
    ax.legend()
    return fig


def main():
    if sys.argv[1:] not in ([], ["--table"]):
        print(__doc__)
        sys.exit(2)
    try:
        if not sys.argv[1:]:
            train_missing()
        for folder in planned("baselines"):
            write_curves(folder)
        for folder in planned("ablations"):
            groups = write_ablations(folder)
            if folder.name == "pocket":
                draw_ablations(groups)
    except Refused as e:
        sys.exit(f"sweeps.py: {e}")
    except KeyboardInterrupt:
        sys.exit("sweeps.py: interrupted; the same command goes on")


if __name__ == "__main__":
    main()
