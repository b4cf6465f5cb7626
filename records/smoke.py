"""
Does a record's script leak? leaderboard.py verify --smoke trains it at toy size, and audits that.
"""

import math
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import ROOT, Refused, read_json, read_log, read_tracks
from walls import words
from workshop import Workshop, option_words

# Tokens of the stream that stands in for validation while the script trains.
DECOY = 20_000

# A recipe at toy size has these values, as far as its script has these options (probes and probe_tokens are
# older names). A vocab_size and a bos_id of 0 are taken from the data. For so small a model a second thread
# gains nothing, and beside another process it costs much.
TOY = dict(
    mlp_hidden=64,
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


def toy_options(config, data):
    """Options that train a record's recipe at toy size on these data: its own config, made small."""
    small = {}
    for name, value in config.items():
        if name in TOY_LIMITS:
            small[name] = min(value, TOY_LIMITS[name])
        elif name == "data":
            small[name] = data
        else:
            small[name] = TOY.get(name, value)
    # A width that the recipe's heads divide, for some scripts have other options that depend on their number.
    step = 4 * config.get("n_head", 2)
    if "n_embd" in config:
        small["n_embd"] = step * math.ceil(32 / step)
    # Few tokens for a step, so that there are enough steps, and many for a pass when it is scored.
    for name, rows in (("batch_tokens", 4), ("device_tokens", 32)):
        if name in config:
            small[name] = rows * small.get("seq_len", 256)
    # Windows that overlap still do so, by the same share.
    if config.get("score_stride"):
        seq_len = config["seq_len"]
        small["score_stride"] = max(1, config["score_stride"] * small["seq_len"] // seq_len)
    # A range of layers remains one.
    for name in ("loop_first", "loop_last"):
        if name in config:
            small[name] = config[name] * small["n_layer"] // config["n_layer"]
    # The student is as small as the others.
    if config.get("student"):
        made_small = {
            *TOY,
            *TOY_LIMITS,
            "data",
            "n_embd",
            "n_head",
            "batch_tokens",
            "device_tokens",
            "loop_first",
            "loop_last",
        }
        changes = config["student"].split(",")
        kept = [change for change in changes if change.partition("=")[0] not in made_small]
        small["student"] = ",".join(kept)
    return option_words(small)


def smoke(folder, seconds, root=ROOT):
    """Train the script in a record's log for a few steps at toy size, and audit that. Returns the faults."""
    name = os.path.relpath(folder, root)
    print(f"{name}: running the submitted code at toy size; {words()}", flush=True)
    log = read_log(folder / read_json(folder / "record.json")["runs"][0]["log"])
    with tempfile.TemporaryDirectory() as tmp:
        shop = Workshop(tmp, log, "pocket", read_tracks(root), root, seconds)
        data, unseen = shop.write_data("data", DECOY)
        run = shop.work / "run"
        try:
            options = toy_options(log.config, data)
        except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError) as e:
            # A config is a stranger's, and anything may stand in it.
            return [f"{name}: its config cannot be made small ({type(e).__name__}: {e})"]
        options += ["--run_dir", str(run), "--steps", "12", "--device", "cpu", "--compile", "off"]
        try:
            shop.run("its script at toy size", [sys.executable, str(shop.script), *options])
        except Refused as e:
            return [f"{name}: {e}"]
        faults = shop.audit(run, unseen, show_indented).faults
        return [f"{name}: {fault}" for fault in faults]


def show_indented(line):
    print(f"  {line}", flush=True)
