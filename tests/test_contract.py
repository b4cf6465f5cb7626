"""
What every script must keep to enter: the command line, the run folder and the log, as the referee and a user
need them.

Nothing here knows the model: no import of the script, no parameter's name, no checkpoint's content. The
script is train_gpt.py, or the one that TOKENRUN_SCRIPT names. Of a run folder the tests read log.txt,
record.json and val_nll.npy, and they know that checkpoints are called state-*.pt, final weights weights-*.pt,
and files that are being written *.tmp.
"""

import contextlib
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import audit
import reading
import submit
import verify
from runs import (
    HEADER_BYTES,
    PLAIN,
    RECIPE,
    ROOT,
    SCRIPT,
    TINY,
    Forked,
    assert_refused,
    assert_same_end,
    assert_same_model,
    has_logged,
    log_lines,
    make_repository,
    options,
    record_of,
    run_script,
    score,
    script_options,
    start,
    start_ranks,
    steps_of,
    stop_at,
    tokens_of,
    wait_for,
)

pytestmark = pytest.mark.contract

# Two computations of one NLL in float32 that add in another order, because other rows stand beside it in the
# batch: each of about 20 matrix products in the tiny model rounds sums of at most 257 terms, to 2**-24 of
# themselves at each addition, and logits are of the size 10. If all roundings went the same way that would be
# 20 * 257 * 2**-24 * 10 = 3e-3; they do not, so the root of their number counts: 70 * 2**-24 * 10 = 4e-5, and
# twice that for the two computations.
REORDERED = 1e-4


def needs(*names):
    """Skip a test of options that the script does not have: a contestant may have removed them."""
    for name in names:
        if name not in script_options():
            pytest.skip(f"the script has no --{name}")


@pytest.fixture(scope="session")
def stopped_run(tiny_data, tmp_path_factory):
    """A run that was stopped after some of its 39 steps, with two checkpoints. Tests go on with copies of
    it."""
    for _ in range(5):  # on a busy machine the signal may come when the run has ended
        run = tmp_path_factory.mktemp("runs") / "stopped"
        argv = [*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN]
        if stop_at(11, signal.SIGTERM, run, argv) == 130:
            assert len(list(run.glob("state-*.pt"))) == 2
            return run
    raise AssertionError("SIGTERM did not end the run with status 130")


@pytest.fixture
def copy_of_stopped(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.fixture(scope="session")
def recipe_run(tiny_data, tmp_path_factory):
    """The pocket track's own recipe at tiny size: every technique that the script uses there."""
    run = tmp_path_factory.mktemp("runs") / "recipe"
    assert run_script([*options(**RECIPE, data=tiny_data), "--run_dir", run, *PLAIN]) == 0
    return run


# ---- a finished run


def test_run_folder(finished_run, tiny_data):
    """The source, the steps and the result in the log; the same result in record.json and val_nll.npy."""
    (script, *others), _ = reading.split_log((finished_run / "log.txt").read_bytes())
    record, meta = record_of(finished_run), json.loads((tiny_data / "meta.json").read_text())
    assert script.content == SCRIPT.read_bytes() and script.name == SCRIPT.name
    assert record["source_sha256"] == hashlib.sha256(script.content).hexdigest()
    for harness in others:
        assert harness.content == SCRIPT.with_name("harness.py").read_bytes()
        assert record["harness_sha256"] == hashlib.sha256(harness.content).hexdigest()
    assert record["data_sha256"] == meta["sha256"]
    sums = np.load(finished_run / "val_nll.npy", allow_pickle=False)
    assert sums.dtype == np.float64 and sums.shape == (4,)  # 3,010 tokens in blocks of 1,000
    # sums of float64 in another order: 3,009 additions, each rounded to 2**-53 of itself, are exact to 4e-13
    assert record["val_loss"] == pytest.approx(sums.sum() / 3009, rel=1e-12)
    assert record["val_bpb"] == pytest.approx(sums.sum() / math.log(2) / meta["text_bytes"]["val"], rel=1e-12)
    assert record["val_tokens"] == 3009 and record["trial"] is False
    assert record["val_loss"] < math.log(meta["vocab_size"])  # better than a uniform guess
    lines = log_lines(finished_run)
    loss, bpb = f"{record['val_loss']:.6f}", f"{record['val_bpb']:.6f}"
    assert lines.count(f"val_loss {loss} nats per token, {bpb} bits per byte, 3,009 tokens scored") == 1
    steps = [line for line in lines if line.startswith("step ")]
    n_steps = record["steps"]
    assert [line.split()[1] for line in steps] == [f"{i}/{n_steps}" for i in range(1, n_steps + 1)]
    terms = r"loss \d+\.\d+( \w+ -?\d\S*)* lr \d\S* tok/s \d+ time \d+\.\ds left \d+s"
    assert all(re.fullmatch(rf"step \d+/\d+ epoch \d+\.\d+ {terms}", line) for line in steps), steps[0]
    for fact in ("packages: python", "hardware: ", "dtype: ", "attention: ", "compiled: "):
        assert any(line.startswith(fact) for line in lines), fact
    assert not list(finished_run.glob("*.tmp")) and list(finished_run.glob("weights-*.pt"))


def test_the_referee_makes_a_record_of_it(finished_run, tiny_data, tmp_path):
    """submit scores the test stream by the script in the run's log, and verify follows every claim back to a
    file."""
    root = tmp_path / "root"
    make_repository(root, tiny_data)
    (root / "note.md").write_text("# The tiny recipe\n\nNothing to see.\n")
    noon = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
    folder = submit.submit([finished_run], "tiny", root / "note.md", ["A. Author"], root, noon)
    assert verify.verify_record(folder, root) == []
    run = record_of(folder)["runs"][0]
    meta = json.loads((tiny_data / "meta.json").read_text())
    assert run["test_loss"] != run["val_loss"] and run["test_loss"] < math.log(meta["vocab_size"])


# ---- --score


@pytest.mark.parametrize("run", ["finished_run", "recipe_run"])
def test_score_of_a_shard_is_the_recorded_one(run, request, tiny_data, cli, tmp_path):
    run = request.getfixturevalue(run)
    nll = score(cli, run, tiny_data / "val.bin", tmp_path)
    assert nll.shape == (3010,) and nll.dtype.kind == "f" and nll[0] == 0 and nll.min() >= 0
    sums = np.add.reduceat(nll.astype(np.float64), [0, 1000, 2000, 3000])
    # The same computation, of which --score may round each NLL to float32, by 2**-24 of itself, and so at
    # most the sum of them.
    np.testing.assert_allclose(sums, np.load(run / "val_nll.npy"), rtol=2**-24)


@pytest.mark.parametrize("run", ["finished_run", "recipe_run"])
def test_score_of_independent_rows(run, request, tiny_data, cli, tmp_path):
    """A row's NLL is the same alone, in company and in another order, and is that of the same tokens as a
    shard."""
    run, val = request.getfixturevalue(run), tokens_of(tiny_data / "val.bin")
    rows = np.stack([val[at : at + 193] for at in (0, 1000, 1500, 0)])  # of three windows and a token
    nll = score(cli, run, rows, tmp_path)
    assert nll.shape == rows.shape and nll.dtype.kind == "f" and not nll[:, 0].any()
    alone = score(cli, run, rows[1:2], tmp_path)
    turned = score(cli, run, rows[::-1].copy(), tmp_path)
    np.testing.assert_allclose(nll[3], nll[0], rtol=0, atol=REORDERED)
    np.testing.assert_allclose(alone[0], nll[1], rtol=0, atol=REORDERED)
    np.testing.assert_allclose(turned[::-1], nll, rtol=0, atol=REORDERED)
    reading.write_shard(tmp_path / "row.bin", rows[2])
    as_shard = score(cli, run, tmp_path / "row.bin", tmp_path)
    np.testing.assert_allclose(as_shard, nll[2], rtol=0, atol=REORDERED)


@pytest.mark.parametrize("run", ["finished_run", "recipe_run"])
def test_streams_of_one_or_two_tokens(run, request, cli, tmp_path):
    run = request.getfixturevalue(run)
    assert (score(cli, run, np.full((3, 1), 256, np.uint16), tmp_path) == np.zeros((3, 1))).all()
    two = score(cli, run, np.array([[256, 10], [256, 10], [65, 66]], np.uint16), tmp_path)
    assert not two[:, 0].any() and (two[:, 1] > 0).all() and abs(two[0, 1] - two[1, 1]) < REORDERED


class InProcess:
    """What the audit calls to have tokens scored: the script's --score, in this process."""

    def __init__(self, cli, run, folder):
        self.cli, self.run, self.folder = cli, run, folder
        self.calls = self.tokens = 0

    def __call__(self, tokens):
        self.calls += 1
        self.tokens += tokens.size
        sent = tokens.astype(np.uint16)
        if tokens.ndim == 1:
            sent = self.folder / "stream.bin"
            reading.write_shard(sent, tokens)
        nll = score(self.cli, self.run, sent, self.folder)
        assert nll.shape == tokens.shape and nll.dtype.kind == "f"
        assert np.isfinite(nll).all() and nll.min() >= 0 and not nll[..., 0].any()
        return nll.astype(np.float64)


def test_audit(recipe_run, tiny_data, cli, tmp_path, monkeypatch):
    """Causal, normalized, independent of other rows, and fair on noise: what the referee's audit asks of
    every record, here of the track's own recipe at tiny size. It allows for the rounding of bf16; this model
    runs in float32, and may have learned too little in its few steps for a fault to be large."""
    for limit in ("TOKEN", "MEAN", "SUM"):
        monkeypatch.setattr(audit, limit, REORDERED)
    lines, rng = [], np.random.default_rng(0)
    claimed = np.load(recipe_run / "val_nll.npy")
    scorer = InProcess(cli, recipe_run, tmp_path)
    auditor = audit.Audit(scorer, tokens_of(tiny_data / "val.bin"), 257, rng, claimed, show=lines.append)
    auditor.length = 4 * RECIPE["seq_len"]  # of its rows: a few windows are enough
    auditor.run()
    assert [line for line in lines if line.startswith("FAULT")] == [] and len(lines) > 10


def assert_causal(cli, run, tiny_data, folder):
    """Every place of the second window of 64 tokens, and of those that overlap with it: when the stream is
    another one from there on, the NLL of that token moves, and of none before."""
    val = tokens_of(tiny_data / "val.bin")
    cuts = np.arange(62, 146)
    rows = np.tile(val[:160], (len(cuts), 1))
    for row, cut in zip(rows, cuts):
        row[cut:] = val[1000 : 1000 + 160 - cut]
        row[cut] = (val[cut] + 1) % 257
    moved = np.abs(score(cli, run, rows, folder) - score(cli, run, val[None, :160], folder))
    assert max(row[:cut].max() for row, cut in zip(moved, cuts)) < REORDERED
    assert min(row[cut] for row, cut in zip(moved, cuts)) > 0


@pytest.mark.parametrize("run", ["finished_run", "recipe_run"])
def test_no_token_is_seen_before_it_is_predicted(run, request, tiny_data, cli, tmp_path):
    assert_causal(cli, request.getfixturevalue(run), tiny_data, tmp_path)


def test_overlapping_windows(tiny_data, cli, tmp_path):
    """Each token is still scored once, and from its strict prefix."""
    needs("score_stride")
    run = tmp_path / "run"
    argv = [*options(**TINY | {"score_stride": 16}, data=tiny_data), "--run_dir", run, "--steps", 3, *PLAIN]
    assert cli(*argv)[0] == 0
    nll = score(cli, run, tiny_data / "val.bin", tmp_path)
    sums = np.add.reduceat(nll.astype(np.float64), [0, 1000, 2000, 3000])
    np.testing.assert_allclose(sums, np.load(run / "val_nll.npy"), rtol=2**-24)  # as above
    assert_causal(cli, run, tiny_data, tmp_path)


def test_sample(finished_run, cli):
    """Text, and the same text again."""
    argv = ("--sample", finished_run, "--prompt", "def ", "--length", 40, *PLAIN)
    status, out, err = cli(*argv)
    assert status == 0 and "def " in out and len(out) > len("def \n"), err
    assert cli(*argv)[1] == out


# ---- what a run may learn from


def changed_data(folder, tiny_data, **first_kept):
    """A copy of the data in which all tokens of a split from a place on are others, and without test.bin."""
    shutil.copytree(tiny_data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    for split, first in first_kept.items():
        tokens = tokens_of(folder / f"{split}.bin").copy()
        tokens[first:] = np.roll(tokens[first:], 5)[::-1]
        reading.write_shard(folder / f"{split}.bin", tokens)
        meta["sha256"][f"{split}.bin"] = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "test.bin").unlink()
    return folder


def test_only_the_budget_is_learned_from(recipe_run, tiny_data, cli, tmp_path):
    """Training tokens beyond the budget, the end of the validation stream and all of the test stream are
    others: training is the same bit for bit, and so is the NLL of the validation tokens before them."""
    data = changed_data(tmp_path / "data", tiny_data, train=TINY["train_tokens"], val=2000)
    status, _, err = cli(*options(**RECIPE, data=data), "--run_dir", tmp_path / "run", *PLAIN)
    assert status == 0, err
    assert steps_of(tmp_path / "run") == steps_of(recipe_run)
    before, after = (np.load(run / "val_nll.npy") for run in (recipe_run, tmp_path / "run"))
    assert np.array_equal(before[:2], after[:2]) and not np.isclose(before[2:], after[2:]).any()


def test_seeds(finished_run, second_seed):
    """Another seed is another run. That the same seed is the same run, bit for bit, is in many tests here."""
    assert steps_of(second_seed) != steps_of(finished_run)
    assert record_of(second_seed)["val_loss"] != record_of(finished_run)["val_loss"]


def test_steps_make_a_trial(tiny_data, cli, tmp_path, monkeypatch):
    """A run that is cut short says so, and the referee makes no record of it. Without --run_dir it gets a
    folder under runs/."""
    monkeypatch.chdir(tmp_path)
    assert cli(*options(**TINY, data=tiny_data), "--steps", 3, *PLAIN)[0] == 0
    [run] = (tmp_path / "runs").iterdir()
    record = record_of(run)
    assert record["trial"] is True and record["steps"] == 3
    assert [line.split()[1] for line in steps_of(run)] == ["1/3", "2/3", "3/3"]


def test_dry_run_trains_nothing(tiny_data, cli, tmp_path, monkeypatch):
    """It says what a run would take, for these options and for a track whose data is not here."""
    monkeypatch.chdir(tmp_path)
    for argv in (options(**TINY, data=tiny_data), ["--track", "limited"]):
        status, out, err = cli(*argv, "--dry_run")
        assert status == 0 and " parameters" in out and " FLOPs" in out, err
    assert not list(tmp_path.iterdir())


def test_evaluations_read_the_stream_that_is_scored(tiny_data, cli, tmp_path):
    """40 windows of 64 tokens are most of this stream, and at the last evaluations training is nearly
    over."""
    needs("evals", "eval_windows")
    run = tmp_path / "run"
    recipe = TINY | dict(evals=13, eval_windows=40)
    assert cli(*options(**recipe, data=tiny_data), "--run_dir", run, "--steps", 13, *PLAIN)[0] == 0
    form = r"eval (\d+)/(\d+) val_loss (\d+\.\d+) on 40 windows of 64 tokens spread over validation"
    found = [re.fullmatch(form, line) for line in log_lines(run) if line.startswith("eval ")]
    assert len(found) == 12 and all(found)
    (before, _, higher), (last, steps, lower) = (
        [float(word) for word in match.groups()] for match in found[-2:]
    )
    # As streams of their own, as evaluations see them: a scorer that adapts to a stream gains less on these.
    tokens = reading.read_shard(tiny_data / "val.bin")
    rows = np.stack([tokens[start : start + 65] for start in range(0, len(tokens) - 64, 64)])
    windows = score(cli, run, rows, tmp_path)[:, 1:].astype(np.float64).mean(1)
    # Of the windows' mean: 40 of 47, drawn without return, with four standard errors. Of the steps that are
    # left: learning rates fall to zero, so these move the loss by no more than as many steps did before. And
    # half of the last digit that is printed.
    sampling = 4 * windows.std(ddof=1) * math.sqrt((1 - 40 / len(windows)) / 40)
    training = abs(higher - lower) * (steps - last) / (last - before)
    assert abs(lower - windows.mean()) <= sampling + training + 0.5e-4


# ---- kills, stops, broken disks


def test_killed_again_and_again(tiny_data, recipe_run, tmp_path):
    """SIGKILL before the first checkpoint, while one is written, in the last model of an ensemble, and when
    there is only the scoring left: in the end the run is the one that nobody killed, and what was finished
    was not trained again."""
    run = tmp_path / "run"
    steps = [line.split(" epoch ")[0] for line in steps_of(recipe_run)]
    quarter = len(steps) // 4
    n_weights = len(list(recipe_run.glob("weights-*.pt")))

    def being_saved():
        if not has_logged(run, steps[quarter]):
            return False
        return list(run.glob("state-*.tmp")) or has_logged(run, steps[2 * quarter])

    moments = {
        "early": lambda: (run / "log.txt").exists() and (run / "log.txt").stat().st_size > 0,
        "while one is written": being_saved,
        "in the last model": lambda: has_logged(run, steps[3 * quarter]),
        "scoring": lambda: len(list(run.glob("weights-*.pt"))) == n_weights,
    }
    finished = {}
    process = start(tiny_data, run, recipe=RECIPE)
    for has_come in moments.values():
        wait_for(has_come, process)
        process.kill()
        # The newest may be written a second time: it is finished when the next checkpoint says so.
        finished |= {path: path.stat().st_mtime_ns for path in sorted(run.glob("weights-*.pt"))[:-1]}
        if (run / "record.json").exists():
            break  # on a busy machine the run may end before it is killed
        process = Forked(["--resume", run], tmp_path)  # on the device, and compiled or not, as it was started
    else:
        status, _, err = process.wait()
        assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert_same_end(run, recipe_run)


def test_sigterm_saves_first(stopped_run, finished_run, cli, copy_of_stopped):
    status, _, err = cli("--resume", copy_of_stopped)
    assert status == 0, err
    assert_same_end(copy_of_stopped, finished_run)


def test_sigint_saves_first(tiny_data, finished_run, cli, tmp_path, capsys):
    """The one line that it prints names the command that goes on. There is no checkpoint but the one that the
    signal causes."""
    run = tmp_path / "run"
    argv = [*options(**TINY | {"save_every": 1000}, data=tiny_data), "--run_dir", run, *PLAIN]
    status = stop_at(3, signal.SIGINT, run, argv)
    err = capsys.readouterr().err
    assert status == 130 and err.count("\n") == 1 and f"--resume {run}" in err, err
    assert len(list(run.glob("state-*.pt"))) == 1 and not (run / "record.json").exists()
    assert cli("--resume", run)[0] == 0
    assert_same_end(run, finished_run)


def test_two_processes_on_one_run(tiny_data, finished_run, cli, tmp_path):
    """The second is refused, and the first does not notice."""
    run = tmp_path / "run"
    process = start(tiny_data, run)
    wait_for(lambda: has_logged(run, "step 3/"), process)
    process.send_signal(signal.SIGSTOP)
    assert_refused(cli("--resume", run, *PLAIN), run)
    assert_refused(cli(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN), "--run_dir")
    process.send_signal(signal.SIGCONT)
    assert process.wait()[0] == 0
    assert_same_end(run, finished_run)


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond so many bytes: what a full disk looks like to a run."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(finished_run, cli, copy_of_stopped):
    """There is room for the log but not for a checkpoint, and then there is again."""
    run = copy_of_stopped
    before = {path.name: path.read_bytes() for path in run.glob("state-*.pt")}
    size = min(map(len, before.values())) - 1000
    if size < (run / "log.txt").stat().st_size + 10_000:
        pytest.skip("the script's checkpoints are smaller than its log, so a limit cannot tell them apart")
    with largest_file(size):
        status, _, err = cli("--resume", run, *PLAIN)
    assert status not in (0, 2) and err.count("\n") == 1 and "--resume" in err, err
    assert {path.name: path.read_bytes() for path in run.glob("state-*.pt")} == before
    assert not list(run.glob("*.tmp"))
    assert cli("--resume", run, *PLAIN)[0] == 0
    assert_same_end(run, finished_run)


def test_full_disk_while_scoring(finished_run, tiny_data, cli, tmp_path):
    """There is no file that somebody could take for a score."""
    out = tmp_path / "nll.npy"
    with largest_file(5000):  # 3,010 numbers take more
        status, _, err = cli("--score", finished_run, "--tokens", tiny_data / "val.bin", "--nll", out, *PLAIN)
    assert status not in (0, 2) and err.count("\n") == 1, err
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint_falls_back_to_the_one_before(finished_run, cli, copy_of_stopped, damage):
    run = copy_of_stopped
    path = sorted(run.glob("state-*.pt"))[-1]
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data = data[: len(data) // 2]
    path.write_bytes(data)
    status, _, err = cli("--resume", run, *PLAIN)
    assert status == 0 and str(path) in err
    assert_same_end(run, finished_run)


def test_data_that_changed_under_a_run(tiny_data, cli, tmp_path):
    data, run = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "run"
    stopped = stop_at(3, signal.SIGTERM, run, [*options(**TINY, data=data), "--run_dir", run, *PLAIN])
    assert stopped == 130
    raw = bytearray((data / "train.bin").read_bytes())
    raw[5000] ^= 1
    (data / "train.bin").write_bytes(raw)
    assert_refused(cli("--resume", run, *PLAIN), "train.bin")


def test_a_clock_that_jumps(tiny_data, finished_run, cli, tmp_path, monkeypatch):
    """Somebody sets the clock of the machine back and forth: neither the run nor its times are touched by
    it."""
    now, jumps = time.time, itertools.cycle((0, 1e8, -1e8))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    assert cli(*options(**TINY, data=tiny_data), "--run_dir", tmp_path / "run", *PLAIN)[0] == 0
    monkeypatch.undo()
    assert_same_end(tmp_path / "run", finished_run)
    lines = [line for line in log_lines(tmp_path / "run") if line.startswith("step ")]
    times = [float(line.split(" time ")[1].split("s")[0]) for line in lines]
    assert times == sorted(times) and times[0] >= 0
    # The last step's time is printed in tenths of a second.
    assert times[-1] <= record_of(tmp_path / "run")["train_seconds"] + 0.05 < 1e6


# ---- an edited script


def edited_script(folder):
    """The script with one comment more, in a folder of its own."""
    folder.mkdir()
    script = folder / SCRIPT.name
    script.write_bytes(SCRIPT.read_bytes() + b"\n# edited\n")
    return script


def test_an_edited_script_is_not_resumed(cli, copy_of_stopped, tmp_path):
    run = copy_of_stopped
    before = {path: path.read_bytes() for path in run.iterdir()}
    status, _, err = cli("--resume", run, *PLAIN, script=edited_script(tmp_path / "edited"))
    assert status == 2 and err.count("\n") == 1 and "--resume" in err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_force_goes_on_and_makes_a_trial(finished_run, copy_of_stopped, cli, tmp_path):
    """A trial it stays, also where the edited script goes on from a checkpoint of its own, which needs no
    force. One comment changes nothing else, so all the rest is the same."""
    run, script = copy_of_stopped, edited_script(tmp_path / "edited")
    stopped = stop_at(20, signal.SIGTERM, run, ["--resume", run, "--force", *PLAIN], script=script)
    if stopped == 130:  # else the run had ended before the signal came
        status, _, err = cli("--resume", run, *PLAIN, script=script)
        assert status == 0, err
    assert (run / "val_nll.npy").read_bytes() == (finished_run / "val_nll.npy").read_bytes()
    assert record_of(run)["trial"] is True and record_of(finished_run)["trial"] is False


# ---- weights that are not what they were


def replace_file(path, data):
    """Put other bytes into a file whose name may hold a digest of them."""
    old, new = (hashlib.sha256(content).hexdigest() for content in (path.read_bytes(), data))
    path.unlink()
    for length in range(64, 7, -1):
        if old[:length] in path.name:
            path = path.with_name(path.name.replace(old[:length], new[:length]))
            break
    path.write_bytes(data)


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "what", ["flipped", "truncated", "other tensors", "pickle", "pickle by torch", "none"]
)
def test_damaged_weights_are_not_scored(finished_run, tiny_data, cli, tmp_path, what):
    run, evil = shutil.copytree(finished_run, tmp_path / "run"), tmp_path / "evil"
    [path] = run.glob("weights-*.pt")
    data = bytearray(path.read_bytes())
    if what == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif what == "other tensors":
        torch.save({"nonesuch": torch.zeros(3)}, tmp_path / "other.pt")
        replace_file(path, (tmp_path / "other.pt").read_bytes())
    elif what == "pickle":
        replace_file(path, pickle.dumps(Evil(evil)))
    elif what == "pickle by torch":
        torch.save({"nonesuch": Evil(evil)}, tmp_path / "other.pt")
        replace_file(path, (tmp_path / "other.pt").read_bytes())
    else:
        path.unlink()
    out = tmp_path / "o.npy"
    result = cli("--score", run, "--tokens", tiny_data / "val.bin", "--nll", out, *PLAIN)
    assert_refused(result, run, out, evil)


# ---- several members, several ranks


def test_more_members_later(tiny_data, cli, tmp_path):
    """A finished run that is given a second member is the same as two from the start."""
    needs("members")
    one, both = tmp_path / "one", tmp_path / "both"
    for run, members in ((one, 1), (both, 2)):
        recipe = options(**TINY | {"members": members}, data=tiny_data)
        assert cli(*recipe, "--run_dir", run, "--steps", 6, *PLAIN)[0] == 0
    weights = {path: path.stat().st_mtime_ns for path in one.glob("weights-*.pt")}
    alone = record_of(one)["val_loss"]
    assert_refused(cli("--resume", one, *PLAIN), one)  # it is finished
    assert cli("--resume", one, "--members", 2, *PLAIN)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert (one / "val_nll.npy").read_bytes() == (both / "val_nll.npy").read_bytes()
    record = record_of(one)
    assert record["members"] == 2 and record["steps"] == 12 and record["val_loss"] != alone
    assert_refused(cli("--resume", one, "--members", 1, *PLAIN), "--members")


def test_two_ranks_go_on_where_one_stopped(
    finished_run, second_seed, tiny_data, copy_of_stopped, cli, tmp_path
):
    run = copy_of_stopped
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(SCRIPT), "--resume", str(run), *PLAIN]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert record_of(run)["ranks"] == 2
    assert record_of(run)["tokens_seen"] == record_of(finished_run)["tokens_seen"]
    assert_same_model(run, finished_run, second_seed, tiny_data, cli, tmp_path)


def test_one_rank_goes_on_where_two_stopped(finished_run, second_seed, tiny_data, cli, tmp_path):
    """Both are asked to stop; the first of them says so, and writes the log."""
    run = tmp_path / "run"
    ranks = start_ranks(2, tiny_data, run)
    wait_for(lambda: has_logged(run, "step 11/"), *ranks)
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    (status, _, err), (other_status, _, other_err) = (process.wait() for process in ranks)
    assert (status, other_status) == (130, 130), err + other_err
    assert f"--resume {run}" in err and f"--resume {run}" not in other_err
    assert not (run / "record.json").exists()
    assert cli("--resume", run, *PLAIN)[0] == 0
    assert record_of(run)["ranks"] == 2
    # Before the first update the model is the same. Its loss is printed with four digits, of which rounding
    # may turn the last.
    first, expected = (float(steps_of(path)[0].split(" loss ")[1].split()[0]) for path in (run, finished_run))
    assert abs(first - expected) < 1.5e-4
    assert_same_model(run, finished_run, second_seed, tiny_data, cli, tmp_path)


# ---- mistakes of the user: one line that names the option or file, status 2, nothing written

BAD_OPTIONS = [
    "--nonesuch 1",
    "--track nonesuch",
    "--steps 0",
    "--steps few",
    "--seed -1",
    "--epochs 0",
    "--epochs nan",
    "--members 0",
    "--train_tokens 0",
    "--train_tokens 40000",  # more than the shard holds
    "--batch_tokens 1000",  # no multiple of the context
    "--device abacus",
    "--data nonesuch",
]


@pytest.mark.parametrize("words", BAD_OPTIONS)
def test_impossible_options(tiny_data, cli, tmp_path, words):
    name, value = words.split()
    if name != "--nonesuch":
        needs(name[2:])
    run = tmp_path / "run"
    result = cli(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN, name, value)
    assert_refused(result, value if name == "--data" else name, run)


def test_options_that_do_not_go_together(finished_run, tiny_data, stopped_run, cli, tmp_path):
    none, out = tmp_path / "none", tmp_path / "o.npy"
    val = tiny_data / "val.bin"
    recipe = options(**TINY, data=tiny_data)
    new = [*recipe, "--run_dir", none]
    for argv, named in (
        ([*new, "--tokens", val], "--score"),
        ([*new, "--nll", out], "--score"),
        ([*new, "--prompt", "x"], "--sample"),
        ([*new, "--length", 5], "--sample"),
        ([*recipe, "--run_dir", finished_run], "--run_dir"),
        (["--score", finished_run], "--tokens"),
        (["--score", finished_run, "--tokens", val], "--nll"),
        (["--score", none, "--tokens", val, "--nll", out], none),
        (["--score", stopped_run, "--tokens", val, "--nll", out], stopped_run),  # it has no final weights yet
        (["--score", finished_run, "--sample", finished_run], "--sample"),
        (["--sample", none], none),
        (["--resume", none], none),
        (["--resume", finished_run], finished_run),
        (["--resume", stopped_run, "--epochs", 3], "--epochs"),
        (["--resume", stopped_run, "--steps", 3], "--steps"),
    ):
        assert_refused(cli(*argv, *PLAIN), named, none, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tiny_data, cli, tmp_path):
    run = tmp_path / "run"
    result = cli(*options(**TINY, data=tiny_data), "--run_dir", run, "--compile", "off", "--device", "cuda")
    assert_refused(result, "--device", run)


def break_data(folder, what):
    meta, train = folder / "meta.json", folder / "train.bin"
    stored = json.loads(meta.read_text())
    if what == "no meta":
        meta.unlink()
    elif what == "meta is not JSON":
        meta.write_text("{")
    elif what == "meta lacks a key":
        meta.write_text(json.dumps({name: value for name, value in stored.items() if name != "bos_id"}))
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
        reading.write_shard(train, np.full(30_000, 300))
        stored["sha256"]["train.bin"] = hashlib.sha256(train.read_bytes()).hexdigest()
        meta.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "what, named",
    [
        ("no meta", "meta.json"),
        ("meta is not JSON", "meta.json"),
        ("meta lacks a key", "meta.json"),
        ("no shard", "train.bin"),
        ("truncated", "train.bin"),
        ("empty", "train.bin"),
        ("other file", "train.bin"),
        ("changed", "train.bin"),
        ("ids too large", "train.bin"),
    ],
)
def test_broken_data(tiny_data, cli, tmp_path, what, named):
    data, run = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "run"
    break_data(data, what)
    assert_refused(cli(*options(**TINY, data=data), "--run_dir", run, *PLAIN), named, run)


def npy(header, data=bytes(20)):
    """A .npy file with a header of one's own making."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def npy_of(descr="'<u2'", order="False", shape="(2, 5)", rest=""):
    return npy(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {rest}}}")


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros((2, 5), np.uint16))
    return buffer.getvalue()


def shard_header(*values):
    return np.array([*values, *[0] * (256 - len(values))], "<i4").tobytes()


GOOD_SHARD = shard_header(20240520, 1, 10) + bytes(20)

# What is no file of tokens, by the name that it is given.
TOKEN_FILES = {
    "floats.npy": saved(np.zeros((2, 5))),
    "flat.npy": saved(np.zeros(5, np.uint16)),
    "ids.npy": saved(np.full((2, 5), 999, np.uint16)),
    "nothing.npy": saved(np.zeros((0, 5), np.uint16)),
    "objects.npy": saved(np.array([["a", {}]], dtype=object)),
    "noise.npy": b"not an array",
    "empty.npy": b"",
    "zip.npy": zipped(),
    "half_a_zip.npy": zipped()[:60],
    "half.npy": saved(np.zeros((2, 5), np.uint16))[:-3],
    "more_than_it_has.npy": npy_of(shape="(99999999999, 5)"),
    "more_than_there_is.npy": npy_of(shape="(4611686018427387904, 4)"),
    "negative.npy": npy_of(shape="(-2, -5)"),
    "unclosed.npy": npy_of(shape="(2, 5"),
    "deep.npy": npy_of(shape="(" * 300),
    "no_type.npy": npy_of(descr="None"),
    "large_type.npy": npy_of(descr="'2147483647u2'"),
    "odd_key.npy": npy_of(rest="1: 2"),
    "noise_in_the_header.npy": npy("\\ \x00 0x '' {"),
    "later_version.npy": npy_of().replace(b"NUMPY\x01", b"NUMPY\x09"),
    "short.bin": bytes(HEADER_BYTES),
    "empty.bin": b"",
    "half_a_header.bin": GOOD_SHARD[:101],
    "half.bin": GOOD_SHARD[:-3],
    "negative.bin": shard_header(20240520, 1, -1) + bytes(20),
    "none.bin": shard_header(20240520, 1, 0),
    "more_than_it_has.bin": shard_header(20240520, 1, 2**31 - 1) + bytes(20),
    "other_version.bin": shard_header(20240520, 2, 10) + bytes(20),
    "missing.npy": None,
    "missing.bin": None,
}


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_tokens_that_cannot_be_scored(finished_run, cli, tmp_path, name):
    if TOKEN_FILES[name] is not None:
        (tmp_path / name).write_bytes(TOKEN_FILES[name])
    out = tmp_path / "o.npy"
    result = cli("--score", finished_run, "--tokens", tmp_path / name, "--nll", out, *PLAIN)
    assert_refused(result, name, out)


@pytest.mark.parametrize("out", ["o.txt", "no/where/o.npy"])
def test_scores_that_cannot_be_written(finished_run, tiny_data, cli, tmp_path, out):
    tokens = tiny_data / "val.bin"
    result = cli("--score", finished_run, "--tokens", tokens, "--nll", tmp_path / out, *PLAIN)
    assert_refused(result, "--nll", tmp_path / out)


def a_pipe(path):
    os.mkfifo(path)


def a_device(path):
    path.symlink_to("/dev/zero")


def a_folder(path):
    path.mkdir()


def a_large_file(path):
    """Of a terabyte, nearly all of it a hole."""
    with open(path, "wb") as f:
        f.write(GOOD_SHARD)
        f.truncate(2**40)


@pytest.mark.parametrize("make", [a_pipe, a_device, a_folder, a_large_file])
@pytest.mark.parametrize("name", ["tokens.npy", "tokens.bin", "config.json", "train.bin", "meta.json"])
def test_what_is_no_plain_file_is_not_read(finished_run, tiny_data, cli, tmp_path, name, make):
    """To read one might never end, or take all memory there is."""
    out = tmp_path / "o.npy"
    if name.startswith("tokens"):
        make(tmp_path / name)
        argv = ["--score", finished_run, "--tokens", tmp_path / name, "--nll", out]
    elif name == "config.json":
        (tmp_path / "run").mkdir()
        make(tmp_path / "run" / name)
        argv = ["--score", tmp_path / "run", "--tokens", tiny_data / "val.bin", "--nll", out]
    else:
        data = shutil.copytree(tiny_data, tmp_path / "data")
        (data / name).unlink()
        make(data / name)
        out = tmp_path / "run"
        argv = [*options(**TINY, data=data), "--run_dir", out]
    assert_refused(cli(*argv, *PLAIN), name, out)


def test_a_shard_that_changes_during_a_run(finished_run, tiny_data, cli, tmp_path, monkeypatch):
    """What was checked is what is trained on and scored: the files may change, and even get shorter."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = tmp_path / "run"
    backward = torch.autograd.backward

    def change_the_shards(*args, **kwargs):
        if has_logged(run, "step 2/"):
            monkeypatch.undo()
            for name in ("train.bin", "val.bin"):
                with open(data / name, "r+b") as f:
                    f.seek(HEADER_BYTES)
                    f.write(b"\xff" * 2000)
                    f.truncate(HEADER_BYTES + 2000)
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", change_the_shards)
    assert cli(*options(**TINY, data=data), "--run_dir", run, *PLAIN)[0] == 0
    assert (data / "train.bin").stat().st_size == HEADER_BYTES + 2000
    assert_same_end(run, finished_run)
