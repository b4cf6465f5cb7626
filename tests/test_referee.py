"""The referee's desk on records made of a tiny run: what is honest verifies, what was tampered with is named."""
import datetime
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, TINY, options
from test_run import PLAIN

sys.path.insert(0, str(ROOT / "records"))
import audit  # noqa: E402
import leaderboard as board  # noqa: E402

NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
NOTE = "# The tiny recipe\n\nNothing to see.\n"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_root(folder, tiny_data):
    """A repository as the referee sees one, whose pocket track is the tests' tiny data."""
    (folder / "records").mkdir(parents=True)
    shutil.copytree(tiny_data, folder / "data" / "pocket")
    meta, tracks = json.loads((tiny_data / "meta.json").read_text()), audit.read_tracks()
    tracks["datasets"]["pocket"] |= {
        "train_tokens": 20_000, "val_tokens": meta["tokens"]["val"], "test_tokens": meta["tokens"]["test"], "val_bytes": meta["text_bytes"]["val"],
        "sha256": meta["sha256"]}
    tracks["tracks"]["pocket"] |= {"max_seconds": 10 ** 9}  # a run inside the tests' own process counts from its start
    (folder / "records" / "tracks.json").write_text(json.dumps(tracks))
    (folder / "note.md").write_text(NOTE)
    (folder / "README.md").write_text(f"# Board\n\n{board.BEGIN}\n{board.END}\n\nafter\n")
    baselines = json.loads((ROOT / "records" / "baselines.json").read_text())
    baselines["pocket"]["points"] = [{"train_tokens": n, "val_loss": loss, "train_flops": n * 1e5} for n, loss in ((20_000, 4.0), (40_000, 3.0), (80_000, 2.0))]
    (folder / "records" / "baselines.json").write_text(json.dumps(baselines))
    return folder


@pytest.fixture(scope="module")
def second_seed(tiny_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "second"
    subprocess.run([sys.executable, "train_gpt.py", *options(**TINY | {"seed": 1}, data=tiny_data), "--run_dir", str(run), *PLAIN], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    return run


@pytest.fixture(scope="module")
def original(tiny_data, finished_run, second_seed, tmp_path_factory):
    root = make_root(tmp_path_factory.mktemp("roots") / "original", tiny_data)
    folder = board.submit([finished_run, second_seed], "tiny", root / "note.md", ["A. Author", "b-c"], root, NOON)
    return root, folder


@pytest.fixture
def copy(original, tmp_path):
    """(root, record folder) of a repository with one good record, to be tampered with."""
    shutil.copytree(original[0], tmp_path / "root")
    return tmp_path / "root", tmp_path / "root" / original[1].relative_to(original[0])


# ---- submit and verify


def test_a_record_of_two_seeds(original, finished_run):
    root, folder = original
    assert folder == root / "records" / "pocket" / "2026-01-02_tiny"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "log.txt", "log_2.txt", "record.json", "test_nll.npy", "test_nll_2.npy", "val_nll.npy", "val_nll_2.npy"]
    record = json.loads((folder / "record.json").read_text())
    assert record["description"] == "The tiny recipe" and record["contributors"] == ["A. Author", "b-c"]
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert abs(record["runs"][0]["test_loss"] - record["runs"][0]["val_loss"]) < 1  # the same kind of text, but not the same
    assert record["runs"][0]["test_loss"] != record["runs"][0]["val_loss"]
    assert (folder / "val_nll.npy").read_bytes() == (finished_run / "val_nll.npy").read_bytes()
    assert board.verify_record(folder, root) == []
    assert not list(folder.parent.glob(".submit*"))


def replace(path, old, new, count=1):
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, count))


def first_run(**values):
    return lambda root, folder: edit(folder / "record.json", lambda r: r["runs"][0].update(values))


def digit_in_log(root, folder):
    loss = json.loads((folder / "record.json").read_text())["runs"][0]["val_loss"]
    replace(folder / "log.txt", f"val_loss {loss:.6f}".encode(), f"val_loss {loss - 0.1:.6f}".encode())


def digit_in_record(root, folder):
    edit(folder / "record.json", lambda r: r["runs"][1].update(val_loss=r["runs"][1]["val_loss"] - 1e-6))


def array(change, name="val_nll.npy", **kwargs):
    def tamper(root, folder):
        np.save(folder / name, change(np.load(folder / name)), **kwargs)
    return tamper


def lower(sums):
    sums[1] *= 0.9
    return sums


def cut_file(root, folder):
    data = (folder / "val_nll.npy").read_bytes()
    (folder / "val_nll.npy").write_bytes(data[:-5])


def climb(root, folder):
    shutil.copy(folder / "val_nll.npy", folder.parent / "val_nll.npy")
    first_run(val_nll="../val_nll.npy")(root, folder)


def link(root, folder):
    (folder / "val_nll.npy").rename(root / "val_nll.npy")
    (folder / "val_nll.npy").symlink_to(root / "val_nll.npy")


def other_dataset(root, folder):
    edit(folder / "record.json", lambda r: r["runs"][0]["data_sha256"].update({"val.bin": "0" * 64}))


def other_dataset_in_log(root, folder):
    digest = json.loads((folder / "record.json").read_text())["runs"][0]["data_sha256"]["train.bin"]
    replace(folder / "log.txt", digest.encode(), b"f" * 64)


def over_budget(root, folder):
    replace(folder / "log.txt", b'"train_tokens": 20000', b'"train_tokens": 25000')
    first_run(train_tokens=25_000)(root, folder)


def more_epochs_than_told(root, folder):
    record = json.loads((folder / "record.json").read_text())["runs"][0]
    replace(folder / "log.txt", f"{record['tokens_seen']:,} tokens seen".encode(), b"9,984 tokens seen")
    first_run(tokens_seen=9984)(root, folder)


def lines_of_log(change):
    def tamper(root, folder):
        head, mark, rest = (folder / "log.txt").read_bytes().partition(b"\n==== end of source\n")
        (folder / "log.txt").write_bytes(head + mark + change(rest))
    return tamper


def without_step(n):
    return lines_of_log(lambda rest: b"".join(line for line in rest.splitlines(True) if not line.startswith(b"step %d/" % n)))


def later_step(rest):
    lines = rest.splitlines(True)
    i = next(i for i, line in enumerate(lines) if line.startswith(b"step 5/"))
    lines[i], lines[i + 1] = lines[i + 1], lines[i]
    return b"".join(lines)


def other_script(root, folder):
    source, name, rest = audit.split_log((folder / "log.txt").read_bytes())
    source += b"# and one line more\n"
    header = f"==== source {name} bytes={len(source)} sha256={board.hashlib.sha256(source).hexdigest()}\n".encode()
    (folder / "log.txt").write_bytes(header + source + b"\n==== end of source\n" + rest)


def big_file(root, folder):
    with open(folder / "log.txt", "ab") as f:
        f.truncate(1 << 30)  # sparse: takes no room


def wrong_track(root, folder):
    (root / "records" / "tiny").mkdir()
    folder.rename(root / "records" / "tiny" / folder.name)


def wrong_track_told(root, folder):
    wrong_track(root, folder)
    edit(root / "records" / "tiny" / folder.name / "record.json", lambda r: [r.update(track="tiny"), [run.update(track="tiny") for run in r["runs"]]])


def over_time(root, folder):
    edit(root / "records" / "tracks.json", lambda t: t["tracks"]["pocket"].update(max_seconds=0.01))


def pickled(root, folder):
    (folder / "weights.pt").write_bytes(b"\x80\x04.")


def same_weights(root, folder):
    edit(folder / "record.json", lambda r: r["runs"][1].update(weights_sha256=r["runs"][0]["weights_sha256"]))


def same_nll(root, folder):
    shutil.copy(folder / "val_nll.npy", folder / "val_nll_2.npy")


def not_json(root, folder):
    (folder / "record.json").write_text('{"track": "pocket", "runs": [')


@pytest.mark.parametrize("tamper, words", [
    (digit_in_log, ["log.txt: val_loss is claimed", "in record.json"]), (digit_in_record, ["record.json: val_loss is claimed", "in val_nll_2.npy"]),
    (array(lower), ["record.json: val_loss is claimed", "in val_nll.npy"]), (array(lower, "test_nll.npy"), ["test_loss", "in test_nll.npy"]),
    (array(lambda a: a[:-1]), ["val_nll.npy: holds float64 [3], not float64 [4]"]), (cut_file, ["val_nll.npy: cannot be read"]),
    (array(lambda a: a.astype(object), allow_pickle=True), ["val_nll.npy: cannot be read as plain numbers"]),
    (array(lambda a: a.astype(np.float32)), ["holds float32"]), (array(lambda a: a * [1, 1, 1, np.nan]), ["not finite"]),
    (array(lambda a: a * [1, 1, 1, -1]), ["below 0"]), (climb, ["record.json: names '../val_nll.npy'"]), (link, ["val_nll.npy: not a plain file"]),
    (other_dataset, ["record.json: sha256 of val.bin", "the track's"]), (other_dataset_in_log, ["log.txt: sha256 of train.bin"]),
    (over_budget, ["record.json: train_tokens is claimed 25,000, found a budget of 20,000"]), (more_epochs_than_told, ["log.txt: its 0.9", "tokens seen"]),
    (without_step(7), ["log.txt: after step 6", "steps are missing"]), (without_step(39), ["ends at step 38", "steps are missing"]),
    (without_step(1), ["after step 0", "steps are missing"]), (lines_of_log(later_step), ["steps are missing"]),
    (other_script, ["record.json: source_sha256 is claimed"]), (lambda root, f: replace(f / "log.txt", b"import argparse", b"import argpraze"), ["log.txt: the header of the source claims"]),
    (lambda root, f: replace(f / "log.txt", b" bytes=", b" bytes=1"), ["log.txt: does not begin"]),
    (big_file, ["bytes, 20,000,000 are the most"]), (wrong_track, ["record.json: track is claimed pocket, found folder of tiny"]),
    (wrong_track_told, ["log.txt: track of the config is claimed pocket, found tiny"]), (over_time, ["record.json: train_seconds is claimed"]),
    (pickled, ["weights.pt: not a plain file of"]), (same_weights, ["weights_sha256 must differ"]), (same_nll, ["two runs have the same val_nll"]),
    (first_run(seed=1), ["seed must differ"]), (first_run(trial=True), ["a trial"]), (first_run(threads=64), ["cores is claimed 64"]),
    (first_run(steps=38), ["number of steps is claimed 39"]), (first_run(train_seconds=0.0), ["time of the last step"]),
    (first_run(val_loss=float("nan")), ["record.json: damaged"]), (first_run(val_tokens="many"), ["val_tokens of run 1 is not a int"]),
    (first_run(members=2), ["ends at step 0 of member 1, of 2 members: steps are missing"]), (not_json, ["record.json: damaged"]), (lambda root, f: (f / "README.md").unlink(), ["README.md: missing"]),
    (lambda root, f: edit(f / "record.json", lambda r: r.update(description="<script> | x")), ["description"]),
    (lambda root, f: edit(f / "record.json", lambda r: r.update(contributors=["[x](http://x)"])), ["contributors"]),
    (lambda root, f: edit(f / "record.json", lambda r: r.update(description="The tiny\rrecipe")), ["description"]),
    (lambda root, f: edit(f / "record.json", lambda r: r.update(description="Another one")), ["README.md: its first line"]),
    (first_run(hardware="x |\n\n# Fake\n| 1 |"), ["hardware: one line"]), (first_run(hardware="a better machine"), ["log.txt: its hardware lines"]),
    (lambda root, f: replace(f / "log.txt", b"; 1 rank(s) of", b"; 8 rank(s) of"), ["log.txt: its hardware lines"]),
    (lambda root, f: replace(f / "log.txt", b" epoch 0.", b" epoch " + b"9" * 400 + b"0."), ["some that are not 'step i/n"]),
    (first_run(test_nll="val_nll.npy"), ["files of their own"]), (first_run(val_nll="val_nll_2.npy"), ["files of their own"]),
    (lambda root, f: edit(f / "record.json", lambda r: r.update(submitted="2026-01-02T99:00:00Z")), ["submitted is"])])
def test_tampered_records_are_named(copy, tamper, words):
    root, folder = copy
    tamper(root, folder)
    [folder] = [path.parent for path in (root / "records").glob("*/*/record.json")]
    faults = board.verify_record(folder, root)
    assert any(all(word in fault for word in words) for fault in faults), faults
    assert all(fault.startswith(os.path.relpath(folder, root)) and "\n" not in fault for fault in faults)


def test_what_a_model_writes_is_not_read_as_a_claim(copy):
    """The sample in the log may look like anything, a step or a score included."""
    root, folder = copy
    replace(folder / "log.txt", b"---- what the model writes on its own\n", b"---- what the model writes on its own\nstep 1/2 val_loss\nval_loss 0.1\n")
    assert board.verify_record(folder, root) == []


def test_members_of_an_ensemble_count_their_steps_one_after_the_other(copy):
    root, folder = copy

    def two_members(rest):
        lines = rest.splitlines(True)
        steps = [line for line in lines if line.startswith((b"step ", b"probe "))]
        at = lines.index(steps[0])
        again = [b"member %d " % member + line.split(b" time ")[0] + b" time 0.0s left 0s\n" if line.startswith(b"step") else line
                 for member in (1, 2) for line in steps]
        text = b"".join(lines[:at] + again + lines[lines.index(steps[-1]) + 1:])
        return text.replace(b"19,968 tokens seen", b"39,936 tokens seen")
    lines_of_log(two_members)(root, folder)
    first_run(members=2, steps=78, tokens_seen=39_936)(root, folder)
    assert board.verify_record(folder, root) == []
    # chains that were trained apart each have their clock, and their ranks add up
    clock = lambda rest: rest.replace(b" time 0.0s", b" time 0.1s", 39)  # noqa: E731
    lines_of_log(clock)(root, folder)
    assert any("runs backward" in fault for fault in board.verify_record(folder, root))
    lines_of_log(lambda rest: rest.replace(b"member 1 step 1/", b"chain 1 of 2: 1 rank(s), 0.1 s, seed 0\nmember 1 step 1/")
                 .replace(b"member 2 step 1/", b"chain 2 of 2: 1 rank(s), 0.1 s, seed 1\nmember 2 step 1/"))(root, folder)
    assert any("ranks of all chains" in fault for fault in board.verify_record(folder, root))
    first_run(ranks=2)(root, folder)
    assert board.verify_record(folder, root) == []
    for ranks, words in ((b"1", "a chain begins after step 2"), (b"0", "some that are not 'step i/n")):
        lines_of_log(lambda rest: rest.replace(b"member 2 step 3/", b"chain 3 of 2: " + ranks + b" rank(s)\nmember 2 step 3/"))(root, folder)  # noqa: B023
        assert any(words in fault for fault in board.verify_record(folder, root))
        lines_of_log(lambda rest: rest.replace(b"chain 3 of 2: " + ranks + b" rank(s)\n", b""))(root, folder)  # noqa: B023
    without = lines_of_log(lambda rest: b"".join(line for line in rest.splitlines(True) if not line.startswith(b"member 2 step 3/")))
    without(root, folder)
    assert any("after step 2 of member 2" in fault for fault in board.verify_record(folder, root))


def test_submit_refuses_what_would_not_verify(tiny_data, finished_run, second_seed, tmp_path):
    root = make_root(tmp_path / "root", tiny_data)
    trial = tmp_path / "trial"
    shutil.copytree(finished_run, trial)
    edit(trial / "record.json", lambda r: r.update(trial=True))
    no_weights = tmp_path / "bare"
    shutil.copytree(finished_run, no_weights, ignore=shutil.ignore_patterns("weights*"))
    (root / "plain.md").write_text("no heading\n")
    note = root / "note.md"
    for runs, slug, text, by, words in (
            ([trial], "a", note, ["A"], "a trial"), ([finished_run, finished_run], "a", note, ["A"], "seed must differ"), ([no_weights], "a", note, ["A"], "no weights"),
            ([tmp_path], "a", note, ["A"], "not the folder of a finished run"), ([finished_run], "A/b", note, ["A"], "--slug"),
            ([finished_run], "a", root / "plain.md", ["A"], "begin it with"), ([finished_run], "a", root / "none.md", ["A"], "cannot be read"),
            ([finished_run], "a", note, [], "--by")):
        with pytest.raises(board.Refused, match=words):
            board.submit(runs, slug, text, by, root, NOON)
    assert not list((root / "records").glob("*/*"))
    board.submit([finished_run], "a", note, ["A"], root, NOON)
    with pytest.raises(board.Refused, match="exists"):
        board.submit([finished_run], "a", note, ["A"], root, NOON)
    with pytest.raises(board.Refused, match="does not beat 2026-01-02_a at p < 0.01"):
        board.submit([second_seed], "b", note, ["A"], root, NOON + datetime.timedelta(hours=1))
    assert [p.name for p in (root / "records" / "pocket").iterdir()] == ["2026-01-02_a"]


def test_a_time_that_has_not_come(copy):
    root, folder = copy
    later = folder.rename(folder.with_name("2999-01-01_tiny"))
    edit(later / "record.json", lambda r: r.update(date="2999-01-01", submitted="2999-01-01T00:00:00Z"))
    assert any("submitted is '2999" in fault for fault in board.verify_record(later, root))


@pytest.mark.parametrize("content", ["{}", '{"submitted": "2025"}', '{"submitted": "2025", "runs": []}', '{"submitted": "2025", "runs": [{}]}', "[" * 100_000,
                                     '{"submitted": "2025", "runs": [{"val_loss": "x", "data_sha256": {}}]}'], ids=range(6))
def test_a_broken_record_spoils_no_other(copy, content):
    root, folder = copy
    (folder.parent / "2025-01-01_broken").mkdir()
    (folder.parent / "2025-01-01_broken" / "record.json").write_text(content)
    assert board.verify_record(folder, root) == []


def test_the_test_stream_is_scored_for_records_alone(tiny_data, finished_run, second_seed, tmp_path, monkeypatch):
    """A run that does not beat the standing record is refused before anything looks at the test stream."""
    root = make_root(tmp_path / "root", tiny_data)
    board.submit([finished_run], "a", root / "note.md", ["A"], root, NOON)
    monkeypatch.setattr(board, "Scorer", None)
    with pytest.raises(board.Refused, match="does not beat"):
        board.submit([second_seed], "b", root / "note.md", ["A"], root, NOON + datetime.timedelta(hours=1))


def test_a_student_is_as_small_as_the_others():
    """In verify --smoke the student's own sizes give way to the toy's."""
    config = dict(seq_len=192, n_layer=8, n_embd=384, student="n_layer=8,n_head=3,distill_alpha=0.9,dropout=0.1,device_tokens=2048", batch_tokens=4096, device_tokens=4096)
    words = board.toy_options(config)
    assert words[words.index("--student") + 1] == "distill_alpha=0.9,dropout=0.1"
    assert words[words.index("--batch_tokens") + 1] == words[words.index("--device_tokens") + 1] == "768"


def test_the_first_record_sets_open_hashes(copy):
    root, folder = copy
    edit(root / "records" / "tracks.json", lambda t: t["datasets"]["pocket"]["sha256"].update({"train.bin": audit.OPEN, "val.bin": audit.OPEN}))
    assert board.verify_record(folder, root) == []
    later = folder.with_name("2026-01-03_later")
    shutil.copytree(folder, later)
    edit(later / "record.json", lambda r: [r.update(date="2026-01-03", submitted="2026-01-03T00:00:00Z"), r["runs"][0]["data_sha256"].update({"train.bin": "0" * 64})])
    assert any("sha256 of train.bin" in fault for fault in board.verify_record(later, root))


# ---- smoke


@pytest.mark.parametrize("leak", [False, True])
def test_smoke_finds_a_leak_in_the_script_alone(copy, pocket, leak, monkeypatch, capsys):
    root, folder = copy
    if leak:  # a model that sees the token it predicts: scoring hands it over in the embedding
        source, name, rest = audit.split_log((folder / "log.txt").read_bytes())
        old = b"h = forward(p, ids[:, :-1], c, m, bos_id, phase)\n            nll ="
        assert old in source
        source = source.replace(old, b"h = forward(p, ids[:, :-1], c, m, bos_id, phase) + 40 * F.normalize(p['lm_head'], dim=1)[ids[:, 1:, 0]]\n            nll =")
        header = f"==== source {name} bytes={len(source)} sha256={board.hashlib.sha256(source).hexdigest()}\n".encode()
        (folder / "log.txt").write_bytes(header + source + b"\n==== end of source\n" + rest)
    monkeypatch.setattr(board, "STREAM", 20_000)
    faults = board.smoke(folder, 300)
    assert "running the submitted code" in capsys.readouterr().out
    assert bool(faults) == leak, faults
    assert not leak or any("noise" in fault or "normalization" in fault for fault in faults)


# ---- compare and diff


def fake_record(folder, losses, track="pocket_unlimited"):
    """A record of seeds with these block sums, as far as compare() reads one."""
    folder.mkdir()
    runs = []
    for i, sums in enumerate(losses):
        np.save(folder / f"v{i}.npy", sums)
        runs.append({"val_nll": f"v{i}.npy", "val_tokens": 1000 * len(sums) - 1})
    (folder / "record.json").write_text(json.dumps({"track": track, "runs": runs}))
    return folder


def test_student_is_students():
    """Values of t tables."""
    for t, df, p in ((12.706, 1, 0.05), (2.228, 10, 0.05), (2.750, 30, 0.01), (1.960, 1e6, 0.05), (4.604, 4, 0.01)):
        values, tail = board.student(df)
        assert np.interp(t, values, tail) == pytest.approx(p, rel=2e-3)


def test_compare_counts_the_text_and_the_seeds(tmp_path):
    rng = np.random.default_rng(0)
    text = rng.normal(1000, 100, 400)  # blocks differ far more than the records do; the difference is paired
    a = board.read_scores(fake_record(tmp_path / "a", [text - 5 + rng.normal(0, 10, 400)]))
    b = board.read_scores(fake_record(tmp_path / "b", [text]))
    c = board.compare_scores(a, b, {})
    assert c["mean"] == pytest.approx(-0.005, abs=0.0015) and c["p"] < 1e-6 and c["interval"][0] < -0.005 < c["interval"][1]
    assert c["text"] == pytest.approx(10 / 400 ** 0.5 / 1000, rel=0.5)
    # a spread between seeds as large as the difference: one seed each proves nothing, twenty do
    assert board.compare_scores(a, b, {"seed_sd": 0.005})["p"] > 0.1
    many = [board.read_scores(fake_record(tmp_path / f"s{i}", [text - 5 * i + rng.normal(0, 4) for _ in range(20)])) for i in (0, 1)]
    c = board.compare_scores(many[1], many[0], {"seed_sd": 0.005})
    assert c["seed"] == pytest.approx(0.005 * (2 / 20) ** 0.5) and c["p"] < 0.01
    assert board.compare_scores(a, a, {})["p"] == 1


def test_compare_is_calibrated():
    """Under no difference, with blocks that vary together as neighbours of one document do, p < 0.05 comes in about one of
    twenty; a test that takes blocks as independent says so in one of four."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        noise = np.repeat(rng.normal(0, 10, 110), 4)[:400] + rng.normal(0, 5, 400)
        hits += board.compare_scores((1000 + noise, np.ones(1), 399_999), (np.full(400, 1000.0), np.ones(1), 399_999), {})["p"] < 0.05
    assert hits <= 30, hits


def run_board(*argv):
    return subprocess.run([sys.executable, "records/leaderboard.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)


def test_compare_and_diff_on_the_command_line(original, finished_run, second_seed, tmp_path):
    _, folder = original
    done = run_board("compare", f"{finished_run},{second_seed}", folder)
    assert done.returncode == 0 and "A - B  +0.000000 nats per token" in done.stdout and "2 seeds" in done.stdout, done.stderr
    assert run_board("compare", tmp_path, folder).returncode == 2
    done = run_board("compare", fake_record(tmp_path / "short", [np.ones(3)]), folder)
    assert done.returncode == 2 and done.stderr.startswith("leaderboard.py: scored on different streams") and done.stderr.count("\n") == 1
    assert run_board("diff", folder, finished_run).stdout == ""
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    replace(other / "log.txt", b"import argparse", b"import argpraze")
    header, rest = (other / "log.txt").read_bytes().split(b"\n", 1)
    digest = board.hashlib.sha256(rest[:int(header.split(b"bytes=")[1].split()[0])]).hexdigest()
    (other / "log.txt").write_bytes(header.split(b"sha256=")[0] + f"sha256={digest}\n".encode() + rest)
    lines = run_board("diff", folder, other).stdout.splitlines()
    assert "-import argparse" in lines and "+import argpraze" in lines and "\033" not in "".join(lines)


# ---- render


def test_render_is_stable_and_notices_what_is_stale(copy):
    root, folder = copy

    def write():
        changes = board.stale(root)
        for change in changes.values():
            change()
        return sorted(os.path.relpath(path, root) for path in changes)
    assert write() == ["README.md", *(f"records/pictures/pocket_{kind}_{theme}.svg" for kind in ("curve", "progress") for theme in ("dark", "light"))]
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Board") and readme.endswith("after\n")
    assert write() == []
    loss = board.mean_loss(json.loads((folder / "record.json").read_text()))
    row, cost = next(line for line in readme.splitlines() if "The tiny recipe" in line), readme.split("What they cost")[1].splitlines()[4]
    assert cost.startswith("| 1 | ") and "| 20k |" in cost.replace("19.968k", "20k").replace("| 20.0k |", "| 20k |")
    assert f"| {loss:.4f} (2 seeds) |" in row and "[log](records/pocket/2026-01-02_tiny/log.txt)" in row and "A. Author, b-c" in row
    assert "not verified here" in readme and "| 3.307 |" in readme  # the published rows have no rank
    assert next(line for line in readme.splitlines() if "| 3.307 |" in line).startswith("|  | 3.307 |")
    replace(root / "README.md", f"{loss:.4f}".encode(), b"1.0000")
    assert write() == ["README.md"]
    edit(root / "records" / "baselines.json", lambda b: b["pocket"]["points"][0].update(val_loss=4.1))
    assert set(write()) >= {"records/pictures/pocket_curve_light.svg", "records/pictures/pocket_curve_dark.svg"}


def test_data_efficiency_is_read_off_the_curve_and_never_beyond_it():
    """Linear between measured points. Slowrun's published 13.8 comes out of its published curve."""
    points = json.loads((ROOT / "records" / "baselines.json").read_text())["fineweb"]["points"]
    ratio, bound = board.data_efficiency({"points": points}, 2.987, 100_000_000)
    assert ratio == pytest.approx(13.8, abs=0.05) and bound == ""
    assert board.data_efficiency({"points": points}, 2.5, 100_000_000) == (20, "≥")
    assert board.data_efficiency({"points": points}, 4.0, 100_000_000) == (2, "<")
    curve = {"points": [{"train_tokens": 1, "val_loss": 2.0, "train_flops": 10.0}, {"train_tokens": 2, "val_loss": 1.0, "train_flops": 40.0}]}
    assert board.compute_multiplier(curve, 1.5, 5.0) == (5.0, "")
    assert board.compute_multiplier({"points": points}, 3.0, 1.0) is None


# ---- pull requests


@pytest.fixture
def branch(original, tmp_path):
    """A clone of a small repository whose branch adds the tiny record, and a `python` that only says how it was called."""
    root, folder = original
    work = tmp_path / "work"
    (work / ".github").mkdir(parents=True)
    shutil.copy(ROOT / ".github" / "check_records.sh", work / ".github")
    (work / "README.md").write_text(f"# Top\n{board.BEGIN}\nold\n{board.END}\n")
    (work / "train_gpt.py").write_text("old script\n")
    standing = work / "records" / "pocket" / "2026-01-01_standing"
    standing.mkdir(parents=True)
    (standing / "record.json").write_text('{"submitted": "2026-01-01T00:00:00Z"}')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho called with $@\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": os.devnull}

    def git(*argv):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *argv], cwd=work, env=env, check=True, capture_output=True)

    def check():
        git("add", "-A")
        git("commit", "-m", "change")
        return subprocess.run([".github/check_records.sh", "base"], cwd=work, env=env, capture_output=True, text=True)
    git("init")
    git("add", "-A")
    git("commit", "-m", "base")
    git("branch", "base")
    shutil.copytree(folder, work / "records" / "pocket" / folder.name)
    (work / "train_gpt.py").write_bytes(audit.split_log((folder / "log.txt").read_bytes())[0])
    (work / "README.md").write_text(f"# Top\n{board.BEGIN}\nnew\n{board.END}\n")
    return work, check


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("change, words", [
    (None, None), ("data/prepare.py", "a record touches only"), ("records/pocket/2026-01-01_standing/record.json", "changes records that already stand"),
    ("records/leaderboard.py", "a record touches only"), ("records/pocket/2026-01-02_tiny/more/x.md", "a record touches only"),
    ("README.md", "outside the board"), ("train_gpt.py", "not the script of the record"), ("records/pictures/p.svg", "plain files only"), ("submitted", "says that it was submitted before")])
def test_what_a_pull_request_with_a_record_may_touch(branch, change, words):
    work, check = branch
    if change == "submitted":
        edit(work / "records" / "pocket" / "2026-01-02_tiny" / "record.json", lambda r: r.update(submitted="2025-12-31T00:00:00Z"))
    elif change:
        (work / change).parent.mkdir(exist_ok=True)
        if change.endswith(".svg"):
            (work / change).symlink_to("../../train_gpt.py")
        else:
            with open(work / change, "a") as f:
                f.write("# changed\n")
    done = check()
    if change:
        assert done.returncode == 1 and words in done.stderr and "verify" not in done.stdout, done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"called with records/leaderboard.py {what}" for what in (
            "render --check", "verify records/pocket/2026-01-02_tiny", "verify --smoke records/pocket/2026-01-02_tiny")]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_pull_request_without_a_record(branch):
    work, check = branch
    shutil.rmtree(work / "records" / "pocket" / "2026-01-02_tiny")
    done = check()
    assert (done.returncode, done.stdout) == (0, "adds no record\n"), done.stderr


# ---- this repository


def test_the_records_of_this_repository_hold_and_the_board_is_fresh():
    done = run_board("verify")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_board("render", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("argv, words", [(["verify", "tests"], "no record"), (["compare", "tests", "data"], "neither a record nor"), (["diff", "tests", "data"], "no log")])
def test_mistakes_get_one_line(argv, words):
    done = run_board(*argv)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
