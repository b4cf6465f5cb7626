"""A run that keeps its own clock: when it will end, and --fit. No real clock is read: what a step takes is
made up."""

import dataclasses
import json
import time
import types

import pytest
import torch

import harness
import reading
import train_gpt as t
from reference import config, run_main
from runs import PLAIN, TINY, options, record_of

pytestmark = pytest.mark.reference

CAP = 1_000_000  # seconds, so many that what a machine really takes does not matter


@pytest.fixture
def capped(monkeypatch):
    """The track has a limit in seconds."""
    monkeypatch.setattr(harness, "read_rules", lambda track: {"max_seconds": CAP})
    monkeypatch.setattr(harness, "START", time.monotonic())


@pytest.fixture
def clock(monkeypatch):
    """The script's clock, which runs on when a test adds to clock.ahead."""
    clock = types.SimpleNamespace(ahead=0.0, **vars(time))
    clock.monotonic = lambda: time.monotonic() + clock.ahead
    monkeypatch.setattr(harness, "time", clock)
    return clock


def made_up_plan(c):
    m = harness.Machine(torch.device("cpu"), torch.float32)
    return t.training_plan(c, torch.zeros(c.train_tokens, 1, dtype=torch.int16).numpy(), m), m


def test_seconds_left_are_those_of_steps_evaluations_and_checkpoints(monkeypatch):
    """Of two members, from a step of the first on, added up by hand."""
    monkeypatch.setattr(harness, "n_kept", lambda c: 5 * 10**8)
    monkeypatch.setattr(t, "n_params", lambda c: 10**9)
    monkeypatch.setattr(harness, "COPY_SECONDS_PER_GB", 1000.0)
    monkeypatch.setattr(harness, "SAVE_SECONDS_PER_GB", 10.0)
    c = config(members=2, loop_times=1, epochs=1.0, evals=4, eval_windows=5, save_every=10, ema=0.0)
    (first, second), m = made_up_plan(c)
    m.world_size = 2  # each copies its share of the weights, 2 GB, and its state of the optimizer
    assert first.batches.steps == 39
    forward = t.flops_per_token(c, t.phase_schedule(1.0, c))
    evaluation = 5 * c.seq_len * forward
    of_first = sum(first.step_flops[13:]) + 4 * 26 / 39 * evaluation
    of_second = second.train_flops + 4 * evaluation
    saves = 2 + 3  # after every tenth step; after the last one, the final weights of 4 GB are written
    expected = 1e-6 * (of_first + of_second) + saves * 3 * 1000.0 + 2 * 4 * 10.0
    assert harness.seconds_left([first, second], 13, 1e-6, m) == pytest.approx(expected, rel=1e-12)


def test_a_run_asks_after_a_hundred_steps(tiny_data, tmp_path, monkeypatch, clock):
    """Once, with the seconds on its clock and those that are left, at the speed so far."""
    asked = []
    estimates = []

    def seconds_left(plan, *rest):
        estimates.append(rest)
        return 5e6

    monkeypatch.setattr(harness, "seconds_left", seconds_left)
    monkeypatch.setattr(harness, "ask_referee", lambda run, *argv: asked.append(argv))
    monkeypatch.setattr(t, "sample", lambda *args: [])
    train_step = t.train_step

    def slow_step(*args):
        clock.ahead += 1e4
        return train_step(*args)

    monkeypatch.setattr(t, "train_step", slow_step)
    run = tmp_path / "run"
    argv = [*options(**TINY | dict(epochs=2.7, save_every=1000), data=tiny_data), "--run_dir", run, *PLAIN]
    given, args = harness.parse_args(list(map(str, argv)))
    harness.train_command(given, args)
    flops, answer, end = asked
    assert flops[0] == "--flops" and end == ()
    step, speed, _ = estimates[99]
    assert step == 100
    record = record_of(run)
    assert record["steps"] == 105
    # 1e4 s a step, and next to them the few that this machine really takes.
    assert speed == pytest.approx(1e4 * record["steps"] / record["train_flops"], rel=0.01)
    assert answer[0] == "--seconds" and float(answer[1]) == pytest.approx(6e6, rel=0.01)


FIT = TINY | dict(epochs=3.0, dropout=0.0)


def test_fit_finds_the_most_epochs(monkeypatch, capped, clock):
    """By the slowest phase, beside what startup took; and a recipe that fits stays as it is."""
    c = config(**FIT | dict(loop_times=1, loop_first=1, loop_last=1, loop_from=0.5))
    (model,), m = made_up_plan(c)
    harness.set_compiled(m, "off")
    per_flop = 1.5 * CAP / model.train_flops  # of the looped phase; the other is twice as fast
    longer = max(model.step_flops)

    def train_step(p, optimizer, model, step, batch, m, teacher):
        slow = model.step_flops[step] == longer
        clock.ahead += model.step_flops[step] * per_flop / (1 if slow else 2)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(t, "train_step", train_step)
    clock.ahead = startup = 0.2 * CAP
    fitted, beside = harness.fit(c, m)
    assert dataclasses.replace(fitted, epochs=3.0) == c
    (chosen,), _ = made_up_plan(fitted)
    room = 0.97 * CAP - startup
    (longer_by_a_step,), _ = made_up_plan(
        dataclasses.replace(fitted, epochs=fitted.epochs + 512 / c.train_tokens)
    )
    assert harness.seconds_left([chosen], 0, per_flop, m) <= room
    assert harness.seconds_left([longer_by_a_step], 0, per_flop, m) > room - 60  # a real minute of this test
    timed = 4 * per_flop * (longer + min(model.step_flops) / 2)
    assert beside == pytest.approx(timed, abs=60)
    assert f"{fitted.epochs:g} of 3 epochs" in m.reasons["fit"]

    clock.ahead = 0.0
    per_flop /= 2
    assert harness.fit(c, m)[0] == c


def fit_run(data, run, *argv, **changes):
    return run_main(*options(**FIT | changes, data=data), "--run_dir", run, *PLAIN, *argv)


def test_a_fitted_run_and_its_rest(tiny_data, tmp_path, monkeypatch, capped, clock):
    """Half of the epochs fit, and a resumed run keeps them. Its clock leaves out what the choice took, as it
    leaves out compilation, and the log says both."""

    def measure_speed(plan, m):
        clock.ahead += 2e4
        return 1.94 * CAP / sum(model.train_flops for model in plan)

    monkeypatch.setattr(harness, "measure_speed", measure_speed)
    train_step = t.train_step

    def killed_at_twenty(p, optimizer, model, step, *rest):
        if step == 20:
            raise KeyboardInterrupt
        return train_step(p, optimizer, model, step, *rest)

    run = tmp_path / "run"
    monkeypatch.setattr(t, "train_step", killed_at_twenty)
    assert fit_run(tiny_data, run, "--fit")[0] == 130
    monkeypatch.setattr(t, "train_step", train_step)
    clock.ahead = 0.0
    status, _, err = run_main("--resume", run, *PLAIN)
    assert status == 0, err
    epochs = json.loads((run / "config.json").read_text())["config"]["epochs"]
    # Of the time, evaluations and checkpoints take less than a hundredth.
    assert 1.49 < epochs < 1.5
    log = reading.read_log(run / "log.txt")
    assert log.config["epochs"] == epochs
    [line] = [line for line in log.lines if line.startswith("fit: ")]
    assert line.startswith(f"fit: {epochs:g} of 3 epochs, ")
    record = record_of(run)
    assert record["steps"] == log.of(reading.Step)[-1].steps < 60
    assert record["compile_seconds"] >= 2e4 > record["train_seconds"]
    assert log.of(reading.Compiled)[0].seconds >= 2e4


def test_fit_leaves_training_as_it_is(tiny_data, tmp_path, capped):
    """With everything that a step can have, really measured: all fits, and each loss is as it is without."""
    recipe = dict(members=2, distill_alpha=0.4, mtp_weight=0.3, bag_size=2, bag_until=0.3, memory="3")
    recipe |= dict(recall="2", dropout=0.1, ema=0.9, loop_times=1, loop_first=1, loop_last=1, epochs=0.3)
    losses = []
    for name, words in (("fitted", ["--fit"]), ("plain", [])):
        status, _, err = fit_run(tiny_data, tmp_path / name, *words, **recipe)
        assert status == 0, err
        log = reading.read_log(tmp_path / name / "log.txt")
        losses.append([entry._replace(seconds=0.0) for entry in log.of(reading.Step)])
        assert any(line.startswith("fit: 0.3 of 0.3 epochs") for line in log.lines) == (name == "fitted")
    assert losses[0] == losses[1] and len(losses[0]) > 20


REFUSED = [
    (["--fit", "--steps", 5], "--steps"),
    (["--fit"], "has no limit in seconds"),
]


@pytest.mark.parametrize("argv, named", REFUSED, ids=str)
def test_fit_that_cannot_be(tiny_data, tmp_path, argv, named):
    """One line, and nothing written. The last one: on a track without such a limit."""
    run = tmp_path / "run"
    status, out, err = fit_run(tiny_data, run, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
    assert not run.exists()


def test_a_model_that_never_fits(tiny_data, tmp_path, monkeypatch, capped):
    monkeypatch.setattr(harness, "measure_speed", lambda *args: 1e9)
    status, out, err = fit_run(tiny_data, tmp_path / "run", "--fit")
    assert (status, out, err.count("\n")) == (2, "", 1) and "--fit" in err
    assert not (tmp_path / "run").exists()


def test_fit_goes_with_a_new_run(finished_run):
    for command in (["--resume", finished_run], ["--dry_run"], ["--sample", finished_run]):
        status, out, err = run_main(*command, "--fit")
        assert (status, out, err.count("\n")) == (2, "", 1) and "--fit" in err
