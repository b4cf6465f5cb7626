"""The one reader of logs: what each kind of line says, in old and new logs, and what is no such line."""

import hashlib
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import reading
from reading import Alone, Chain, Done, Eval, Hardware, Malformed, Score, Size, Step, Trained, Without

pytestmark = pytest.mark.contract


def write_log(path, lines, source=b"print(1)\nval_loss 0.1\n"):
    header = f"==== source s.py bytes={len(source)} sha256={hashlib.sha256(source).hexdigest()}\n"
    path.write_bytes(header.encode() + source + b"\n==== end of source\n" + "\n".join([*lines, ""]).encode())
    return path


@pytest.mark.parametrize(
    "line, entry",
    [
        (
            "step 3/757 epoch 0.012 loss 5.5493 lr 0.00264 tok/s 9114 time 7.4s left 340s",
            Step(1, 3, 757, 0.012, 5.5493, False, 7.4),
        ),
        (
            "member 2 step 1/9 epoch 0.111 bag_loss 4.5000 mtp 1.5432 kl 0.1 lr 0.1 time 0.1s left 2s",
            Step(2, 1, 9, 0.111, 4.5, True, 0.1),
        ),
        ("probe 95/757 val_loss 0.8254 on the first 40,000 tokens", Eval(1, 95, 757, 0.8254, "probe")),
        (
            "member 3 eval 5/9 val_loss 1.0685 on 40 windows of 1,024 tokens spread over validation",
            Eval(3, 5, 9, 1.0685, "eval"),
        ),
        (
            "member 2 done: val_loss 0.5883, the members so far together 0.5766, on the first 40,000 tokens",
            Done(2, 0.5883, 0.5766),
        ),
        (
            "member 1 alone: 0.704998; the members so far together: 0.704998 nats per token",
            Alone(1, 0.704998, 0.704998),
        ),
        ("without n-grams: 0.997234 nats per token", Without(0.997234)),
        ("chain 2 of 3: 8 rank(s), 0.1 s, seed 1", Chain(8)),
        ("hardware: AMD EPYC, 2 cores; 1 rank(s) of 2 thread(s)", Hardware("AMD EPYC, 2 cores", 1, 2)),
        ("run runs/a: track pocket, 2,016,138 parameters, 781 steps of 4,096 tokens", Size(2_016_138)),
        ("run runs/7 b: track pocket, 1 model(s), the first of 95 parameters, 1 steps", Size(95)),
        (
            "trained for 282.7 s, 3,100,672 tokens seen, 4.282e+13 FLOPs, peak memory 1106 MiB",
            Trained(282.7, 3_100_672, 4.282e13),
        ),
        ("trained for 1.0 s, 5 tokens seen, 1234 FLOPs, peak memory 1 MiB", Trained(1.0, 5, 1234.0)),
        ("trained for 1.0 s, 5 tokens seen", Trained(1.0, 5, None)),
        (
            "val_loss 0.767990 nats per token, 1.108044 bits per byte, 399,999 tokens scored",
            Score(0.76799, 1.108044, 399_999),
        ),
    ],
)
def test_what_a_line_says(line, entry):
    assert reading.parse_line(line) == entry
    # A log that is being written may end anywhere. A number that is cut is not taken for a whole one.
    for end in range(len(line)):
        part = reading.parse_line(line[:end])
        if isinstance(part, Trained):
            part = part._replace(flops=entry.flops)
        if isinstance(part, Alone):
            part = part._replace(together=entry.together)
        assert part == entry or part is None or isinstance(part, Malformed), line[:end]


@pytest.mark.parametrize(
    "line, kind",
    [
        ("step 3/757 epoch 0.012 loss nan lr 0.00264 tok/s 9114 time 7.4s left 340s", Step),
        ("step 3/757 epoch 0.012 loss 5.54", Step),
        ("step 3/757 epoch 0.012 loss " + "9" * 400 + ".0 time 7.4s", Step),
        ("step \u0663/757 epoch 0.012 loss 5.5493 lr 0.00264 tok/s 9114 time 7.4s left 340s", Step),
        ("member two step 3/757 epoch 0.012 loss 5.5493 time 7.4s", Step),
        ("chain 1 of 2: 0 rank(s), 0.1 s", Chain),
        ("hardware: a machine", Hardware),
        ("val_loss 0.767990 nats per token, 1.108044 bits per byte, 399,999 tokens scored, twice", Score),
        ("trained for 1 s, 5 tokens seen", Trained),
    ],
)
def test_a_line_that_goes_on_in_another_way(line, kind):
    assert reading.parse_line(line) == Malformed(kind, line)


@pytest.mark.parametrize("line", ["", "member", "steps 3/757", "the run is in runs/step", "loss 1.0"])
def test_a_line_that_says_nothing_of_these(line):
    assert reading.parse_line(line) is None


def test_what_the_model_wrote_and_the_source_say_nothing(tmp_path):
    score = "val_loss 0.500000 nats per token, 0.721348 bits per byte, 9 tokens scored"
    sample = ["---- what the model writes", "---- again", score.replace("0.5", "0.1"), "----"]
    path = write_log(tmp_path / "log.txt", ['config {"seed": 3}', *sample, score, "the run is in runs/a"])
    log = reading.read_log(path)
    assert log.entries == [Score(0.5, 0.721348, 9)] and log.config == {"seed": 3} and log.data is None
    [script] = log.sources
    assert script.content.startswith(b"print(1)") and script.name == "s.py"


def test_a_log_that_was_kept_without_its_source(tmp_path):
    """Only where all of it is left out: a part of it is a damaged log."""
    path = write_log(tmp_path / "log.txt", ["config {}", "chain 1 of 1: 2 rank(s)"])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"print(1)\nval_loss 0.1\n\n", b""))
    log = reading.read_log(path)
    [script] = log.sources
    assert script.content is None and script.name == "s.py" and log.entries == [Chain(2)]
    path.write_bytes(content.replace(b"print(1)\n", b""))
    with pytest.raises(ValueError, match="does not begin with"):
        reading.read_log(path)


def test_a_script_with_a_harness(tmp_path):
    """Both sources are read, with or without their text. A second one of another name is none: it would be
    written to where the script is run."""
    script, harness = write_log(tmp_path / "script", []), write_log(tmp_path / "harness", ["config {}"])
    named = harness.read_bytes().replace(b"source s.py", b"source harness.py")
    path = tmp_path / "log.txt"
    path.write_bytes(script.read_bytes() + named)
    whole = reading.read_log(path).sources
    assert [source.name for source in whole] == ["s.py", "harness.py"]
    assert [source.content for source in whole] == [b"print(1)\nval_loss 0.1\n"] * 2
    path.write_bytes(path.read_bytes().replace(b"print(1)\nval_loss 0.1\n\n", b""))
    kept = reading.read_log(path).sources
    assert kept == [source._replace(content=None) for source in whole]
    path.write_bytes(script.read_bytes() + harness.read_bytes())
    with pytest.raises(ValueError, match="its second source is s.py, not harness.py"):
        reading.read_log(path)


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "lacks its config line"),
        (["config {"], "its config line is damaged"),
        (["config [1]"], "its config line is damaged"),
        (['config {"lr": NaN}'], "holds NaN"),
        (["config {}", "data nothing"], "its data line is damaged"),
    ],
)
def test_what_is_no_log(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        reading.read_log(write_log(tmp_path / "log.txt", lines))


def test_every_log_of_this_repository_is_read():
    """The lines of all runs in records/ have the forms of their kinds. One run was stopped."""
    paths = [*(ROOT / "records").glob("*/*/log*.txt"), *(ROOT / "records").glob("*/*/*.log")]
    unfinished = 0
    for path in paths:
        log = reading.read_log(path)
        assert not log.of(Malformed), path
        assert len(log.of(Size)) == 1 and log.of(Hardware), path
        unfinished += not log.of(Score)
    assert len(paths) > 180 and unfinished <= 1
