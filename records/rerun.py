"""
Trains a record's own script again, as a stranger's program inside walls, and scores it.

    python records/leaderboard.py rerun RECORD [--seconds S]

The script gets a folder with train.bin cut to the budget, and a decoy in place of the validation stream: text
from beyond the budget. So it cannot learn from validation, nor know what it will be scored on. Then the
referee scores the true validation stream with the fresh weights, counts FLOPs, audits the scorer at full
size, and writes what came out into the record, as rerun.json.
"""

import datetime
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import Audit, Broken, Scorer, run_limited
from reading import (
    ROOT,
    Refused,
    Step,
    expected_hashes,
    read_json,
    read_log,
    read_shard,
    read_tracks,
    write_json,
    write_shard,
)
from smoke import option_words, show_indented
from walls import missing, walled, words

# Runs a script under PyTorch's FLOP counter: argv is where to write the total, the script, and its options. A
# CPU's attention kernel has no formula of its own in PyTorch; its is that of any attention.
COUNTER = """
import runpy, sys
import torch
from torch.utils import flop_counter

def forward_flops(q, k, v, *args, out_shape=None, **kwargs):
    return flop_counter.sdpa_flop_count(q, k, v)

def backward_flops(grad, q, k, v, *args, out_shape=None, **kwargs):
    return flop_counter.sdpa_backward_flop_count(grad, q, k, v)

out, script, *options = sys.argv[1:]
sys.argv = [script, *options]
kernel = "_scaled_dot_product_flash_attention_for_cpu"
formulas = {
    getattr(torch.ops.aten, kernel): forward_flops,
    getattr(torch.ops.aten, kernel + "_backward"): backward_flops,
}
counter = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)
try:
    with counter:
        runpy.run_path(script, run_name="__main__")
finally:
    with open(out, "w") as f:
        f.write(str(counter.get_total_flops()))
"""

# Steps of the two short trainings whose difference is the cost of a step. Phases keep their proportions.
FEW_STEPS = 10
MORE_STEPS = 30

# Tokens of the streams whose difference is the cost of scoring: both have full windows.
SHORT_STREAM = 8
LONG_STREAM = 24

# A script claims the FLOPs of its model, by formula: two per weight and position, attention over what a token
# sees, three times that for training. PyTorch counts what is multiplied, with the optimizer's products and
# what masked attention throws away. That is 1.34 times as much for the standing record of pocket
# (its rerun.json). More than this many times the claim is another model than the claimed one.
COUNTED_PER_CLAIMED = 1.4

# Another machine rounds differently, and after thousands of steps that is like another seed: the difference
# of two runs has sqrt(2) times the seeds' spread, and exceeds three times that once in 400 reruns.
SPREADS = 3.0 * math.sqrt(2)


class Workshop:
    """A folder in which a record's script runs inside walls, with the data that it may see."""

    def __init__(self, folder, record, root, seconds):
        self.folder = Path(folder)
        self.seconds = seconds
        self.root = root
        run = record["runs"][0]
        self.record_folder = record["folder"]
        self.log = read_log(self.record_folder / run["log"])
        self.script = self.folder / "script.py"
        self.script.write_bytes(self.log.source)
        tracks = read_tracks(root)
        self.rules = tracks["tracks"][run["track"]]
        self.dataset = tracks["datasets"][self.rules["dataset"]]
        self.data = root / "data" / self.rules["dataset"]
        self.hashes = expected_hashes(root, tracks, self.rules["dataset"])

    def write_data(self, name, val_tokens=None):
        """A data folder with train.bin cut to the budget, and text from beyond it as val.bin."""
        folder = self.folder / name
        folder.mkdir()
        budget = self.dataset["train_tokens"]
        train = read_shard(self.data / "train.bin", self.hashes["train.bin"])
        n = val_tokens or self.dataset["val_tokens"]
        if len(train) < budget + n:
            raise Refused(f"{self.data / 'train.bin'}: holds too little beyond the budget for a decoy")
        # A decoy begins with a document.
        begins = np.flatnonzero(train[budget : len(train) - n] == self.dataset["bos_id"])
        start = budget + int(begins[0]) if len(begins) else budget
        shards = {"train.bin": train[:budget], "val.bin": train[start : start + n]}
        meta = read_json(self.data / "meta.json")
        for shard, tokens in shards.items():
            write_shard(folder / shard, tokens)
            meta["sha256"][shard] = hashlib.sha256((folder / shard).read_bytes()).hexdigest()
        write_json(folder / "meta.json", meta)
        return folder

    def options(self, data, **changes):
        """The record's own recipe as options of its script."""
        config = self.log.config | {"data": data, "dtype": "auto"} | changes
        return option_words({name: config[name] for name in self.log.config})

    def run(self, what, command):
        """Run a command inside the walls. Refused where it fails. Returns the seconds that it took."""
        print(f"  {what} ...", flush=True)
        began = time.monotonic()
        status, last = run_limited(walled(command, self.folder, [self.root / "data"]), self.seconds)
        if status is None:
            raise Refused(f"{what}: took longer than {self.seconds:,} s ({last})")
        if status != 0:
            raise Refused(f"{what}: exit status {status} ({last})")
        return time.monotonic() - began

    def count(self, what, options):
        """FLOPs of the script with these options, uncompiled, as PyTorch counts them."""
        out = self.folder / f"flops_{os.urandom(4).hex()}"
        self.run(what, [sys.executable, "-c", COUNTER, str(out), str(self.script), *options])
        return float(out.read_text())

    def score_command(self, run):
        score = [sys.executable, str(self.script), "--score", str(run)]
        score += ["--tokens", "{tokens}", "--nll", "{nll}"]
        return walled(score, self.folder, [self.root / "data"])


def count_flops(shop, steps):
    """(FLOPs of training for so many steps, of scoring a token, of one forward pass of it), as counted.

    Two short trainings differ in their steps alone, and two short streams in their tokens, so that what comes
    once falls out. A forward pass is a third of training.
    """
    data = shop.write_data("short", 2000)
    total = {}
    seen = {}
    for n in (FEW_STEPS, MORE_STEPS):
        run = shop.folder / f"steps_{n}"
        options = shop.options(data, evals=1, probes=1, save_every=10**6)
        options += ["--run_dir", str(run), "--steps", str(n), "--device", "cpu", "--compile", "off"]
        total[n] = shop.count(f"counting the FLOPs of {n} steps of each model", options)
        seen[n] = len(read_log(run / "log.txt").of(Step))
    per_step = (total[MORE_STEPS] - total[FEW_STEPS]) / (seen[MORE_STEPS] - seen[FEW_STEPS])
    tokens = shop.log.config.get("batch_tokens")
    seq_len = shop.log.config.get("seq_len", 1024)
    text = read_shard(data / "train.bin")
    scoring = []
    for n in (SHORT_STREAM * seq_len, LONG_STREAM * seq_len):
        shard = shop.folder / f"stream_{n}.bin"
        write_shard(shard, text[:n])
        score = ["--score", str(run), "--tokens", str(shard), "--nll", str(shop.folder / "counted.npy")]
        scoring.append(shop.count(f"counting the FLOPs of scoring {n:,} tokens", [*score, "--device", "cpu"]))
    per_token = (scoring[1] - scoring[0]) / ((LONG_STREAM - SHORT_STREAM) * seq_len)
    forward = None
    if tokens:
        forward = per_step / tokens / 3
    return per_step * steps, per_token, forward


def rerun(folder, seconds, root=ROOT):
    """Train and score a record again. Writes rerun.json into its folder. Returns the faults."""
    record = read_json(folder / "record.json")
    run = record["runs"][0]
    name = os.path.relpath(folder, root)
    print(f"{name}: running the submitted code; {words()}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        shop = Workshop(tmp, record | {"folder": folder}, root, seconds)
        flops, score_flops, forward = count_flops(shop, run["steps"])
        fresh = shop.folder / "run"
        options = [*shop.options(shop.write_data("data")), "--run_dir", str(fresh), "--device", "cpu"]
        took = shop.run("training its recipe again", [sys.executable, str(shop.script), *options])
        val = read_shard(shop.data / "val.bin", shop.hashes["val.bin"])
        print("  scoring the validation stream ...", flush=True)
        command = shop.score_command(fresh)
        try:
            nll = Scorer(command, shop.folder, seconds)(val)
        except Broken as e:
            raise Refused(f"{name}: its scorer breaks the contract: {e}") from None
        audit = Audit(
            Scorer(command, shop.folder, seconds),
            val,
            shop.dataset["vocab_size"],
            np.random.default_rng(),
            show=show_indented,
        )
        faults = audit.run()
        loss = float(nll.sum() / (len(val) - 1))
    limit = SPREADS * shop.dataset.get("seed_sd", 0.0)
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "walls_missing": list(missing()),
        "val_loss": loss,
        "claimed": run["val_loss"],
        "limit": limit,
        "seconds": took,
        "train_flops": flops,
        "claimed_train_flops": run["train_flops"],
        "score_flops_per_token": score_flops,
        "forward_flops_per_token": forward,
        "audited_tokens": len(val),  # of the longest streams in the audit
    }
    result["faults"] = [*faults, *judge_rerun(result, shop.rules)]
    write_json(folder / "rerun.json", result)
    print(json.dumps(result, indent=1))
    return [f"{name}: {fault}" for fault in result["faults"]]


def judge_rerun(result, rules):
    """What is wrong with a record by its rerun, a line for each fault."""
    faults = []
    loss = result["val_loss"]
    difference = loss - result["claimed"]
    if abs(difference) > result["limit"]:
        explained = f"seeds and rounding explain {result['limit']:.4f}"
        faults.append(f"the loss is {loss:.4f}, {difference:+.4f} from the claimed one; {explained}")
    counted = result["train_flops"]
    claimed = result["claimed_train_flops"]
    if counted > COUNTED_PER_CLAIMED * claimed:
        faults.append(f"training takes {counted:.4g} FLOPs as counted, {claimed:.4g} are claimed")
    cap = rules.get("max_score_passes", math.inf)
    if result["forward_flops_per_token"]:
        passes = result["score_flops_per_token"] / result["forward_flops_per_token"]
        if passes > cap:
            faults.append(f"scoring a token takes {passes:.1f} forward passes, {cap} are allowed")
    return faults


def machine():
    """The referee's machine, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.exists():
        names = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def reproduction(folder):
    """The board's cell about a record's rerun."""
    path = folder / "rerun.json"
    if not path.exists():
        return "not yet"
    result = read_json(path)
    verdict = "no" if result["faults"] else "yes"
    audited = "audited" if result["audited_tokens"] else "not audited"
    return f"{verdict}: {result['val_loss']:.4f}, {audited}, {result['date']}, {result['machine']}"
