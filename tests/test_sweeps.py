"""The curves that sweeps.py makes of the logs of its plan."""

import json
import shutil
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import sweeps

pytestmark = pytest.mark.contract


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of records/baselines, for sweeps.py to work on."""
    shutil.copytree(ROOT / "records" / "baselines", tmp_path / "baselines")
    shutil.copy(ROOT / "records" / "baselines.json", tmp_path)
    monkeypatch.setattr(sweeps, "HERE", tmp_path)
    return tmp_path


def curves(here):
    """Losses of both curves in baselines.json, by tokens."""
    pocket = json.loads((here / "baselines.json").read_text())["pocket"]
    plain, look_ups = pocket["points"], pocket["with_look_ups"]["points"]
    return [{p["train_tokens"]: p["val_loss"] for p in points} for points in (plain, look_ups)]


def test_the_curves_of_this_repository_are_those_of_its_logs(here):
    before = curves(here)
    page = (here / "baselines" / "README.md").read_text()
    sweeps.write_curves(here / "baselines" / "pocket")
    assert curves(here) == before and (here / "baselines" / "README.md").read_text() == page


def test_a_run_with_look_ups_is_of_the_second_curve(here):
    """However good it is, it does not touch the plain one. Several epochs are of neither."""
    sweeps.write_curves(here / "baselines" / "pocket")
    plain, look_ups = curves(here)
    folder = here / "baselines" / "pocket"
    log = (folder / "4M_w256_b2048_lr0.014.log").read_text()
    log = log.replace('"recall": ""', '"recall": "4"').replace(
        '"train_tokens": 4000000', '"train_tokens": 3000000'
    )
    log = log.replace("\nval_loss 0.", "\nval_loss 0.1")
    (folder / "lookups_3M.log").write_text(log)
    (folder / "lookups_9M.log").write_text(
        log.replace('"train_tokens": 3000000', '"train_tokens": 9000000').replace(
            '"epochs": 1.0', '"epochs": 2.0'
        )
    )
    sweeps.write_curves(here / "baselines" / "pocket")
    now_plain, now_look_ups = curves(here)
    assert now_plain == plain and set(now_look_ups) == {*look_ups, 3_000_000}
    assert 0.1 < now_look_ups[3_000_000] < 0.2


def test_the_plan_for_look_ups_differs_in_the_look_ups_alone():
    """Each recipe of the second curve has the options of a plain one, and two more."""
    plan = {
        entry["name"]: entry["options"]
        for entry in sweeps.read_plan(ROOT / "records" / "baselines" / "pocket")
    }
    names = [name for name in plan if name.startswith("lookups_")]
    assert len(names) == 4
    for name in names:
        options, _, look_ups = plan[name].partition(" --recall ")
        assert options == plan[name.removeprefix("lookups_")] and " --memory " in look_ups
