"""The spread from seed to seed: which runs are pooled, and that tracks.json states what the logs give."""

import json
import math
import sys

import pytest

from conftest import ROOT
from test_reading import write_log

sys.path.insert(0, str(ROOT / "records"))
import leaderboard
import reading
import spread

pytestmark = pytest.mark.contract

DATASET = {"sha256": {"val.bin": "0" * 64}, "train_tokens": 1000}


@pytest.fixture
def write_run(tmp_path):
    """A function that writes a run's log into records/."""
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "tracks.json").write_text(json.dumps({"tracks": {"pocket": {}}}))

    def write(where, seed, loss, source=b"x", val="0" * 64, **config):
        path = tmp_path / "records" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"config {json.dumps({'recall': '2', 'train_tokens': 250, 'seed': seed} | config)}",
            f"data {json.dumps({'sha256': {'val.bin': val}})}",
        ]
        if loss is not None:
            lines.append(f"val_loss {loss:.6f} nats per token, 1.000000 bits per byte, 9 tokens scored")
        write_log(path, lines, source)

    return write


def groups(tmp_path):
    found = spread.seed_groups(tmp_path, DATASET)
    return [(group.name, group.losses, group.counts) for group in found]


def write_three(write_run, name, losses=(0.7, 0.71, 0.72), **kwargs):
    for seed, loss in enumerate(losses):
        write_run(f"{name}_s{seed}.log", seed, loss, **kwargs)


def test_seeds_of_one_recipe_are_a_group(write_run, tmp_path):
    """A record lends a seed, a repeated one counts once, and two are too few."""
    write_run("ablations/pocket/a_s0.log", 0, 0.7)
    write_run("ablations/pocket/a_s1.log", 1, 0.71)
    assert groups(tmp_path) == []
    write_run("ablations/tried/again.log", 1, 0.5)
    assert groups(tmp_path) == []
    write_run("pocket/2026-01-01_a/log.txt", 2, 0.72)
    assert groups(tmp_path) == [("ablations/pocket/a_s0.log", {0: 0.7, 1: 0.71, 2: 0.72}, True)]


@pytest.mark.parametrize(
    "third",
    [{"source": b"y"}, {"val": "1" * 64}, {"n_layer": 5}, {"loss": None}],
    ids=lambda third: [*third][0],
)
def test_what_is_another_recipe(write_run, tmp_path, third):
    """Another script, other data, another option. A run that was stopped is none."""
    write_run("ablations/pocket/a_s0.log", 0, 0.7)
    write_run("ablations/pocket/a_s1.log", 1, 0.71)
    write_run("ablations/pocket/a_s2.log", 2, **{"loss": 0.72} | third)
    assert groups(tmp_path) == []


def test_records_make_no_group_of_their_own(write_run, tmp_path):
    """Somebody could submit many seeds that are alike, so that everybody's spread is small."""
    for seed in range(20):
        write_run(f"pocket/2026-01-01_a/log_{seed}.txt", seed, 0.7)
    assert groups(tmp_path) == []


def test_recipes_without_look_ups_do_not_count(write_run, tmp_path):
    write_three(write_run, "ablations/pocket/a")
    write_three(write_run, "ablations/pocket/b", losses=(0.7, 0.8, 0.9), recall="")
    found = spread.seed_groups(tmp_path, DATASET)
    assert [group.counts for group in found] == [True, False]


def test_recipes_on_little_text_do_not_count(write_run, tmp_path):
    write_three(write_run, "ablations/pocket/a", train_tokens=249)
    write_three(write_run, "ablations/pocket/b", train_tokens=250)
    assert [group.counts for group in spread.seed_groups(tmp_path, DATASET)] == [False, True]


def test_groups_are_pooled_by_their_degrees_of_freedom():
    """Of those that count; no spread is told from too few."""
    two = spread.Group("a", {0: 0.7, 1: 0.71, 2: 0.72}, True)
    eighteen = spread.Group("b", dict.fromkeys(range(19), 0.7), True)
    other = spread.Group("c", {0: 0.7, 1: 0.8, 2: 0.9}, False)
    assert spread.pooled([two, eighteen, other]) == (pytest.approx(math.sqrt(2 * 1e-4 / 20)), 20)
    assert spread.pooled([two] * 9) == (0.0, 0)
    assert spread.pooled([]) == (0.0, 0)


@pytest.mark.parametrize("name", reading.read_tracks()["datasets"])
def test_tracks_json_states_what_the_logs_give(call, name):
    """leaderboard.py spread prints what belongs there."""
    status, out, err = call(leaderboard.main, "spread", name)
    assert status == 0, out + err


def test_a_dataset_that_there_is_not(call):
    status, out, err = call(leaderboard.main, "spread", "moon")
    assert status == 2 and err.count("\n") == 1 and "choose one of pocket" in err
