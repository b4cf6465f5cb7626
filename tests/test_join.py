"""records/join.py on run folders made by hand: what it makes of them, and what it refuses."""

import hashlib
import json
import os
import shutil
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import join
import reading

pytestmark = pytest.mark.contract

SOURCE = b"print('a script')\n\n"
STEP = "step 1/1 epoch 1.000 loss 2.0000 lr 0.02 tok/s 1 time 1.0s left 0s"
DATA = {"tokenizer": "bytes", "vocab_size": 257, "sha256": {"val.bin": "0", "train.bin": "1"}}


def save(folder, name, data, ending):
    """A file as training scripts write them: its name states its digest."""
    digest = hashlib.sha256(data).hexdigest()[:16]
    (folder / f"{name}.{digest}.{ending}").write_bytes(data)


def write_config(run, stored):
    """config.json, which states the digest of the rest of it."""
    rest = {name: value for name, value in stored.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (run / "config.json").write_text(json.dumps(rest | {"sha256": digest}))


def make_run(folder, seed, members=1, seconds=10.0, ranks=1, source=SOURCE, word="eval", **config):
    """A finished run, as far as joining looks at one."""
    folder.mkdir()
    config = dict(track="pocket", seed=seed, members=members, chains=1, student="") | config
    stored = {"config": config, "data": DATA, "steps": None, "device": "auto"}
    write_config(folder, stored)
    (folder / "record.json").write_text("{}")
    header = f"==== source s.py bytes={len(source)} sha256={hashlib.sha256(source).hexdigest()}\n"
    lines = [f"config {json.dumps(config)}", f"data {json.dumps(DATA)}", "hardware: a machine"]
    for k in range(1, members + 1):
        member = f"member {k} " if members > 1 else ""
        lines += [f"{member}{word} 1/2 val_loss 3.0000 on a part of validation", f"{member}{STEP}"]
        if members > 1:
            lines.append(f"member {k} done: val_loss 2.5000, the members so far together 2.4000")
        save(folder, f"weights-{k - 1:07d}", f"of seed {seed}, member {k}".encode(), "pt")
    trained = header.encode() + source + b"\n==== end of source\n" + "\n".join([*lines, ""]).encode()
    progress = dict(
        seconds=seconds, compile_seconds=seconds / 10, ranks=ranks, threads=2, model=members, step=0
    )
    state = {
        "source": hashlib.sha256(source).hexdigest(),
        "recipe": "of the script's own making",
        "progress": progress | {"log_bytes": len(trained)},
        "shards": [],
        "weights": [path.name for path in folder.glob("weights-*")],
    }
    save(folder, f"state-{members * 10**7}", json.dumps(state).encode(), "json")
    score = b"val_loss 2.500000 nats per token, 3.6 bits per byte, 9 tokens scored\n"
    (folder / "log.txt").write_bytes(trained + score)
    return folder


@pytest.fixture
def chains(tmp_path):
    """Two runs of two members each."""
    first = make_run(tmp_path / "a", 0, members=2, seconds=10.0, ranks=1)
    second = make_run(tmp_path / "b", 1, members=2, seconds=20.0, ranks=3)
    return [first, second]


def lines_of(run):
    _, rest = reading.split_log((run / "log.txt").read_bytes())
    return rest.decode().splitlines()


def test_a_joined_run(chains, tmp_path, call):
    run = tmp_path / "new" / "joined"
    status, out, _ = call(join.main, *chains, "--run_dir", run)
    assert status == 0
    assert f"4 members in 2 chains; score them with: python train_gpt.py --resume {run}" in out

    stored = json.loads((run / "config.json").read_text())
    original = json.loads((chains[0] / "config.json").read_text())
    assert stored["config"] == original["config"] | {"members": 4, "chains": 2}
    assert stored["data"] == DATA and stored["device"] == "auto"
    rest = {name: value for name, value in stored.items() if name != "sha256"}
    assert stored["sha256"] == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

    # The weights are those of the chains, one after the other, and unchanged.
    weights = sorted(run.glob("weights-*"))
    assert [path.name.split(".")[0] for path in weights] == [f"weights-{k:07d}" for k in range(4)]
    contents = [path.read_text() for path in weights]
    assert contents == [f"of seed {seed}, member {k}" for seed in (0, 1) for k in (1, 2)]

    # The last state is that of a run which has trained everything and scored nothing.
    [path] = run.glob("state-*")
    state = json.loads(path.read_text())
    assert path.name == f"state-40000000.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.json"
    assert state["source"] == hashlib.sha256(SOURCE).hexdigest()
    assert state["recipe"] == "of the script's own making"  # it leaves out what joining changes
    assert (state["shards"], state["weights"]) == ([], [path.name for path in weights])
    assert state["progress"] == {
        "model": 4,
        "step": 0,
        "seconds": 20.0,
        "compile_seconds": 2.0,
        "ranks": 4,
        "threads": 2,
        "log_bytes": (run / "log.txt").stat().st_size,
    }
    assert not (run / "record.json").exists()
    assert [path.name for path in run.parent.iterdir()] == ["joined"]


def test_the_joined_log(chains, tmp_path):
    """The source and the joined config, then each chain's lines up to its score, with members counted on."""
    run = tmp_path / "joined"
    join.join(chains, run)
    [script], _ = reading.split_log((run / "log.txt").read_bytes())
    assert (script.content, script.name) == (SOURCE, "s.py")
    lines = lines_of(run)
    assert json.loads(lines[0].removeprefix("config "))["members"] == 4 and lines[1].startswith("data ")
    starts = [line.split(" of 2: ")[1] for line in lines if line.startswith("chain ")]
    assert starts == ["1 rank(s), 10.0 s, seed 0", "3 rank(s), 20.0 s, seed 1"]
    for word in ("step 1/1 ", "eval 1/2 ", "done: "):
        members = [line.split()[1] for line in lines if f" {word}" in line]
        assert members == ["1", "2", "3", "4"], word
    assert not any(line.startswith("val_loss") for line in lines)


def test_runs_of_one_model_and_of_an_older_script(tmp_path):
    """Their lines name no member, and an evaluation was called a probe."""
    runs = [make_run(tmp_path / str(seed), seed, word="probe") for seed in (3, 4, 5)]
    assert join.join(runs, tmp_path / "joined") == 3
    lines = lines_of(tmp_path / "joined")
    for word in ("step 1/1 ", "probe 1/2 "):
        assert [line.split(word)[0] for line in lines if word in line] == [
            "member 1 ",
            "member 2 ",
            "member 3 ",
        ]


def test_a_damaged_checkpoint_is_passed_over(chains, tmp_path):
    """As when training is resumed: the one before it counts."""
    (chains[0] / "state-20000001.0123456789abcdef.json").write_bytes(b"damaged")
    assert join.join(chains, tmp_path / "joined") == 4


# ---- refusals


def unfinished(run):
    (run / "record.json").unlink()


def without_config(run):
    (run / "config.json").unlink()


def damaged_config(run):
    (run / "config.json").write_text("{")


def changed_config(run):
    """One digit of it: it would be joined as something else than was trained."""
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"steps": null', '"steps": 5'))


def without_state(run):
    for path in run.glob("state-*"):
        path.unlink()


def without_weights(run):
    next(iter(run.glob("weights-0000001.*"))).unlink()


def damaged_weights(run):
    path = next(iter(run.glob("weights-0000001.*")))
    path.write_bytes(path.read_bytes()[:-1])


def damaged_log(run):
    (run / "log.txt").write_text("==== source")


def odd_state(run):
    """Under the right name, something else."""
    without_state(run)
    save(run, f"state-{2 * 10**7}", b"[[]]", "json")


def large_state(run):
    """More than any run has to say."""
    without_state(run)
    save(run, f"state-{2 * 10**7}", b" " * 2**20 + b"{}", "json")


def piped_log(run):
    (run / "log.txt").unlink()
    os.mkfifo(run / "log.txt")


def endless_weights(run):
    path = next(iter(run.glob("weights-0000001.*")))
    path.unlink()
    path.symlink_to("/dev/zero")


def change_state(run, **changes):
    """Put other content into the last state, under the digest that belongs to it."""
    (path,) = run.glob("state-*")
    state = json.loads(path.read_text())
    path.unlink()
    state["progress"] |= changes
    save(run, f"state-{2 * 10**7}", json.dumps(state).encode(), "json")


def many_members(run):
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["members"] = 10**8
    write_config(run, stored)


@pytest.mark.parametrize(
    "changes",
    [
        dict(seconds="ten"),
        dict(seconds=-1.0),
        dict(compile_seconds=None),
        dict(ranks={}),
        dict(ranks=-1),
        dict(threads=1.5),
        dict(log_bytes=[]),
    ],
)
def test_a_state_with_the_right_digest_and_odd_content(chains, tmp_path, call, changes):
    change_state(chains[1], **changes)
    argv = [*chains, "--run_dir", tmp_path / "joined"]
    assert_refused(call, tmp_path, argv, [str(chains[1]), "damaged", *changes])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (large_state, "bytes"),
        (piped_log, "not a plain file"),
        (endless_weights, "not a plain file"),
        (many_members, "100000000 members"),
        (unfinished, "not the folder of a finished run"),
        (without_config, "config.json: No such file"),
        (damaged_config, "damaged"),
        (changed_config, "does not match its sha256"),
        (without_state, "no undamaged checkpoint"),
        (odd_state, "damaged"),
        (without_weights, "the weights of member 2 are missing or damaged"),
        (damaged_weights, "the weights of member 2 are missing or damaged"),
        (damaged_log, "damaged"),
        (shutil.rmtree, "not the folder of a finished run"),
    ],
)
def test_a_run_that_cannot_be_joined(chains, tmp_path, call, spoil, words):
    spoil(chains[1])
    assert_refused(call, tmp_path, [*chains, "--run_dir", tmp_path / "joined"], [str(chains[1]), words])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(seed=0), "same seeds"),
        (dict(seed=1000), "same seeds"),
        (dict(seed=1, members=3), "differs from"),
        (dict(seed=1, epochs=2.0), "differs from"),
        (dict(seed=1, source=b"print('another')\n"), "differs from"),
        (dict(seed=1, chains=2), "has chains or a student already"),
        (dict(seed=1, student="dropout=0.1"), "has chains or a student already"),
    ],
)
def test_runs_that_do_not_fit(chains, tmp_path, call, change, words):
    other = make_run(tmp_path / "other", **dict(members=2) | change)
    argv = [chains[0], other, "--run_dir", tmp_path / "joined"]
    assert_refused(call, tmp_path, argv, [str(other), words])


def test_a_trial_beside_a_run(chains, tmp_path, call):
    """--steps must be the same for both."""
    write_config(chains[1], json.loads((chains[1] / "config.json").read_text()) | {"steps": 5})
    argv = [*chains, "--run_dir", tmp_path / "joined"]
    assert_refused(call, tmp_path, argv, [str(chains[1]), "differs from"])


def test_mistakes_on_the_command_line(chains, tmp_path, call):
    assert_refused(call, tmp_path, [*chains], ["--run_dir"])
    assert_refused(call, tmp_path, [chains[0], "--run_dir", tmp_path / "joined"], ["several runs"])
    argv = [*chains, "--run_dir", chains[0]]
    assert_refused(call, tmp_path, argv, ["exists already"])


def test_a_folder_that_cannot_be_written(chains, tmp_path, call):
    (tmp_path / "file").write_text("")
    argv = [*chains, "--run_dir", tmp_path / "file" / "joined"]
    assert_refused(call, tmp_path, argv, ["file"])


def assert_refused(call, tmp_path, argv, words):
    """One line, exit status 2, and nothing is left behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, err = call(join.main, *argv)
    assert status == 2 and err.count("\n") == 1 and err.startswith("join.py: "), err
    assert all(word in err for word in words), err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
