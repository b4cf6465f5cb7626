"""
The runs behind records/baselines.json: how low the plain recipe gets on more and more training tokens.

    python records/baselines.py            train every run of records/baselines/pocket/plan.txt that is not finished (hours)
    python records/baselines.py --table    only read the logs, write the table and the curve

Each line of plan.txt is a run: its name, a colon, the options that it gives to train_gpt.py. Killed at any time, this goes on
where it stopped; lines added to the plan while it works are found. A run's log is kept without the script's source; its first
line has the sha256 of the train_gpt.py that ran, as the repository's history holds it.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, LOGS = HERE.parent, HERE / "baselines" / "pocket"

def read_plan():
    """Name -> options of every run, in order."""
    lines = [line.split("#")[0].strip() for line in (LOGS / "plan.txt").read_text().splitlines()]
    return {name.strip(): options.split() for name, options in (line.split(":", 1) for line in lines if line)}

def train_missing():
    """Train what has no log yet, one run after the other."""
    while missing := [(name, options) for name, options in read_plan().items() if not (LOGS / f"{name}.log").exists()]:
        name, options = missing[0]
        run = ROOT / "runs" / f"baseline_{name}"
        if not (run / "record.json").exists():
            where = os.path.relpath(run, ROOT)  # it stands in the log
            how = ["--resume", where] if (run / "config.json").exists() else ["--run_dir", where, *options]
            print(f"==== {name}: {' '.join(how)}", flush=True)
            subprocess.run([sys.executable, "train_gpt.py", *how], cwd=ROOT, check=True)
        head, _, rest = (run / "log.txt").read_text().partition("\n")
        (LOGS / f"{name}.log").write_text(head + rest[rest.index("\n==== end of source"):])

def read_log(path):
    """What a finished run's log says of it."""
    text = path.read_text()
    config = json.loads(re.search(r"^config (.*)$", text, re.MULTILINE)[1])
    flops = re.search(r"^trained for .* seen, ([\d.e+]+) FLOPs", text, re.MULTILINE)[1]
    return config | {"name": path.stem, "val_loss": float(re.search(r"^val_loss ([\d.]+) nats", text, re.MULTILINE)[1]), "flops": float(flops),
                     "parameters": int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))}

def write_curve():
    """The sweep's table into records/baselines/README.md, and the best recipe at each number of tokens into baselines.json."""
    recipes = {}
    for path in LOGS.glob("*.log"):
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
    page, begin, end = HERE / "baselines" / "README.md", "<!-- sweep: python records/baselines.py --table -->", "<!-- end of sweep -->"
    text = page.read_text()
    page.write_text(text.split(begin)[0] + begin + "\n" + "\n".join(lines) + "\n" + end + text.split(end)[1])
    path = HERE / "baselines.json"
    baselines = json.loads(path.read_text())
    baselines["pocket"]["points"] = [points[tokens] for tokens in sorted(points)]
    path.write_text(json.dumps(baselines, indent=1) + "\n")

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--table"]):
        print(__doc__)
        sys.exit(2)
    if not sys.argv[1:]:
        train_missing()
    write_curve()
