"""A stranger's program inside walls, and the rerun of a record."""

import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT
from runs import make_repository, run_here

sys.path.insert(0, str(ROOT / "records"))
import audit
import reading
import rerun
import walls
import workshop

pytestmark = pytest.mark.contract

needs_walls = pytest.mark.skipif(bool(walls.missing()), reason=f"this system lacks walls: {walls.missing()}")


def run_inside(folder, code, hidden=()):
    command = walls.walled([sys.executable, "-c", code], folder, hidden)
    return audit.run_limited(command, 60)


@needs_walls
def test_a_program_reaches_nothing_outside(tmp_path):
    """Each line is one that a cheat would try; what it may do, it can."""
    inside = tmp_path / "inside"
    secret = tmp_path / "secret"
    inside.mkdir()
    secret.mkdir()
    (secret / "val.bin").write_text("secret")
    code = f"""
import os, pathlib, socket
done = []
def attempt(what, action):
    try:
        action()
        done.append(what)
    except OSError:
        pass
attempt("wrote beside", lambda: pathlib.Path({str(tmp_path / "left")!r}).write_text("x"))
attempt("wrote secret", lambda: pathlib.Path({str(secret / "left")!r}).write_text("x"))
attempt("read", lambda: pathlib.Path({str(secret / "val.bin")!r}).read_text())
attempt("connected", lambda: socket.create_connection(("192.0.2.1", 80), timeout=1))
attempt("wrote inside", lambda: pathlib.Path("own.txt").write_text("x"))
print(done)
"""
    status, last = run_inside(inside, code, [secret])
    assert (status, last) == (0, "['wrote inside']")
    assert (inside / "own.txt").exists() and not (tmp_path / "left").exists()


@needs_walls
def test_no_process_is_left_behind(tmp_path):
    """Not even one that has left its process group and its parent."""
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for i in range(600):
            open("alive", "w").write(str(i))
            time.sleep(0.05)
    os._exit(0)
time.sleep(0.5)
print("done")
"""
    status, last = run_inside(tmp_path, code)
    assert (status, last) == (0, "done")
    before = (tmp_path / "alive").read_text()
    time.sleep(0.5)
    assert (tmp_path / "alive").read_text() == before


@pytest.fixture
def root(tiny_data, tmp_path):
    make_repository(tmp_path / "root", tiny_data)
    return tmp_path / "root"


def make_shop(folder, log, root):
    folder.mkdir()
    return workshop.Workshop(folder, log, "pocket", reading.read_tracks(root), root, 300)


@pytest.fixture
def shop(root, finished_run, tmp_path):
    """The Workshop of a record of the tests' tiny run."""
    return make_shop(tmp_path / "shop", reading.read_log(finished_run / "log.txt"), root)


def test_the_data_of_a_rerun_is_the_budget_and_a_decoy(shop):
    folder, unseen = shop.write_data("data", 3000)
    meta = json.loads((folder / "meta.json").read_text())
    train = reading.read_shard(shop.data / "train.bin")
    given = reading.read_shard(folder / "train.bin", meta["sha256"]["train.bin"])
    decoy = reading.read_shard(folder / "val.bin", meta["sha256"]["val.bin"])
    assert np.array_equal(given, train[:20_000])
    assert len(decoy) == 3000 and decoy[0] == shop.dataset["bos_id"]
    # Budget, decoy and what the script is not given are three parts of the text.
    rest = train[20_000:]
    start = len(rest) - len(unseen) - 3000
    assert np.array_equal(decoy, rest[start : start + 3000])
    assert np.array_equal(unseen, rest[start + 3000 :]) and len(unseen) > 1000
    assert not np.array_equal(decoy, shop.val[:3000])


# A scorer that leaves a note wherever it may write. Its NLL is the number of notes from earlier calls that it
# finds, and 100 more if it finds the true validation stream.
FORGETFUL = b"""
import os, pathlib, sys
import numpy as np

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
tokens, out = words["--tokens"], words["--nll"]
shape = np.load(tokens).shape if tokens.endswith(".npy") else (np.fromfile(tokens, "<u2")[512:].size,)
found = 0
places = [words["--score"], os.path.dirname(sys.argv[0]), os.environ["HOME"], "/dev/shm", "/tmp", "."]
for place in places:
    note = pathlib.Path(place) / "note_of_a_scorer"
    found += note.exists()
    try:
        note.touch()
    except OSError:
        pass
found += 100 * os.path.exists(os.path.join(VAL, "val.bin"))
nll = np.full(shape, float(found))
nll[..., 0] = 0
np.save(out, nll)
"""


@needs_walls
def test_a_scorer_remembers_nothing(root, finished_run, tmp_path):
    """Each call has its own folder, and cannot write into the run, beside the script or anywhere else."""
    source = b"VAL = %r\n" % str(root / "data" / "pocket") + FORGETFUL
    log = reading.read_log(finished_run / "log.txt")
    sources = [log.sources[0]._replace(content=source), *log.sources[1:]]
    shop = make_shop(tmp_path / "shop", log._replace(sources=sources), root)
    score = shop.scorer(shop.work)
    for tokens in (shop.val[:50], shop.val[:50], shop.val[:60].reshape(6, 10)):
        assert score(tokens).max() == 0


def test_flops_are_counted(shop, finished_run, monkeypatch):
    """Training is the formula, the optimizer's products and masked attention, and no sample. Scoring is the
    formula and masked attention."""
    monkeypatch.setattr(rerun, "FEW_STEPS", 2)
    monkeypatch.setattr(rerun, "MORE_STEPS", 4)
    monkeypatch.setattr(rerun, "SHORT_STREAM", 1)
    monkeypatch.setattr(rerun, "LONG_STREAM", 3)
    monkeypatch.setattr(workshop, "run_limited", run_here)
    monkeypatch.setattr(workshop, "walled", lambda command, folder, hidden: command)
    # The counter replaces it in this process. Left as it is, the samples at the end of both trainings would
    # differ in length and cost as much as the steps.
    monkeypatch.setattr(torch, "multinomial", torch.multinomial)
    steps = len(shop.log.of(reading.Step))
    counted, per_token, forward = rerun.count_flops(shop, steps)
    claimed = shop.log.of(reading.Trained)[0].flops
    assert claimed < counted < 1.5 * claimed
    assert forward == pytest.approx(counted / steps / shop.log.config["batch_tokens"] / 3)
    by_formula = json.loads((finished_run / "record.json").read_text())["score_flops_per_token"]
    assert by_formula < per_token < 1.5 * by_formula


class Interrupted(Exception):
    pass


def test_a_training_that_was_broken_off_goes_on(tmp_path, monkeypatch):
    """Its FLOPs are not counted again, its folder is resumed, and the time that it took is kept."""
    kept = tmp_path / "trained.json"
    fresh = tmp_path / "run"
    counted = []
    commands = []

    class Shop:
        script = "script.py"

        def options(self, data):
            return ["--data", str(data)]

        def run(self, what, command):
            commands.append(command)
            if len(commands) == 1:
                fresh.mkdir()
                for name, time in (("config.json", 1000), ("log.txt", 1060)):
                    (fresh / name).touch()
                    os.utime(fresh / name, (time, time))
                raise Interrupted
            return 5.0

    monkeypatch.setattr(rerun, "count_flops", lambda shop, steps: counted.append(steps) or (1.0, 2.0, 3.0))
    run = {"source_sha256": "a", "steps": 7}
    with pytest.raises(Interrupted):
        rerun.train_again(Shop(), "data", fresh, kept, run)
    done = rerun.train_again(Shop(), "data", fresh, kept, run)
    assert counted == [7] and done["seconds"] == 65 and done["train_flops"] == 1.0
    assert "--run_dir" in commands[0] and commands[1][-2:] == ["--resume", str(fresh)]


def test_a_kept_training_is_not_repeated(tmp_path):
    kept = tmp_path / "trained.json"
    trained = {"source_sha256": "a", "train_flops": 1.0, "seconds": 1.0}
    kept.write_text(json.dumps(trained))
    assert rerun.train_again(None, None, None, kept, {"source_sha256": "a"}) == trained
    with pytest.raises(reading.Refused, match="another record"):
        rerun.train_again(None, None, None, kept, {"source_sha256": "b"})


HONEST = {
    "val_loss": 0.7,
    "claimed": 0.701,
    "limit": 0.0127,
    "train_flops": 1.3e14,
    "claimed_train_flops": 1e14,
    "train_flops_limit": 1.4e14,
    "score_flops_per_token": 3e7,
    "forward_flops_per_token": 1e7,
}


@pytest.mark.parametrize(
    "claims, config, expected",
    [
        # Batches of 4,096: a step of the optimizer adds a third. Of 1,024: as much as the model, and no more.
        (dict(steps=1000, parameters=2e6, members=1, train_flops=5e13), {"n_embd": 192}, 6.5e13 + 1.152e13),
        (dict(steps=9000, parameters=2e6, members=1, train_flops=5e13), {"n_embd": 192}, 6.5e13 + 5e13),
        # Each step trains one of the members.
        (dict(steps=4000, parameters=8e6, members=4, train_flops=2e14), {"n_embd": 192}, 2.6e14 + 4.608e13),
        # A config that does not tell its width, or lies about it.
        (dict(steps=1, parameters=2e6, members=1, train_flops=5e13), {}, 1.15e14),
        (dict(steps=1, parameters=2e6, members=1, train_flops=5e13), {"n_embd": "wide"}, 1.15e14),
    ],
)
def test_the_optimizer_multiplies_too(claims, config, expected):
    assert rerun.train_flops_limit(claims, config) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"val_loss": 0.75}, "+0.0490 from the claimed one"),
        (
            {"train_flops": 1.5e14},
            "1.5e+14 FLOPs, masked attention included; 1e+14 are claimed, which allows 1.4e+14",
        ),
        ({"score_flops_per_token": 1e9}, "scoring a token takes 100.0 forward passes, 20 are allowed"),
    ],
)
def test_what_a_rerun_says(changes, words):
    faults = rerun.judge_rerun(HONEST | changes, {"max_score_passes": 20})
    assert len(faults) == (words is not None)
    assert all(words in fault for fault in faults)
