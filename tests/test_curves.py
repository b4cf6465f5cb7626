"""Watching runs: their curves, and the list of all of them."""

import fcntl
import json
import shutil
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import curves
from test_reading import write_log

pytestmark = pytest.mark.contract

CONFIG = f"config {json.dumps({'members': 2})}"


def step(k, loss, word="loss", member=""):
    return f"{member}step {k}/200 epoch {k / 100:.3f} {word} {loss:.4f} lr 0.1 time {k:.1f}s left 2s"


def test_losses_of_a_log(tmp_path):
    """Bags are no part of the training loss, which is the mean over neighbors; an evaluation is at the epoch
    of its step."""
    lines = [CONFIG, *(step(k, 9, "bag_loss") for k in range(1, 81))]
    lines += [step(k, 2 + (k % 2) / 2) for k in range(81, 201)]
    lines += ["eval 100/200 val_loss 1.5000 on 4 windows", "probe 150/200 val_loss 1.4000 on the first"]
    lines += [
        step(1, 3.0, member="member 2 "),
        "val_loss 1.1 nats per token, 1.2 bits per byte, 9 tokens scored",
    ]
    found = curves.curves_of(write_log(tmp_path / "log.txt", lines))
    first, second = found["models"]
    assert first["train"] == [[round(0.815 + 0.02 * i, 5), 2.25] for i in range(60)]
    assert first["evals"] == [[1.0, 1.5], [1.5, 1.4]] and first["word"] == "probe"
    assert second == {"train": [[0.01, 3.0]], "evals": [], "word": "eval"}
    assert found["score"] == 1.1
    assert curves.curves_of(tmp_path)["models"] == found["models"]


def test_a_plot_in_characters():
    """Losses fall from the upper left to the lower right; where two runs meet is a star; what is above or
    below the range is left out."""
    falling = [[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [2.0, 9.0], [2.0, -9.0]]
    flat = [[0.0, 1.0], [2.0, 1.0]]
    plot = curves.text_plot([falling, flat], 2.0, 1.0, 3.0, 11, 3)
    assert plot == ["A          ", "     A     ", "B         *", "-----------", "0         2"]


def test_the_range_leaves_out_how_training_began():
    model = {"train": [[0.1, 9.0], [1.0, 3.0]], "evals": [[0.1, 8.0], [1.0, 2.0]], "word": "eval"}
    assert curves.loss_range([{"name": "a", "models": [model], "score": 1.5}]) == (1.5, 3.0)
    assert curves.loss_range([{"name": "a", "models": [], "score": None}]) == (0.0, 1.0)


@pytest.mark.parametrize("lines", [[], [step(1, 2.0)]], ids=["no step yet", "one step"])
def test_a_run_that_has_just_begun(call, tmp_path, lines):
    write_log(tmp_path / "log.txt", [CONFIG, *lines])
    status, out, err = call(curves.main, tmp_path, "--picture", tmp_path / "both")
    assert (status, err) == (0, "") and "A  " in out
    assert (tmp_path / "both_dark.svg").exists() and (tmp_path / "both_light.svg").exists()


def test_runs_side_by_side(call, tmp_path, finished_run):
    """A run and a record, in the terminal and as pictures, which may be drawn again over themselves."""
    record = next((ROOT / "records" / "pocket").glob("*/"))
    argv = (finished_run, record, "--picture", tmp_path / "both")
    status, out, err = call(curves.main, *argv)
    assert (status, err) == (0, "")
    score = json.loads((finished_run / "record.json").read_text())["val_loss"]
    assert f"\nA  {finished_run.name}: " in out and f" val_loss {score:.4f} " in out
    assert f"\nB  {record.name}: " in out
    assert call(curves.main, *argv)[0] == 0


def test_nothing_of_the_users_is_overwritten(call, tmp_path, finished_run):
    (tmp_path / "mine_dark.svg").write_text("<svg/>")
    status, _, err = call(curves.main, finished_run, "--picture", tmp_path / "mine")
    assert (status, err.count("\n")) == (2, 1) and "mine_dark.svg" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine_dark.svg"]
    assert (tmp_path / "mine_dark.svg").read_text() == "<svg/>"


@pytest.mark.parametrize(
    "words, named",
    [
        (["nothing"], "nothing"),
        (["--picture", "x"], "--picture"),
        (["README.md"], "README.md"),
        (["records"], "records"),
        (["a"] * 13, "at most 12"),
    ],
    ids=str,
)
def test_what_has_no_curves_is_one_line(call, monkeypatch, words, named):
    monkeypatch.chdir(ROOT)
    status, out, err = call(curves.main, *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err


def test_the_list_of_all_runs(call, tmp_path, monkeypatch, finished_run):
    """Each state, the score or the last evaluation, and what is wrong. A name cannot steer the terminal."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(curves.main)
    assert status == 0 and "holds no runs" in out

    runs = tmp_path / "runs"
    for name in ("finished", "training", "stopped", "trial", "no config", "no\x1b[2Jlog"):
        shutil.copytree(finished_run, runs / name)
    for name in ("training", "stopped"):
        (runs / name / "record.json").unlink()
    config = json.loads((finished_run / "config.json").read_text())
    (runs / "trial" / "config.json").write_text(json.dumps(config | {"trial": True}))
    (runs / "trial" / "record.json").unlink()
    (runs / "no config" / "config.json").unlink()
    (runs / "no\x1b[2Jlog" / "log.txt").unlink()
    with open(runs / "training" / "log.txt", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        status, out, err = call(curves.main)
    assert (status, err) == (0, "")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows.keys() >= {"finished", "training", "stopped", "trial", "no config", "no?[2Jlog"}
    record = json.loads((finished_run / "record.json").read_text())
    assert "  finished  " in rows["finished"] and f"  {record['val_loss']:.4f}  " in rows["finished"]
    assert "train.bin is not the track's" in rows["finished"] and "--resume" not in rows["finished"]
    assert "  training  " in rows["training"] and "  eval " in rows["training"]
    assert "  interrupted  " in rows["stopped"] and "--resume runs/stopped" in rows["stopped"]
    assert f"  {record['steps']}/{record['steps']}  " in rows["stopped"]
    assert "  interrupted, trial  " in rows["trial"] and "it is a trial" in rows["trial"]
    for name in ("no config", "no?[2Jlog"):
        assert "  unreadable  " in rows[name] and "No such file" in rows[name]
