"""
The runs behind records/baselines.json: how low the plain recipe gets on more and more training tokens.

    python records/baselines.py            train every run of records/baselines/pocket/plan.txt that is not finished (hours)
    python records/baselines.py --table    only read the logs, write the table and the curve

Each line of plan.txt is a run: its name, a colon, the options that it gives to train_gpt.py. Killed at any time, this goes on
where it stopped; lines added to the plan while it works are found. A run's log is kept without the script's source, whose
sha256 stands in its first line, and the source itself once, in the record that submits the baseline at the budget.
"""
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
            how = ["--resume", str(run)] if (run / "config.json").exists() else ["--run_dir", str(run), *options]
            print(f"==== {name}: {' '.join(how)}", flush=True)
            subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *how], cwd=ROOT, check=True)
        head, _, rest = (run / "log.txt").read_text().partition("\n")
        (LOGS / f"{name}.log").write_text(head + rest[rest.index("\n==== end of source"):])

train_missing()
