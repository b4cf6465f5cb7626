"""Several processes train the model that one trains, whatever becomes of them on the way."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import harness
import train_gpt as t
from reference import EXACT, FLOAT64_PROCESS, QUICK_END, environment, weights_of
from runs import PLAIN, ROOT, TINY, options

pytestmark = pytest.mark.reference

# Bags, loops and a chain of two, for every kind of parameter. Three layers make 15 matrices: no number of
# ranks divides every bank. Eight rows make a batch.
EVERYTHING = TINY | dict(
    device_tokens=256,
    loss_chunk=200,
    train_tokens=8000,
    members=2,
    distill_alpha=0.4,
    bag_size=2,
    bag_until=0.3,
    loop_first=1,
    loop_last=1,
    loop_times=1,
    mtp_weight=0.3,
    iha=True,
    recall="2,4",
    memory="3",
    ngrams="1,2,4",
    online_lr=0.1,
    ema=0.9,
)
STEPS = 15  # of each member

# AdamW divides by sqrt(v) + 1e-10. Where the gradients of an element cancel, their sum is a rounding of
# 1e-16, which moves the weight by up to 1e-6 of the learning rate in each of some 30 steps.
WEIGHTS = dict(rtol=1e-9, atol=1e-6)

# All of it in float64, and the losses of every step in full precision: on any number of ranks and any
# processor they then differ by no more than EXACT, where in float32 rounding grows to 1e-5 and more.
TRAIN = (
    FLOAT64_PROCESS
    + QUICK_END
    + """
import os, signal, socket, sys
losses_of = open(sys.argv.pop(1), "a")
n_ranks = int(sys.argv.pop(1))
all_reduce = harness.all_reduce

def noted(m, tensor):
    out = all_reduce(m, tensor)
    if m.is_main and tensor.dim() == 1 and len(tensor) > 1:  # of a step: its losses, and two flags
        print(*map(repr, out[:-2].tolist()), file=losses_of, flush=True)
    return out

harness.all_reduce = noted
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
children = []
for rank in map(str, range(n_ranks)):  # forked, so that torch is imported once
    child = os.fork()
    if not child:
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(n_ranks), LOCAL_WORLD_SIZE=str(n_ranks))
        harness.main()
        os._exit(0)
    children.append(child)
signal.signal(signal.SIGTERM, lambda number, frame: [os.kill(child, number) for child in children])
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
)


def torchrun(n_ranks):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]


@pytest.fixture(scope="module")
def train(tiny_data, tmp_path_factory):
    """Start or resume a run of EVERYTHING on so many ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "train.py"
    program.write_text(TRAIN)

    def start(name, n_ranks, resume=False):
        run = folder / name
        words = ["--resume", run] if resume else [*options(**EVERYTHING, data=tiny_data), "--run_dir", run]
        argv = [sys.executable, program, folder / f"{name}.losses", n_ranks, *words, *PLAIN]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return run, subprocess.Popen(list(map(str, argv)), cwd=ROOT, env=environment(), **pipes)

    return start


def losses_of(run):
    return np.array(
        [line.split() for line in run.with_suffix(".losses").read_text().splitlines()], dtype=object
    )


def finish(started):
    run, process = started
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return run


@pytest.fixture(scope="module")
def one(train):
    return finish(train("one", 1))


def assert_same_model(run, one):
    """Losses of every step, every weight, and the score, which is computed by all ranks too."""
    expected = losses_of(one)
    assert len(expected) == 2 * STEPS
    for got, wanted in zip(losses_of(run), expected, strict=True):
        np.testing.assert_allclose(np.array(got, float), np.array(wanted, float), **EXACT)
    weights = weights_of(run)
    for name, w in weights_of(one).items():
        assert w.dtype == torch.float64
        torch.testing.assert_close(weights[name], w, **WEIGHTS, msg=name)
    # the score's NLL of one member travels as float32
    np.testing.assert_allclose(np.load(run / "val_nll.npy"), np.load(one / "val_nll.npy"), **EXACT)


def test_two_ranks_train_the_same_model(train, one):
    run = finish(train("two", 2))
    assert_same_model(run, one)
    a, b = (json.loads((r / "record.json").read_text()) for r in (one, run))
    assert (a["ranks"], b["ranks"]) == (1, 2)
    assert all(a[name] == b[name] for name in ("tokens_seen", "train_flops", "parameters", "steps"))


@pytest.mark.parametrize("numbers", [(8, 4, 1), (1, 2, 4)])
def test_stopped_and_continued_on_another_number_of_ranks(train, one, numbers):
    """A checkpoint in the first member is continued by another number of ranks, theirs in the second by a
    third. Of the first stop's checkpoint the last rank's file is damaged: all go back to the one before."""
    name = "_".join(map(str, numbers))
    for i, until in enumerate(("\nmember 1 step 7/", "\nmember 2 step 4/")):
        n_ranks = numbers[i]
        run, process = train(name, n_ranks, resume=i > 0)
        log = run / "log.txt"
        limit = time.monotonic() + 300
        while not (log.exists() and until in log.read_text()):
            assert process.poll() is None and time.monotonic() < limit, process.communicate()
            time.sleep(0.001)
        process.terminate()  # passed on to the ranks
        _, err = process.communicate(timeout=120)
        assert f"; {n_ranks} rank(s)" in log.read_text() and not (run / "record.json").exists(), err
        newest = harness.read_index(harness.saved(run, harness.INDEX_FILE)[-1])
        assert len(newest["shards"]) == n_ranks
        if i == 0:
            assert newest["progress"]["step"] > 5
            damaged = run / newest["shards"][-1]
            damaged.write_bytes(damaged.read_bytes()[:-1])
            lines = run.with_suffix(".losses").read_text().splitlines(keepends=True)
            run.with_suffix(".losses").write_text("".join(lines[:5]))
    finish(train(name, numbers[-1], resume=True))
    resumed = re.findall(r"^resumed at step (\d+) of model (\d+)", log.read_text(), re.MULTILINE)
    assert len(resumed) == 2 and resumed[0] == ("5", "1")
    assert json.loads((run / "record.json").read_text())["ranks"] == max(numbers)
    assert_same_model(run, one)


FULL = (
    """
import errno, os
import harness
import train_gpt as t
"""
    + QUICK_END
    + """
write_tensors = harness.write_tensors

def full(path, content):
    if path.name == "state-0000010.1of2":
        with harness.writing(path):
            raise OSError(errno.ENOSPC, "No space left on device")
    return write_tensors(path, content)

harness.write_tensors = full
harness.main()
"""
)


def test_the_disk_of_one_rank_is_full(tiny_data, tmp_path):
    """All ranks stop, the first says why, and the checkpoint before is what is left."""
    run = tmp_path / "run"
    (tmp_path / "full.py").write_text(FULL)
    recipe = options(**TINY | dict(train_tokens=8000), data=tiny_data)
    argv = [*torchrun(2), str(tmp_path / "full.py"), *recipe, "--run_dir", str(run), *PLAIN]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert len(said) == 1 and "1of2: cannot be written (No space left" in said[0], done.stderr
    assert [harness.number_of(path) for path in harness.saved(run, harness.INDEX_FILE)] == [5]
    assert all(harness.is_whole(path) for path in harness.saved(run, harness.SHARD_FILE))


LOST = (
    """
import os, signal
import harness
import train_gpt as t
"""
    + QUICK_END
    + """
step = t.MuonAdamW.step

def lost(self, number, *args):
    is_second = os.environ["RANK"] == "1"
    if number == 7 and is_second and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *args)

t.MuonAdamW.step = lost
harness.main()
"""
)


def test_a_lost_rank(tiny_data, tmp_path):
    """The others stop with a line that says so; torchrun starts the same command again, which continues from
    the last checkpoint with bit-identical results."""
    lost = tmp_path / "lost"
    undisturbed = tmp_path / "undisturbed"
    (tmp_path / "lost.py").write_text(LOST)
    # Otherwise a rank can meet the lost one's address (pytorch issue 135712).
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    recipe = options(**TINY | dict(train_tokens=8000), data=tiny_data)
    restarting = [*torchrun(2), "--max-restarts=1", str(tmp_path / "lost.py")]
    for run, command in ((lost, restarting), (undisturbed, [*torchrun(2), "train_gpt.py"])):
        argv = [*command, *recipe, "--run_dir", str(run), *PLAIN]
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if run == lost:
            assert "lost the connection to another rank" in done.stderr and "Traceback" not in done.stderr
    assert "resumed at step 5 of model 1" in (lost / "log.txt").read_text()
    weights = weights_of(lost)
    for name, w in weights_of(undisturbed).items():
        assert torch.equal(weights[name], w), name


def test_the_tiny_track_cut_down(tiny_data, tmp_path):
    """The preset of 8xH100 at a size for a CPU: bags, loops, averages, two targets, scoring; on two ranks,
    as it would run there. What `kill` sends to torchrun stops both, and they go on."""
    of_the_preset = {
        name: t.PRESETS["tiny"][name] for name in ("ema", "mtp_weight", "iha", "wd_points", "dropout")
    }
    small = TINY | of_the_preset | dict(track="tiny", n_layer=6, train_tokens=8000)
    small |= dict(bag_size=4, bag_until=0.2, loop_first=2, loop_last=3, loop_times=1)
    argv = options(**small, data=tiny_data)
    run = tmp_path / "run"
    command = [*torchrun(2), "train_gpt.py", *argv, "--run_dir", str(run), *PLAIN]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    log = run / "log.txt"
    limit = time.monotonic() + 300
    while not (log.exists() and "\nstep 2/" in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert len(harness.saved(run, harness.INDEX_FILE)) == 1
    resume = [*torchrun(2), "train_gpt.py", "--resume", str(run)]
    done = subprocess.run(resume, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "record.json").read_text())
    stored = json.loads((run / "config.json").read_text())["config"]
    assert stored["track"] == "tiny" and stored.items() >= of_the_preset.items()
    assert record["track"] == "tiny" and record["ranks"] == 2
    assert record["tokens_seen"] == 512 * (15 + 3 * 3)  # 3 of the 15 steps see bags of four
    assert record["val_loss"] < np.log(257) - 0.3
