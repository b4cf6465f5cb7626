"""The verdict of compare, and diff as a research note: on made-up records, and small histories."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from runs import SEED_SPREAD
from test_reading import write_log

sys.path.insert(0, str(ROOT / "records"))
import compare
import diff
import reading

pytestmark = pytest.mark.contract

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")

BLOCKS = 400

STATED = {"seed_sd": 0.003, "seed_df": 54}
TEXT = compare.Spread(0.002, 19, "of the text")
A_SPREAD = compare.Spread(0.002, 54, "stated")


# ---- compare

CLAIMS = dict(
    track="pocket",
    trial=False,
    seed=0,
    train_tokens=1_000_000,
    train_seconds=100.0,
    train_flops=1e13,
    score_flops_per_token=1e6,
    parameters=10**6,
    members=1,
    ranks=1,
    threads=2,
    val_tokens=1000 * BLOCKS - 1,
)


@pytest.fixture
def root(tmp_path):
    """A repository with the rules of this one and a record on pocket at 0.7 nats per token. It asks for no
    number of seeds: that rule holds from some day on, and the runs here are of the day of the test."""
    tracks = json.loads((ROOT / "records" / "tracks.json").read_text())
    del tracks["tracks"]["pocket"]["seeds"]
    tracks["datasets"]["pocket"] |= SEED_SPREAD
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "tracks.json").write_text(json.dumps(tracks))
    write_record(tmp_path, "2026-01-01_first", 0.8)
    write_record(tmp_path, "2026-01-02_standing", 0.7)
    return tmp_path


def sums_of(loss):
    """Summed NLL of each block for a mean loss, with the same text for all."""
    text = np.random.default_rng(0).normal(0, 50, BLOCKS)
    return 1000 * loss + text - text.mean()


def claims_of(root, loss, **claims):
    dataset = reading.read_tracks(root)["datasets"]["pocket"]
    return CLAIMS | {"data_sha256": dataset["sha256"], "val_loss": loss} | claims


def write_record(root, name, *losses):
    """A record of seeds with these losses. Its date is in its name."""
    folder = root / "records" / "pocket" / name
    folder.mkdir(parents=True)
    runs = []
    for i, loss in enumerate(losses):
        np.save(folder / f"val_nll_{i}.npy", sums_of(loss))
        runs.append(claims_of(root, loss, seed=i, val_nll=f"val_nll_{i}.npy"))
    record = {"track": "pocket", "submitted": f"{name[:10]}T00:00:00Z", "runs": runs}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def write_run(root, name, loss, **claims):
    """The folder of a finished run."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    np.save(folder / "val_nll.npy", sums_of(loss))
    (folder / "record.json").write_text(json.dumps(claims_of(root, loss, **claims)))
    return folder


def edit_tracks(root, change):
    """Change what tracks.json says of pocket's dataset."""
    path = root / "records" / "tracks.json"
    tracks = json.loads(path.read_text())
    change(tracks["datasets"]["pocket"])
    path.write_text(json.dumps(tracks))


def after(lines, start):
    """The lines from the one with this start on."""
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    return lines[at:]


def test_a_better_run_is_a_record(root):
    """Without B it is compared with the standing record. All its seeds are in what comes next."""
    a = write_run(root, "a", 0.65)
    b = write_run(root, "b", 0.66, seed=1)
    lines = compare.compare(f"{a},{b}", root=root)
    assert lines[2] == "B  " + os.path.relpath(root / "records" / "pocket" / "2026-01-02_standing")
    assert not any("cannot become" in line for line in lines)
    assert after(lines, "verdict") == [
        lines[-5],
        "next:",
        f"  python records/audit.py {a}",
        f"  python records/audit.py {b}",
        f"  python records/leaderboard.py submit {a} {b} --slug NAME --note NOTE.md",
    ]
    assert lines[-5].startswith("verdict: better, p = ") and lines[-5].endswith(": a record")


def test_a_worse_run(root):
    a = write_run(root, "a", 0.75)
    lines = compare.compare(a, root=root)
    standing = os.path.relpath(root / "records" / "pocket" / "2026-01-02_standing")
    verdict, *steps = after(lines, "verdict")
    assert verdict.startswith("verdict: worse, p = ")
    assert steps == ["next:", f"  python records/leaderboard.py diff {standing} {a}"]


@pytest.mark.parametrize(
    "loss, seeds",
    [
        # p < 0.01 needs 2.67 standard errors. A seed's is 0.00283 on each side: 0.009 is 2.60 standard errors
        # with two seeds of A, and 2.75 with three.
        (0.691, "3 seeds of A with this mean would show that A is better"),
        (0.699, "even 20 seeds of A with this mean would not show that A is better"),
    ],
)
def test_a_run_that_is_not_better_by_more_than_chance(root, loss, seeds):
    a = write_run(root, "a", loss, seed=4)
    lines = compare.compare(f"{a}/", root=root)
    verdict, more, *steps = after(lines, "verdict")
    assert verdict.startswith("verdict: not more than chance, p = ") and "p < 0.01" in verdict
    assert more.strip() == seeds
    assert steps == [
        "next:",
        f"  python train_gpt.py --track pocket --seed 5 --run_dir {a}_seed5 [the other options of A]",
        f"  python records/leaderboard.py compare {a},{a}_seed5",
    ]


def test_more_seeds_of_a_run_that_is_no_better_are_not_advertised(root):
    lines = compare.compare(write_run(root, "a", 0.701), root=root)
    assert after(lines, "verdict")[1] == "next:"


@pytest.mark.parametrize(
    "claims, fault",
    [
        ({"train_tokens": 2_000_000}, "--train_tokens 2,000,000 of 1,000,000 that are allowed"),
        ({"trial": True}, "it is a trial (--steps, or an edited script)"),
        ({"data_sha256": {"val.bin": "0" * 64}}, "val.bin is not the track's"),
    ],
)
def test_a_better_run_with_a_fault(root, claims, fault):
    """What two seeds have in common is said once, and there is no submit among what comes next."""
    a = write_run(root, "a", 0.65, **claims)
    b = write_run(root, "b", 0.66, seed=1, **claims)
    lines = compare.compare(f"{a},{b}", root=root)
    assert [line for line in lines if "cannot become" in line] == [f"A cannot become a record: {fault}"]
    verdict, *steps = after(lines, "verdict")
    assert verdict.startswith("verdict: better, p = ") and "but no record" in verdict
    assert not any(" submit " in line for line in steps)


def test_better_than_something_else_than_the_standing_record(root):
    """To beat an old record, or another run, makes no record."""
    a = write_run(root, "a", 0.75)
    for b in (root / "records" / "pocket" / "2026-01-01_first", write_run(root, "b", 0.85)):
        verdict, *steps = after(compare.compare(a, b, root), "verdict")
        assert verdict.startswith("verdict: better, p = ")
        assert verdict.endswith("; the record to beat is 2026-01-02_standing, 0.7000")
        assert steps == ["next:", f"  python records/leaderboard.py compare {a}"]


def test_a_record_is_compared_with_the_one_before_it(root):
    folder = root / "records" / "pocket" / "2026-01-02_standing"
    before = os.path.relpath(folder.parent / "2026-01-01_first")
    lines = compare.compare(folder, root=root)
    assert lines[2] == f"B  {before}" and after(lines, "verdict")[0].endswith(": a record")
    assert lines[-1] == f"  python records/leaderboard.py diff {before} {folder}"
    lines = compare.compare(folder.parent / "2026-01-01_first", root=root)
    assert after(lines, "verdict") == ["verdict: track pocket has no record to beat: this is the first"]


@pytest.mark.parametrize("claims, word", [({}, "this is the first"), ({"trial": True}, "but this is none")])
def test_a_track_without_a_record(root, claims, word):
    shutil.rmtree(root / "records" / "pocket")
    lines = compare.compare(write_run(root, "a", 0.7, **claims), root=root)
    assert word in after(lines, "verdict")[0]
    assert any(" submit " in line for line in lines) == (not claims)


@pytest.mark.parametrize(
    "claims, words",
    [
        ({"track": "marathon"}, "its track 'marathon' is not in"),
        ({"ranks": None}, "record.json is incomplete"),
    ],
)
def test_a_run_that_cannot_be_judged(root, claims, words):
    with pytest.raises(reading.Refused, match=words):
        compare.compare(write_run(root, "a", 0.65, **claims), root=root)


@pytest.mark.parametrize(
    "seeds, dataset, spread",
    [
        ([0.70, 0.71, 0.72], STATED, (0.01, 54, "of its own 3 seeds")),
        ([0.700, 0.701, 0.702], STATED, (0.003, 54, "stated in tracks.json")),
        ([0.70, 0.72], STATED, (0.003, 54, "stated in tracks.json")),
        ([0.70, 0.71, 0.72], {}, (0.01, 2, "of its own 3 seeds")),
        ([0.70, 0.72], {}, (0.0, 1, "not counted: tracks.json states none")),
    ],
)
def test_which_spread_of_seeds_counts(seeds, dataset, spread):
    found = compare.seed_spread(np.array(seeds), dataset)
    assert found[:2] == pytest.approx(spread[:2]) and found.source.startswith(spread[2])


@pytest.mark.parametrize(
    "parts, df",
    [
        ([(TEXT, 1), (A_SPREAD, 1)], 19 * 54 / ((19 + 54) / 4)),  # two equal parts of the variance
        ([(TEXT, 1), (A_SPREAD, 10**9)], 19),  # so many seeds that the text alone counts
        ([(A_SPREAD, 1), (A_SPREAD, 3)], 54),  # one stated spread, used on both sides
        ([(A_SPREAD, 1), (compare.Spread(0.002, 54, "other"), 1)], 108),
    ],
)
def test_degrees_of_freedom_are_welchs(parts, df):
    error, found = compare.standard_error(parts)
    assert found == pytest.approx(df)
    assert error == pytest.approx(sum(0.002**2 / count for _, count in parts) ** 0.5)


def test_few_degrees_of_freedom_of_the_seeds_make_a_larger_p():
    """A spread that four differences tell proves less than the same one from 54."""
    sums = sums_of(0.7)
    tokens = 1000 * BLOCKS - 1
    a = (sums - 10, np.zeros(1), tokens)
    b = (sums, np.zeros(1), tokens)
    p = {}
    for df in (4, 54):
        p[df] = compare.compare_scores(a, b, {"seed_sd": 0.003, "seed_df": df})["p"]
    # Of 0.010 / (0.003 * sqrt(2)) = 2.357 standard errors, by tables of Student's t.
    assert p[4] == pytest.approx(0.078, abs=0.001) and p[54] == pytest.approx(0.022, abs=0.001)


def test_seeds_that_nothing_is_known_about_are_said_aloud(root):
    """As on mini and FineWeb. The text alone is in p, and a reader is told."""
    edit_tracks(root, lambda dataset: [dataset.pop("seed_sd"), dataset.pop("seed_df")])
    a = write_run(root, "a", 0.69)
    lines = compare.compare(a, root=root)
    assert sum(line.startswith("p leaves out that another seed gives another loss") for line in lines) == 1
    three = ",".join(str(write_run(root, f"a{seed}", 0.69 + 0.001 * seed, seed=seed)) for seed in range(3))
    spread = write_record(root, "2026-01-01_three", 0.80, 0.81, 0.82)
    assert not any(line.startswith("p leaves out") for line in compare.compare(three, spread, root))


def test_each_side_has_its_own_spread(root):
    """A lead of 0.02 over one seed is nothing beside seeds that differ by 0.05; verify asks the same."""
    dataset = STATED
    steady = compare.read_scores(write_record(root, "2026-01-03_steady", 0.72, 0.72, 0.72))
    spread = compare.read_scores(write_record(root, "2026-01-03_spread", 0.67, 0.72, 0.77))
    a = compare.read_scores(write_run(root, "a", 0.70))
    assert compare.compare_scores(a, steady, dataset)["p"] < 0.01
    c = compare.compare_scores(a, spread, dataset)
    assert c["p"] > 0.3
    # The other side has the stated one.
    assert c["seed"] == pytest.approx((0.05**2 / 3 + 0.003**2) ** 0.5, rel=1e-4)
    lines = compare.compare(root / "runs" / "a", root / "records" / "pocket" / "2026-01-03_spread", root)
    assert "  spread of A from seed to seed: 0.0028, stated in tracks.json" in lines
    assert "  spread of B from seed to seed: 0.0500, of its own 3 seeds" in lines


def test_as_many_seeds_as_are_needed():
    """The number that compare names is the smallest for which its test has p < 0.01."""
    text = sums_of(0.7)
    noise = np.random.default_rng(1).normal(0, 90, BLOCKS)
    tokens = 1000 * BLOCKS - 1
    better = text - 16 + noise - noise.mean()
    spreads = compare.Spread(0.008, 2, "own"), compare.Spread(0.003, 54, "stated")

    def p_of(n):
        return compare.paired_test((better, np.zeros(n), tokens), (text, np.zeros(3), tokens), *spreads)

    n = compare.seeds_needed(p_of(1), [(spreads[0], 1), (spreads[1], 3)], 0.01)
    assert n > 2 and p_of(n)["p"] < 0.01 <= p_of(n - 1)["p"]


# ---- diff


def write_side(folder, source, claims=None, **config):
    """A run, or a record where claims are given, as far as diff looks at one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_log(folder / "log.txt", [f"config {json.dumps(config)}"], "\n".join([*source, ""]).encode())
    if claims is not None:
        (folder / "record.json").write_text(json.dumps({"runs": [{"log": "log.txt"} | claims]}))
    return folder


def numbered(word, n=30):
    return [f"{word} {i}" for i in range(n)]


def test_what_changed_in_the_options(tmp_path):
    """The number of members is that of the record: its log has the one that the run began with."""
    a = write_side(tmp_path / "a", ["x"], lr=0.1, memory="", members=1, xsa=False, seed=0)
    b = write_side(tmp_path / "b", ["x"], {"members": 2}, lr=0.2, memory="3,4", members=1, stride=256, seed=0)
    assert diff.diff(a, b, tmp_path) == [
        "config, A -> B",
        "  lr: 0.1 -> 0.2",
        '  memory: "" -> "3,4"',
        "  members: 1 -> 2",
        "  options of A alone: xsa false",
        "  options of B alone: stride 256",
        "",
        "script: equal",
    ]
    assert diff.diff(a, a, tmp_path) == ["config: equal", "", "script: equal"]


@pytest.fixture
def main(tmp_path):
    """(a repository, a function that commits a version of the script and returns the commit's short hash)."""
    root = tmp_path / "main"
    root.mkdir()
    env = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}

    def git(*argv):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(["git", *identity, *argv], cwd=root, env=env, check=True, capture_output=True)
        return done.stdout.decode().strip()

    def commit(script, message):
        (root / "train_gpt.py").write_text("\n".join([*script, ""]))
        git("add", "-A")
        git("commit", "-m", message)
        return git("rev-parse", "--short", "HEAD")

    git("init")
    return root, commit


OLD = numbered("old")
NEW = numbered("new")


@needs_git
def test_a_refactoring_of_main_is_not_shown(main, tmp_path):
    """Both records changed a line of their own; in between, main was refactored in two commits."""
    root, commit = main
    first = commit(OLD, "first")
    commit([*OLD[:10], *NEW[10:]], "half of it")
    last = commit(NEW, "the other half")
    a = write_side(tmp_path / "a", [*OLD, "idea of a"], {})
    b = write_side(tmp_path / "b", ["idea of b", *NEW[1:]], {})
    lines = diff.diff(a, b, root)
    changed = [line for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    assert changed == ["+idea of a", "-new 0", "+idea of b"]
    text = "\n".join(lines)
    assert f"A came from commit {first} of " in text and f"B came from commit {last} of " in text
    assert f"`git diff {first} {last} -- train_gpt.py`" in text
    assert [line.split()[0] + " " + line.split()[1] for line in lines[-2:]] == ["+20 -20", "+10 -10"]
    assert lines[-2].endswith(" half of it") and lines[-1].endswith(" the other half")

    # And back.
    lines = diff.diff(b, a, root)
    assert "what main changed from B to A, and A -> B takes back" in "\n".join(lines)
    assert lines[-1].endswith(" the other half")


@needs_git
def test_scripts_of_one_commit_are_compared_with_each_other(main, tmp_path):
    root, commit = main
    hash = commit(OLD, "first")
    commit(NEW, "second")
    a = write_side(tmp_path / "a", [*OLD, "idea of a"])
    b = write_side(tmp_path / "b", [*OLD, "idea of b"])
    lines = diff.diff(a, b, root)
    assert f"script (both came from commit {hash} of " in "\n".join(lines)
    assert lines[-2:] == ["-idea of a", "+idea of b"]


@needs_git
def test_a_record_that_brought_its_script_to_main(main):
    """Its script came from the commit before the record's own."""
    root, commit = main
    commit(OLD, "first")
    a = write_side(root / "records" / "pocket" / "a", OLD, {})
    commit(OLD, "record a")
    before = commit(NEW, "a refactoring")
    b = write_side(root / "records" / "pocket" / "b", [*NEW, "idea of b"], {})
    commit([*NEW, "idea of b"], "record b")
    commit(NEW[:20], "later")
    lines = diff.diff(a, b, root)
    assert "A is the script of commit " in "\n".join(lines)
    assert f"B came from commit {before} of " in "\n".join(lines)
    assert "+idea of b" in lines and "-old 0" not in lines
    assert [line.split(maxsplit=3)[3] for line in lines[-1:]] == ["a refactoring"]


@needs_git
def test_scripts_that_are_nearer_to_each_other_than_to_main(main, tmp_path):
    """A long idea that both share is not shown, at the price of showing the line that main changed."""
    root, commit = main
    commit(OLD, "first")
    commit(["changed", *OLD[1:]], "second")
    a = write_side(tmp_path / "a", [*OLD, *numbered("idea", 20)])
    b = write_side(tmp_path / "b", ["changed", *OLD[1:], *numbered("idea", 20), "more"])
    lines = diff.diff(a, b, root)
    assert lines[2] == "script (no commit of main is nearer to them than they are to each other)"
    assert "+changed" in lines and lines[-1] == "+more" and "+idea 1" not in lines


@needs_git
@pytest.mark.parametrize("swap, unknown", [(False, "A"), (True, "B")])
def test_a_script_that_came_from_no_commit(main, tmp_path, swap, unknown):
    """Another script altogether is compared line by line."""
    root, commit = main
    commit(OLD, "first")
    sides = [write_side(tmp_path / "a", numbered("other")), write_side(tmp_path / "b", OLD)]
    if swap:
        sides.reverse()
    lines = diff.diff(*sides, root)
    assert lines[2].startswith(f"script (git knows no commit of train_gpt.py here that {unknown} came from")
    assert {"old 0", "other 0"} == {line[1:] for line in lines if line[1:] in ("old 0", "other 0")}


def test_without_a_history_main_is_shown_too(tmp_path):
    a = write_side(tmp_path / "a", OLD)
    b = write_side(tmp_path / "b", NEW)
    lines = diff.diff(a, b, tmp_path)
    assert lines[2].startswith("script (git knows no commit of train_gpt.py here that A came from")
    assert "-old 0" in lines and "+new 0" in lines


def test_a_log_that_was_kept_without_its_script(tmp_path):
    a = write_side(tmp_path / "a", OLD)
    log = (a / "log.txt").read_text()
    (a / "log.txt").write_text(log.replace("\n".join([*OLD, "", ""]), ""))
    with pytest.raises(reading.Refused, match="kept without the script"):
        diff.diff(a, a, tmp_path)
