"""tests/node.sh: the hour at toy size, its frame, and what it concludes from measurements made up here."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
import node
import train_gpt as t
from reference import environment
from runs import ROOT

pytestmark = pytest.mark.reference


def run_node(*tracks, **env):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "tests" / "node.sh"), *tracks]
    env = environment(**{"PATH": path} | env)
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=900)


def table(out):
    """{step: its outcome}."""
    lines = out.partition("==== table\n")[2].splitlines()
    return {line[:20].strip(): line[21:40].strip() for line in lines}


@pytest.mark.skipif(node.ON_GPU, reason="on a GPU it takes an hour, and is no toy")
def test_the_hour_at_toy_size(tiny_data, tmp_path):
    """Everything works, on two ranks over gloo, and each step prints what it is for."""
    done = run_node("limited", DATA=str(tiny_data), RANKS="1 2", FILE=str(tmp_path / "node.txt"))
    out = done.stdout
    assert done.returncode == 0, out
    assert (tmp_path / "node.txt").read_text() == out
    steps = ["check", "reference tests", "attention", "ranks", "resume", "limited", "profile of limited"]
    assert table(out) == dict.fromkeys([*steps, "verdict"], "ok")
    assert out.count("sdpa, window") == out.count(": agrees; off by") == 3
    assert len(re.findall(r"^(ranks2 against ranks1|the resumed run): largest difference", out, re.M)) == 2
    assert re.search(r"^resumed at step \d+; over", out, re.M)
    # of the recipe's two phases
    assert len(re.findall(r"^limited: \S+ s for a step of \S+ FLOPs on 2 rank", out, re.M)) == 2
    assert len(re.findall(r"^ +\S+ ms +\S+% +\S+ calls  \S", out, re.M)) == 10
    assert re.search(r"^limited: [\d,]+ s of 3,600 on 8 GPU\(s\), from 2 measured$", out, re.M)
    assert not list((ROOT / "runs").glob("node.*/limited/*.pt"))


# ---- the frame

# In place of python and timeout: the first ends as the steps' names say, the second writes down its limits.
PYTHON = """#!/bin/bash
case "$*" in
    *"node.py check"*) exit ${CHECK:-0} ;;
    *pytest*) exit 1 ;;
    *"node.py attention"*) exit 3 ;;
    *"node.py ranks"*) exit 124 ;;
esac
"""
TIMEOUT = """#!/bin/bash
echo "$2" >>"$(dirname "$0")/limits"
shift 2
exec "$@"
"""


@pytest.fixture
def frame(tmp_path):
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return lambda *tracks, **env: run_node(*tracks, PATH=path, FILE=str(tmp_path / "node.txt"), **env)


def test_every_step_has_its_limit_and_its_line(frame, tmp_path):
    """One that fails ends neither the others nor as a success."""
    done = frame("solo", "tiny")
    outcomes = {
        "check": "ok",
        "reference tests": "FAILED, status 1",
        "attention": "skipped",
        "ranks": "over its limit",
        "resume": "ok",
        "solo": "ok",
        "tiny": "ok",
        "profile of solo": "ok",
        "verdict": "ok",
    }
    assert table(done.stdout) == outcomes
    assert done.returncode == 1
    limits = (tmp_path / "limits").read_text().split()
    assert len(limits) == len(outcomes) and all(int(limit) > 0 for limit in limits)


def test_a_machine_that_cannot_work_ends_it(frame):
    done = frame(CHECK="2")
    assert done.returncode == 2
    assert table(done.stdout) == {"check": "FAILED, status 2"}


def test_no_such_track(call):
    status, out, _ = call(node.main, "check", "larg", "--folder", "nowhere")
    assert status == 2
    assert out == f"node.py: larg: no track for GPUs; choose from {', '.join(node.TRACKS)}\n"


# ---- what a machine lacks

GOOD = node.Machine(
    broken="",
    drivers=["580.65.06"] * 2,
    capabilities=["9.0"] * 2,
    used=[4, 4],
    cuda="13.0",
    usable=True,
    error="",
    free_disk=200e9,
    free_memory=100e9,
    needed_disk=60e9,
    needed_memory=50e9,
    folder=Path("data/mini"),
    data="mini",
    has_data=True,
)
WITHOUT_GPU = dict(drivers=[], capabilities=[], used=[], cuda=None, usable=False)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({}, []),
        (WITHOUT_GPU, []),
        # An old driver is named by its number, not by what torch makes of it.
        (dict(usable=False, drivers=["535.104"], capabilities=[]), ["driver 535.104.*580 or newer"]),
        (dict(usable=False, cuda="12.6", drivers=["535.104"]), ["torch can use no GPU"]),
        (dict(usable=False, error="no device"), [r"torch can use no GPU \(no device\)"]),
        (dict(usable=False, cuda=None), ["built for CPUs.*requirements.txt"]),
        (WITHOUT_GPU | dict(broken="has failed"), ["nvidia-smi: has failed"]),
        (dict(capabilities=["9.0", "7.5"]), ["GPU 1: compute capability 7.5"]),
        (dict(capabilities=["10.0", "8.0"]), []),
        (dict(used=[4, 30_000]), ["GPU 1: 30000 MiB"]),
        (dict(has_data=False), ["data/mini: no data.*prepare.py mini"]),
        (dict(free_disk=59e9), ["disk: 59.0 GB free.*60.0 GB"]),
        (dict(free_memory=49e9, has_data=False), ["no data", "memory of the host: 49.0 GB"]),
    ],
)
def test_a_line_for_each_reason(changes, named):
    found = node.problems(dataclasses.replace(GOOD, **changes))
    assert len(found) == len(named)
    for line, pattern in zip(found, named):
        assert re.search(pattern, line) and "\n" not in line


def test_what_checkpoints_need(monkeypatch):
    """Of `unlimited` on eight GPUs: three states, and the weights of eight models."""
    monkeypatch.setattr(node, "ON_GPU", True)
    disk, memory = node.checkpoint_bytes("unlimited", 8)
    plan, m = node.planned({"track": "unlimited"}, 8)
    weights = 4 * t.n_params(plan[0].c)
    state = 8e9 * harness.shard_size(plan[0], m)
    assert disk == pytest.approx(3 * state + 8 * weights)
    assert state < memory < disk


# ---- what is measured


def entries_of(plan, seconds_of):
    """Lines of metrics.jsonl, each step's seconds decided by its model and its number."""
    entries = []
    clock = 100.0
    for model in plan:
        n_steps = model.batches.steps
        for step in range(1, n_steps + 1):
            clock += seconds_of(model.number, step)
            val_loss = 1.0 if step == round(n_steps / 2) else None
            entries.append({"model": model.number + 1, "step": step, "seconds": clock, "val_loss": val_loss})
    return entries


def test_steps_away_from_saves_and_evaluations():
    """Two members, the second with a teacher, in two phases each: four kinds of steps of 1, 2, 3 and 4 s.
    Whatever else there is takes a hundred."""
    cut = {"track": "unlimited", "train_tokens": 10_000_000, "members": 2, "evals": 2, "save_every": 8}
    plan, _ = node.planned(cut | {"loop_from": 0.64}, 8, 24)
    looped = [len(phase.layers) > 30 for phase in plan[0].batches.phases]
    assert looped.index(True) == 15
    # the first of a phase, four after each save, and the one after the evaluation
    slow = {1, 16} | {9, 10, 11, 12} | {17, 18, 19, 20} | {13}

    def seconds_of(number, step):
        return 100.0 if step in slow else 1.0 + looped[step - 1] + 2 * number

    found = node.undisturbed_steps(entries_of(plan, seconds_of), plan)
    expected = {}
    for model in plan:
        for step, flops in enumerate(model.step_flops, start=1):
            if step not in slow:
                expected.setdefault(flops, set()).add(seconds_of(model.number, step))
    assert {flops: set(taken) for flops, taken in found.items()} == expected
    assert sorted(map(tuple, expected.values())) == [(1.0,), (2.0,), (3.0,), (4.0,)]
    assert node.seconds_after_saves(entries_of(plan, seconds_of), plan) == [100.0] * 4


def test_memory_decides_what_is_left_out(monkeypatch):
    plan, m = node.planned({"track": "limited"}, 8)
    monkeypatch.setattr(node, "gpu_gb", lambda: 80.0)
    node.require_memory("limited", plan, m)
    monkeypatch.setattr(node, "gpu_gb", lambda: node.memory_gb(plan, m) + harness.RESERVE_GB - 0.1)
    with pytest.raises(SystemExit) as stopped:
        node.require_memory("limited", plan, m)
    assert stopped.value.code == node.SKIPPED


def test_wrong_attention_is_found(monkeypatch):
    """A window that is one token too long, and documents that see those before them, in one of the two
    precisions that are compared."""
    node.attention(None)
    masks = t.attention_masks

    def longer(starts, windows, m):
        if m.dtype == torch.float64:
            return masks(starts, windows, m)
        return {window: masks(starts, [window + 1], m)[window + 1] for window in windows}

    def through(starts, windows, m):
        return masks(starts & (m.dtype == torch.float64), windows, m)

    for wrong in (longer, through):
        monkeypatch.setattr(t, "attention_masks", wrong)
        with pytest.raises(SystemExit) as stopped:
            node.attention(None)
        assert stopped.value.code == 1


def test_runs_that_differ():
    expected = np.array([5.0, 4.0, 3.0])
    seed = expected + [0.1, -0.1, 0.1]
    node.assert_close("close", expected + 0.01, expected, seed)
    with pytest.raises(SystemExit, match="does not agree"):
        node.assert_close("far", expected + [0.03, -0.03, 0.03], expected, seed)
    with pytest.raises(SystemExit, match="does not agree"):
        node.assert_close("broken", expected * math.nan, expected, seed)
    with pytest.raises(SystemExit, match="2 steps instead of 3"):
        node.assert_close("short", expected[:2], expected, seed)


# ---- the verdict


def measured_at(utilization, gpu=None, peak=72.0, estimated=72.0):
    """Of `limited` on one GPU that has the share of one of eight."""
    per_flop = 1 / (utilization * harness.GPU_FLOPS)
    return dict(n_ranks=1, seconds_per_flop=per_flop, startup=30.0, peak=peak, estimated=estimated, gpu=gpu)


def seconds_of_limited(utilization, **options):
    plan, m = node.planned({"track": "limited"} | options, 8)
    return 30.0 + harness.seconds_left(plan, 0, 1 / (8 * utilization * harness.GPU_FLOPS), m)


def test_a_track_that_fits():
    [line] = node.verdict_on("limited", measured_at(0.42))
    assert line == f"limited: {seconds_of_limited(0.42):,.0f} s of 3,600 on 8 GPU(s), from 1 measured"


@pytest.mark.parametrize(
    "utilization,missed", [(0.3, r"[\d,]+ s too long"), (0.39, "too close to the limit")]
)
def test_what_to_lower_for_the_clock(utilization, missed):
    """The epochs that it names fit, a fiftieth more do not; and at the speed that it names all would."""
    _, line = node.verdict_on("limited", measured_at(utilization))
    found = re.fullmatch(
        rf"  {missed}: --epochs (\S+) instead of 11 takes ([\d,]+) s; --fit finds it; "
        r"at steps (\S+)% faster all of them would fit",
        line,
    )
    assert found, line
    epochs = float(found[1])
    allowed = 0.97 * 3600
    assert seconds_of_limited(utilization, epochs=epochs) <= allowed
    assert seconds_of_limited(utilization, epochs=epochs * 1.02) > allowed
    assert found[2] == f"{seconds_of_limited(utilization, epochs=epochs):,.0f}"
    # printed to a tenth of a percent
    assert seconds_of_limited(utilization * (1 + float(found[3]) / 100)) == pytest.approx(allowed, rel=0.001)


def test_a_track_that_never_fits():
    _, line = node.verdict_on("limited", measured_at(1e-9))
    assert "no number of epochs fits" in line


def test_what_to_lower_for_memory():
    plan, m = node.planned({"track": "limited"}, 8)
    estimated = node.memory_gb(plan, m)
    _, line = node.verdict_on("limited", measured_at(0.42, 80.0, estimated, estimated))
    assert line == f"  {estimated:.1f} GB of 80.0; measured 1.00 times what --dry_run says"
    _, _, line = node.verdict_on("limited", measured_at(0.42, 80.0, 1.2 * estimated, estimated))
    half = 1.2 * node.memory_gb(*node.planned({"track": "limited", "device_tokens": 8192}, 8))
    assert half <= 74
    assert line.endswith(f"--device_tokens 8192 instead of 16384 takes {half:.1f} GB")
    _, _, line = node.verdict_on("limited", measured_at(0.42, 20.0, estimated, estimated))
    assert "lower --n_embd" in line


def test_what_was_not_measured(call, tmp_path):
    (tmp_path / "limited.json").write_text(json.dumps(measured_at(0.42)))
    status, out, _ = call(node.main, "verdict", "tiny", "limited", "--folder", tmp_path)
    assert status == 0
    assert out.startswith("tiny: not measured\nlimited: ")
