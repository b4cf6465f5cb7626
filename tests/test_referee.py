"""The referee's desk on records of a tiny run: what is honest verifies, what was tampered with is named."""

import argparse
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, SCRIPT
from runs import SEED_SPREAD, make_repository

sys.path.insert(0, str(ROOT / "records"))
import board
import compare
import efficiency
import judge
import leaderboard
import reading
import rerun
import smoke
import submit
import verify

pytestmark = pytest.mark.contract

NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
NOTE = "# The tiny recipe\n\nNothing to see.\n"


# ---- helpers


def edit(path, change):
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def replace(path, old, new, count=1):
    """Change a part of a file that must be there."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, count))


WITH_HARNESS = pytest.mark.skipif(
    not SCRIPT.with_name(reading.HARNESS).exists(), reason="the script has no harness beside it"
)


def read_record(folder):
    return json.loads((folder / "record.json").read_text())


def log_of(sources, rest):
    """A log.txt that claims these sources, {name: content}."""
    log = b""
    for name, content in sources.items():
        digest = hashlib.sha256(content).hexdigest()
        log += f"==== source {name} bytes={len(content)} sha256={digest}\n".encode()
        log += content + b"\n==== end of source\n"
    return log + rest


def edit_source(path, change, name=SCRIPT.name):
    """Change a source in a log, with the length and hash that belong to it."""
    sources, rest = reading.split_log(path.read_bytes())
    contents = {source.name: source.content for source in sources}
    path.write_bytes(log_of(contents | {name: change(contents[name])}, rest))


def edit_lines(path, change):
    """Change the lines of a log behind its source. change: list of lines with their ends -> list of lines."""
    sources, rest = reading.split_log(path.read_bytes())
    contents = {source.name: source.content for source in sources}
    path.write_bytes(log_of(contents, b"".join(change(rest.splitlines(keepends=True)))))


def make_root(folder, tiny_data):
    """A repository with a board, a baseline and a note."""
    # Some tests are about a track with a clock. That of a run inside the tests' own process counts from the
    # start of that process.
    make_repository(folder, tiny_data, max_seconds=10**9, max_cores=4)
    (folder / "note.md").write_text(NOTE)
    (folder / "README.md").write_text(f"# Board\n\n{board.BEGIN}\n{board.END}\n\nafter\n")
    baselines = json.loads((ROOT / "records" / "baselines.json").read_text())
    baselines["pocket"]["points"] = [
        {"train_tokens": n, "val_loss": loss, "train_flops": n * 1e5}
        for n, loss in ((20_000, 4.0), (40_000, 3.0), (80_000, 2.0))
    ]
    baselines["pocket"]["with_look_ups"]["points"] = []
    (folder / "records" / "baselines.json").write_text(json.dumps(baselines))
    return folder


@pytest.fixture(scope="module")
def original(tiny_data, finished_run, second_seed, tmp_path_factory):
    """(root, record folder) of a repository with one good record, which nobody changes."""
    root = make_root(tmp_path_factory.mktemp("roots") / "original", tiny_data)
    runs = [finished_run, second_seed]
    folder = submit.submit(runs, "tiny", root / "note.md", ["A. Author", "b-c"], root, NOON)
    return root, folder


@pytest.fixture
def copy(original, tmp_path):
    """A copy of it, to be tampered with."""
    root, folder = original
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root", tmp_path / "root" / folder.relative_to(root)


# ---- submit and verify


def test_a_record_of_two_seeds(original, finished_run):
    root, folder = original
    assert folder == root / "records" / "pocket" / "2026-01-02_tiny"
    names = ["README.md", "log.txt", "log_2.txt", "record.json"]
    names += ["test_nll.npy", "test_nll_2.npy", "val_nll.npy", "val_nll_2.npy"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = read_record(folder)
    assert record["description"] == "The tiny recipe" and record["contributors"] == ["A. Author", "b-c"]
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    # The test stream is of the same kind of text, but not the same.
    first = record["runs"][0]
    assert 0 < abs(first["test_loss"] - first["val_loss"]) < 1
    assert (folder / "val_nll.npy").read_bytes() == (finished_run / "val_nll.npy").read_bytes()
    assert verify.verify_record(folder, root) == []
    assert not list(folder.parent.glob(".submit*"))


# Each of these tampers with a record, given the root and the record's folder.


def edit_record(**values):
    return lambda root, folder: edit(folder / "record.json", lambda record: record.update(values))


def edit_run(**values):
    """Change what is claimed of the first run."""
    return lambda root, folder: edit(folder / "record.json", lambda record: record["runs"][0].update(values))


def edit_array(change, name="val_nll.npy", **kwargs):
    return lambda root, folder: np.save(folder / name, change(np.load(folder / name)), **kwargs)


def edit_log(change):
    return lambda root, folder: edit_lines(folder / "log.txt", change)


def replace_in_log(old, new):
    return lambda root, folder: replace(folder / "log.txt", old, new)


def better_score_in_log(root, folder):
    loss = read_record(folder)["runs"][0]["val_loss"]
    replace(folder / "log.txt", f"val_loss {loss:.6f}".encode(), f"val_loss {loss - 0.1:.6f}".encode())


def better_score_in_record(root, folder):
    def change(record):
        record["runs"][1]["val_loss"] -= 1e-6

    edit(folder / "record.json", change)


def lower(sums):
    sums[1] *= 0.9
    return sums


def cut_file(root, folder):
    content = (folder / "val_nll.npy").read_bytes()
    (folder / "val_nll.npy").write_bytes(content[:-5])


def climb(root, folder):
    shutil.copy(folder / "val_nll.npy", folder.parent / "val_nll.npy")
    edit_run(val_nll="../val_nll.npy")(root, folder)


def link(root, folder):
    (folder / "val_nll.npy").rename(root / "val_nll.npy")
    (folder / "val_nll.npy").symlink_to(root / "val_nll.npy")


def other_dataset(root, folder):
    def change(record):
        record["runs"][0]["data_sha256"]["val.bin"] = "0" * 64

    edit(folder / "record.json", change)


def other_dataset_in_log(root, folder):
    digest = read_record(folder)["runs"][0]["data_sha256"]["train.bin"]
    replace(folder / "log.txt", digest.encode(), b"f" * 64)


def over_budget(root, folder):
    replace(folder / "log.txt", b'"train_tokens": 20000', b'"train_tokens": 25000')
    edit_run(train_tokens=25_000)(root, folder)


def more_epochs_than_claimed(root, folder):
    seen = read_record(folder)["runs"][0]["tokens_seen"]
    half = seen // 2
    replace(folder / "log.txt", f"{seen:,} tokens seen".encode(), f"{half:,} tokens seen".encode())
    edit_run(tokens_seen=half)(root, folder)


def without_step(n):
    return edit_log(lambda lines: [line for line in lines if not line.startswith(b"step %d/" % n)])


def without_last_step(root, folder):
    without_step(read_record(folder)["runs"][0]["steps"])(root, folder)


def fewer_steps(root, folder):
    edit_run(steps=read_record(folder)["runs"][0]["steps"] - 1)(root, folder)


def swapped_steps(lines):
    steps = [i for i, line in enumerate(lines) if line.startswith(b"step ")]
    a, b = steps[4:6]
    lines[a], lines[b] = lines[b], lines[a]
    return lines


def other_harness(root, folder):
    edit_source(folder / "log.txt", lambda source: source + b"# and one line more\n", reading.HARNESS)


def without_claim_of_harness(root, folder):
    record = read_record(folder)
    for run in record["runs"]:
        del run["harness_sha256"]
    (folder / "record.json").write_text(json.dumps(record))


def other_script(root, folder):
    edit_source(folder / "log.txt", lambda source: source + b"# and one line more\n")


def big_file(root, folder):
    # It is sparse, and takes no room.
    with open(folder / "log.txt", "ab") as f:
        f.truncate(1 << 30)


def wrong_track(root, folder):
    (root / "records" / "tiny").mkdir()
    folder.rename(root / "records" / "tiny" / folder.name)


def wrong_track_claimed(root, folder):
    def change(record):
        record["track"] = "tiny"
        for run in record["runs"]:
            run["track"] = "tiny"

    wrong_track(root, folder)
    edit(root / "records" / "tiny" / folder.name / "record.json", change)


def over_time(root, folder):
    def change(tracks):
        tracks["tracks"]["pocket"]["max_seconds"] = 0.01

    edit(root / "records" / "tracks.json", change)


def pickled(root, folder):
    (folder / "weights.pt").write_bytes(b"\x80\x04.")


def same_weights(root, folder):
    def change(record):
        first, second = record["runs"]
        second["weights_sha256"] = first["weights_sha256"]

    edit(folder / "record.json", change)


def same_nll(root, folder):
    shutil.copy(folder / "val_nll.npy", folder / "val_nll_2.npy")


def noisy_copy(root, folder):
    noise = np.random.default_rng(0).normal(0, 1e-4, 4)
    np.save(folder / "val_nll_2.npy", np.load(folder / "val_nll.npy") + noise)


def other_recipe(root, folder):
    """Another value of any option that is a number with a fraction, whatever the script calls it."""
    config = reading.read_log(folder / "log_2.txt").config
    name = [name for name, value in config.items() if type(value) is float][-1]
    replace(folder / "log_2.txt", f'"{name}": '.encode(), f'"{name}": 1'.encode())


def too_few_seeds(root, folder):
    def change(tracks):
        tracks["tracks"]["pocket"]["seeds"] = {"least": 3, "from": "2026-01-01"}

    edit(root / "records" / "tracks.json", change)


def no_flops(root, folder):
    """Of the record and of the log alike."""
    told = reading.read_log(folder / "log.txt").of(reading.Trained)[0].flops
    replace(folder / "log.txt", f", {told:.4g} FLOPs".encode(), b", 1 FLOPs")
    edit_run(train_flops=1.0)(root, folder)


def one_parameter(root, folder):
    """Of the record and of the log alike."""
    told = reading.read_log(folder / "log.txt").of(reading.Size)[0].parameters
    replace(folder / "log.txt", f" {told:,} parameters".encode(), b" 1 parameters")
    edit_run(parameters=1)(root, folder)


def far_from_validation(root, folder):
    edit_array(lambda a: a / 2, "test_nll.npy")(root, folder)
    edit_run(test_loss=read_record(folder)["runs"][0]["test_loss"] / 2)(root, folder)


def long_source(root, folder):
    edit_source(folder / "log.txt", lambda source: source + b"#" * 300_000)


def lower_evaluations(lines):
    return [re.sub(rb"^(eval .* val_loss) \d", rb"\1 1", line) for line in lines]


def not_json(root, folder):
    (folder / "record.json").write_text('{"track": "pocket", "runs": [')


def no_note(root, folder):
    (folder / "README.md").unlink()


@pytest.mark.parametrize(
    "lines, holds",
    [
        (["member 2 alone: 0.9; the members so far together: 0.850000 nats per token"], True),
        (["member 2 alone: 0.9; the members so far together: 0.851000 nats per token"], False),
        # Whatever a script mixes in, if its log says what the members reach without that.
        (
            [
                "member 2 alone: 0.9; the members so far together: 0.880000 nats per token",
                "without an oracle: 0.880000 nats per token",
            ],
            True,
        ),
        (
            [
                "member 2 alone: 0.9; the members so far together: 0.850000 nats per token",
                "without an oracle: 0.880000 nats per token",
            ],
            False,
        ),
    ],
)
def test_the_members_together_are_the_result(lines, holds):
    entries = [reading.parse_line(line) for line in ["member 1 alone: 0.9; anything", *lines]]
    log = reading.Log([], [], {}, None, entries)
    said = []
    verify.verify_evaluations(
        lambda fine, *rest: fine or said.append(rest), log, {"val_loss": 0.85, "members": 2}
    )
    assert bool(said) != holds


@pytest.mark.parametrize(
    "tamper, words",
    [
        (better_score_in_log, ["log.txt: val_loss is claimed", "in record.json"]),
        (better_score_in_record, ["record.json: val_loss is claimed", "in val_nll_2.npy"]),
        (edit_array(lower), ["record.json: val_loss is claimed", "in val_nll.npy"]),
        (edit_array(lower, "test_nll.npy"), ["test_loss", "in test_nll.npy"]),
        (edit_array(lambda a: a[:-1]), ["val_nll.npy: holds float64 [3], not float64 [4]"]),
        (cut_file, ["val_nll.npy: cannot be read"]),
        (
            edit_array(lambda a: a.astype(object), allow_pickle=True),
            ["val_nll.npy: cannot be read as plain numbers"],
        ),
        (edit_array(lambda a: a.astype(np.float32)), ["holds float32"]),
        (edit_array(lambda a: a * [1, 1, 1, np.nan]), ["not finite"]),
        (edit_array(lambda a: a * [1, 1, 1, -1]), ["below 0"]),
        (climb, ["record.json: names '../val_nll.npy'"]),
        (link, ["val_nll.npy: not a plain file"]),
        (other_dataset, ["record.json: sha256 of val.bin", "the track's"]),
        (other_dataset_in_log, ["log.txt: sha256 of train.bin"]),
        (over_budget, ["record.json: train_tokens is claimed 25,000, found a budget of 20,000"]),
        (more_epochs_than_claimed, ["log.txt: its ", " epochs of ", "tokens seen"]),
        (without_step(7), ["log.txt: after step 6", "steps are missing"]),
        (without_last_step, ["ends at step", "steps are missing"]),
        (without_step(1), ["after step 0", "steps are missing"]),
        (edit_log(swapped_steps), ["steps are missing"]),
        (other_script, ["record.json: source_sha256 is claimed"]),
        pytest.param(other_harness, ["record.json: harness_sha256 is claimed"], marks=WITH_HARNESS),
        pytest.param(without_claim_of_harness, ["tells of another number of sources"], marks=WITH_HARNESS),
        (replace_in_log(b"import ", b"imqort "), ["log.txt: the header of the source claims"]),
        (replace_in_log(b" bytes=", b" bytes=1"), ["log.txt: does not begin"]),
        (big_file, ["bytes, 20,000,000 are the most"]),
        (wrong_track, ["record.json: track is claimed pocket, found folder of tiny"]),
        (wrong_track_claimed, ["log.txt: track of the config is claimed pocket, found tiny"]),
        (over_time, ["record.json: train_seconds is claimed"]),
        (pickled, ["weights.pt: not a plain file of"]),
        (same_weights, ["weights_sha256 must differ"]),
        (same_nll, ["two runs' val_nll differ by 0 nats per token"]),
        (noisy_copy, ["two runs' val_nll differ by"]),
        (other_recipe, ["log_2.txt: another recipe than log.txt has: "]),
        (too_few_seeds, ["number of runs is claimed 2, found the track asks for 3 seeds"]),
        (edit_run(train_flops=1.0), ["log.txt: training FLOPs is claimed"]),
        (edit_run(train_flops=2e14), ["record.json: train_flops is claimed 2", "found a limit of 1"]),
        (no_flops, ["training FLOPs are claimed 1, but a model of these sizes takes"]),
        (
            edit_run(parameters=1),
            ["log.txt: parameters of the first model is claimed ", ", found 1 in record.json"],
        ),
        (one_parameter, ["1 parameters are claimed, but a model of these sizes has "]),
        (edit_run(train_seconds=1e-4), ["no machine of", "is as fast"]),
        (edit_run(compile_seconds=3600.0), ["3600 s of compilation, 1800 are the most"]),
        (edit_run(compile_seconds=60.0), ["compile seconds is claimed 0.0, found 60.0"]),
        (replace_in_log(b'"epochs": 1.0', b'"epochs": 9.0'), ["epochs by the config is claimed 9.0"]),
        (replace_in_log(b'"members": 1', b'"members": 4'), ["models by the config is claimed 4, found 1"]),
        (replace_in_log(b'"members": 1', b'"members": "x"'), ["another recipe than log.txt has: members"]),
        (edit_log(lower_evaluations), ["its last evaluation is claimed 1."]),
        (far_from_validation, ["the test loss is -", "from the validation loss, 1.0 are the most"]),
        (long_source, ["log.txt: train_gpt.py has ", "bytes, 300,000 are the most"]),
        (edit_run(seed=1), ["seed must differ"]),
        (edit_run(trial=True), ["a trial"]),
        (edit_run(threads=64), ["cores is claimed 64"]),
        (fewer_steps, ["number of steps is claimed"]),
        (edit_run(train_seconds=0.0), ["time of the last step"]),
        (edit_run(val_loss=float("nan")), ["record.json: damaged"]),
        (edit_run(val_tokens="many"), ["val_tokens of run 1 is not a int"]),
        (edit_run(members=2), ["ends at step 0 of member 1, of 2 members: steps are missing"]),
        (not_json, ["record.json: damaged"]),
        (no_note, ["README.md: missing"]),
        (edit_record(description="<script> | x"), ["description"]),
        (edit_record(contributors=["[x](http://x)"]), ["contributors"]),
        (edit_record(description="The tiny\rrecipe"), ["description"]),
        (edit_record(description="Another one"), ["README.md: its first line"]),
        (edit_record(submitted="2026-01-02T99:00:00Z"), ["submitted is"]),
        (edit_run(hardware="x |\n\n# Fake\n| 1 |"), ["hardware: one line"]),
        (edit_run(hardware="a better machine"), ["log.txt: its hardware lines"]),
        (replace_in_log(b"; 1 rank(s) of", b"; 8 rank(s) of"), ["log.txt: its hardware lines"]),
        (
            edit_log(lambda lines: [line.replace(b" epoch ", b" epoch " + b"9" * 400) for line in lines]),
            ["some that are not 'step i/n"],
        ),
        (edit_run(test_nll="val_nll.npy"), ["files of their own"]),
        (edit_run(val_nll="val_nll_2.npy"), ["files of their own"]),
    ],
)
def test_tampered_records_are_named(copy, tamper, words):
    root, folder = copy
    tamper(root, folder)
    [folder] = [path.parent for path in (root / "records").glob("*/*/record.json")]
    faults = verify.verify_record(folder, root)
    assert any(all(word in fault for word in words) for fault in faults), faults
    name = os.path.relpath(folder, root)
    assert all(fault.startswith(name) and "\n" not in fault for fault in faults)


def test_seeds_may_be_trained_on_different_machines(copy):
    """With another number of threads, in smaller passes: what a machine asks for is no other recipe."""
    root, folder = copy
    for old, new in (
        (b'"cpu_threads": ', b'"cpu_threads": 1'),
        (b'"device_tokens": ', b'"device_tokens": 1'),
    ):
        replace(folder / "log_2.txt", old, new)
    assert not any("recipe" in fault for fault in verify.verify_record(folder, root))


@pytest.mark.parametrize("names, n_faults", [(["H100", "H200"], 2), (["H100", "cores"], 0), ([], 0)], ids=str)
def test_hardware_of_the_track(copy, names, n_faults):
    """Of each of the two seeds, which have trained on a CPU's cores."""
    root, folder = copy
    change_rules(root, hardware=names)
    faults = verify.verify_record(folder, root)
    assert len(faults) == n_faults and all("a track for H100 or H200" in fault for fault in faults), faults


# ---- rerun.json


@pytest.fixture
def rerun_json(copy):
    """(root, record folder, a function that writes a rerun.json with changes) of an honest rerun."""
    root, folder = copy
    run = read_record(folder)["runs"][0]
    honest = {
        "date": "2026-01-03",
        "machine": "AMD EPYC, 2 cores",
        "walls_missing": [],
        "val_loss": run["val_loss"] + 0.001,
        "claimed": run["val_loss"],
        "limit": SEED_SPREAD["seed_sd"] * 3 * 2**0.5,
        "seconds": 60.0,
        "train_flops": 1.2 * run["train_flops"],
        "claimed_train_flops": run["train_flops"],
        "train_flops_limit": rerun.train_flops_limit(run, reading.read_log(folder / run["log"]).config),
        "score_flops_per_token": 3e7,
        "forward_flops_per_token": 1e7,
        "audited_tokens": 3010,
        "faults": [],
    }

    def write(**changes):
        (folder / "rerun.json").write_text(json.dumps(honest | changes))

    write()
    return root, folder, write


def test_an_honest_rerun(rerun_json):
    """One that found a fault holds as well; it is for people to decide what follows. So does one from a day
    when the stated spread was smaller."""
    root, folder, write = rerun_json
    assert faults_of(root, folder) == ""
    write(faults=["causality: looks ahead"], forward_flops_per_token=None)
    assert faults_of(root, folder) == ""
    loss = read_record(folder)["runs"][0]["val_loss"]
    for limit in ({}, {"limit": 0.01}):
        explained = f"seeds and rounding explain {limit.get('limit', 0.0120):.4f}"
        fault = f"the loss is {loss + 1:.4f}, +1.0000 from the claimed one; {explained}"
        write(val_loss=loss + 1, faults=[fault], **limit)
        assert faults_of(root, folder) == ""


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"val_loss": 1.0}, "its faults lack what follows from its numbers: the loss is 1.0000"),
        ({"train_flops": 1e15}, "its faults lack what follows from its numbers: training takes 1e+15 FLOPs"),
        ({"score_flops_per_token": 1e9}, "its faults lack what follows from its numbers: scoring a token"),
        ({"claimed": 3.0}, "claimed is claimed 3.0, found"),
        ({"claimed_train_flops": 1e14}, "claimed_train_flops is claimed"),
        ({"train_flops_limit": 1e16, "train_flops": 1e15}, "train_flops_limit is claimed 1e+16, found"),
        ({"limit": 1.0}, "limit is claimed 1.0, found 0.0120"),
        ({"limit": None}, "limit is claimed none, found 0.0120"),
        ({"date": "2026-01-01"}, "date is '2026-01-01', not a day from the record's own on"),
        ({"date": "2999-01-01"}, "date is '2999-01-01', not a day"),
        ({"date": "yesterday"}, "date is 'yesterday', not a day"),
        ({"machine": "x |\n# Fake"}, "machine: one line"),
        ({"faults": [1]}, "walls_missing and faults are not lines of text"),
        ({"faults": "none"}, "faults is not a list"),
        ({"seconds": -1.0}, "seconds is not a float or is out of range"),
        ({"audited_tokens": True}, "audited_tokens is not a int"),
        ({"forward_flops_per_token": "x"}, "forward_flops_per_token is not a float"),
    ],
)
def test_a_rerun_that_somebody_wrote(rerun_json, changes, words):
    """Nothing trained it: the numbers contradict the record, the rules, or each other."""
    root, folder, write = rerun_json
    write(**changes)
    faults = verify.verify_record(folder, root)
    assert any(f"rerun.json: {words}" in fault for fault in faults), faults


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"date": NaN}'])
def test_a_rerun_that_is_damaged(rerun_json, text):
    root, folder, _ = rerun_json
    (folder / "rerun.json").write_text(text)
    assert "rerun.json: damaged or incomplete" in faults_of(root, folder)


def test_a_new_rerun_replaces_a_damaged_one(rerun_json, monkeypatch):
    root, folder, _ = rerun_json
    (folder / "rerun.json").write_text("[]")
    again = []
    monkeypatch.setattr(leaderboard, "record_folder", lambda path: path)
    monkeypatch.setattr(leaderboard, "verify_record", functools.partial(verify.verify_record, root=root))
    monkeypatch.setattr(leaderboard, "rerun", lambda folder, *rest: again.append(folder) or [])
    assert not leaderboard.rerun_command(argparse.Namespace(records=[folder], seconds=1, keep=None))
    assert again == [folder]


def test_a_record_that_is_scaled_as_a_whole(rerun_json):
    """Every array and number by 0.96: the files agree, so verify alone cannot see it. The rerun does."""
    root, folder, write = rerun_json
    honest = read_record(folder)["runs"][0]["val_loss"]
    (folder / "rerun.json").unlink()

    def scale(record):
        for run in record["runs"]:
            for name in ("val_loss", "val_bpb", "test_loss"):
                run[name] *= 0.96

    edit(folder / "record.json", scale)
    for path in folder.glob("*.npy"):
        np.save(path, 0.96 * np.load(path))
    for run in read_record(folder)["runs"]:
        score = b"val_loss %.6f nats per token, %.6f bits per byte," % (run["val_loss"], run["val_bpb"])
        edit_lines(
            folder / run["log"],
            lambda lines, score=score: [
                re.sub(rb"^val_loss [0-9.]+ nats per token, [0-9.]+ bits per byte,", score, line)
                for line in lines
            ],
        )
    assert faults_of(root, folder) == ""
    write(claimed=read_record(folder)["runs"][0]["val_loss"], val_loss=honest)
    assert "its faults lack what follows from its numbers: the loss is" in faults_of(root, folder)


# ---- what is unusual, and honest


def saved_by_another_numpy(root, folder):
    """Whose files have a header of a later version."""
    sums = np.load(folder / "val_nll.npy")
    with open(folder / "val_nll.npy", "wb") as f:
        np.lib.format.write_array(f, sums, version=(3, 0))


def seeds_of_two_machines(root, folder):
    def change(record):
        record["runs"][1]["hardware"] = "Another CPU, 64 cores"

    edit(folder / "record.json", change)
    edit_lines(
        folder / "log_2.txt",
        lambda lines: [
            re.sub(rb"^hardware: .*; 1 rank", b"hardware: Another CPU, 64 cores; 1 rank", line)
            for line in lines
        ],
    )


def data_elsewhere(root, folder):
    edit_lines(
        folder / "log_2.txt",
        lambda lines: [re.sub(rb'"data": "[^"]*"', b'"data": "/elsewhere/pocket"', line) for line in lines],
    )


def resumed_elsewhere(root, folder):
    """A run that was killed says its machine again when it goes on."""

    def change(lines):
        at = next(i for i, line in enumerate(lines) if line.startswith(b"step 5/"))
        machine = next(line for line in lines if line.startswith(b"hardware: "))
        first = re.sub(rb"hardware: .*;", b"hardware: Another CPU, 1 cores;", machine)
        lines[lines.index(machine)] = first
        return [*lines[:at], b"resumed at step 4 of model 1\n", machine, *lines[at:]]

    edit_lines(folder / "log.txt", change)


def no_evaluations(root, folder):
    """A script need not look at validation before the end."""
    edit_lines(
        folder / "log.txt",
        lambda lines: [line for line in lines if not line.startswith((b"eval ", b"probe "))],
    )


def other_options(root, folder):
    """A model of another kind has no sizes that verify knows."""
    for name in ("log.txt", "log_2.txt"):
        edit_lines(
            folder / name,
            lambda lines: [
                re.sub(rb'"(n_embd|n_layer|epochs|members)":', rb'"my_\1":', line) for line in lines
            ],
        )


@pytest.mark.parametrize(
    "change",
    [
        saved_by_another_numpy,
        seeds_of_two_machines,
        data_elsewhere,
        resumed_elsewhere,
        no_evaluations,
        other_options,
    ],
)
def test_what_is_unusual_and_honest_verifies(copy, change):
    root, folder = copy
    before = {path: path.read_bytes() for path in folder.iterdir()}
    change(root, folder)
    assert before != {path: path.read_bytes() for path in folder.iterdir()}
    assert faults_of(root, folder) == ""


def test_noise_of_a_gpu_makes_no_other_verdict():
    """Of 0.003 nats a token, independent: a run scored again is neither better nor worse than itself."""
    rng = np.random.default_rng(0)
    text = rng.normal(1000, 100, 400)
    again = text + rng.normal(0, 0.003 * 1000**0.5, 400)
    dataset = reading.read_tracks()["datasets"]["pocket"]
    scores = [(sums, np.array([sums.sum() / 399_999]), 399_999) for sums in (text, again)]
    assert compare.compare_scores(*scores, dataset)["p"] > 0.9


def test_what_a_model_writes_is_not_read_as_a_claim(copy):
    """The sample in the log may look like anything, a step or a score included."""
    root, folder = copy

    def add_claims(lines):
        sample = [b"---- what the model writes\n", b"step 1/2 val_loss\n", b"val_loss 0.1\n", b"----\n"]
        marks = [i for i, line in enumerate(lines) if line.startswith(b"----")]
        at = marks[0] if marks else len(lines)
        return [*lines[:at], *sample, *lines[at:]]

    edit_lines(folder / "log.txt", add_claims)
    assert verify.verify_record(folder, root) == []


def test_further_terms_of_a_loss_and_bags(copy):
    """Other terms may follow a step's loss, which is called bag_loss while positions hold several tokens."""
    root, folder = copy
    loss = read_record(folder)["runs"][0]["val_loss"]

    def change(lines):
        out = []
        for line in lines:
            if line.startswith(b"step 1/"):
                line = line.replace(b" loss ", b" bag_loss ")
            elif line.startswith(b"step "):
                line = line.replace(b" lr ", b" mtp 1.5432 kl 0.1234 lr ")
            elif line.startswith((b"eval ", b"probe ")):
                line = f"probe 20/39 val_loss {loss:.4f} on the first 40,000 tokens\n".encode()
            out.append(line)
        return out

    edit_lines(folder / "log.txt", change)
    text = (folder / "log.txt").read_text()
    assert "bag_loss" in text and " mtp 1.5432 " in text
    assert verify.verify_record(folder, root) == []


# ---- several members and chains


@pytest.fixture
def ensemble(copy):
    """(root, record folder) of a record of one run with two members, each with the original's steps."""
    root, folder = copy
    run = read_record(folder)["runs"][0]

    def two_members(lines):
        steps = [line for line in lines if line.startswith((b"step ", b"eval ", b"probe "))]
        first = lines.index(steps[0])
        last = lines.index(steps[-1])
        # All steps are at one time: the second member's clock may not run backward.
        timed = []
        for line in steps:
            if line.startswith(b"step "):
                line = line.split(b" time ")[0] + b" time 0.0s left 0s\n"
            timed.append(line)
        both = [b"member %d %s" % (member, line) for member in (1, 2) for line in timed]
        return [*lines[:first], *both, *lines[last + 1 :]]

    edit_lines(folder / "log.txt", two_members)
    seen = run["tokens_seen"]
    replace(folder / "log.txt", f"{seen:,} tokens seen".encode(), f"{2 * seen:,} tokens seen".encode())
    replace(folder / "log.txt", b'"members": 1', b'"members": 2')
    edit(folder / "record.json", lambda record: record["runs"].pop())
    edit_run(members=2, steps=2 * run["steps"], tokens_seen=2 * seen)(root, folder)
    return root, folder


def faults_of(root, folder):
    return " / ".join(verify.verify_record(folder, root))


def insert_before(path, start, new):
    """Insert a line into a log, before the first that has this start."""

    def change(lines):
        at = next(i for i, line in enumerate(lines) if line.startswith(start))
        return [*lines[:at], new, *lines[at:]]

    edit_lines(path, change)


def test_members_of_an_ensemble_count_their_steps_one_after_the_other(ensemble):
    root, folder = ensemble
    assert faults_of(root, folder) == ""
    edit_lines(
        folder / "log.txt",
        lambda lines: [line for line in lines if not line.startswith(b"member 2 step 3/")],
    )
    assert "after step 2 of member 2" in faults_of(root, folder)


def test_chains_that_were_trained_apart(ensemble):
    """Each has a clock of its own, and their ranks add up."""
    root, folder = ensemble
    log = folder / "log.txt"

    def later_first_member(lines):
        changed = []
        for line in lines:
            if line.startswith(b"member 1 step "):
                line = line.replace(b" time 0.0s", b" time 0.1s")
            changed.append(line)
        return changed

    edit_lines(log, later_first_member)
    assert "runs backward" in faults_of(root, folder)
    insert_before(log, b"member 1 step 1/", b"chain 1 of 2: 1 rank(s), 0.1 s, seed 0\n")
    insert_before(log, b"member 2 step 1/", b"chain 2 of 2: 1 rank(s), 0.1 s, seed 1\n")
    assert "ranks of all chains" in faults_of(root, folder)
    edit_run(ranks=2)(root, folder)
    assert faults_of(root, folder) == ""


@pytest.mark.parametrize(
    "ranks, words", [(b"1", "a chain begins after step 2"), (b"0", "some that are not 'step i/n")]
)
def test_a_chain_within_a_member(ensemble, ranks, words):
    root, folder = ensemble
    insert_before(folder / "log.txt", b"member 2 step 3/", b"chain 3 of 2: " + ranks + b" rank(s)\n")
    assert words in faults_of(root, folder)


# ---- submit


def test_submit_refuses_what_would_not_verify(tiny_data, finished_run, second_seed, tmp_path):
    root = make_root(tmp_path / "root", tiny_data)
    note = root / "note.md"
    trial = tmp_path / "trial"
    shutil.copytree(finished_run, trial)
    edit(trial / "record.json", lambda record: record.update(trial=True))
    bare = tmp_path / "bare"
    shutil.copytree(finished_run, bare, ignore=shutil.ignore_patterns("weights*"))
    plain = root / "plain.md"
    plain.write_text("no heading\n")
    utf16 = root / "utf16.md"
    utf16.write_text(NOTE, encoding="utf-16")
    for runs, slug, text, by, words in (
        ([trial], "a", note, ["A"], "a trial"),
        ([finished_run, finished_run], "a", note, ["A"], "seed must differ"),
        ([bare], "a", note, ["A"], "no weights"),
        ([tmp_path], "a", note, ["A"], "not the folder of a finished run"),
        ([finished_run], "A/b", note, ["A"], "try --slug a-b"),
        ([finished_run], "a", plain, ["A"], "begin it with"),
        ([finished_run], "a", root / "none.md", ["A"], "No such file .*; begin one with: echo"),
        ([finished_run], "a", root, ["A"], "not a plain file"),
        ([finished_run], "a", utf16, ["A"], "save it as UTF-8"),
        ([finished_run], "a", note, [], "--by"),
    ):
        with pytest.raises(reading.Refused, match=words):
            submit.submit(runs, slug, text, by, root, NOON)
    assert not list((root / "records").glob("*/*"))


@pytest.mark.parametrize(
    "content", [NOTE.encode("utf-8-sig"), NOTE.replace("\n", "\r\n").encode(), NOTE.strip().encode()]
)
def test_a_note_as_editors_write_it(tmp_path, content):
    """With a byte order mark, with the line ends of Windows, without a last one: it is the same note."""
    note = tmp_path / "note.md"
    note.write_bytes(content)
    assert submit.read_note(note) == NOTE


def test_submit_wants_a_better_record(tiny_data, finished_run, second_seed, tmp_path, monkeypatch):
    """A run that does not beat the standing record is refused before anything looks at the test stream."""
    root = make_root(tmp_path / "root", tiny_data)
    note = root / "note.md"
    submit.submit([finished_run], "a", note, ["A"], root, NOON)
    with pytest.raises(reading.Refused, match="exists"):
        submit.submit([finished_run], "a", note, ["A"], root, NOON)
    monkeypatch.setattr(submit, "Scorer", None)
    # This is the first run with another seed and a loss that is nowhere lower.
    worse = tmp_path / "worse"
    shutil.copytree(finished_run, worse)
    edit(worse / "record.json", lambda record: record.update(seed=1))
    replace(worse / "log.txt", b'"seed": 0', b'"seed": 1')
    later = NOON + datetime.timedelta(hours=1)
    with pytest.raises(reading.Refused, match="does not beat 2026-01-02_a at p < 0.01"):
        submit.submit([worse], "b", note, ["A"], root, later)
    assert [path.name for path in (root / "records" / "pocket").iterdir()] == ["2026-01-02_a"]


@pytest.mark.parametrize("minutes, holds", [(2, True), (60, False), (10**6, False)])
def test_a_time_that_has_not_come(copy, minutes, holds):
    """A clock may be minutes ahead, not an hour."""
    root, folder = copy
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    later = folder.rename(folder.with_name(f"{when:%Y-%m-%d}_tiny"))
    submitted = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    edit_record(date=submitted[:10], submitted=submitted)(root, later)
    assert (f"submitted is '{submitted}" in faults_of(root, later)) == (not holds)


@pytest.mark.parametrize(
    "name",
    [
        "A. Author",
        "Pat O'Neil",
        "Anne (Annie) B",
        "J. [J.] Doe",
        "a+b@example.org",
        "Анна Ли",
        "李雷",
        "José",
        "नरेन्द्र मोदी",
        "Sinéad O‘Connor",
        "Müller & Söhne",
        "María del Carmen Fernández de la Vega Sanz",
    ],
)
def test_names_that_are_fine(name):
    assert verify.is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 61,
        "A" + 5 * "\u0489",  # a letter under a heap of marks
        "@somebody",
        "see @somebody",
        "www.example.org",
        "http://x",
        "[x](x)",
        "Аlice",  # begins with a Cyrillic A
        "Ａlice",  # full width
        "Agent ٧",  # a digit of another script
        "a\u202eb",  # turns the direction of writing
        "a|b",
    ],
)
def test_names_that_are_not(name):
    assert not verify.is_name(name)


def test_records_that_were_merged_in_the_same_hours(copy):
    """The one that was merged first stands. What no longer beats it is overtaken, and main is green."""
    root, folder = copy
    render(root)
    second = folder.with_name("2026-01-02_second")
    shutil.copytree(folder, second)
    # Submitted before the first, but merged after it, with the same losses.
    edit_record(submitted="2026-01-02T00:00:00Z")(root, second)
    [fault] = verify.verify_record(second, root)
    assert "does not beat 2026-01-02_tiny" in fault
    assert "records/order.json" in render(root) and render(root) == []
    assert verify.verify_record(second, root) == []
    assert [name.name for name, _ in reading.all_records(root, "pocket")] == ["2026-01-02_tiny"]
    page = (root / "README.md").read_text()
    assert "merged first: [pocket/2026-01-02_second]" in page and "| 2 |" not in page


def test_two_records_of_one_second(copy):
    """Neither comes before the other by its time, so its name decides, and the other has to beat it."""
    root, folder = copy
    second = folder.with_name("2026-01-02_tiny-too")
    shutil.copytree(folder, second)
    assert verify.verify_record(folder, root) == []
    [fault] = verify.verify_record(second, root)
    assert "does not beat 2026-01-02_tiny at p" in fault
    render(root)
    assert reading.read_order(root) == {
        "merged": {"pocket": ["2026-01-02_tiny"]},
        "overtaken": ["pocket/2026-01-02_tiny-too"],
    }


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"submitted": "2025"}',
        '{"submitted": "2025", "runs": []}',
        '{"submitted": "2025", "runs": [{}]}',
        "[" * 100_000,
        '{"submitted": "2025", "runs": [{"val_loss": "x", "data_sha256": {}}]}',
    ],
    ids=range(6),
)
def test_a_broken_record_spoils_no_other(copy, content):
    root, folder = copy
    broken = folder.parent / "2025-01-01_broken"
    broken.mkdir()
    (broken / "record.json").write_text(content)
    assert verify.verify_record(folder, root) == []


def test_the_first_record_sets_open_hashes(copy):
    root, folder = copy

    def open_hashes(tracks):
        tracks["datasets"]["pocket"]["sha256"] |= {"train.bin": reading.OPEN, "val.bin": reading.OPEN}

    def other_data(record):
        record.update(date="2026-01-03", submitted="2026-01-03T00:00:00Z")
        record["runs"][0]["data_sha256"]["train.bin"] = "0" * 64

    edit(root / "records" / "tracks.json", open_hashes)
    assert verify.verify_record(folder, root) == []
    later = folder.with_name("2026-01-03_later")
    shutil.copytree(folder, later)
    edit(later / "record.json", other_data)
    assert "sha256 of train.bin" in faults_of(root, later)


# ---- smoke


def test_a_recipe_at_toy_size():
    """Old and new names of options alike; what the data decides is left to it, and no option is added."""
    old = dict(
        seq_len=192, n_layer=8, loop_first=4, loop_last=7, probes=8, probe_tokens=40_000, batch_tokens=1
    )
    words = smoke.toy_options(old | dict(unet=True, device_tokens=1), "data")
    toy = dict(zip(words[::2], words[1::2]))
    assert toy["--probes"] == "1" and toy["--probe_tokens"] == "2000" and toy["--unet"] == "1"
    assert (toy["--n_layer"], toy["--loop_first"], toy["--loop_last"]) == ("6", "3", "5")
    assert (toy["--batch_tokens"], toy["--device_tokens"]) == (str(4 * 192), str(32 * 192))
    assert "--evals" not in toy and "--vocab_size" not in toy
    words = smoke.toy_options(dict(evals=8, eval_windows=40, vocab_size=50_257, bos_id=50_256), "data")
    toy = dict(zip(words[::2], words[1::2]))
    assert (toy["--evals"], toy["--eval_windows"]) == ("1", "2")
    assert (toy["--vocab_size"], toy["--bos_id"]) == ("0", "0")
    assert not {"--probes", "--batch_tokens", "--student"} & set(toy)


def test_a_student_is_as_small_as_the_others():
    """In verify --smoke the student's own sizes give way to the toy's."""
    student = "n_layer=8,n_head=3,distill_alpha=0.9,dropout=0.1,device_tokens=2048"
    words = smoke.toy_options(dict(seq_len=192, n_layer=8, n_embd=384, student=student), "data")
    assert words[words.index("--student") + 1] == "distill_alpha=0.9,dropout=0.1"


# ---- compare and diff


def fake_record(folder, losses, track="pocket_unlimited"):
    """A record of seeds with these block sums, as far as compare() reads one."""
    folder.mkdir()
    runs = []
    for i, sums in enumerate(losses):
        np.save(folder / f"v{i}.npy", sums)
        runs.append({"track": track, "val_nll": f"v{i}.npy", "val_tokens": 1000 * len(sums) - 1})
    (folder / "record.json").write_text(json.dumps({"track": track, "runs": runs}))
    return folder


def test_student_is_students():
    """Values of t tables, which have four digits."""
    for t, df, p in (
        (12.706, 1, 0.05),
        (2.228, 10, 0.05),
        (2.750, 30, 0.01),
        (1.960, 1e6, 0.05),
        (4.604, 4, 0.01),
    ):
        values, tail = compare.student(df)
        assert np.interp(t, values, tail) == pytest.approx(p, rel=2e-3)


def test_compare_counts_the_text_and_the_seeds(tmp_path):
    rng = np.random.default_rng(0)
    # Blocks differ far more than the records do: the difference is paired.
    text = rng.normal(1000, 100, 400)
    a = compare.read_scores(fake_record(tmp_path / "a", [text - 5 + rng.normal(0, 10, 400)]))
    b = compare.read_scores(fake_record(tmp_path / "b", [text]))
    c = compare.compare_scores(a, b, {})
    # The mean over 400 blocks of noise of 10 nats has a standard error of 0.5 per 1,000 tokens; 3 of them.
    assert c["mean"] == pytest.approx(-0.005, abs=0.0015)
    assert c["p"] < 1e-6 and c["interval"][0] < -0.005 < c["interval"][1]
    # It is estimated with 19 degrees of freedom, so to 1 / sqrt(2 * 19) = 16%; 3 of these.
    assert c["text"].sd == pytest.approx(10 / 400**0.5 / 1000, rel=0.5)
    assert compare.compare_scores(a, a, {})["p"] == 1

    # The seeds spread as much as the records differ: one seed each proves nothing. With twenty, the
    # difference is sqrt(10) = 3.2 standard errors.
    assert compare.compare_scores(a, b, {"seed_sd": 0.005, "seed_df": 54})["p"] > 0.1
    many = []
    for name, mean in (("low", text - 5), ("high", text)):
        seeds = [mean + offset for offset in np.linspace(-4, 4, 20)]
        many.append(compare.read_scores(fake_record(tmp_path / name, seeds)))
    c = compare.compare_scores(*many, {"seed_sd": 0.005, "seed_df": 54})
    assert c["seed"] == pytest.approx(0.005 * (2 / 20) ** 0.5) and c["p"] < 0.01


def test_compare_is_calibrated():
    """Without a difference, p < 0.05 comes in one of twenty.

    Blocks vary together here as neighbors of one document do; a test that takes them as independent finds
    something in one of four. Of 300 trials, 15 are expected, with a standard deviation of 3.8: the bound is 4
    of these.
    """
    rng = np.random.default_rng(1)
    flat = (np.full(400, 1000.0), np.ones(1), 399_999)
    hits = 0
    for _ in range(300):
        noise = np.repeat(rng.normal(0, 10, 110), 4)[:400] + rng.normal(0, 5, 400)
        hits += compare.compare_scores((1000 + noise, np.ones(1), 399_999), flat, {})["p"] < 0.05
    assert hits <= 30, hits


def run_board(*argv):
    command = [sys.executable, "records/leaderboard.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_compare_on_the_command_line(original, finished_run, second_seed, tmp_path):
    _, folder = original
    done = run_board("compare", f"{finished_run},{second_seed}", folder)
    assert done.returncode == 0, done.stderr
    assert "A - B  +0.000000 nats per token" in done.stdout and "2 seeds" in done.stdout
    assert run_board("compare", tmp_path, folder).returncode == 2
    done = run_board("compare", fake_record(tmp_path / "short", [np.ones(3)]), folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("leaderboard.py: scored on different streams")


def test_diff_on_the_command_line(original, finished_run, tmp_path):
    _, folder = original
    assert run_board("diff", folder, finished_run).stdout == "config: equal\n\nscript: equal\n"
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    edit_source(other / "log.txt", lambda source: b"# new\n" + source)
    lines = run_board("diff", folder, other).stdout.splitlines()
    assert "+# new" in lines and "\033" not in "".join(lines)


# ---- judge


def change_rules(root, **rules):
    edit(root / "records" / "tracks.json", lambda tracks: tracks["tracks"]["pocket"].update(rules))


def test_a_run_that_may_become_a_record(copy, finished_run):
    root, _ = copy
    change_rules(root, max_seconds=10**9)
    lines = judge.judge(finished_run, root=root)
    assert not any("cannot become a record" in line for line in lines), lines
    seconds, flops, standing, _, compared, audited, *_, submitted = lines
    assert " s of the 1,000,000,000 s that pocket allows" in seconds
    assert " FLOPs of the 1e+14 that pocket allows" in flops and "the standing record" in standing
    assert " compare " in compared and "audit.py " in audited and " submit " in submitted


def test_a_run_that_will_be_over_the_budget(copy, finished_run, tmp_path):
    """It is said at the start, when there is no record.json yet."""
    root, _ = copy
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "record.json").unlink()
    for flops, faults in ((9e13, 0), (2e14, 1)):
        lines = judge.judge(run, flops=flops, root=root)
        assert sum("training takes 2e+14 FLOPs, the track allows 1e+14" in line for line in lines) == faults


@pytest.mark.parametrize(
    "rules, started, words",
    [
        ({"max_seconds": 0.01}, {}, "s, the track allows 0.01"),
        ({"max_cores": 0.5}, {}, "1 cores, 0.5 are allowed"),
        ({"max_flops": 1e9}, {}, "FLOPs, the track allows 1e+09"),
        ({"hardware": ["H100", "H200"]}, {}, " cores, the track is for H100 or H200"),
        ({}, {"trial": True}, "it is a trial"),
        ({}, {"config": {"track": "pocket", "train_tokens": 20_001}}, "--train_tokens 20,001 of 20,000"),
        ({}, {"data": {"sha256": {"val.bin": "0" * 64}}}, "val.bin is not the track's"),
    ],
)
def test_a_run_that_cannot_become_a_record(copy, finished_run, tmp_path, rules, started, words):
    """Before its end, too, where that is known. Each refusal is one that verify has."""
    root, _ = copy
    change_rules(root, **rules)
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    edit(run / "config.json", lambda config: config.update(started))
    if "config" in started:  # a record.json says the same once more
        (run / "record.json").unlink()
    faults = [line for line in judge.judge(run, root=root) if "cannot become a record" in line]
    assert len(faults) == 1 and words in faults[0], faults


def test_a_clock_that_will_run_out(copy, finished_run):
    root, _ = copy
    change_rules(root, max_seconds=300)
    when = "at this speed, training will end after"
    assert judge.judge(finished_run, seconds=300.0, root=root) == [f"{when} 300 s, and pocket allows 300"]
    [line] = judge.judge(finished_run, seconds=301.0, root=root)
    assert line.startswith(f"TOO SLOW: {when} 301 s, and pocket allows 300; ") and "--fit" in line
    change_rules(root, max_seconds=None)
    assert judge.judge(finished_run, seconds=301.0, root=root) == []


# ---- render


def render(root):
    """Write what is stale. Returns the names of these files."""
    return sorted(os.path.relpath(path, root) for path in board.render(root))


def rows_with(page, words):
    return [line for line in page.splitlines() if words in line]


def test_render_is_stable_and_notices_what_is_stale(copy):
    root, folder = copy
    pictures = [
        f"records/pictures/pocket_{kind}_{theme}.svg"
        for kind in ("curve", "losses", "progress")
        for theme in ("dark", "light")
    ]
    page = "records/pocket/README.md"
    assert render(root) == ["README.md", "records/order.json", *pictures, page]
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Board") and readme.endswith("after\n")
    assert render(root) == []
    loss = reading.mean_loss(read_record(folder))
    replace(root / "README.md", f"{loss:.4f}".encode(), b"1.0000")
    assert render(root) == ["README.md"]

    def change(baselines):
        baselines["pocket"]["points"][0]["val_loss"] = 4.1

    edit(root / "records" / "baselines.json", change)
    assert set(render(root)) >= set(pictures[:2])


def test_pictures_of_another_matplotlib_are_not_stale(copy):
    """Its paths differ. What a picture was drawn from is what counts."""
    root, _ = copy
    render(root)
    for path in (root / "records" / "pictures").glob("*.svg"):
        path.write_text(path.read_text().replace("<path ", '<path data-version="2" '))
    assert render(root) == []


def test_pictures_of_others_stay(copy):
    """Whatever its name: a picture is the board's if the board has drawn it."""
    root, _ = copy
    render(root)
    folder = root / "records" / "pictures"
    drawn = folder / "pocket_curve_dark.svg"
    drawn.rename(folder / "of_a_track_that_is_gone.svg")
    (folder / "mine.svg").write_text("<svg/>")
    drawn.write_text("<svg>mine</svg>")
    with pytest.raises(reading.Refused, match="pocket_curve_dark.svg"):
        render(root)
    assert drawn.read_text() == "<svg>mine</svg>"
    drawn.unlink()
    render(root)
    assert (folder / "mine.svg").exists() and not (folder / "of_a_track_that_is_gone.svg").exists()


def test_a_record_on_the_board(copy):
    root, folder = copy
    text, _, _ = board.board_and_pages(root)
    record = read_record(folder)
    [row] = rows_with(text, "The tiny recipe")
    assert f"| {reading.mean_loss(record):.4f} (2 seeds) |" in row and "A. Author, b-c" in row
    assert "[log](records/pocket/2026-01-02_tiny/log.txt)" in row
    cost = text.split("Cost of each record:")[1].splitlines()[4]
    seen = board.short(record["runs"][0]["tokens_seen"])
    assert cost.startswith("| 1 | ") and f"| {seen} |" in cost


def test_the_second_baseline_on_the_board(copy):
    """Where the baseline with look-ups is measured, a column shows what a record is worth against it."""
    root, folder = copy
    heading = "against the baseline with look-ups"
    text, _, _ = board.board_and_pages(root)
    assert heading not in text and heading not in "".join(board.top_of_board(root))
    loss = reading.mean_loss(read_record(folder))

    def measure(baselines):
        baselines["pocket"]["with_look_ups"]["points"] = [
            {"train_tokens": n, "val_loss": value} for n, value in ((10_000, loss + 1), (40_000, loss - 1))
        ]

    edit(root / "records" / "baselines.json", measure)
    text, pictures, _ = board.board_and_pages(root)
    # Halfway between the two points: 25,000 tokens, of a budget of 20,000.
    [row] = rows_with(text, "The tiny recipe")
    at = text.split("### pocket")[1].splitlines()[4].split(" | ").index(heading)
    assert row.split(" | ")[at] == "1.25x"
    assert heading in board.top_of_board(root)[0]
    draw, data, theme = pictures["records/pictures/pocket_curve_light.svg"]
    [axes] = draw(data, theme).axes
    [line] = [line for line in axes.lines if "look-up" in line.get_label()]
    assert list(line.get_ydata()) == [loss + 1, loss - 1]


def test_training_curves_on_the_board(copy):
    """Of both seeds, from their logs, with the record's score."""
    root, folder = copy
    _, pictures, pages = board.board_and_pages(root)
    page = pages["records/pocket/README.md"]
    assert 'src="../../records/pictures/pocket_losses_light.svg"' in page
    assert f"[The tiny recipe]({folder.name}/README.md)" in page
    draw, data, theme = pictures["records/pictures/pocket_losses_dark.svg"]
    [curve] = data["curves"]
    loss = reading.mean_loss(read_record(folder))
    assert (curve["name"], curve["score"], len(curve["models"])) == (folder.name, loss, 2)
    left, right = draw(data, theme).axes
    for i, name in enumerate(("log.txt", "log_2.txt")):
        steps = reading.read_log(folder / name).of(reading.Step)
        # So few steps are not averaged.
        assert list(left.lines[i].get_ydata()) == [step.loss for step in steps]
    assert [list(line.get_ydata()) for line in right.lines if line.get_marker() == "D"] == [[loss]]


def test_tracks_without_a_record_on_the_board(copy):
    """Those with results published elsewhere share a table, and the others have a line each."""
    root, folder = copy
    text, _, _ = board.board_and_pages(root)
    assert "### tiny, limited, two_hour, unlimited\n" in text and "not verified here" in text
    [row] = rows_with(text, "| 3.307 |")
    assert row.startswith("| tiny | 15 minutes on one node of 8xH100 | 3.307 | ")
    assert "| 2026-06-14 | 14.1 min | @neel04 |" in row
    [line] = rows_with(text, "**mini**")
    assert line.endswith("No record yet.")

    # With a record, a track has a section, in which a published result has no rank.
    shutil.copytree(folder, root / "records" / "tiny" / folder.name)
    text, _, _ = board.board_and_pages(root)
    assert "### limited, two_hour, unlimited\n" in text and "### tiny\n" in text
    [row] = rows_with(text, "| 3.307 |")
    assert row.startswith("|  | 3.307 | ") and "published elsewhere, not verified here" in row


def test_data_efficiency_is_read_off_the_curve_and_never_beyond_it():
    """Linear between measured points. Slowrun's published 13.8 comes out of its published curve."""
    fineweb = json.loads((ROOT / "records" / "baselines.json").read_text())["fineweb"]
    ratio, bound = efficiency.data_efficiency(fineweb, 2.987, 100_000_000)
    assert ratio == pytest.approx(13.8, abs=0.05) and bound == ""
    assert efficiency.data_efficiency(fineweb, 2.5, 100_000_000) == (20, "≥")
    assert efficiency.data_efficiency(fineweb, 4.0, 100_000_000) == (2, "<")
    points = [
        {"train_tokens": 1, "val_loss": 2.0, "train_flops": 10.0},
        {"train_tokens": 2, "val_loss": 1.0, "train_flops": 40.0},
    ]
    assert efficiency.compute_multiplier({"points": points}, 1.5, 5.0) == (5.0, "")
    assert efficiency.compute_multiplier(fineweb, 3.0, 1.0) is None


# ---- this repository


def test_the_records_of_this_repository_hold():
    done = run_board("verify")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "argv, words",
    [
        (["verify", "tests"], "no record"),
        (["compare", "tests", "data"], "neither a record nor"),
        (["diff", "tests", "data"], "no log"),
    ],
)
def test_mistakes_get_one_line(argv, words):
    done = run_board(*argv)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
