"""
Does a record's script leak? leaderboard.py verify --smoke trains it at toy size, and audits that.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import audit_run, run_limited
from reading import ROOT, read_json, read_log, split_log

# Tokens of the longest streams that verify --smoke scores.
STREAM = 100_000

# A recipe at toy size has these values, as far as its script has these options (probes and probe_tokens are
# older names). A vocab_size and a bos_id of 0 are taken from the data. For so small a model a second thread
# gains nothing, and beside another process it costs much.
TOY = dict(
    n_embd=64,
    n_head=2,
    mlp_hidden=128,
    train_tokens=100_000,
    epochs=1,
    evals=1,
    eval_windows=2,
    probes=1,
    probe_tokens=2000,
    vocab_size=0,
    bos_id=0,
    cpu_threads=1,
    dtype="fp32",
)

# It has at most these values.
TOY_LIMITS = dict(seq_len=256, window_short=64, n_layer=6, members=2, chains=1, cycles=2)


def toy_options(config, data=ROOT / "data" / "pocket"):
    """Options that train a record's recipe at toy size on these data: its own config, made small."""
    small = {}
    for name, value in config.items():
        if name in TOY_LIMITS:
            small[name] = min(value, TOY_LIMITS[name])
        elif name == "data":
            small[name] = data
        else:
            small[name] = TOY.get(name, value)
    # Few tokens for a step, so that there are enough steps, and many for a pass when it is scored.
    for name, rows in (("batch_tokens", 4), ("device_tokens", 32)):
        if name in config:
            small[name] = rows * small.get("seq_len", 256)
    # A range of layers remains one.
    for name in ("loop_first", "loop_last"):
        if name in config:
            small[name] = config[name] * small["n_layer"] // config["n_layer"]
    # The student is as small as the others.
    if config.get("student"):
        made_small = {*TOY, *TOY_LIMITS, "data", "batch_tokens", "device_tokens", "loop_first", "loop_last"}
        changes = config["student"].split(",")
        kept = [change for change in changes if change.partition("=")[0] not in made_small]
        small["student"] = ",".join(kept)
    return option_words(small)


def option_words(config):
    """A config as options of its script."""
    words = []
    for name, value in config.items():
        if isinstance(value, bool):
            value = int(value)
        words += [f"--{name}", str(value)]
    return words


def smoke(folder, seconds, root=ROOT):
    """Train the script in a record's log for a few steps at toy size, and audit that. Returns the faults."""
    name = os.path.relpath(folder, root)
    print(f"{name}: running the submitted code, at toy size", flush=True)
    data = root / "data" / "pocket"
    if not (data / "meta.json").exists():
        subprocess.run([sys.executable, str(root / "data" / "prepare.py"), "pocket"], check=True)
    log = read_log(folder / read_json(folder / "record.json")["runs"][0]["log"])
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / Path(log.script).name
        path.write_bytes(log.source)
        run = Path(tmp) / "run"
        command = [sys.executable, str(path), *toy_options(log.config, data), "--run_dir", str(run)]
        command += ["--steps", "12", "--device", "cpu", "--compile", "off"]
        status, last = run_limited(command, seconds)
        if status is None:
            return [f"{name}: its script does not train at toy size (over {seconds} s: {last})"]
        if status != 0 or not (run / "record.json").exists():
            return [f"{name}: its script does not train at toy size (exit status {status}: {last})"]
        # What is audited is the script in this new log.
        try:
            trained, _, _ = split_log((run / "log.txt").read_bytes())
        except (OSError, ValueError):
            trained = None
        if trained != log.source:
            return [f"{name}: its script writes another script into its log"]
        rng = np.random.default_rng()
        faults = audit_run(run, seconds, rng, STREAM, "pocket", show_indented, root)
        return [f"{name}: {fault}" for fault in faults]


def show_indented(line):
    print(f"  {line}", flush=True)
