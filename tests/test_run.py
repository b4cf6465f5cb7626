"""Whole runs, where a test must look inside: chains, students, checkpoints, averages, compilation. What can
be said through the command line alone is in test_contract.py."""

import argparse
import contextlib
import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
import reading
import train_gpt as t
from reference import EXACT, QUICK_END, config, environment, float64, run_main, weights_of
from runs import (
    PLAIN,
    ROOT,
    TINY,
    assert_refused,
    in_this_process,
    log_lines,
    options,
    record_of,
    resume,
    start,
    stop_at,
    wait_for,
)

pytestmark = pytest.mark.reference


def told(run):
    """What the log says of training and its result, without times."""
    wanted = ("step ", "eval ", "val_loss ", "member ", "model ")
    return [line.split(" tok/s")[0] for line in log_lines(run) if line.startswith(wanted)]


def metrics_of(run):
    """The lines of metrics.jsonl, without the clock's."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clock = dict.fromkeys(("tokens_per_second", "seconds"))
    return [json.loads(line) | clock for line in lines]


def assert_same_end(run, undisturbed):
    """Bit for bit: weights, NLL of every block, every step's line, also in metrics.jsonl."""
    weights = weights_of(run)
    for name, w in weights_of(undisturbed).items():
        assert torch.equal(weights[name], w), name
    assert (run / "val_nll.npy").read_bytes() == (undisturbed / "val_nll.npy").read_bytes()
    assert told(run) == told(undisturbed)
    assert metrics_of(run) == metrics_of(undisturbed)
    (state,) = harness.saved(run, harness.INDEX_FILE)
    assert state.stat().st_size < 5000  # what is left holds the clock and no weights
    assert not list(run.glob("*.tmp"))


def train_tiny(data, run, *argv, **changes):
    """A run in this process, where a test may have replaced functions of the script."""
    status, _, err = run_main(*options(**TINY | changes, data=data), "--run_dir", run, *PLAIN, *argv)
    assert status == 0, err
    return run


# ---- one model


def test_resumed_as_it_was_started(tiny_data, finished_run, tmp_path):
    """The command that a stopped run prints names no options: device, attention and compiler are those of the
    start. The most threads that any part had go into the record, for the track's limit."""
    run = tmp_path / "run"
    process = start(tiny_data, run)
    wait_for(
        lambda: (
            harness.saved(run, harness.INDEX_FILE)
            and harness.saved(run, harness.INDEX_FILE)[-1].name >= "state-0000010"
        ),
        process,
    )
    process.kill()
    path = harness.saved(run, harness.INDEX_FILE)[-1]
    state = harness.read_index(path)
    path.unlink()
    state["progress"]["threads"] += 7  # as if the first part had run on a larger machine
    harness.write_json(run / f"state-{state['progress']['step']:07d}", state, "json")
    status, _, err = run_main("--resume", run)
    assert status == 0, err
    assert "compiled: no" in (run / "log.txt").read_text().split("resumed at step")[1]
    assert record_of(run)["threads"] == state["progress"]["threads"]
    assert_same_end(run, finished_run)


class OneStepAhead(harness.Monitor):
    """As on a GPU, which is at work on a step while the one before is logged."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps_ahead = 1


def test_one_step_ahead_of_what_is_logged(tiny_data, finished_run, tmp_path, monkeypatch):
    """The same run, also when it is stopped on the way: the step that is ahead is logged and saved, too."""

    class Stopped(OneStepAhead):
        def report(self, step, losses, val_loss):
            super().report(step, losses, val_loss)
            if step + 1 == 6:
                self.run.stop_requested.append(0.0)

    monkeypatch.setattr(t, "Monitor", OneStepAhead)
    assert_same_end(train_tiny(tiny_data, tmp_path / "whole"), finished_run)
    monkeypatch.setattr(t, "Monitor", Stopped)
    run = tmp_path / "stopped"
    status, _, err = run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN)
    # Step 6 is read after step 7, so step 8 is the first to tell of the signal. It is read after step 9.
    assert status == 130 and f"step 9/{record_of(finished_run)['steps']} and saved" in err, err
    monkeypatch.setattr(t, "Monitor", OneStepAhead)
    status, _, err = run_main("--resume", run)
    assert status == 0, err
    assert_same_end(run, finished_run)


def test_checkpoints_of_many_members(tmp_path):
    """Of a chain's eleventh member, too, the newest is the last in the list."""
    for number in (10**8 + 100, 9 * 10**7 + 200, 10**8):
        harness.write_json(tmp_path / f"state-{number:07d}", number, "json")
    numbers = [json.loads(path.read_text()) for path in harness.saved(tmp_path, harness.INDEX_FILE)]
    assert numbers == [9 * 10**7 + 200, 10**8, 10**8 + 100]


def test_two_runs_that_took_one_name(tiny_data, finished_run, tmp_path):
    """Neither saw the other's folder when it looked: the first keeps it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    given, args = harness.parse_args([*options(**TINY | {"seed": 5}, data=tiny_data), *PLAIN])
    args.run_dir = run
    with pytest.raises(harness.UserError, match="taken this name"):
        harness.train_command(given, args)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


FOREIGN = [
    "log.txt",
    "metrics.jsonl",
    "draft.tmp",
    "state-0000005.0123456789abcdef.pt",
    "config.json",
    "a/b.txt",
]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_new_run_leaves_other_folders_alone(tiny_data, tmp_path, name):
    """One file of somebody's is enough, even if a run has files of that name."""
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("{}")
    before = contents(run)
    assert_refused(run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN), "--run_dir")
    assert contents(run) == before


def test_a_new_run_takes_no_record_and_no_file(tiny_data, finished_run, tmp_path, monkeypatch):
    """Nor a link to nowhere, and an empty name is not the current folder."""
    record = tmp_path / "record"
    record.mkdir()
    for name in ("log.txt", "record.json", "val_nll.npy"):
        shutil.copy(finished_run / name, record)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = contents(tmp_path)
    monkeypatch.chdir(record)
    for taken in (record, tmp_path / "file", tmp_path / "link", ""):
        assert_refused(run_main(*options(**TINY, data=tiny_data), "--run_dir", taken, *PLAIN), "--run_dir")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "left", [(), ("log.txt",), ("config.json", "log.txt", "metrics.jsonl", "record.json.tmp")]
)
def test_a_folder_without_a_checkpoint_is_free(tiny_data, finished_run, tmp_path, left):
    """It is empty, or a run ended in it before there was anything to resume. Its log starts afresh."""
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).write_bytes((finished_run / name.removesuffix(".tmp")).read_bytes()[:5000])
    train_tiny(tiny_data, run, "--steps", 3)
    assert (run / "log.txt").read_text().count(harness.SOURCE_END) == 2
    assert [line.split()[1] for line in told(run) if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    assert not list(run.glob("*.tmp"))


def test_what_is_put_into_a_run_later_stays(tiny_data, tmp_path):
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 3)
    for name in ("draft.tmp", "state-of-the-art.tmp"):
        (run / name).write_text("mine")
    assert run_main("--resume", run, "--members", 2, *PLAIN)[0] == 0
    assert {path.name for path in run.glob("*.tmp")} == {"draft.tmp", "state-of-the-art.tmp"}


def test_a_score_overwrites_nothing(tiny_data, finished_run, tmp_path):
    out = tmp_path / "out.npy"
    for make in (lambda: out.write_text("mine"), lambda: out.symlink_to("nowhere")):
        make()
        score = ("--score", finished_run, "--tokens", tiny_data / "val.bin", "--nll", out, *PLAIN)
        assert_refused(run_main(*score), "--nll")
        assert out.is_symlink() or out.read_text() == "mine"
        out.unlink()


# ---- what a machine may lack


@pytest.fixture(autouse=True)
def new_machine(monkeypatch):
    """What the script has found out about the machine holds for a process, which all these tests share."""
    monkeypatch.setattr(harness, "MISSING", [])


@contextlib.contextmanager
def lost_terminal(kind):
    """Nothing can be written to stdout and stderr."""
    if kind == "full disk":
        terminal = open("/dev/full", "w")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        terminal = os.fdopen(writer, "w")
    with terminal, contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        yield


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
def test_a_terminal_that_is_lost(tiny_data, finished_run, tmp_path, kind):
    """The run ends well, and its log is whole, and says so once."""
    run = tmp_path / "run"
    argv = [ROOT / "train_gpt.py", *options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN]
    with lost_terminal(kind):
        status = in_this_process(harness.main, argv)
    assert status == 0
    assert_same_end(run, finished_run)
    assert "\n".join(log_lines(run)).count("nothing more is shown on") == 1


def signaled(function, *, when=lambda *args: True):
    def call(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    return call


def test_ctrl_c_without_a_terminal(tiny_data, finished_run, tmp_path, monkeypatch):
    """With `2>&1 | tee`, the reader gets the signal, too, and is gone first. The checkpoint is still
    written."""
    run = tmp_path / "run"
    recipe = options(**TINY | dict(save_every=1000), data=tiny_data)
    step = signaled(t.train_step, when=lambda p, optimizer, model, step, *args: step == 3)
    with monkeypatch.context() as patch, lost_terminal("closed pipe"):
        patch.setattr(t, "train_step", step)
        status = in_this_process(harness.main, [ROOT / "train_gpt.py", *recipe, "--run_dir", run, *PLAIN])
    assert status == 130 and [path.name[:13] for path in harness.saved(run, harness.INDEX_FILE)] == [
        "state-0000004"
    ]
    assert run_main("--resume", run)[0] == 0
    assert_same_end(run, finished_run)


def fails(number, when=lambda *args: True):
    """A system call that does not work, and otherwise the true one's result: None."""

    def call(*args):
        if when(*args):
            raise OSError(number, os.strerror(number))

    return call


def is_folder(number):
    return stat.S_ISDIR(os.fstat(number).st_mode)


LACKING = [
    (harness.fcntl, "flock", errno.ENOSYS, "no locks"),
    (harness.fcntl, "flock", errno.ENOLCK, "no locks"),
    (os, "fsync", errno.EINVAL, "cannot sync"),
]


@pytest.mark.parametrize("module, name, number, words", LACKING)
def test_file_systems_of_clusters(tiny_data, tmp_path, monkeypatch, module, name, number, words):
    """No lock, or no fsync on folders: the run goes on, and says so once."""
    when = is_folder if name == "fsync" else lambda *args: True
    monkeypatch.setattr(module, name, fails(number, when))
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 6)
    assert "\n".join(log_lines(run)).count(words) == 1 and (run / "record.json").exists()


def test_without_locks_nothing_is_taken_over(tiny_data, tmp_path, monkeypatch):
    """A run before its first checkpoint may be under way."""
    monkeypatch.setattr(harness.fcntl, "flock", fails(errno.ENOSYS))
    run = tmp_path / "run"
    argv = [*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN, "--steps", 3]
    with monkeypatch.context() as patch:
        patch.setattr(harness, "train", fails(errno.EIO))
        assert run_main(*argv)[0] == 1
    before = contents(run)
    assert before
    assert_refused(run_main(*argv), run)
    assert contents(run) == before


@pytest.mark.parametrize("after, remedy", [(1, "start again"), (2, "go on with --resume")])
def test_a_disk_that_fails(tiny_data, tmp_path, monkeypatch, after, remedy):
    """With the first checkpoint or the second: one line that names the file, and what is left of the run."""
    run = tmp_path / "run"
    names = []
    write_file = harness.write_file

    def noted(path, *args):
        names.append(path.name)
        if sum(name.endswith(".0of1") for name in names) == after:
            monkeypatch.setattr(os, "fsync", fails(errno.EIO))
        return write_file(path, *args)

    monkeypatch.setattr(harness, "write_file", noted)
    status, _, err = run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN)
    assert status == 1 and err.count("\n") == 1
    assert "cannot be written (Input/output error)" in err and str(run) in err and remedy in err
    assert len(harness.saved(run, harness.INDEX_FILE)) == after - 1 and not list(run.glob("*.tmp"))


def test_out_of_memory(tiny_data, tmp_path):
    """A model of 34 trillion parameters: one line that says what to lower, also in the log. The corrected
    command then takes the same folder."""
    run = tmp_path / "run"
    recipe = options(**TINY | dict(n_layer=1000, n_embd=2**16, mlp_hidden=2**16), data=tiny_data)
    status, _, err = run_main(*recipe, "--run_dir", run, *PLAIN, "--steps", 3)
    assert status == 1 and err.count("\n") == 1 and "out of memory" in err and "--device_tokens" in err
    assert log_lines(run)[-1].startswith("out of memory")
    train_tiny(tiny_data, run, "--steps", 3)


LAUNCHES = [
    (dict(RANK=1), "RANK=1"),
    (dict(WORLD_SIZE=2), "WORLD_SIZE=2"),
    (dict(LOCAL_RANK=1), "LOCAL_RANK=1"),
    (dict(RANK=2, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1), "RANK=2"),
    (dict(RANK=-1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1), "RANK=-1"),
    (dict(RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2), "MASTER_ADDR"),
    (dict(WORLD_SIZE="two"), "WORLD_SIZE=two"),
]


@pytest.mark.parametrize("env, named", LAUNCHES)
def test_launchers_that_tell_half(tiny_data, tmp_path, monkeypatch, env, named):
    """One line on whatever rank this is, and nothing is trained."""
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    run = tmp_path / "run"
    assert_refused(run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN), named, run)


def test_a_run_follows_its_data(tiny_data, finished_run, tmp_path, monkeypatch):
    """To where it is now, if it is the same; a later command finds it there by itself."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, "data")
    step = signaled(t.train_step, when=lambda p, optimizer, model, step, *args: step == 11)
    with monkeypatch.context() as patch:
        patch.setattr(t, "train_step", step)
        assert run_main(*options(**TINY, data="./data"), "--run_dir", "run", *PLAIN)[0] == 130
    Path("data").rename("moved")
    assert_refused(run_main("--resume", "run", *PLAIN), "--data")
    other = Path(shutil.copytree("moved", "other"))
    (other / "train.bin").write_bytes(b"\0" + (other / "train.bin").read_bytes()[1:])
    assert_refused(run_main("--resume", "run", "--data", "./other", *PLAIN), "other/train.bin")
    assert run_main("--resume", "run", "--data", "./moved", *PLAIN)[0] == 0
    assert_same_end(tmp_path / "run", finished_run)
    assert run_main("--resume", "run", "--members", 2, *PLAIN)[0] == 0


def test_n_grams_are_part_of_the_score(tiny_data, tmp_path):
    """A score knows the training tokens; the loss is that of the network's logits plus the gate times the
    n-grams' log-probabilities, and training has moved the gate. It is the members' mean that
    learns from the stream."""
    changes = dict(members=2, ngrams="1,2", online_lr=0.1)
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 3, **changes)
    score = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "nll.npy", *PLAIN)
    assert run_main(*score)[0] == 0
    nll = np.load(tmp_path / "nll.npy").astype(np.float64)
    assert nll.sum() / 3009 == pytest.approx(record_of(run)["val_loss"], rel=1e-5)
    c, meta, _ = harness.read_run(run)
    m = harness.Machine(torch.device("cpu"), torch.float32)
    train_tokens = harness.read_shard(tiny_data / "train.bin", c.vocab_size)[: c.train_tokens]
    val_tokens = harness.read_shard(tiny_data / "val.bin", c.vocab_size)
    counted = torch.from_numpy(t.NgramModel(train_tokens, c).nll(val_tokens[None])[0] / -4096.0)
    x = torch.from_numpy(val_tokens.astype(np.int64))
    columns = torch.zeros(3009, c.vocab_size, dtype=torch.long)
    members = []  # of each, p [3009, V]
    for number, c_model in t.scored_models(c):
        p = harness.load_weights(run, number, c_model, m)
        assert p["ngram_gate"].abs().max() > 0
        phase = t.phase_schedule(1.0, c_model)
        inputs = torch.cat([x[:3009, None], columns], dim=1).split(c.seq_len)
        h = torch.cat([t.forward(p, window[None], c_model, m, phase)[0] for window in inputs])
        gate = 0.25 + h @ p["ngram_gate"].T
        logits = t.head_logits(h, p["lm_head"], c_model)
        members.append((logits + gate * counted[:3009]).softmax(-1).numpy())
    of_all = np.pad(-np.log(np.mean(members, axis=0)), ((1, 0), (0, 0)))
    inputs = np.concatenate([val_tokens[:, None], counted * -4096.0], axis=1).astype(np.uint16)
    learning = t.online_nll(of_all[None], inputs[None], c)[0]
    np.testing.assert_allclose(nll[1:], learning[1:], rtol=1e-5, atol=1e-6)
    (plain,) = reading.read_log(run / "log.txt").of(reading.Without)
    assert plain.loss == pytest.approx(of_all[np.arange(1, 3010), val_tokens[1:]].mean(), abs=2e-6)


def test_n_grams_and_learning_from_the_stream_need_a_small_vocabulary(tiny_data, tmp_path):
    """Which one it is, the data says. Of 50,257 tokens, a number for each would not fit into any memory."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"vocab_size": 2000}))
    for option, value in [("--ngrams", "1,2"), ("--online_lr", "0.1")]:
        words = [*options(**TINY, data=data), "--run_dir", tmp_path / "run", *PLAIN, option, value]
        assert_refused(run_main(*words), f"{option} {value}")
        assert not (tmp_path / "run").exists()


def test_a_score_follows_the_data_and_the_machine(tiny_data, tmp_path):
    """The training tokens, which look-ups need, are elsewhere; and another number of tokens fits into
    memory."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = train_tiny(data, tmp_path / "run", "--steps", 3, memory="2,5")
    data.rename(tmp_path / "moved")
    score = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "nll.npy", *PLAIN)
    assert_refused(run_main(*score), "--data")
    place = ("--data", tmp_path / "moved", "--device_tokens", 64, "--loss_chunk", 50)
    assert run_main(*score, *place)[0] == 0
    nll = np.load(tmp_path / "nll.npy").astype(np.float64)
    # Sums of float32 in another order.
    assert nll.sum() / 3009 == pytest.approx(record_of(run)["val_loss"], rel=1e-5)
    assert_refused(run_main(*score, "--softcap", 20), "--softcap")


ENDS = [
    (harness, "save_weights", lambda *args: True),
    (t, "run_nll", lambda *args: True),
    (harness, "from_prepare", lambda *args: True),
]


@pytest.mark.parametrize("module, name, when", ENDS)
def test_stopped_at_the_end(tiny_data, finished_run, tmp_path, monkeypatch, module, name, when):
    """Between training and scoring, while it is scored, and where a sample is written: the run stops, says
    how to go on, and goes on."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signaled(getattr(module, name), when=when))
        status, _, err = run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN)
    assert status == 130 and err.count("\n") == 1 and f"--resume {run}" in err
    assert log_lines(run)[-1] == err.strip().removeprefix("train_gpt.py: ")
    assert not (run / "record.json").exists()
    assert run_main("--resume", run)[0] == 0
    assert_same_end(run, finished_run)


def test_stopped_when_all_is_done(tiny_data, finished_run, tmp_path, monkeypatch):
    """There is nothing to go on with, and the line says so."""
    run = tmp_path / "run"
    when = lambda log, line, *args: line.startswith("the run is in")  # noqa: E731
    monkeypatch.setattr(harness.Log, "__call__", signaled(harness.Log.__call__, when=when))
    status, _, err = run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN)
    assert status == 130 and err.count("\n") == 1 and "finished" in err and "--resume" not in err
    assert_same_end(run, finished_run)


def test_names_forge_no_lines(tiny_data, tmp_path):
    run = tmp_path / "a\nval_loss 0.1"
    assert_refused(run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN), "val_loss 0.1", run)


def test_samples_control_no_terminal(finished_run, monkeypatch):
    """Whatever the model writes, and whatever it is given."""
    monkeypatch.setattr(harness, "from_prepare", lambda *args: Encoding())
    argv = ("--sample", finished_run, "--prompt", "\x1b[31m", *PLAIN)
    status, out, _ = run_main(*argv)
    assert status == 0 and out == "a\tb\n\\x1b[2J\\x07\\r\\x85é\n"


class Encoding:
    def encode_ordinary(self, text):
        return list(text.encode())

    def decode(self, ids):
        return "a\tb\n\x1b[2J\x07\r\x85é"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_track_without_a_gpu(tiny_data, tmp_path):
    run = tmp_path / "run"
    recipe = options(**TINY | dict(track="mini", n_head=2), data=tiny_data)
    assert_refused(run_main(*recipe, "--run_dir", run, "--steps", 1), "--device cpu", run)
    assert run_main(*recipe, "--run_dir", run, "--steps", 1, *PLAIN)[0] == 0


@pytest.mark.parametrize(
    "track, found, wanted, fits",
    [
        ("mini", "sdpa", "auto", False),
        ("mini", "sdpa", "sdpa", True),
        ("mini", "flex", "auto", True),
        ("pocket", "sdpa", "auto", True),
    ],
)
def test_a_gpu_track_without_its_kernels(track, found, wanted, fits):
    """SDPA, which would run out of memory, is no fallback there."""
    m = harness.Machine(torch.device("cuda"), torch.bfloat16, attention=found)
    m.reasons["attention"] = "sdpa (varlen does not work here: no kernel)"
    args = argparse.Namespace(device="auto", attention=wanted)
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(harness.UserError, match="no kernel.*--attention sdpa")
    ):
        harness.check_machine(config(track=track), m, args)


def test_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path, monkeypatch):
    """With one line, and with checkpoints on disk that are all finite."""
    monkeypatch.setattr(harness, "RANGES", ())  # no rate within them overflows so soon
    run = tmp_path / "run"
    recipe = options(**TINY | dict(head_lr=1e38, save_every=1), data=tiny_data)
    status, _, err = run_main(*recipe, "--run_dir", run, *PLAIN)
    assert status == 1 and err.count("\n") == 1 and "step " in err and "finite" in err
    assert "checkpoint" in err and not (run / "record.json").exists()
    for path in harness.saved(run, harness.SHARD_FILE):
        assert all(
            w.isfinite().all() for kinds in harness.load_tensors(path).values() for w in kinds.values()
        )


def test_config_that_lacks_an_entry(finished_run, tmp_path):
    """Each of them, one at a time."""
    stored = json.loads((finished_run / "config.json").read_text())
    for name in stored:
        rest = {other: value for other, value in stored.items() if other != name}
        (tmp_path / "config.json").write_text(json.dumps(rest))
        status, _, err = run_main("--resume", tmp_path)
        assert status == 2 and err.count("\n") == 1 and "config.json" in err, name


def with_entry(stored, path, value):
    """A copy with another value under names with dots between: config.n_layer."""
    name, _, rest = path.partition(".")
    return stored | {name: with_entry(stored[name], rest, value) if rest else value}


# An entry of config.json, what somebody has made of it, and what the refusal names beside the file.
BAD_ENTRIES = [
    ("config", [1], "damaged"),
    ("config.n_layer", 10**400, "--n_layer"),
    ("config.n_layer", math.inf, "--n_layer"),
    ("config.n_layer", True, "--n_layer"),
    ("config.n_layer", 3.0, "--n_layer"),
    ("config.members", 10**7, "--members"),
    ("config.loop_times", 10**8, "--loop_times"),
    ("config.memory", ",".join(["3"] * 1000), "--memory"),
    ("config.softcap", math.nan, "--softcap"),
    ("config.iha", None, "--iha"),
    ("config.data", "a\0b", "--data"),
    ("config.data", "a\nb", "--data"),
    ("config.data", "\ud800", "--data"),
    ("config.student", "\x1b[2J", "--student"),
    ("config.nonesuch", 1, "damaged"),
    ("config.track", [], "damaged"),
    ("data", None, "damaged"),
    ("data.vocab_size", 257.0, "whole number"),
    ("data.vocab_size", 257.5, "whole number"),
    ("data.vocab_size", 10**9, "vocab_size"),
    ("data.sha256", {"train.bin": None, "val.bin": None}, "text"),
    ("data.text_bytes.val", 10**400, "text_bytes"),
    ("device", "abacus", "options"),
    ("steps", "5", "options"),
    ("steps", -5, "options"),
    ("trial", "no", "options"),
]


@pytest.mark.parametrize("path, value, named", BAD_ENTRIES)
@pytest.mark.parametrize("command", ["--score", "--resume"])
def test_a_config_that_somebody_made_up(finished_run, tmp_path, command, path, value, named):
    stored = json.loads((finished_run / "config.json").read_text())
    del stored["sha256"]
    stored = with_entry(stored, path, value)
    harness.write_json(tmp_path / "config.json", stored | {"sha256": harness.json_sha256(stored)})
    rest = ["--tokens", "x.npy", "--nll", tmp_path / "o.npy"] if command == "--score" else []
    assert_one_line(run_main(command, tmp_path, *rest), tmp_path / "config.json", named)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "text", [b"", b"[" * 10**5, b'{"a":' * 10**5, b"null", b"\xff", b"1" * 5000, b" " * 2**21]
)
def test_a_config_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    assert_one_line(run_main("--resume", tmp_path), tmp_path / "config.json")


def assert_one_line(result, *named):
    """A refusal: short, and without what could steer a terminal."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1), result
    assert len(err) < 1200 and err.rstrip("\n").isprintable()
    assert all(str(name) in err for name in named), err


def test_weights_that_are_not_numbers(tiny_data, tmp_path):
    """No score is made of NaN."""
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 2)
    (path,) = harness.saved(run, harness.WEIGHTS_FILE)
    stored = harness.load_tensors(path)
    stored["params"]["lm_head"][5, 5] = math.nan
    path.unlink()
    harness.write_tensors(run / "weights-0000000", stored)
    out = tmp_path / "nll.npy"
    argv = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", out, *PLAIN)
    assert_one_line(run_main(*argv), run, "NaN")
    assert not out.exists()


def test_scoring_from_memory_needs_the_training_tokens(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = train_tiny(data, tmp_path / "run", "--steps", 5, memory="2,5")
    score = ("--score", run, "--tokens", data / "val.bin", "--nll", tmp_path / "nll.npy", *PLAIN)
    assert run_main(*score)[0] == 0
    nll = np.load(tmp_path / "nll.npy").astype(np.float64)
    # Each NLL was rounded to float32, which is off by 2**-24 of it.
    assert nll.sum() / 3009 == pytest.approx(record_of(run)["val_loss"], rel=2**-24)
    (data / "train.bin").unlink()
    (tmp_path / "nll.npy").unlink()
    status, _, err = run_main(*score)
    assert status == 2 and "train.bin" in err and err.count("\n") == 1


@pytest.fixture
def path(monkeypatch):
    """The parameters after every optimizer step of the runs of this process."""
    path = []
    step = t.MuonAdamW.step

    def recorded(self, *args):
        step(self, *args)
        path.append({name: w.detach().clone() for name, w in self.p.items()})

    monkeypatch.setattr(t.MuonAdamW, "step", recorded)
    return path


def test_ema_is_the_average_of_the_path(tiny_data, tmp_path, path):
    with float64():
        run = train_tiny(tiny_data, tmp_path / "r", "--steps", 15, ema=0.8)
        weights = weights_of(run)
        for name, average in t.init_params(config()).items():
            for i, p in enumerate(path):
                decay = min(0.8, (i + 1) / (i + 10))
                average = decay * average + (1 - decay) * p[name]
            torch.testing.assert_close(weights[f"0 {name}"], average, **EXACT)


def test_a_steps_line_has_the_cross_entropy_alone(tiny_data, tmp_path, monkeypatch):
    """The first step of each model, from its seed's weights, computed by hand; terms of other kinds beside
    it."""
    with float64():
        changes = dict(members=2, distill_alpha=0.4, mtp_weight=0.3, bag_size=2, bag_until=0.01)
        run = train_tiny(tiny_data, tmp_path / "run", "--steps", 2, **changes)
        meta = json.loads((tiny_data / "meta.json").read_text())
        c = config(**changes)
        tokens = harness.read_shard(tiny_data / "train.bin", 257, meta["sha256"]["train.bin"])
        m = harness.Machine(torch.device("cpu"), torch.float64)
        lines = [line for line in told(run) if " step 1/" in line]
        for c_model, line in zip(t.model_configs(c), lines, strict=True):
            p = t.init_params(c_model)
            x, y, n_targets = t.Batches(tokens[:, None], c_model, m, 2).batch(0)
            h = t.forward(p, x, c_model, m, t.phase_schedule(0.5, c_model))
            logits = t.head_logits(h, p["lm_head"], c_model)
            ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
            assert f" loss {ce:.4f} " in line
        assert [sum(f" {name} " in line for name in ("loss", "mtp", "kl")) for line in lines] == [2, 3]


# ---- checkpoints


def test_training_goes_on_while_a_checkpoint_is_written(tiny_data, finished_run, tmp_path, monkeypatch, path):
    """The thread that writes the first one waits for steps to come, as if the disk were slow. It writes what
    was at the fifth step, and the run is the same."""
    go = threading.Event()
    seen = []
    train_step = t.train_step
    write_tensors = harness.write_tensors

    def counted(p, optimizer, model, step, *args):
        if step == 9:
            go.set()
        return train_step(p, optimizer, model, step, *args)

    def slow(path_of_file, content):
        if path_of_file.name.startswith("state-0000005"):
            seen.append(go.wait(60))
            seen.extend(torch.equal(content[name]["w"], w.flatten()) for name, w in vectors(path[4]))
        return write_tensors(path_of_file, content)

    def vectors(p):
        return [(name, w) for name, w in p.items() if t.param_table(config())[name].optimizer == "adamw"]

    monkeypatch.setattr(t, "train_step", counted)
    monkeypatch.setattr(harness, "write_tensors", slow)
    run = train_tiny(tiny_data, tmp_path / "run")
    assert len(seen) > 3 and all(seen)
    assert_same_end(run, finished_run)


BREAKS = {
    "while a shard is written": ("write_tensors", "state-0000015"),
    "between shard and index": ("write_json", "state-0000015"),
    "between index and removal": ("remove_states", "state-0000015"),
}


@pytest.mark.parametrize("function, name", BREAKS.values(), ids=BREAKS)
def test_a_disk_that_fills_up_during_a_save(tiny_data, finished_run, tmp_path, monkeypatch, function, name):
    """In the thread that writes, at the third checkpoint: one line that says so, and on disk what was whole.
    What the save has left is gone after --resume, and nothing else is."""
    run = tmp_path / "run"
    intact = getattr(harness, function)

    def full(path, *args):
        if path.name in (name, f"{name}.0of1") or (function == "remove_states" and args[-1] == 15):
            with harness.writing(run / name):
                raise OSError(errno.ENOSPC, "No space left on device")
        return intact(path, *args)

    monkeypatch.setattr(harness, function, full)
    status, _, err = run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN)
    assert status == 1 and err.count("\n") == 1 and "No space left" in err and "--resume" in err
    newest = 15 if function == "remove_states" else 10
    assert harness.number_of(harness.saved(run, harness.INDEX_FILE)[-1]) == newest
    assert any("0000015" in shard.name for shard in harness.saved(run, harness.SHARD_FILE)) == (
        function != "write_tensors"
    )
    monkeypatch.undo()
    for left in ("state-0000015.0of1.tmp", "weights-0000000.tmp", "config.json.tmp", "draft.tmp"):
        (run / left).write_text("half")
    assert run_main("--resume", run)[0] == 0
    assert f"resumed at step {newest}" in (run / "log.txt").read_text()
    (run / "draft.tmp").unlink()  # the user's own; none of the others is left
    assert_same_end(run, finished_run)


@pytest.fixture(scope="module")
def stopped_run(tiny_data, tmp_path_factory):
    """A run that lacks its last steps."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    argv = [*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN]
    assert stop_at(11, signal.SIGTERM, run, argv) == 130
    return run


@pytest.mark.parametrize("field", ["softcap", "score_stride", "window_short", "members", "muon_lr"])
@pytest.mark.parametrize("which", ["finished_run", "stopped_run"])
def test_a_bit_of_the_config_that_flips(request, tiny_data, tmp_path, which, field):
    """Each bit of the value that a field has: the config is refused, or is still the same. Of one of them, by
    the command line."""
    run = shutil.copytree(request.getfixturevalue(which), tmp_path / "run")
    path = run / "config.json"
    data = path.read_bytes()
    stored = harness.read_run(run)
    found = re.search(rf'"{field}": ([^,]+),'.encode(), data)
    for at, bit in itertools.product(range(*found.span(1)), range(8)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        with contextlib.suppress(harness.UserError):
            assert harness.read_run(run) == stored
    before = {file: file.read_bytes() for file in run.iterdir()}
    path.write_bytes(data.replace(found[0], found[0].replace(found[1], b"2")))
    score = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "nll.npy")
    for argv in (score, ("--resume", run)):
        status, out, err = run_main(*argv, *PLAIN)
        assert (status, out, err.count("\n")) == (2, "", 1) and "config.json" in err
    path.write_bytes(data)
    assert {file: file.read_bytes() for file in run.iterdir()} == before | {path: data}
    assert not (tmp_path / "nll.npy").exists()


@pytest.mark.parametrize("which", ["finished_run", "stopped_run"])
def test_the_config_of_another_run(request, tiny_data, tmp_path, which):
    """It is whole, but neither the weights nor the checkpoint are of that recipe."""
    run = shutil.copytree(request.getfixturevalue(which), tmp_path / "run")
    other = train_tiny(tiny_data, tmp_path / "other", softcap=30.0, epochs=0.1)
    shutil.copy(other / "config.json", run)
    (run / "record.json").unlink(missing_ok=True)
    score = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "nll.npy")
    for argv in (score, ("--resume", run)):
        status, out, err = run_main(*argv, *PLAIN)
        assert (status, err.count("\n")) == (2, 1) and str(run) in err
    assert not (tmp_path / "nll.npy").exists()


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_a_finished_run_without_its_checkpoint(finished_run, tmp_path, what):
    """It is finished, as before. It cannot grow, and is not trained from nothing."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    (path,) = harness.saved(run, harness.INDEX_FILE)
    if what == "damaged":
        path.write_bytes(path.read_bytes().replace(b"seconds", b"minutes"))
    else:
        path.unlink()
    before = {file: file.read_bytes() for file in run.iterdir()}
    for words, said in ((), "is finished"), (("--members", 2), "no checkpoint that is whole"):
        status, _, err = run_main("--resume", run, *words, *PLAIN)
        assert status == 2 and said in err.splitlines()[-1] and err.count("\n") <= 2
    (run / "record.json").unlink()
    assert run_main("--resume", run, *PLAIN)[0] == 2
    assert {file: file.read_bytes() for file in run.iterdir()} == {
        file: data for file, data in before.items() if file.name != "record.json"
    }


def test_weights_that_are_not_the_runs_own(tiny_data, finished_run, second_seed, tmp_path):
    """Two files of one number, then another run's file alone: nobody can say which was meant."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    (own,), (other,) = (harness.saved(path, harness.WEIGHTS_FILE) for path in (run, second_seed))
    shutil.copy(other, run)
    score = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", tmp_path / "nll.npy")
    status, _, err = run_main(*score, *PLAIN)
    assert (status, err.count("\n")) == (2, 1) and own.name in err and other.name in err
    own.unlink()
    status, _, err = run_main("--resume", run, "--members", 2, *PLAIN)
    assert (status, err.count("\n")) == (2, 1) and own.name in err


@pytest.mark.parametrize("what", ["cut", "gone", "a link"])
def test_a_log_that_is_not_whole(stopped_run, tmp_path, what):
    """Nothing is padded, nothing is written through a link, and the checkpoint stays as it is."""
    run = shutil.copytree(stopped_run, tmp_path / "run")
    log = run / "log.txt"
    data = log.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data)
    if what == "cut":
        log.write_bytes(data[:-2000])
    else:
        log.unlink()
    if what == "a link":
        log.symlink_to(elsewhere)
    (newest,) = harness.saved(run, harness.INDEX_FILE)[-1:]
    status, _, err = run_main("--resume", run, *PLAIN)
    assert (status, err.count("\n")) == (2, 1) and str(log) in err
    assert newest.exists() and elsewhere.read_bytes() == data
    assert what == "a link" or b"\0" not in log.read_bytes()


def test_torchrun_goes_on_with_the_run_that_it_began_alone(tiny_data, stopped_run, tmp_path, monkeypatch):
    """Somebody else's run in that folder is left alone, down to the last byte."""
    run = shutil.copytree(stopped_run, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    command = [*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN]
    status, _, err = run_main(*command, "--muon_lr", 0.01)
    assert (status, err.count("\n")) == (2, 1) and "muon_lr" in err
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    assert run_main(*command)[0] == 0


# ---- several models in one run

CHAIN = TINY | dict(
    device_tokens=512,
    loss_chunk=300,
    members=3,
    distill_alpha=0.4,
    distill_temp=1.2,
    bag_size=2,
    bag_until=0.3,
    ema=0.9,
    loop_first=1,
    loop_last=1,
    loop_times=1,
    dropout=0.1,
    recall="2,4",
    memory="3",
    student="distill_alpha=0.9,n_embd=16,mlp_hidden=32",
)
STEPS = 39  # of each model


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory):
    """A finished chain of three members and a student, with every phase there is."""
    return train_tiny(tiny_data, tmp_path_factory.mktemp("runs") / "chain", **CHAIN)


def test_metrics_are_the_logs(chain):
    """A line for each step, with the same keys in each, and the log's numbers, which are rounded."""
    lines = [json.loads(line) for line in (chain / "metrics.jsonl").read_text().splitlines()]
    assert all(list(line) == harness.Metrics.keys for line in lines)
    log = reading.read_log(chain / "log.txt")
    evals = {(entry.member, entry.step): entry.loss for entry in log.of(reading.Eval)}
    steps = log.of(reading.Step)
    for line, step in zip(lines, steps, strict=True):
        assert (line["model"], line["step"], line["steps"]) == (step.member, step.step, step.steps)
        loss = line["bag_loss"] if step.of_bags else line["loss"]
        assert (round(loss, 4), round(line["epoch"], 3)) == (step.loss, step.epoch)
        assert (line["loss"] is None) == step.of_bags
        assert (line["kl"] is None) == (step.of_bags or step.member == 1)
        assert round(line["seconds"], 1) == step.seconds
        val_loss = line["val_loss"] and round(line["val_loss"], 4)
        assert val_loss == evals.get((step.member, step.step))
    assert len(evals) == 4 and any(step.of_bags for step in steps)


@pytest.mark.parametrize(
    "end", [b'{"model": 1, "st', b"[]\n", b"5\n", b'{"model": "x", "step": 0}\n'], ids=str
)
def test_metrics_that_a_kill_has_cut_short(tmp_path, end):
    """Steps behind the checkpoint go, whatever is no step goes, and all others stay as they are."""
    place = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1)]
    lines = [json.dumps({"model": model, "step": step, "own": 0.1}).encode() for model, step in place]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, end]))
    m = harness.Machine(torch.device("cpu"), torch.float32)
    metrics = harness.Metrics(tmp_path, m, {"model": 1, "step": 2})
    metrics(model=2, step=3)
    content = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert content[:-1] == lines[:4]
    assert json.loads(content[-1]) == dict.fromkeys(harness.Metrics.keys) | {"model": 2, "step": 3}


@pytest.mark.parametrize("when", ["in the third member", "between two", "in the student"])
def test_a_killed_chain_ends_as_if_it_had_not_been(tiny_data, chain, tmp_path, when):
    """What is done is not trained again: the weights on disk stay the files they were."""
    texts = {
        "in the third member": "\nmember 3 step 7/",
        "between two": "\nmember 2 done",
        "in the student": "\nmember 4 step 12/",
    }
    run = tmp_path / "run"
    process = start(tiny_data, run, recipe=CHAIN)
    log = run / "log.txt"
    wait_for(lambda: log.exists() and texts[when] in log.read_text(), process)
    process.kill()
    before = {path: path.stat().st_mtime_ns for path in harness.saved(run, harness.WEIGHTS_FILE)}
    assert len(before) >= 2
    status, _, err = resume(run)
    assert status == 0, err
    assert_same_end(run, chain)
    # Killed between two, the newest may be saved once more, as it was.
    kept = list(before.items())[: 1 if when == "between two" else 2]
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept)
    assert set(before) <= set(harness.saved(run, harness.WEIGHTS_FILE))


KILLS = (
    """
import os, pathlib, random, signal, sys, time
import torch._dynamo
import harness
import train_gpt as t  # once: a process forked from here begins in no time
"""
    + QUICK_END
    + """
run = pathlib.Path(sys.argv[1])
begin = sys.argv[2:]
rng = random.Random(0)
n_killed = 0

def lines():
    log = run / "log.txt"
    return log.read_bytes().count(b"\\n") if log.exists() else 0

def states():
    return sorted({path.name.split(".")[0] for path in run.glob("*-*.pt")})

def without_index():
    indexes = [path.name.split(".")[0] for path in run.glob("state-*.json")]
    return any(path.name.split(".")[0] not in indexes for path in run.glob("state-*.pt"))

write_index = harness.Saver.write_index

def later(self):  # so that some kills come between shard and index
    time.sleep(0.02)
    write_index(self)

harness.Saver.write_index = later

while True:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        words = ["--resume", str(run)] if (run / "config.json").exists() else begin
        sys.argv = ["train_gpt.py", *words, "--device", "cpu", "--compile", "off"]
        harness.main()
        os._exit(0)
    if n_killed == 30:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    enough = lines() + rng.randrange(2, 11)
    while lines() < enough:
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the run ended before it had been killed often enough")
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    n_killed += 1
    print(*states(), "without index" if without_index() else "", flush=True)
"""
)


def test_thirty_kills_over_a_chain(tiny_data, chain, tmp_path):
    """SIGKILL at random instants of three members and their student: training, checkpoints, what lies between
    two models."""
    run = tmp_path / "run"
    argv = [sys.executable, "-c", KILLS, run, *options(**CHAIN, data=tiny_data), "--run_dir", run]
    words = list(map(str, argv))
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    seen = done.stdout.splitlines()
    assert done.returncode == 0 and len(seen) == 30, done.stderr
    assert len(set(seen)) > 8  # it came forward between the kills
    assert any("without index" in line for line in seen)
    assert sum("weights-0000001" in line for line in seen) > 2  # and was killed late, too
    assert_same_end(run, chain)


def test_the_score_of_members_is_that_of_their_mean_probability(tiny_data, tmp_path):
    """Of three members, as the mean of three runs of their seeds. Scores are written in float32, which
    rounds an NLL of up to 16 nats by 2**-21, and its probability by that share."""
    seeds = (0, 1000, 2000)
    nll = {}
    for name, changes in (("all", dict(members=3)), *((seed, dict(seed=seed)) for seed in seeds)):
        run = train_tiny(tiny_data, tmp_path / str(name), "--steps", 10, **changes)
        out = tmp_path / f"{name}.npy"
        argv = ("--score", run, "--tokens", tiny_data / "val.bin", "--nll", out, *PLAIN)
        assert run_main(*argv)[0] == 0
        nll[name] = np.load(out).astype(np.float64)
    mean = -np.log(np.mean([np.exp(-nll[seed]) for seed in seeds], axis=0))
    assert nll["all"].max() < 16
    np.testing.assert_allclose(nll["all"], mean, rtol=0, atol=2 * 2**-21)
    assert nll["all"].mean() < np.mean([nll[seed].mean() for seed in seeds])
    record = record_of(tmp_path / "all")
    assert record["members"] == record["scored"] == 3 and record["steps"] == 3 * 10


def test_the_student_alone_is_scored(chain):
    record = record_of(chain)
    student = t.model_configs(config(**CHAIN))[-1]
    assert (student.n_embd, student.distill_alpha, student.dropout, student.seed) == (16, 0.9, 0.1, 3000)
    # From the first step on it is what its teachers became.
    assert (student.bag_until, student.loop_from) == (0, 0)
    assert record["members"] == 4 and record["scored"] == 1
    assert record["parameters"] == t.n_params(student)
    n_bag_steps = math.ceil(0.3 * STEPS - 0.5)  # of a member, whose bags hold two; the student has none
    assert record["tokens_seen"] == 512 * (3 * (STEPS + n_bag_steps) + STEPS)
    lines = [line for line in told(chain) if line.startswith("member 1 step ")]
    epochs = float(lines[-1].split("epoch ")[1].split()[0])
    # Rows are rounded up to whole ones, by less than one in 20_000 / 128 of them.
    assert epochs == pytest.approx(512 * (STEPS + n_bag_steps) / 20_000, rel=128 / 20_000)


def test_a_student_learns_from_each_in_turn(tiny_data, tmp_path, monkeypatch):
    """teacher_switch_every steps from each member, in their order, also where a run goes on in the middle
    of a turn; and a member of a chain from the one before alone."""
    seen = []
    train_pass = t.train_pass

    def noted(*args):
        teacher = args[-1]
        seen.append(teacher and float(teacher[1]["lm_head"].sum()))
        return train_pass(*args)

    monkeypatch.setattr(t, "train_pass", noted)
    recipe = dict(members=3, distill_alpha=0.4, student="distill_alpha=0.9", teacher_switch_every=4)
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 11, device_tokens=512, **recipe)
    sums = [
        float(harness.load_tensors(path)["params"]["lm_head"].sum())
        for path in harness.saved(run, harness.WEIGHTS_FILE)
    ]
    of_the_student = [sums[0]] * 4 + [sums[1]] * 4 + [sums[2]] * 3
    assert seen == [None] * 11 + [sums[0]] * 11 + [sums[1]] * 11 + of_the_student
    # The same run as it was before the student's seventh step.
    seen.clear()
    (run / "record.json").unlink()
    harness.saved(run, harness.WEIGHTS_FILE)[-1].unlink()
    (path,) = harness.saved(run, harness.INDEX_FILE)
    state = harness.read_index(path)
    path.unlink()
    c, _, _ = harness.read_run(run)
    p = t.init_params(c)
    optimizer = t.MuonAdamW(p, c, harness.Machine(torch.device("cpu"), torch.float32))
    state["progress"] |= {"model": 3, "step": 6, "log_bytes": (run / "log.txt").stat().st_size}
    shard = harness.write_tensors(run / "state-30000006.0of1", harness.shard_state(optimizer))
    harness.write_json(
        run / "state-30000006", state | {"shards": [shard.name], "weights": state["weights"][:3]}, "json"
    )
    assert run_main("--resume", run, *PLAIN)[0] == 0
    assert seen == of_the_student[6:]


WARM = {
    "same shape": ("muon_lr=0", True),
    "without the second target": ("muon_lr=0,mtp_weight=0", True),
    "fewer layers": ("muon_lr=0,n_layer=1", False),
    "narrower": ("muon_lr=0,n_embd=16", False),
}


@pytest.mark.parametrize("change, warm", WARM.values(), ids=WARM)
def test_warm_start(tiny_data, tmp_path, change, warm):
    """A student of its teachers' shape starts from the last one's weights, another one is drawn from its
    seed. With a rate of zero it ends where it began."""
    student = f"distill_alpha=0.5,{change},embed_lr=0,head_lr=0,scalar_lr=0"
    recipe = dict(members=2, mtp_weight=0.3, weight_decay=0, student=student)
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 2, **recipe)
    c, _, _ = harness.read_run(run)
    c_student = t.model_configs(c)[-1]
    _, last, student = (
        harness.load_tensors(path)["params"] for path in harness.saved(run, harness.WEIGHTS_FILE)
    )
    begun = last if warm else t.init_params(c_student)
    assert student.keys() == t.param_shapes(c_student).keys()
    assert all(torch.equal(w, begun[name]) for name, w in student.items())
    assert ("model 3 starts from the weights of model 2" in (run / "log.txt").read_text()) == warm


def test_a_student_can_come_later(tiny_data, chain, tmp_path):
    """Members first, their student by a later command: the same as both at once, and no member after it."""
    run = train_tiny(tiny_data, tmp_path / "run", **CHAIN | {"student": ""})
    assert record_of(run)["scored"] == 3
    assert run_main("--resume", run, *PLAIN)[0] == 2  # finished
    assert run_main("--resume", run, "--student", "distill_alpha=0", *PLAIN)[0] == 2  # it would learn nothing
    assert run_main("--resume", run, "--student", CHAIN["student"], *PLAIN)[0] == 0
    assert (run / "val_nll.npy").read_bytes() == (chain / "val_nll.npy").read_bytes()
    assert run_main("--resume", run, "--members", 4, *PLAIN)[0] == 2
    assert run_main("--resume", run, "--student", "distill_alpha=0.5", *PLAIN)[0] == 2


def flat_weights(run):
    paths = harness.saved(run, harness.WEIGHTS_FILE)
    return [torch.cat([w.flatten() for w in harness.load_tensors(path)["params"].values()]) for path in paths]


def test_chains_within_one_run(tiny_data, tmp_path):
    """The first member of each chain has no teacher, so it is the same as that of a run without distillation;
    with alpha 0 every member is the run of its seed."""
    ways = {
        "chains": dict(members=4, chains=2, distill_alpha=0.4),
        "one chain": dict(members=4, distill_alpha=0.4),
        "apart": dict(members=4),
        "second": dict(seed=1000),
    }
    weights = {}
    for name, changes in ways.items():
        run = train_tiny(tiny_data, tmp_path / name, "--steps", 5, **changes)
        weights[name] = flat_weights(run)
    assert [torch.equal(*pair) for pair in zip(weights["chains"], weights["apart"])] == [
        True,
        False,
        True,
        False,
    ]
    assert [torch.equal(*pair) for pair in zip(weights["chains"], weights["one chain"])] == [
        True,
        True,
        False,
        False,
    ]
    assert torch.equal(weights["second"][0], weights["apart"][1])
    lines = [
        line.removeprefix("member 2 ")
        for line in told(tmp_path / "apart")
        if line.startswith("member 2 step")
    ]
    assert lines == [line for line in told(tmp_path / "second") if line.startswith("step")]


def test_chains_trained_apart(tiny_data, tmp_path):
    """Two chains, each a run of its own, joined and scored: the mean of all their members, weights and
    lines of both, and one student of all."""
    two = CHAIN | dict(members=2, student="")
    runs = [train_tiny(tiny_data, tmp_path / name, **two, seed=seed) for seed, name in enumerate("ab")]
    joined = tmp_path / "joined"
    argv = [sys.executable, "records/join.py", *runs, "--run_dir", joined]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    status, _, err = run_main("--resume", joined, *PLAIN)
    assert status == 0, err
    parts = [record_of(run) for run in runs]
    record = record_of(joined)
    assert record["train_seconds"] == pytest.approx(max(part["train_seconds"] for part in parts))
    assert (record["ranks"], record["members"], record["scored"]) == (2, 4, 4)
    for name in ("steps", "tokens_seen", "parameters", "train_flops"):
        assert record[name] == sum(part[name] for part in parts), name
    for k, flat in enumerate(flat_weights(joined)):
        assert torch.equal(flat, flat_weights(runs[k // 2])[k % 2])
    steps = [line.split()[1] for line in told(joined) if " step " in line]
    assert steps == [str(k) for k in (1, 2, 3, 4) for _ in range(STEPS)]

    # The score: each member's probabilities, averaged.
    c, meta, _ = harness.read_run(joined)
    m = harness.Machine(torch.device("cpu"), torch.float32)
    train_tokens, val_tokens = (
        harness.read_shard(tiny_data / f"{name}.bin", 257) for name in ("train", "val")
    )
    inputs = t.Lookup(train_tokens[: c.train_tokens], c).inputs(val_tokens[None])
    members = [t.stream_nll(harness.load_weights(joined, k, c, m), inputs, c, m)[0] for k in range(4)]
    mean = -np.log(np.mean(np.exp(-np.array(members, np.float64)), axis=0))
    assert record["val_loss"] == pytest.approx(mean.sum() / 3009, rel=1e-8)  # added up in float32

    assert run_main("--resume", joined, "--members", 6, *PLAIN)[0] == 2  # which chain would it be?
    assert run_main("--resume", joined, "--student", CHAIN["student"], *PLAIN)[0] == 0
    assert record_of(joined)["members"] == 5


# ---- compilation


def test_compiled_before_the_clock_and_never_again(tiny_data, tmp_path, monkeypatch):
    """All graphs of all phases, of members with and without a teacher and of a student, are made by
    compile_all(), and none is broken: what would be compiled later is an error here. No C++ is written for
    them, which would take minutes: test_model.py does that for one."""
    compile_all = harness.compile_all

    def then_no_more(*args):
        seconds = compile_all(*args)
        torch.compiler.set_stance("fail_on_recompile")
        return seconds

    monkeypatch.setattr(harness, "compile_all", then_no_more)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Three rows a step, in micro-batches of two rows and of one, which do not fill a chunk.
    small = dict(n_layer=2, window_pattern="L", batch_tokens=192, device_tokens=128, loss_chunk=128)
    small |= dict(members=2, mtp_weight=0.3, iha=True, student="distill_alpha=0.9,n_layer=1,loop_times=0")
    recipe = options(**CHAIN | small, data=tiny_data)
    argv = [*recipe, "--run_dir", tmp_path / "run", "--device", "cpu", "--compile", "on", "--steps", 8]
    try:
        status, out, err = run_main(*argv)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    assert status == 0 and "compiled: yes" in out, err
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 10


def raises(error, cause=None):
    def broken(*args, **kwargs):
        raise copy.copy(error) from copy.copy(cause)  # not the one that keeps the frames of an earlier test

    return broken


UNWRITABLE = PermissionError(errno.EACCES, "Permission denied", "/cache")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
COMPILERS = [
    (RuntimeError("no kernel"), None, "the compiler failed, RuntimeError: no kernel"),
    (
        RuntimeError("C++ compile error\n\nOutput:\n/cache/x.cpp:1: fatal error: cheese.h: No such file"),
        None,
        "RuntimeError: C++ compile error: /cache/x.cpp:1: fatal error: cheese.h: No such file",
    ),
    (UNWRITABLE, None, "cannot write or run /cache, Permission denied"),
    (RuntimeError("inductor"), UNWRITABLE, "cannot write or run /cache, Permission denied"),
]


def compile_with(tiny_data, run):
    argv = ["--device", "cpu", "--compile", "on", "--steps", 3]
    return run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *argv)


@pytest.mark.parametrize("error, cause, words", COMPILERS)
def test_a_compiler_that_fails(tiny_data, tmp_path, monkeypatch, error, cause, words):
    """The run goes on uncompiled, and the log says why, and on which rank."""
    monkeypatch.setattr(harness, "compile_model", raises(error, cause))
    status, out, err = compile_with(tiny_data, tmp_path / "run")
    assert status == 0, err
    assert "compiled: no (rank 0: the " in out and words in out


def test_a_cache_that_cannot_be_written(tiny_data, tmp_path, monkeypatch):
    """PyTorch would fail where it makes the folder, with the first backward pass."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/x")
    run = train_tiny(tiny_data, tmp_path / "run", "--steps", 3)
    assert any(line.startswith("TORCHINDUCTOR_CACHE_DIR /dev/null/x") for line in log_lines(run))
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()


@pytest.mark.parametrize("cause", [None, NO_MEMORY, MemoryError()])
def test_out_of_memory_while_compiling(tiny_data, tmp_path, monkeypatch, cause):
    """Uncompiled, it would need more. The same command with less then takes the same folder."""
    error = RuntimeError("inductor") if cause else NO_MEMORY
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(harness, "compile_model", raises(error, cause))
        status, _, err = compile_with(tiny_data, run)
    assert (
        status == 1 and err.count("\n") == 1 and "rank 0: out of memory" in err and "--device_tokens" in err
    )
    assert "out of memory" in log_lines(run)[-1]
    train_tiny(tiny_data, run, "--steps", 3)


def test_a_compiler_that_fails_on_another_rank(monkeypatch):
    """No rank compiles where one cannot."""
    m = harness.Machine(torch.device("cpu"), torch.float32, compiled=True)
    monkeypatch.setattr(harness, "all_gather", lambda m, value: [value, "the compiler failed"])
    monkeypatch.setattr(harness, "compile_model", lambda *args: None)
    monkeypatch.setattr(harness, "distinct_models", lambda models: models)
    harness.compile_all(["a model"], m)
    assert (
        not m.compiled
        and m.functions.block is t.block
        and "(rank 1: the compiler failed)" in m.reasons["compiled"]
    )


# ---- mistakes of the user that are of this recipe: one line that names the option, status 2, nothing written

BAD_OPTIONS = [
    ("--n_embd 50 --n_head 4", "--n_embd"),
    ("--n_embd 36 --n_head 2", "--n_head"),
    ("--n_layer 0", "--n_layer"),
    ("--device_tokens 32", "--device_tokens"),
    ("--score_stride 65", "--score_stride"),
    ("--loop_times 1 --loop_first 1 --loop_last 3", "--loop_last"),
    ("--loop_times 1 --loop_first 2 --loop_last 1", "--loop_first"),
    ("--loop_from 1", "--loop_from"),
    ("--window_pattern SXL", "--window_pattern"),
    ("--dropout 1.0", "--dropout"),
    ("--dropout -0.1", "--dropout"),
    ("--online_lr -0.1", "--online_lr"),
    ("--warmup 0.5 --warmdown 0.6", "--warmdown"),
    ("--epochs inf", "--epochs"),
    ("--muon_lr fast", "--muon_lr"),
    ("--muon_lr nan", "--muon_lr"),
    ("--unet 2", "--unet"),
    ("--wd_points 0.5:1,0:1", "--wd_points"),
    ("--wd_points x", "--wd_points"),
    ("--recall 4,x", "--recall"),
    ("--memory 0", "--memory"),
    ("--ngrams 3,x", "--ngrams"),
    ("--ngrams 4,40 --train_tokens 40", "--ngrams"),
    ("--ngrams 4,4", "--ngrams"),
    ("--dtype fp8", "--dtype"),
    ("--attention varlen", "--attention"),
    ("--vocab_size 300", "--vocab_size"),
    ("--student depth=3 --distill_alpha 0.5", "--student"),
    ("--student distill_alpha=0.5,dropuot=0.1", "did you mean dropout?"),
    ("--dropuot 0.1", "did you mean --dropout?"),
    ("--n-layer=2", "did you mean --n_layer?"),
    ("--resme runs/x", "did you mean --resume?"),
    ("--nothing_like_it", "--help"),
    ("--iha maybe", "--iha maybe: must be 0 or 1"),
    ("--data fineweb", "python data/prepare.py fineweb"),
    ("--data nonesuch", "python data/prepare.py --help"),
    ("--student n_layer=2", "--student"),
    ("--student distill_alpha=0.5,softcap=30", "softcap"),
    ("--student distill_alpha=0.5,n_layer=x", "--n_layer"),
    ("--student distill_alpha=0.5,dropout=1", "--dropout"),
    ("--train_tokens 2 --bag_size 2 --bag_until 0.5", "--train_tokens"),
    ("--bag_until 1", "--bag_until"),
    ("--ema 1", "--ema"),
    ("--distill_temp 0", "--distill_temp"),
    ("--members 3 --chains 2", "--chains"),
    ("--adam_beta1 1", "--adam_beta1"),
    ("--loop_times 100000000", "--loop_times"),
    ("--members 10000000", "--members"),
    ("--seed 99999999999999999999", "--seed"),
    ("--batch_tokens 640000000000", "--batch_tokens"),
    ("--epochs 1e308", "--epochs"),
    ("--epochs 999999 --batch_tokens 64", "--epochs"),
]


@pytest.mark.parametrize("words, named", BAD_OPTIONS, ids=[words for words, _ in BAD_OPTIONS])
def test_impossible_options(tiny_data, tmp_path, words, named):
    run = tmp_path / "run"
    argv = [*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN, *words.split()]
    status, out, err = run_main(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
    assert not run.exists()


@pytest.mark.parametrize("script", ["train_gpt.py", "data/prepare.py"])
def test_on_windows_one_line_says_where_it_runs(script):
    """Before it imports what Windows does not have."""
    code = "import os, sys; os.name = 'nt'; sys.modules['fcntl'] = None; exec(open(sys.argv[1]).read())"
    done = subprocess.run([sys.executable, "-c", code, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "WSL" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "text, value", [("1", True), ("true", True), ("True", True), ("0", False), ("false", False)]
)
def test_a_switch_can_be_a_word(text, value):
    given, _ = harness.parse_args(["--iha", text])
    assert given == {"iha": value}


def test_batch_that_ranks_cannot_share(monkeypatch, tiny_data, tmp_path):
    setup_machine = harness.setup_machine
    monkeypatch.setattr(
        harness, "setup_machine", lambda *args: dataclasses.replace(setup_machine(*args), world_size=3)
    )
    monkeypatch.setattr(harness.dist, "broadcast_object_list", lambda *args, **kwargs: None)
    monkeypatch.setattr(harness.dist, "barrier", lambda: None)
    run = tmp_path / "run"
    status, _, err = run_main(*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN)
    assert status == 2 and "3 ranks" in err and not run.exists()
