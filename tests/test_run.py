"""Whole runs through the command line: the contract of --score, and everything that may go wrong on the way."""
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train_gpt as t
from conftest import PLAIN, ROOT, TINY, options, tokens_of


def start(tiny_data, run, *argv, recipe=TINY, **kwargs):
    """A run in a process of its own."""
    return subprocess.Popen([sys.executable, "train_gpt.py", *options(**recipe, data=tiny_data), "--run_dir", str(run), *PLAIN, *argv],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def resume(run, *argv):
    return subprocess.run([sys.executable, "train_gpt.py", "--resume", str(run), *PLAIN, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


def step_lines(run):
    """Step lines of the log, without the parts that are times."""
    lines = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith(("step ", "probe ", "val_loss ", "member ", "model "))]
    return [line.split(" tok/s")[0] for line in lines]


def weights(run):
    """Of all models of a run, under numbered names."""
    return {f"{i} {name}": w for i, path in enumerate(t.saved(run, "weights")) for name, w in t.load_tensors(path).items()}


def assert_same_end(run, undisturbed):
    """Bit for bit: weights, NLL of every block, every step's line."""
    for name, w in weights(undisturbed).items():
        assert torch.equal(weights(run)[name], w), name
    assert (run / "val_nll.npy").read_bytes() == (undisturbed / "val_nll.npy").read_bytes()
    assert step_lines(run) == step_lines(undisturbed)
    assert [path.stat().st_size < 5000 for path in t.saved(run, "state")] == [True]  # what is left holds the clock and no weights
    assert not list(run.glob("*.tmp"))


def wait_for(run, condition, process, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.0005)


# ---- a finished run

def test_record_and_log(finished_run, tiny_data):
    record, log = json.loads((finished_run / "record.json").read_text()), (finished_run / "log.txt").read_text()
    sums, meta = np.load(finished_run / "val_nll.npy", allow_pickle=False), json.loads((tiny_data / "meta.json").read_text())
    assert sums.dtype == np.float64 and sums.shape == (4,)  # 3,010 tokens in blocks of 1,000
    assert record["val_loss"] == pytest.approx(sums.sum() / 3009, rel=1e-12) and record["val_tokens"] == 3009
    assert record["val_bpb"] == pytest.approx(sums.sum() / np.log(2) / meta["text_bytes"]["val"])
    assert record["val_loss"] < 4  # it has learned: uniform is 5.55
    assert f"val_loss {record['val_loss']:.6f} nats per token, {record['val_bpb']:.6f} bits per byte" in log
    source = (ROOT / "train_gpt.py").read_text()
    assert f"bytes={len(source.encode())} sha256={record['source_sha256']}\n{source}\n==== end of source\n" in log
    assert record["data_sha256"] == meta["sha256"] and record["steps"] == 39 and record["tokens_seen"] == 39 * 512
    steps = [line for line in log.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{i + 1}/39" for i in range(39)]
    assert all(word in steps[0] for word in (" loss ", " lr ", " tok/s ", " left "))
    for fact in ("packages: python", "hardware: ", "thread(s)", "attention: sdpa", "dtype: fp32", "compiled: no"):
        assert fact in log
    assert record["train_flops"] == pytest.approx(3 * 39 * 512 * record["score_flops_per_token"])


def test_score_of_a_shard_is_the_recorded_one(finished_run, tiny_data, cli, tmp_path):
    status, out, _ = cli("--score", finished_run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "out.npy", *PLAIN)
    nll = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert status == 0 and nll.shape == (3010,) and nll[0] == 0
    assert np.array_equal(np.add.reduceat(nll.astype(np.float64), [0, 1000, 2000, 3000]), np.load(finished_run / "val_nll.npy"))
    assert f"{nll.sum(dtype=np.float64) / 3009:.6f}" in out


def test_score_of_independent_streams(finished_run, tiny_data, cli, tmp_path):
    """Same shape out as in; the first row is the shard's beginning and gets the shard's values."""
    val = tokens_of(tiny_data / "val.bin")
    streams = np.stack([val[:193], val[1000:1193], val[:193]])
    np.save(tmp_path / "in.npy", streams)
    assert cli("--score", finished_run, "--tokens", tmp_path / "in.npy", "--nll", tmp_path / "out.npy", *PLAIN)[0] == 0
    cli("--score", finished_run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "shard.npy", *PLAIN)
    nll = np.load(tmp_path / "out.npy")
    assert nll.shape == streams.shape and nll.dtype == np.float32 and (nll[:, 0] == 0).all()
    np.testing.assert_allclose(nll[0], np.load(tmp_path / "shard.npy")[:193], rtol=1e-5)
    np.testing.assert_allclose(nll[2], nll[0], rtol=1e-6)


def test_streams_of_one_token(finished_run, cli, tmp_path):
    np.save(tmp_path / "in.npy", np.zeros((3, 1), np.uint16))
    assert cli("--score", finished_run, "--tokens", tmp_path / "in.npy", "--nll", tmp_path / "out.npy", *PLAIN)[0] == 0
    assert (np.load(tmp_path / "out.npy") == np.zeros((3, 1))).all()


def test_sample(finished_run, cli):
    status, out, _ = cli("--sample", finished_run, "--prompt", "def ", "--length", 40, *PLAIN)
    again = cli("--sample", finished_run, "--prompt", "def ", "--length", 40, *PLAIN)[1]
    assert status == 0 and out.startswith("def ") and len(out) > 10 and out == again


def test_a_trial_says_so(tiny_data, cli, tmp_path):
    assert cli(*options(**TINY, data=tiny_data), "--run_dir", tmp_path / "r", "--steps", 3, *PLAIN)[0] == 0
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert record["trial"] is True and record["steps"] == 3


def test_better_than_it_was(finished_run, tiny_data, cli, tmp_path):
    """Four epochs beat one on this text: the loop learns from what it is shown."""
    assert cli(*options(**(TINY | dict(epochs=4.0)), data=tiny_data), "--run_dir", tmp_path / "r", *PLAIN)[0] == 0
    one, four = (json.loads((run / "record.json").read_text())["val_loss"] for run in (finished_run, tmp_path / "r"))
    assert four < one - 0.2


def test_overlapping_windows_change_the_score_alone(finished_run, tiny_data, cli, tmp_path):
    """The same weights and another score, which costs four windows for each token."""
    assert cli(*options(**TINY | dict(score_stride=16), data=tiny_data), "--run_dir", tmp_path / "r", *PLAIN)[0] == 0
    for name, w in weights(finished_run).items():
        assert torch.equal(weights(tmp_path / "r")[name], w), name
    apart, overlapping = (json.loads((run / "record.json").read_text()) for run in (finished_run, tmp_path / "r"))
    assert overlapping["val_loss"] != apart["val_loss"] and overlapping["train_flops"] == apart["train_flops"]
    assert overlapping["score_flops_per_token"] == 4 * apart["score_flops_per_token"]


# ---- kills, stops, broken disks

@pytest.mark.parametrize("when", ["early", "training", "checkpoint", "scoring"])
def test_killed_runs_end_as_if_they_had_not_been(tiny_data, finished_run, tmp_path, when):
    """SIGKILL before the first checkpoint, between checkpoints, while one is written, and after training."""
    run, rng = tmp_path / "run", random.Random(when)
    process = start(tiny_data, run, recipe=TINY | dict(save_every=1 if when == "checkpoint" else 5))  # often enough to be hit
    states = lambda: t.saved(run, "state")  # noqa: E731
    wait_for(run, {"early": lambda: (run / "config.json").exists(),
                   "training": lambda: len(states()) and states()[-1].name >= "state-0000015",
                   "checkpoint": lambda: len(states()) and list(run.glob("state-*.tmp")),
                   "scoring": lambda: t.saved(run, "weights")}[when], process)
    if when == "training":
        time.sleep(rng.random() * 0.05)
    process.kill()
    process.wait()
    assert not (run / "record.json").exists()
    done = resume(run)
    assert done.returncode == 0, done.stderr
    assert_same_end(run, finished_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_saves_first(tiny_data, finished_run, tmp_path, number):
    """No checkpoint but the one that the signal causes; then on to the same end."""
    run = tmp_path / "run"
    process = start(tiny_data, run, recipe=TINY | dict(save_every=1000))
    wait_for(run, lambda: (run / "log.txt").exists() and "\nstep 3/" in (run / "log.txt").read_text(), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.count("\n") == 1 and f"--resume {run}" in err
    assert len(t.saved(run, "state")) == 1
    assert resume(run).returncode == 0
    for name, w in weights(finished_run).items():
        assert torch.equal(weights(run)[name], w)


def test_two_processes_on_one_run(tiny_data, finished_run, tmp_path):
    """The second is refused, and the first does not notice."""
    run = tmp_path / "run"
    process = start(tiny_data, run)
    wait_for(run, lambda: (run / "log.txt").exists() and "\nstep 3/" in (run / "log.txt").read_text(), process)
    os.kill(process.pid, signal.SIGSTOP)
    config = (run / "config.json").read_bytes()
    for argv in ([], ["--members", "3"]):
        second = resume(run, *argv)
        assert second.returncode == 2 and second.stderr.count("\n") == 1 and "another process" in second.stderr
    assert (run / "config.json").read_bytes() == config
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    assert_same_end(run, finished_run)


def stop_after(tiny_data, run, steps, **changes):
    """A run that was killed after some steps, its checkpoints on disk."""
    process = start(tiny_data, run, recipe=TINY | changes)
    wait_for(run, lambda: len(t.saved(run, "state")) and t.saved(run, "state")[-1].name >= f"state-{steps:07d}", process)
    process.kill()
    process.wait()


def test_two_runs_that_took_one_name(tiny_data, finished_run, tmp_path, monkeypatch):
    """Neither saw the other's folder when it looked: the first keeps it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    given, args = t.parse_args([*options(**TINY | {"seed": 5}, data=tiny_data), *PLAIN])
    args.run_dir = run
    with pytest.raises(t.Stop, match="another run took this name"):
        t.train_command(given, args)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_checkpoints_of_many_members(tmp_path):
    """Of a chain's eleventh member, too, the newest is the last in the list and the one that is kept."""
    for number in (9 * 10 ** 7 + 200, 10 ** 8, 10 ** 8 + 100):
        t.save_tensors(tmp_path, "state", number, {"step": torch.tensor(number)}, keep=2)
    assert [int(t.load_tensors(path)["step"]) for path in t.saved(tmp_path, "state")] == [10 ** 8, 10 ** 8 + 100]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tiny_data, finished_run, tmp_path, damage):
    run = tmp_path / "run"
    stop_after(tiny_data, run, 10)
    path = t.saved(run, "state")[-1]
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = resume(run)
    assert done.returncode == 0 and f"{path}: damaged" in done.stderr
    assert_same_end(run, finished_run)


def test_resumed_as_it_was_started(tiny_data, finished_run, tmp_path):
    """The command that a stopped run prints names no options: device, attention and compiler are those of the start."""
    run = tmp_path / "run"
    stop_after(tiny_data, run, 10)
    path = t.saved(run, "state")[-1]
    state = t.load_tensors(path)
    path.unlink()
    state["progress"]["threads"] += 7  # as if the first part had run on a larger machine
    t.save_tensors(run, "state", 10 ** 6, state)
    done = subprocess.run([sys.executable, "train_gpt.py", "--resume", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "compiled: no" in (run / "log.txt").read_text().split("resumed at step")[1]
    assert json.loads((run / "record.json").read_text())["threads"] == state["progress"]["threads"]  # the track's limit holds for all parts
    assert_same_end(run, finished_run)


def test_changed_script_is_not_resumed(tiny_data, tmp_path):
    run = tmp_path / "run"
    stop_after(tiny_data, run, 5)
    path = t.saved(run, "state")[-1]
    state = t.load_tensors(path)
    path.unlink()
    t.save_tensors(run, "state", 99, state | {"source": "0" * 64})
    done = resume(run)
    assert done.returncode == 2 and "has changed since this run began" in done.stderr and done.stderr.count("\n") == 1


def test_more_ranks_go_on_where_one_stopped(tiny_data, finished_run, tmp_path):
    """A checkpoint of one rank, continued by two: the same model up to rounding."""
    run = tmp_path / "run"
    stop_after(tiny_data, run, 10)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py", "--resume", str(run), *PLAIN],
                   cwd=ROOT, check=True, timeout=120)
    a, b = (json.loads((r / "record.json").read_text())["val_loss"] for r in (run, finished_run))
    assert a == pytest.approx(b, abs=1e-4)


def test_eight_ranks_stop_and_fewer_go_on(tiny_data, finished_run, tmp_path):
    """The checkpoint of eight ranks is continued by four, and theirs by one: the same model up to rounding."""
    run = tmp_path / "run"
    begin = ["--run_dir", str(run), *options(**TINY, data=tiny_data)]
    for ranks, options_, until in ((8, begin, 5), (4, ["--resume", str(run)], 20)):
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train_gpt.py", *options_, *PLAIN], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wait_for(run, lambda: len(t.saved(run, "state")) and t.saved(run, "state")[-1].name >= f"state-{until:07d}", process, 180)
        process.terminate()  # torchrun passes it on, and waits for the ranks
        process.communicate(timeout=120)
        assert f"; {ranks} rank(s)" in (run / "log.txt").read_text() and not (run / "record.json").exists()
    assert resume(run).returncode == 0
    a, b = (json.loads((r / "record.json").read_text())["val_loss"] for r in (run, finished_run))
    assert a == pytest.approx(b, abs=5e-4)  # eight partial sums round otherwise than one; without the optimizer's state it would be 0.04 off
    assert step_lines(run)[-2].startswith("step 39/39")


def test_loss_that_is_not_finite_stops_the_run(tiny_data, cli, tmp_path):
    run = tmp_path / "run"
    status, _, err = cli(*options(**(TINY | dict(head_lr=1e38, save_every=1)), data=tiny_data), "--run_dir", run, *PLAIN)
    assert status == 1 and err.count("\n") == 1 and "step " in err and ("finite" in err or "the loss is" in err)
    assert "checkpoint" in err and not (run / "record.json").exists()
    for path in t.saved(run, "state"):
        assert all(w.isfinite().all() for w in t.load_tensors(path)["params"].values())


def test_full_disk_leaves_the_last_checkpoint(tiny_data, finished_run, tmp_path):
    """Files may grow to the log's size but not to a checkpoint's, from a moment on: what a full disk looks like to the run."""
    run = tmp_path / "run"
    stop_after(tiny_data, run, 10)
    before = {path.name: path.read_bytes() for path in t.saved(run, "state")}
    limit = len(next(iter(before.values()))) - 1000
    assert (run / "log.txt").stat().st_size < limit
    done = subprocess.run([sys.executable, "train_gpt.py", "--resume", str(run), *PLAIN], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot read or write" in done.stderr and "--resume" in done.stderr
    assert {path.name: path.read_bytes() for path in t.saved(run, "state")} == before and not list(run.glob("*.tmp"))
    assert resume(run).returncode == 0
    assert_same_end(run, finished_run)


def test_config_that_lacks_an_entry(finished_run, cli, tmp_path):
    """Each of them, one at a time."""
    stored = json.loads((finished_run / "config.json").read_text())
    for name in stored:
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if k != name}))
        status, _, err = cli("--resume", tmp_path)
        assert status == 2 and err.count("\n") == 1 and "config.json" in err, name


def test_data_that_changed_under_a_run(tiny_data, tmp_path, cli):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    stop_after(data, run, 5)
    raw = bytearray((data / "train.bin").read_bytes())
    raw[5000] ^= 1
    (data / "train.bin").write_bytes(raw)
    status, _, err = cli("--resume", run, *PLAIN)
    assert status == 2 and "train.bin" in err and "sha256" in err


# ---- several models in one run

CHAIN = TINY | dict(members=3, distill_alpha=0.4, distill_temp=1.2, bag_size=2, bag_until=0.3, ema=0.9, loop_first=1, loop_last=1, loop_times=1,
                    dropout=0.1, recall="2,4", memory="3", student="distill_alpha=0.9,n_embd=16,mlp_hidden=32")


def finish(tiny_data, run, recipe):
    """A run of the recipe, from start to end."""
    process = start(tiny_data, run, recipe=recipe)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return run


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory):
    """A finished chain of three members and a student, with every phase there is."""
    return finish(tiny_data, tmp_path_factory.mktemp("runs") / "chain", CHAIN)


def member_losses(run):
    return [line.split("loss ")[1].split()[0] for line in (run / "log.txt").read_text().splitlines() if line.startswith("member ") and " step " in line]


@pytest.mark.parametrize("when", ["in the third member", "between two", "in the student"])
def test_a_killed_chain_ends_as_if_it_had_not_been(tiny_data, chain, tmp_path, when):
    """What is done is not trained again: the weights on disk stay the files they were."""
    run = tmp_path / "run"
    process = start(tiny_data, run, recipe=CHAIN)
    text = {"in the third member": "\nmember 3 step 7/", "between two": "\nmember 2 done", "in the student": "\nmember 4 step 12/"}[when]
    wait_for(run, lambda: (run / "log.txt").exists() and text in (run / "log.txt").read_text(), process, 120)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in t.saved(run, "weights")}
    assert len(before) >= 2
    assert resume(run).returncode == 0
    assert_same_end(run, chain)
    kept = list(before.items())[:1 if when == "between two" else 2]  # killed between two, the newest is saved once more, as it was
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept) and set(before) <= set(t.saved(run, "weights"))


KILLS = """if True:
    import os, pathlib, random, signal, sys, time
    import train_gpt as t  # once: a process forked from here begins in no time
    run, rng, killed = pathlib.Path(sys.argv[1]), random.Random(0), []
    def lines():
        return (run / "log.txt").read_bytes().count(b"\\n") if (run / "log.txt").exists() else 0
    while True:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.argv = ["train_gpt.py", *(["--resume", str(run)] if (run / "config.json").exists() else sys.argv[2:]), "--device", "cpu", "--compile", "off"]
            t.main()
            os._exit(0)
        enough, done = lines() + rng.randrange(2, 11), 0
        while len(killed) < 30 and not done and lines() < enough:
            done = os.waitpid(child, os.WNOHANG)[0]
            time.sleep(0.0005)
        if len(killed) == 30 or done:
            sys.exit(0 if done else os.waitpid(child, 0)[1])
        time.sleep(rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed.append(lines())
        print(*sorted({path.name.split(".")[0] for path in run.glob("*-*.pt")}), flush=True)
"""


def test_thirty_kills_over_a_chain(tiny_data, chain, tmp_path):
    """SIGKILL at random instants of three members and their student: training, checkpoints, what lies between two models."""
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLS, str(run), *options(**CHAIN, data=tiny_data), "--run_dir", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    seen = done.stdout.splitlines()
    assert done.returncode == 0 and len(seen) == 30, done.stderr
    assert len(set(seen)) > 10 and sum("weights-0000001" in line for line in seen) > 2  # it came forward, and was killed late, too
    assert_same_end(run, chain)


LOST = """if True:
    import os, signal, sys, train_gpt as t
    step = t.MuonAdamW.step
    def lost(self, number, *args):
        if number == 17 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, *args)
    t.MuonAdamW.step = lost
    t.main()
"""


def test_a_lost_rank(tiny_data, tmp_path):
    """The others stop with a line that says so; torchrun begins the same command again, which goes on from the last checkpoint to the same end."""
    (tmp_path / "lost.py").write_text(LOST)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launch in (("lost", [*command, "--max-restarts=1", str(tmp_path / "lost.py")]), ("undisturbed", [*command, "train_gpt.py"])):
        done = subprocess.run([*launch, *options(**TINY, data=tiny_data), "--run_dir", str(tmp_path / name), *PLAIN], cwd=ROOT, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # else a rank can meet the lost one's address (pytorch issue 135712)
        assert done.returncode == 0, done.stderr
        if name == "lost":
            assert "the connection to another rank is lost" in done.stderr and "Traceback" not in done.stderr
    log = (tmp_path / "lost" / "log.txt").read_text()
    assert "resumed at step 15 of model 1" in log and len(step_lines(tmp_path / "lost")) == len(step_lines(tmp_path / "undisturbed"))
    for name, w in weights(tmp_path / "undisturbed").items():
        assert torch.equal(weights(tmp_path / "lost")[name], w)


def test_the_score_of_members_is_that_of_their_mean_probability(tiny_data, cli, tmp_path):
    """Three members, raised from two by a later command: the same as three from the start, and as the mean of three runs."""
    recipe, losses = TINY | dict(members=2), {}
    run, three = tmp_path / "two", tmp_path / "three"
    assert cli(*options(**recipe, data=tiny_data), "--run_dir", run, *PLAIN)[0] == 0
    first = {path.name: path.stat().st_mtime_ns for path in t.saved(run, "weights")}
    assert cli("--resume", run, *PLAIN)[0] == 2  # finished
    assert cli("--resume", run, "--members", 1, *PLAIN)[0] == 2
    assert cli("--resume", run, "--members", 3, *PLAIN)[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in t.saved(run, "weights")[:2]} == first
    assert cli(*options(**recipe | dict(members=3), data=tiny_data), "--run_dir", three, *PLAIN)[0] == 0
    assert (run / "val_nll.npy").read_bytes() == (three / "val_nll.npy").read_bytes()
    record = json.loads((run / "record.json").read_text())
    assert record["members"] == record["scored"] == 3 and record["steps"] == 3 * 39
    for name, folder in (("all", run), *((seed, tmp_path / f"s{seed}") for seed in (0, 1000, 2000))):
        if name != "all":
            assert cli(*options(**TINY | dict(seed=name), data=tiny_data), "--run_dir", folder, *PLAIN)[0] == 0
        assert cli("--score", folder, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "out.npy", *PLAIN)[0] == 0
        losses[name] = np.load(tmp_path / "out.npy").astype(np.float64)
    np.testing.assert_allclose(losses["all"], -np.log(np.mean([np.exp(-losses[seed]) for seed in (0, 1000, 2000)], axis=0)), atol=1e-5)
    assert losses["all"].mean() < np.mean([losses[seed].mean() for seed in (0, 1000, 2000)])


def test_the_student_alone_is_scored(chain):
    record = json.loads((chain / "record.json").read_text())
    student = t.models(t.make_config({name: CHAIN[name] for name in CHAIN}))[-1]
    assert (student.n_embd, student.distill_alpha, student.dropout, student.seed) == (16, 0.9, 0.1, 3000)
    assert (student.bag_until, student.loop_from) == (0, 0)  # from the first step on it is what its teachers became
    assert record["members"] == 4 and record["scored"] == 1 and record["parameters"] == sum(np.prod(s) for s in t.param_shapes(student, 257).values())
    bags = [line.split("epoch ")[1].split()[0] for line in (chain / "log.txt").read_text().splitlines() if line.startswith("member 1 step ")]
    assert record["tokens_seen"] == 512 * (3 * (39 + 12) + 39)  # 12 of a member's 39 steps see bags of two, and none of the student's
    assert float(bags[-1]) == pytest.approx(512 * 51 / 20_000, rel=0.02)


def test_a_student_learns_from_each_in_turn(tiny_data, cli, tmp_path, monkeypatch):
    """TURN steps from each member, in their order, also where a run goes on in the middle of a turn; and a member of a chain from the one before alone."""
    seen, train_pass = [], t.train_pass

    def noted(p, *args):
        teacher = args[-1]
        seen.append(teacher and float(teacher[1]["lm_head"].sum()))
        return train_pass(p, *args)
    monkeypatch.setattr(t, "train_pass", noted)
    monkeypatch.setattr(t, "TURN", 4)
    run, recipe = tmp_path / "run", TINY | dict(members=3, distill_alpha=0.4, device_tokens=512, epochs=0.3, student="distill_alpha=0.9")
    assert cli(*options(**recipe, data=tiny_data), "--run_dir", run, *PLAIN)[0] == 0
    sums = [float(t.load_tensors(path)["lm_head"].sum()) for path in t.saved(run, "weights")]
    assert seen == [None] * 11 + [sums[0]] * 11 + [sums[1]] * 11 + [sums[0]] * 4 + [sums[1]] * 4 + [sums[2]] * 3
    seen.clear()
    (run / "record.json").unlink()
    t.saved(run, "weights")[-1].unlink()
    c, meta, _ = t.read_run(run)
    path = t.saved(run, "state")[-1]
    progress = t.load_tensors(path)["progress"] | {"model": 3, "step": 6, "log_bytes": (run / "log.txt").stat().st_size}
    path.unlink()
    p = t.init_params(c, meta["vocab_size"])
    m = t.Machine(torch.device("cpu"), torch.float32)
    t.save_tensors(run, "state", 3 * 10 ** 7 + 6, {"params": p, "optimizer": t.MuonAdamW(p, c, m).state_dict(), "ema": {}, "progress": progress, "source": t.SOURCE_SHA256})
    assert cli("--resume", run, *PLAIN)[0] == 0
    assert seen == [sums[1]] * 2 + [sums[2]] * 3


@pytest.mark.parametrize("change, warm", [("muon_lr=0", True), ("muon_lr=0,mtp_weight=0", True), ("muon_lr=0,n_layer=1", False), ("muon_lr=0,n_embd=16", False)])
def test_a_student_of_its_teachers_shape_goes_on_from_the_last_one(tiny_data, cli, tmp_path, change, warm):
    """With a rate of zero it ends where it began: at the last member's weights; another shape begins anew, as its seed says."""
    run, recipe = tmp_path / "run", TINY | dict(members=2, epochs=0.1, mtp_weight=0.3, weight_decay=0, ema=0,
                                                student=f"distill_alpha=0.5,{change},embed_lr=0,head_lr=0,scalar_lr=0")
    assert cli(*options(**recipe, data=tiny_data), "--run_dir", run, *PLAIN)[0] == 0
    c, meta, _ = t.read_run(run)
    _, last, student = (t.load_tensors(path) for path in t.saved(run, "weights"))
    begun = last if warm else t.init_params(t.models(c)[-1], meta["vocab_size"])
    assert student.keys() == t.param_shapes(t.models(c)[-1], meta["vocab_size"]).keys()
    assert all(torch.equal(w, begun[name]) for name, w in student.items())
    assert ("model 3 goes on from the weights of model 2" in (run / "log.txt").read_text()) == warm


def test_a_student_can_come_later(tiny_data, chain, cli, tmp_path):
    """Members first, their student by a later command: the same as both at once, and no member after it."""
    run = finish(tiny_data, tmp_path / "run", CHAIN | {"student": ""})
    assert json.loads((run / "record.json").read_text())["scored"] == 3
    assert cli("--resume", run, "--student", "distill_alpha=0", *PLAIN)[0] == 2  # it would learn nothing
    assert cli("--resume", run, "--student", CHAIN["student"], *PLAIN)[0] == 0
    assert (run / "val_nll.npy").read_bytes() == (chain / "val_nll.npy").read_bytes()
    assert cli("--resume", run, "--members", 4, *PLAIN)[0] == 2
    assert cli("--resume", run, "--student", "distill_alpha=0.5", *PLAIN)[0] == 2


def test_chains_trained_apart(tiny_data, cli, tmp_path):
    """Two chains, each a run of its own, joined and scored: the mean of all their members; a referee's line for each; one student of all."""
    two, runs, joined = CHAIN | dict(members=2, student=""), [tmp_path / "a", tmp_path / "b"], tmp_path / "joined"
    for seed, run in enumerate(runs):
        assert cli(*options(**two | dict(seed=seed), data=tiny_data), "--run_dir", run, *PLAIN)[0] == 0
    assert cli("--join", *runs, "--run_dir", joined)[0] == 0
    assert cli("--resume", joined, *PLAIN)[0] == 0
    parts = [json.loads((run / "record.json").read_text()) for run in runs]
    record = json.loads((joined / "record.json").read_text())
    for name, whole in (("ranks", 2), ("members", 4), ("scored", 4), ("train_seconds", max(part["train_seconds"] for part in parts)),
                        *((name, sum(part[name] for part in parts)) for name in ("steps", "tokens_seen", "parameters", "train_flops"))):
        assert record[name] == pytest.approx(whole), name
    nll = []
    for k, path in enumerate(t.saved(joined, "weights")):
        alone = tmp_path / f"alone{k}"
        alone.mkdir()
        config = json.loads((runs[k // 2] / "config.json").read_text())
        (alone / "config.json").write_text(json.dumps(config | {"config": config["config"] | {"members": 1}}))
        shutil.copy(path, alone / path.name.replace(f"{k:07d}", "0000000"))
        assert cli("--score", alone, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "out.npy", *PLAIN)[0] == 0
        nll.append(np.load(tmp_path / "out.npy").astype(np.float64))
    assert record["val_loss"] == pytest.approx(-np.log(np.mean([np.exp(-one) for one in nll], axis=0)).sum() / 3009, abs=1e-5)
    steps = [line.split()[1] for line in step_lines(joined) if " step " in line]
    assert steps == [str(k) for k in (1, 2, 3, 4) for _ in range(39)]
    assert cli("--resume", joined, "--members", 6, *PLAIN)[0] == 2  # which chain would it be?
    assert cli("--resume", joined, "--student", CHAIN["student"], *PLAIN)[0] == 0
    assert json.loads((joined / "record.json").read_text())["members"] == 5
    trial = tmp_path / "trial"
    assert cli(*options(**two | dict(seed=1), data=tiny_data), "--run_dir", trial, "--steps", 5, *PLAIN)[0] == 0
    for argv, named in [((runs[0], runs[0], "--run_dir", tmp_path / "x"), "seeds"), ((runs[0], trial, "--run_dir", tmp_path / "x"), str(trial)), ((runs[0], "--run_dir", tmp_path / "x"), "several"), ((*runs, "--run_dir", joined), "already holds"),
                        ((*runs,), "--run_dir"), ((runs[0], joined, "--run_dir", tmp_path / "x"), str(joined)), ((runs[0], tmp_path / "none", "--run_dir", tmp_path / "x"), "none"),
                        ((*runs, "--seed", 3, "--run_dir", tmp_path / "x"), "--seed")]:
        status, _, err = cli("--join", *argv)
        assert status == 2 and err.count("\n") == 1 and named in err and not (tmp_path / "x").exists(), err


def test_chains_within_one_run(tiny_data, cli, tmp_path):
    """The first member of each chain has no teacher, so it is the same as that of a run without distillation."""
    recipe = TINY | dict(members=4, epochs=0.3)
    for name, changes in (("chains", dict(chains=2, distill_alpha=0.4)), ("none", {}), ("one", dict(distill_alpha=0.4))):
        assert cli(*options(**recipe | changes, data=tiny_data), "--run_dir", tmp_path / name, *PLAIN)[0] == 0
    chains, none, one = ([torch.cat([w.flatten() for w in t.load_tensors(path).values()]) for path in t.saved(tmp_path / name, "weights")] for name in ("chains", "none", "one"))
    assert [torch.equal(a, b) for a, b in zip(chains, none)] == [True, False, True, False]
    assert [torch.equal(a, b) for a, b in zip(chains, one)] == [True, True, False, False]


def test_alpha_zero_is_independent_members(tiny_data, cli, tmp_path):
    """Off means off: with alpha 0 the second member is the run of its seed."""
    for name, changes in (("two", dict(members=2)), ("alone", dict(seed=1000))):
        assert cli(*options(**TINY | changes, data=tiny_data), "--run_dir", tmp_path / name, *PLAIN)[0] == 0
    assert [line.split(" tok/s")[0] for line in (tmp_path / "two" / "log.txt").read_text().splitlines() if line.startswith("member 2 step")] == [
        "member 2 " + line for line in step_lines(tmp_path / "alone") if line.startswith("step")]


@pytest.fixture
def path(monkeypatch):
    """The parameters after every optimizer step of the runs of this process."""
    path, step = [], t.MuonAdamW.step

    def recorded(self, *args):
        step(self, *args)
        path.append({name: w.detach().clone() for name, w in self.p.items()})
    monkeypatch.setattr(t.MuonAdamW, "step", recorded)
    return path


def test_ema_is_the_average_of_the_path(tiny_data, cli, tmp_path, path):
    assert cli(*options(**TINY | dict(ema=0.8), data=tiny_data), "--run_dir", tmp_path / "r", *PLAIN)[0] == 0
    c = t.make_config(TINY)
    for name, start_ in t.init_params(c, 257).items():
        average = start_
        for i, p in enumerate(path):
            d = min(0.8, (i + 1) / (i + 10))
            average = d * average + (1 - d) * p[name]
        torch.testing.assert_close(weights(tmp_path / "r")[f"0 {name}"], average, rtol=1e-4, atol=1e-6)


def test_scoring_from_memory_needs_the_training_tokens(tiny_data, cli, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    assert cli(*options(**TINY | dict(memory="2,5", epochs=0.3), data=data), "--run_dir", run, *PLAIN)[0] == 0
    score = ("--score", run, "--tokens", data / "val.bin", "--nll", tmp_path / "nll.npy")
    assert cli(*score)[0] == 0 and np.load(tmp_path / "nll.npy").sum() / 3009 == pytest.approx(json.loads((run / "record.json").read_text())["val_loss"], rel=1e-3)
    (data / "train.bin").unlink()
    status, _, err = cli(*score)
    assert status == 2 and "train.bin" in err and len(err.strip().splitlines()) == 1


# ---- every phase, on a CPU

def test_compiled_before_the_clock_and_never_again(tiny_data, cli, tmp_path, monkeypatch):
    """All graphs of all phases are made by compile_all(), none is broken: what would be compiled later is an error here."""
    compile_all = t.compile_all

    def then_no_more(*args):
        seconds = compile_all(*args)
        torch.compiler.set_stance("fail_on_recompile")
        return seconds
    monkeypatch.setattr(t, "compile_all", then_no_more)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        status, out, err = cli(*options(**CHAIN | dict(mtp_weight=0.3, iha=True), data=tiny_data), "--run_dir", tmp_path / "run", "--device", "cpu", "--compile", "on")
    finally:
        torch.compiler.set_stance("default")
    assert status == 0 and "compiled: yes" in out, err
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_tiny_track_cut_down(tiny_data, tmp_path):
    """The preset of 8xH100 at a size for a CPU: bags, loops, averages, two targets, scoring; on two ranks, as it would run there."""
    small = dict(track="tiny", n_layer=6, n_embd=64, n_head=2, mlp_hidden=96, seq_len=128, window_short=64, batch_tokens=1024, device_tokens=512, loss_chunk=256,
                 train_tokens=20_000, epochs=1.5, probes=3, probe_tokens=1000, bag_size=4, bag_until=0.2, loop_first=2, loop_last=3, loop_times=1)
    run = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py", *options(**small, data=tiny_data), "--run_dir", str(run), *PLAIN],
                   cwd=ROOT, check=True, timeout=300)
    record, stored = json.loads((run / "record.json").read_text()), json.loads((run / "config.json").read_text())["config"]
    assert record["track"] == "tiny" and record["ranks"] == 2 and record["val_loss"] < 4.5
    assert stored["ema"] > 0 and stored["mtp_weight"] > 0 and stored["wd_points"] != "0:1"  # what the preset itself adds
    assert record["tokens_seen"] == 1024 * (29 + 3 * 6)  # 6 of the 29 steps see bags of four


def test_a_clock_that_jumps(tiny_data, finished_run, tmp_path):
    """Somebody sets the clock of the machine back and forth: times, seconds and the end are not touched by it."""
    program = tmp_path / "jumps.py"
    program.write_text("import itertools, time\nreal, jump = time.time, itertools.cycle((0, 1e8, -1e8))\ntime.time = lambda: real() + next(jump)\nimport train_gpt\ntrain_gpt.main()\n")
    done = subprocess.run([sys.executable, str(program), *options(**TINY, data=tiny_data), "--run_dir", str(tmp_path / "run"), *PLAIN], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "run", finished_run)
    times = [float(line.split(" time ")[1].split("s")[0]) for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if line.startswith("step ")]
    assert times == sorted(times) and 0 < times[-1] < json.loads((tmp_path / "run" / "record.json").read_text())["train_seconds"] + 0.1 < 120


# ---- mistakes of the user: one line that names the option or file, status 2, nothing written

BAD_OPTIONS = [
    (["--n_embd", "50", "--n_head", "4"], "--n_embd"), (["--n_embd", "36", "--n_head", "2"], "--n_head"), (["--n_layer", "0"], "--n_layer"),
    (["--batch_tokens", "1000"], "--batch_tokens"), (["--device_tokens", "32"], "--device_tokens"), (["--score_stride", "65"], "--score_stride"),
    (["--loop_times", "1", "--loop_first", "1", "--loop_last", "3"], "--loop_last"),
    (["--loop_times", "1", "--loop_first", "2", "--loop_last", "1"], "--loop_first"),
    (["--loop_from", "1"], "--loop_from"), (["--window_pattern", "SXL"], "--window_pattern"), (["--dropout", "1.0"], "--dropout"), (["--dropout", "-0.1"], "--dropout"),
    (["--warmup", "0.5", "--warmdown", "0.6"], "--warmdown"), (["--epochs", "nan"], "--epochs"), (["--epochs", "0"], "--epochs"),
    (["--muon_lr", "fast"], "--muon_lr"), (["--unet", "2"], "--unet"), (["--wd_points", "0.5:1,0:1"], "--wd_points"), (["--wd_points", "x"], "--wd_points"), (["--recall", "4,x"], "--recall"), (["--memory", "0"], "--memory"),
    (["--dtype", "fp8"], "--dtype"), (["--track", "nonesuch"], "--track"), (["--train_tokens", "40000"], "--train_tokens"),
    (["--nonesuch", "1"], "--nonesuch"), (["--steps", "0"], "--steps"), (["--attention", "varlen"], "--attention"), (["--seed", "-1"], "--seed"),
    (["--members", "0"], "--members"), (["--student", "depth=3", "--distill_alpha", "0.5"], "--student"), (["--student", "n_layer=2"], "--student"),
    (["--student", "distill_alpha=0.5,softcap=30"], "softcap"), (["--softcap", "60"], "--softcap"), (["--distill_temp", "0.2"], "--distill_temp"), (["--train_tokens", "2", "--bag_size", "2", "--bag_until", "0.5"], "--train_tokens"),
    (["--student", "distill_alpha=0.5,n_layer=x"], "cannot be read"), (["--bag_until", "1"], "--bag_until"), (["--ema", "1"], "--ema"),
    (["--distill_temp", "0"], "--distill_temp"),
    (["--members", "3", "--chains", "2"], "--chains"), (["--adam_beta1", "1"], "--adam_beta1"), (["--tokens", "x.bin"], "--score"), (["--nll", "x.npy"], "--score"),
    (["--prompt", "x"], "--sample"), (["--length", "5"], "--sample"),
]


@pytest.mark.parametrize("argv, named", BAD_OPTIONS, ids=[" ".join(argv) for argv, _ in BAD_OPTIONS])
def test_impossible_options(tiny_data, cli, tmp_path, argv, named):
    status, out, err = cli(*options(**TINY, data=tiny_data), "--run_dir", tmp_path / "run", *PLAIN, *argv)
    assert status == 2 and err.count("\n") == 1 and named in err and not out and not (tmp_path / "run").exists()


def test_batch_that_ranks_cannot_share(monkeypatch, cli, tiny_data, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, _, err = cli(*options(**TINY, data=tiny_data), "--run_dir", tmp_path / "run", *PLAIN)
    assert status == 2 and "3 ranks" in err and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(cli, tmp_path):
    status, _, err = cli("--device", "cuda", "--run_dir", tmp_path / "run")
    assert status == 2 and "--device cpu" in err


def break_data(folder, what):
    meta, train = folder / "meta.json", folder / "train.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 30_000
    if what == "no meta":
        meta.unlink()
    elif what == "meta is not JSON":
        meta.write_text("{")
    elif what == "meta lacks a key":
        meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "bos_id"}))
    elif what == "no shard":
        train.unlink()
    elif what == "truncated":
        train.write_bytes(train.read_bytes()[:-2])
    elif what == "empty":
        train.write_bytes(b"")
    elif what == "other file":
        train.write_bytes(b"PK" * 5000)
    elif what == "changed":
        train.write_bytes(train.read_bytes()[:-2] + b"\x01\x00")
    elif what == "ids too large":
        data = header.tobytes() + np.full(30_000, 300, "<u2").tobytes()
        train.write_bytes(data)
        meta.write_text(meta.read_text().replace(json.loads(meta.read_text())["sha256"]["train.bin"], hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize("what, named", [
    ("no meta", "meta.json"), ("meta is not JSON", "meta.json"), ("meta lacks a key", "meta.json"), ("no shard", "train.bin"), ("truncated", "train.bin"),
    ("empty", "train.bin"), ("other file", "train.bin"), ("changed", "train.bin"), ("ids too large", "train.bin")])
def test_broken_data(tiny_data, cli, tmp_path, what, named):
    shutil.copytree(tiny_data, tmp_path / "data")
    break_data(tmp_path / "data", what)
    status, _, err = cli(*options(**TINY, data=tmp_path / "data"), "--run_dir", tmp_path / "run", *PLAIN)
    assert status == 2 and err.count("\n") == 1 and named in err
    assert not (tmp_path / "run").exists()


def test_bad_scoring(finished_run, tiny_data, cli, tmp_path):
    np.save(tmp_path / "floats.npy", np.zeros((2, 5)))
    np.save(tmp_path / "flat.npy", np.zeros(5, np.uint16))
    np.save(tmp_path / "ids.npy", np.full((2, 5), 999, np.uint16))
    np.save(tmp_path / "objects.npy", np.array([["a", {}]], dtype=object), allow_pickle=True)
    (tmp_path / "noise.npy").write_bytes(b"not an array")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "archive.npz", a=np.zeros((2, 5), np.uint16))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for tokens, nll, named in [("floats.npy", "o.npy", "float64"), ("flat.npy", "o.npy", "[5]"), ("ids.npy", "o.npy", "999"), ("objects.npy", "o.npy", "--tokens"),
                               ("noise.npy", "o.npy", "--tokens"), ("empty.npy", "o.npy", "--tokens"), ("archive.npy", "o.npy", "archive"), ("nothing.npy", "o.npy", "nothing.npy"), ("nothing.bin", "o.npy", "nothing.bin"),
                               ("ids.npy", "o.txt", "--nll"), ("ids.npy", "no/where/o.npy", "--nll")]:
        status, _, err = cli("--score", finished_run, "--tokens", tmp_path / tokens, "--nll", tmp_path / nll, *PLAIN)
        assert status == 2 and err.count("\n") == 1 and named in err, (tokens, err)
        assert not (tmp_path / nll).exists()
    for argv, named in [(["--score", finished_run], "--tokens"), (["--score", tmp_path / "none", "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "o.npy"], "none"),
                        (["--resume", finished_run], "finished"), (["--resume", tmp_path / "none"], "none"), (["--sample", tmp_path / "none"], "none"),
                        (["--resume", finished_run, "--n_layer", "3"], "--n_layer"), (["--run_dir", finished_run], "already holds"),
                        (["--score", finished_run, "--sample", finished_run], "--sample")]:
        status, _, err = cli(*argv, *PLAIN)
        assert status == 2 and err.count("\n") == 1 and named in err, err


@pytest.mark.parametrize("what", ["flipped", "other shapes", "pickle", "none"])
def test_damaged_weights_are_not_scored(finished_run, tiny_data, cli, tmp_path, what):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = t.saved(run, "weights")[-1]
    data = bytearray(path.read_bytes())
    path.unlink()
    if what == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif what == "other shapes":
        t.save_tensors(run, "weights", 0, {"wte": torch.zeros(3)})
    elif what == "pickle":  # a file that would run code where it is unpickled
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "evil"),)
        data = pickle.dumps(Evil())
        (run / f"weights-0000000.{hashlib.sha256(data).hexdigest()[:16]}.pt").write_bytes(data)
    status, _, err = cli("--score", run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "o.npy", *PLAIN)
    assert status == 2 and err.count("\n") == 1 and str(run) in err and not (tmp_path / "o.npy").exists() and not (tmp_path / "evil").exists()
