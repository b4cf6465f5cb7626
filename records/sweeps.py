"""
The experiments behind the board and the notes: runs from plans, and the tables and pictures that are read from their logs.

    python records/sweeps.py             train every run of the plans below that has no log yet (hours), then write the tables
    python records/sweeps.py --table     only read the logs: write the tables, baselines.json, the pictures

baselines/pocket/plan.txt: the plain recipe on more and more tokens, from which data efficiency is read.
ablations/pocket/plan.txt: techniques on and off, three seeds each. A title in equals signs begins a table.

A line of a plan is a run: NAME, a colon, the options that it gives to train_gpt.py. "NAME x3:" stands for three seeds, NAME_s0 to
NAME_s2; "NAME vs OTHER x3:" names the runs to compare them with; "all: OPTIONS" are given to every run below it, before its own. Killed at any time, this goes on where it stopped; started twice, the two share
the work (one core each: taskset -c 0, taskset -c 1). A run's log is kept without the script's source; its first line has the sha256
of the train_gpt.py that ran, as the repository's history holds it.
"""
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import Refused  # noqa: E402
from leaderboard import INK, compare_scores, figure, save_picture  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT, BASELINES, ABLATIONS = HERE.parent, HERE / "baselines" / "pocket", HERE / "ablations" / "pocket"

def read_plan(folder):
    """What plan.txt asks for, in order: dicts of title (of the table), name, control (a name, or None), options, and runs: {name of the run: its options}."""
    entries, title, common = [], "", ""
    for line in (folder / "plan.txt").read_text().splitlines():
        if heading := re.fullmatch(r"== (.*) ==", line):
            title = heading[1]
        elif line.startswith("all: "):
            common = line[5:]
        elif line.strip() and not line.startswith("#"):
            found = re.fullmatch(r"(\S+)(?: vs (\S+))?(?: x(\d+))?: ?(.*)", line)
            if not found:
                raise Refused(f"{folder / 'plan.txt'}: {line!r} is not NAME: OPTIONS")
            name, control, seeds, options = found.groups()
            given = f"{common} {options}".split()
            runs = {f"{name}_s{seed}": [*given, "--seed", str(seed)] for seed in range(int(seeds))} if seeds else {name: given}
            entries.append(dict(title=title, name=name, control=control, options=options, runs=runs))
    return entries

def train_missing():
    """Train what has no log yet, one run after the other; a lock keeps two processes from the same run."""
    locks = ROOT / "runs" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    while True:  # the plan is read anew each time: lines added meanwhile are found
        for folder, name, options in ((folder, *run) for folder in (BASELINES, ABLATIONS) for entry in read_plan(folder) for run in entry["runs"].items()):
            kept = folder / f"{name}.log"
            if kept.exists():
                continue
            with open(locks / f"{folder.parent.name}_{name}", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if not kept.exists():
                    train(folder, name, options, kept)
                break
        else:
            return

def train_run(run, options):
    """Train a run with these options, or the rest of it, or nothing where it is finished. Refused, where that fails."""
    if not (run / "record.json").exists():
        where = os.path.relpath(run, ROOT)  # it stands in the log
        how = ["--resume", where] if (run / "config.json").exists() else ["--run_dir", where, *options]
        print(f"==== {' '.join(how)}", flush=True)
        if subprocess.run([sys.executable, "train_gpt.py", *how], cwd=ROOT).returncode:
            raise Refused(f"{run}: its training failed, see above; the same command goes on")

def train(folder, name, options, kept):
    run = ROOT / "runs" / f"{folder.parent.name}_{name}"
    train_run(run, options)
    head, _, rest = (run / "log.txt").read_text().partition("\n")
    if folder == ABLATIONS:  # many short runs: every fiftieth step will do, and the losses of the blocks are compared
        rest = re.sub(r"^(?:member \d+ )?step (\d+)/.*\n", lambda line: "" if int(line[1]) % 50 else line[0], rest, flags=re.MULTILINE)
        np.save(folder / f"{name}.npy", np.load(run / "val_nll.npy", allow_pickle=False))
    tmp = kept.with_suffix(".tmp")
    tmp.write_text(head + rest[rest.index("\n==== end of source"):])
    tmp.replace(kept)  # a log that is there is whole

def read_log(path):
    """What a finished run's log says of it."""
    text = path.read_text()
    config = json.loads(re.search(r"^config (.*)$", text, re.MULTILINE)[1])
    flops = re.search(r"^trained for .* seen, ([\d.e+]+) FLOPs", text, re.MULTILINE)[1]
    score = re.search(r"^val_loss ([\d.]+) nats per token, .* ([\d,]+) tokens scored", text, re.MULTILINE)
    done = re.findall(r"^member \d+ done: val_loss ([\d.]+), the members so far together ([\d.]+)", text, re.MULTILINE)
    return config | {"name": path.stem, "val_loss": float(score[1]), "tokens": int(score[2].replace(",", "")), "flops": float(flops),
                     "parameters": int(re.search(r"([\d,]+) parameters", text)[1].replace(",", "")), "done": [tuple(map(float, pair)) for pair in done]}

def between(path, begin, end, lines):
    """Put lines between two marker lines of a page."""
    text = path.read_text()
    path.write_text(text.split(begin)[0] + begin + "\n" + "\n".join(lines) + "\n" + end + text.split(end)[1])

# ---- the baseline's curve ---------------------------------------------------------------------------------------------

def write_curve():
    """The sweep's table into records/baselines/README.md, and the best recipe at each number of tokens into baselines.json."""
    recipes = {}
    for path in BASELINES.glob("*.log"):
        run = read_log(path)
        if run["epochs"] != 1:  # of the seeds' spread, not of the curve
            continue
        recipes.setdefault(re.sub(r"_s\d+$", "", run["name"]), []).append(run)  # a recipe's loss is the mean of its seeds'
    rows, points = [], {}
    for name, runs in recipes.items():
        runs.sort(key=lambda run: run["seed"])
        first, loss = runs[0], sum(run["val_loss"] for run in runs) / len(runs)
        rows.append((first["train_tokens"], loss, name, runs))
        if loss < points.get(first["train_tokens"], {"val_loss": 1e9})["val_loss"]:
            points[first["train_tokens"]] = {"train_tokens": first["train_tokens"], "val_loss": round(loss, 6), "train_flops": first["flops"],
                                             "parameters": first["parameters"], "run": name, "seeds": len(runs)}
    lines = ["| tokens | val loss | seeds | layers x width | parameters | batch | muon_lr | embed_lr, head_lr, scalar_lr | FLOPs | log |", "|" + " --- |" * 10]
    for tokens, loss, name, runs in sorted(rows, key=lambda row: row[:3]):
        seeds = " ".join(f"{run['val_loss']:.4f}" for run in runs) if len(runs) > 1 else "1"
        c, best = runs[0], "**" if points[tokens]["run"] == name else ""
        lines.append(f"| {tokens // 10 ** 6}M | {best}{loss:.4f}{best} | {seeds} "
                     f"| {c['n_layer']} x {c['n_embd']} | {c['parameters']:,} | {c['batch_tokens']:,} | {c['muon_lr']:g} "
                     f"| {c['embed_lr']:g}, {c['head_lr']:g}, {c['scalar_lr']:g} | {c['flops']:.3g} | [{name}](pocket/{runs[0]['name']}.log) |")
    between(HERE / "baselines" / "README.md", "<!-- sweep: python records/sweeps.py --table -->", "<!-- end of sweep -->", lines)
    path = HERE / "baselines.json"
    baselines = json.loads(path.read_text())
    baselines["pocket"]["points"] = [points[tokens] for tokens in sorted(points)]
    path.write_text(json.dumps(baselines, indent=1) + "\n")

# ---- the ablations ----------------------------------------------------------------------------------------------------

def write_ablations():
    """The tables of records/ablations/README.md: each group of runs, and its difference to the group that it is compared with."""
    groups = {}
    for entry in read_plan(ABLATIONS):
        paths = [ABLATIONS / f"{name}.log" for name in entry["runs"]]
        if all(path.exists() for path in paths):
            runs = [read_log(path) for path in paths]
            sums = np.mean([np.load(path.with_suffix(".npy"), allow_pickle=False) for path in paths], axis=0)
            groups[entry["name"]] = entry | {"logs": runs, "scores": (sums, np.array([run["val_loss"] for run in runs]), runs[0]["tokens"])}
    lines, title = [], None
    for name, group in groups.items():
        if group["title"] != title:
            title = group["title"]
            lines += ["", f"**{title}**", "", "| run | options | val loss | seeds | difference | 95% interval | p | FLOPs | log |", "|" + " --- |" * 9]
        sums, losses, _ = group["scores"]
        difference, flops = "| | | ", f"{np.mean([run['flops'] for run in group['logs']]):.3g}"
        if group["control"] in groups:
            pair = (group["scores"], groups[group["control"]]["scores"])
            c = compare_scores(*pair, {"seed_sd": np.mean([scores[1].var(ddof=1) for scores in pair]) ** 0.5})
            difference = f"| {c['mean']:+.4f} to {group['control']} | {c['interval'][0]:+.4f} to {c['interval'][1]:+.4f} | {c['p']:.1g} "
        logs = " ".join(f"[{run['name'].rpartition('_')[2]}](pocket/{run['name']}.log)" for run in group["logs"])
        lines.append(f"| {name} | {group['options']} | {losses.mean():.4f} | {' '.join(f'{loss:.4f}' for loss in losses)} {difference}| {flops} | {logs} |")
    between(HERE / "ablations" / "README.md", "<!-- ablations: python records/sweeps.py --table -->", "<!-- end of ablations -->", lines)
    for name, draw in (("decay", draw_decay), ("epochs", draw_epochs), ("chain", draw_chain)):
        for theme in INK:
            if picture := draw(groups, theme):
                save_picture(HERE / "ablations" / f"{name}_{theme}.svg", picture, "the logs")

def draw_decay(groups, theme):
    """Validation loss over weight decay, a line for each width."""
    lines = {}
    for name, group in groups.items():
        if re.fullmatch(r"plain|(w\d+_)?wd[\d.]+", name):
            c = group["logs"][0]
            lines.setdefault(c["n_embd"], []).append((c["weight_decay"], group["scores"][1].mean()))
    if lines:
        fig, [[ax]] = figure(theme, 1, 4)
        for shade, (width, points) in zip(np.linspace(0.4, 1, len(lines)), sorted(lines.items())):
            points.sort()
            ax.plot(*zip(*points), "o-", color=INK[theme][2], alpha=shade, label=f"width {width}")
            ax.plot(*min(points, key=lambda point: point[1]), "o", markersize=11, color=INK[theme][3])
        ax.set(xscale="log", xlabel="weight decay", ylabel="validation loss (nats per token)")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.legend()
        return fig

def draw_epochs(groups, theme):
    """Validation loss over epochs: of the members of an ensemble, one by one, and of all together."""
    runs = sorted((int(name[6:]), group["logs"][0]["done"]) for name, group in groups.items() if re.fullmatch(r"epochs\d+", name))
    if runs:
        fig, [[ax]] = figure(theme, 1, 4)
        epochs = [n for n, _ in runs]
        ax.plot(epochs, [np.mean([loss for loss, _ in done]) for _, done in runs], "o-", color=INK[theme][3], label="a single model, mean of the members")
        ax.plot(epochs, [done[-1][1] for _, done in runs], "o-", color=INK[theme][2], label=f"{len(runs[0][1])} members together")
        ax.set(xscale="log", xlabel="epochs", ylabel="validation loss (nats per token)")
        ax.set_xticks(epochs, epochs)
        ax.minorticks_off()
        ax.legend()
        return fig

def draw_chain(groups, theme):
    """Validation loss over the number of members, independent ones and a chain: of all together, and of the last one alone."""
    if not {"chain4", "independent4"} - set(groups):
        fig, [[ax]] = figure(theme, 1, 4)
        for name, color in (("independent4", INK[theme][3]), ("chain4", INK[theme][2])):
            done = np.mean([run["done"] for run in groups[name]["logs"]], axis=0)  # [members, (alone, together)]
            members = range(1, len(done) + 1)
            ax.plot(members, done[:, 0], "o:", color=color, label=f"{name[:-1]}: each alone")
            ax.plot(members, done[:, 1], "o-", color=color, label=f"{name[:-1]}: together")
        ax.set(xlabel="members", ylabel="validation loss (nats per token)", xticks=list(members))
        ax.legend()
        return fig

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--table"]):
        print(__doc__)
        sys.exit(2)
    try:
        if not sys.argv[1:]:
            train_missing()
        write_curve()
        write_ablations()
    except Refused as e:
        sys.exit(f"sweeps.py: {e}")
    except KeyboardInterrupt:
        sys.exit("sweeps.py: interrupted; the same command goes on")
