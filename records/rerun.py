"""
Trains a record's own script again, as a stranger's program inside walls, and scores it.

    python records/leaderboard.py rerun RECORD ... [--seconds S] [--keep FOLDER]

The script gets a folder with train.bin cut to the budget, and a decoy in place of the validation stream: text
from beyond the budget. So it cannot learn from validation, nor know what it will be scored on. Then the
referee scores the true validation stream with the fresh weights, counts FLOPs, audits the scorer at full
size, and writes what came out into the record, as rerun.json. With --keep, the training stays in FOLDER:
the same command goes on with it where it was broken off, and scores and audits it again once it is finished.
"""

import json
import math
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import seed_spread
from reading import ROOT, Refused, Step, read_json, read_log, read_tracks, today, write_json, write_shard
from smoke import show_indented
from walls import missing, words
from workshop import Workshop

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
# A sample ends where a document does. Both trainings' samples are to cost the same, so they take what is
# likeliest, which is hardly ever the end of a document.
torch.multinomial = lambda p, *args, **kwargs: p.argmax(-1, keepdim=True)
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
# sees, three times that for training. PyTorch counts what is multiplied, with what attention then masks. In
# reruns of three records that was 1.17 to 1.18 times the claim, the optimizer's products taken off.
COUNTED_PER_CLAIMED = 1.3

# Muon multiplies, too: five iterations of three products, at most 30 FLOPs per weight and width in a step.
# With small batches that is as much as the model. None may take more, or it could be a second model.
OPTIMIZER_FLOPS = 30

# Another machine rounds differently, and after thousands of steps that is like another seed: the difference
# of two runs has sqrt(2) times the seeds' spread, and exceeds three times that once in 400 reruns.
SPREADS = 3.0 * math.sqrt(2)


def count_flops(shop, steps):
    """(FLOPs of training for so many steps, of scoring a token, of one forward pass of it), as counted.

    Two short trainings differ in their steps alone, and two short streams in their tokens, so that what comes
    once falls out. A forward pass is a third of training.
    """
    data, _ = shop.write_data("short", 2000)
    total = {}
    seen = {}
    for n in (FEW_STEPS, MORE_STEPS):
        print(f"  counting the FLOPs of {n} steps of each model ...", flush=True)
        run = shop.work / f"steps_{n}"
        shutil.rmtree(run, ignore_errors=True)
        options = shop.options(data, evals=1, probes=1, save_every=10**6)
        options += ["--run_dir", str(run), "--steps", str(n), "--device", "cpu", "--compile", "off"]
        total[n] = count(shop, options)
        seen[n] = len(read_log(run / "log.txt").of(Step))
    per_step = (total[MORE_STEPS] - total[FEW_STEPS]) / (seen[MORE_STEPS] - seen[FEW_STEPS])
    tokens = shop.log.config.get("batch_tokens")
    seq_len = shop.log.config.get("seq_len", 1024)
    scoring = []
    for n in (SHORT_STREAM * seq_len, LONG_STREAM * seq_len):
        print(f"  counting the FLOPs of scoring {n:,} tokens ...", flush=True)
        shard = shop.given / f"stream_{n}.bin"
        write_shard(shard, shop.budget[:n])
        nll = shop.work / f"nll_{os.urandom(4).hex()}.npy"
        options = ["--score", str(run), "--tokens", str(shard), "--nll", str(nll)]
        scoring.append(count(shop, [*options, "--device", "cpu"]))
    per_token = (scoring[1] - scoring[0]) / ((LONG_STREAM - SHORT_STREAM) * seq_len)
    forward = None
    if tokens:
        forward = per_step / tokens / 3
    return per_step * steps, per_token, forward


def count(shop, options):
    """FLOPs of a workshop's script with these options, as PyTorch counts them."""
    out = shop.work / f"flops_{os.urandom(4).hex()}"
    shop.run("counting FLOPs", [sys.executable, "-c", COUNTER, str(out), str(shop.script), *options])
    return float(out.read_text())


def rerun(folder, seconds, keep=None, root=ROOT):
    """Train and score a record again. Writes rerun.json into its folder. Returns the faults.

    keep: a folder in which the training stays, under the record's track and name, and from which it goes on.
    """
    record = read_json(folder / "record.json")
    run = record["runs"][0]
    tracks = read_tracks(root)
    rules = tracks["tracks"][run["track"]]
    name = os.path.relpath(folder, root)
    if "max_seconds" in rules:
        print(f"{name}: not trained again, {run['track']} has a clock and needs its machine", flush=True)
        return []
    print(f"{name}: running the submitted code; {words()}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        place = keep.resolve() / run["track"] / folder.name if keep else Path(tmp)
        shop = Workshop(place, read_log(folder / run["log"]), rules["dataset"], tracks, root, seconds)
        data, unseen = shop.write_data("data", shop.dataset["val_tokens"])
        fresh = shop.work / "run"
        trained = train_again(shop, data, fresh, place / "trained.json", run)
        print("  auditing its scores ...", flush=True)
        audit = shop.audit(fresh, unseen, show_indented)
        if audit.nll is None:
            raise Refused(f"{name}: its scorer breaks the contract: {audit.faults[-1]}")
        loss = float(audit.nll.sum() / (len(shop.val) - 1))
    result = {
        "date": today(),
        "machine": machine(),
        "walls_missing": list(missing()),
        "val_loss": loss,
        "claimed": run["val_loss"],
        "limit": loss_limit(record, shop.dataset),
        "seconds": trained["seconds"],
        "train_flops": trained["train_flops"],
        "claimed_train_flops": run["train_flops"],
        "train_flops_limit": train_flops_limit(run, shop.log.config),
        "score_flops_per_token": trained["score_flops_per_token"],
        "forward_flops_per_token": trained["forward_flops_per_token"],
        "audited_tokens": len(shop.val),  # of the longest streams in the audit
    }
    result["faults"] = [*audit.faults, *judge_rerun(result, rules)]
    write_json(folder / "rerun.json", result)
    print(json.dumps(result, indent=1))
    if not result["faults"]:
        print(f"{name}: reproduced, {loss:.6f} where {run['val_loss']:.6f} is claimed", flush=True)
    return [f"{name}: {fault}" for fault in result["faults"]]


def train_again(shop, data, fresh, kept, run):
    """Count the FLOPs of a record's recipe and train it into the folder `fresh`, or do what the file `kept`
    leaves to do. Returns what that file says in the end: FLOPs, and the seconds of the training."""
    done = {}
    if kept.exists():
        done = read_json(kept)
        if done["source_sha256"] != run["source_sha256"]:
            raise Refused(f"{kept}: is of another record's script; name another folder with --keep")
        print(f"  going on from {kept}", flush=True)
    if "train_flops" not in done:
        flops, score_flops, forward = count_flops(shop, run["steps"])
        done = {
            "source_sha256": run["source_sha256"],
            "train_flops": flops,
            "score_flops_per_token": score_flops,
            "forward_flops_per_token": forward,
        }
        write_json(kept, done)
    if "seconds" not in done:
        print("  training its recipe again ...", flush=True)
        options = [*shop.options(data), "--run_dir", str(fresh), "--device", "cpu"]
        seconds = 0.0
        if (fresh / "config.json").exists():
            # A training that was broken off goes on. So far, it took no longer than from its first file to
            # its last.
            options = ["--resume", str(fresh)]
            written = [path.stat().st_mtime for path in fresh.iterdir()]
            seconds = max(written) - min(written)
        seconds += shop.run("training its recipe again", [sys.executable, str(shop.script), *options])
        done["seconds"] = seconds
        write_json(kept, done)
    return done


def loss_limit(record, dataset):
    """How far the loss of a rerun may be from the claimed one, in nats; None where no spread is known."""
    losses = np.array([run["val_loss"] for run in record["runs"]])
    return SPREADS * seed_spread(losses, dataset).sd or None


def train_flops_limit(run, config):
    """The most FLOPs that a run's training may take as PyTorch counts them, by its claims and its config."""
    claimed = run["train_flops"]
    width = config.get("n_embd")
    if type(width) is int:
        of_a_step = OPTIMIZER_FLOPS * width * run["parameters"] / max(1, run["members"])
        optimizer = min(claimed, run["steps"] * of_a_step)
    else:
        optimizer = claimed
    return COUNTED_PER_CLAIMED * claimed + optimizer


def judge_rerun(result, rules):
    """What is wrong with a record by its rerun, a line for each fault."""
    faults = []
    loss = result["val_loss"]
    difference = loss - result["claimed"]
    if result["limit"] is not None and abs(difference) > result["limit"]:
        explained = f"seeds and rounding explain {result['limit']:.4f}"
        faults.append(f"the loss is {loss:.4f}, {difference:+.4f} from the claimed one; {explained}")
    counted = result["train_flops"]
    most = result["train_flops_limit"]
    if counted > most:
        claimed = f"{result['claimed_train_flops']:.4g} are claimed, which allows {most:.4g} as counted"
        faults.append(f"training takes {counted:.4g} FLOPs, masked attention included; {claimed}")
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
