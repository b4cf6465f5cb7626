"""The audit: each way to cheat is caught by the check meant for it, and unusual honest scorers pass."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import scorers
from conftest import ROOT, tokens_of

sys.path.insert(0, str(ROOT / "records"))
import audit
import reading

pytestmark = pytest.mark.contract

# Enough for any command here on any machine: a limit that no test means to reach.
AMPLE = 3600


class Direct:
    """A scorer without a process around it."""

    def __init__(self, f):
        self.f = f
        self.calls = 0
        self.tokens = 0

    def __call__(self, x):
        return self.f(x)


def checks(scorer, seed, claimed=None, **kwargs):
    """{check: whether it holds} of a scorer on the toy validation stream, which has no tail."""
    lines = []
    rng = np.random.default_rng(seed)
    audit.Audit(Direct(scorer), scorers.VAL, 257, rng, claimed, show=lines.append, **kwargs).run()
    skipped = [line for line in lines if line.startswith("skip")]
    assert skipped == [] or " tail " in skipped[0] and len(skipped) == 1
    return {line[6:22].strip(): line.startswith("ok") for line in lines if line not in skipped}


def reproduces(scorer, seed, claimed, part=None):
    """Does the check of a claimed NLL hold?"""
    rng = np.random.default_rng(seed)
    one = audit.Audit(Direct(scorer), scorers.VAL, 257, rng, claimed, part, show=lambda line: None)
    one.reproduction(scorer(one.text))
    return not one.faults


def blocks(nll):
    return np.add.reduceat(nll, np.arange(0, len(nll), 1000))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scorer", scorers.HONEST)
def test_honest_scorers_pass(scorer, seed):
    got = checks(scorer, seed, blocks(scorer(scorers.VAL)))
    assert all(got.values()) and len(got) == 16, got


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scorer", scorers.CHEATS)
def test_each_cheat_is_caught_by_the_check_meant_for_it(scorer, seed):
    got = checks(scorer, seed)
    assert not any(got[name] for name in scorers.CHEATS[scorer]), got
    if scorer is scorers.likelier_by_a_fifth:
        assert scorer(scorers.VAL).mean() < scorers.sharp(scorers.VAL).mean()
    elif scorer not in (scorers.learning_from_other_rows, scorers.random):
        assert scorer(scorers.VAL).mean() < scorers.honest(scorers.VAL).mean()


@pytest.fixture(scope="module")
def corpus(pocket):
    """Shuffled documents: (validation, test, training budget, what follows the budget)."""
    val = tokens_of(ROOT / "data" / "pocket" / "val.bin")[:60_000]
    test = tokens_of(ROOT / "data" / "pocket" / "test.bin")[:60_000]
    train = tokens_of(ROOT / "data" / "pocket" / "train.bin")
    return val, test, train[:120_000], train[1_000_000:1_300_000]


def tail_gap(corpus, scorer, seed):
    """(does the tail check hold? the gap that it finds)"""
    val, _, budget, beyond = corpus
    lines = []
    rng = np.random.default_rng(seed)
    one = audit.Audit(Direct(scorer), val, 257, rng, show=lines.append, budget=budget, beyond=beyond)
    one.another_end(scorer(val))
    [line] = [line for line in lines if " tail " in line]
    return line.startswith("ok"), float(re.search(r"cost (\S+) nats", line)[1])


@pytest.mark.parametrize("kind", ["adaptive", "n-grams of the budget"])
def test_a_scorer_that_knows_the_budget_passes_the_tail_check(corpus, kind):
    budget = corpus[2]
    scorer = {
        "adaptive": scorers.adaptive,
        "n-grams of the budget": scorers.knowing(budget),
    }[kind]
    holds, gap = tail_gap(corpus, scorer, 0)
    assert holds, gap


def test_a_scorer_that_knows_more_than_the_budget_fails_the_tail_check(corpus):
    """Validation, learned or looked up, makes unseen text look hard; all of train.bin makes it look easy."""
    val, test, budget, beyond = corpus
    for scorer in (
        scorers.knowing(np.concatenate([budget, val])),
        scorers.looking_up(np.concatenate([val, test]), scorers.knowing(budget)),
    ):
        holds, gap = tail_gap(corpus, scorer, 0)
        assert not holds and gap > 0, gap
    holds, gap = tail_gap(corpus, scorers.knowing(np.concatenate([budget, beyond])), 0)
    assert not holds and gap < 0, gap


def test_a_claimed_nll_that_is_not_the_scorers_own():
    honest = blocks(scorers.honest(scorers.VAL))
    one_block = honest.copy()
    one_block[7] -= 20
    for claimed in (honest * 0.999, one_block, honest[:-1]):
        assert not reproduces(scorers.honest, 0, claimed)

    # A random part has other windows than the whole: an honest claim passes, one that is worth a lie does
    # not.
    other = blocks(scorers.other_context(scorers.VAL))
    remembering = blocks(scorers.remembering(scorers.VAL))
    for seed in range(5):
        assert reproduces(scorers.other_context, seed, other, part=20_000)
        assert not reproduces(scorers.other_context, seed, honest * 0.98, part=20_000)
        assert reproduces(scorers.remembering, seed, remembering, part=20_000)


def test_a_peek_of_two_parts_in_a_hundred():
    """Worth 0.02 nats here: single tokens move little, those just behind a cut move on average."""

    def weak(x):
        return -np.log(0.98 * np.exp(-scorers.honest(x)) + 0.02 * np.exp(-scorers.peeking(x)))

    assert not any(checks(weak, seed)["causality"] for seed in range(5))


def test_rounding_is_no_fault():
    """bf16 kernels add in another order in another batch: errors of 0.01 nats that depend on the shape."""

    def rounding(x):
        rng = np.random.default_rng(x.size)
        off = np.abs(scorers.honest(x) + rng.normal(0, 0.003, x.shape))
        off[..., 0] = 0
        return off

    assert all(checks(rounding, 0, blocks(scorers.honest(scorers.VAL))).values())


def test_evidence_is_fair():
    """A fair scorer of noise has evidence above 3 nats with probability e**-3 = 0.0498 at most (Markov).

    Here it is the boldest fair scorer there is.
    """
    rng = np.random.default_rng(0)
    p = np.full(257, 0.5 / 256)
    p[0] = 0.5
    above = 0
    for _ in range(200):
        nll = -np.log(p[rng.integers(257, size=(1, 1000))])
        evidence, _ = audit.evidence_against(257 * np.exp(-nll))
        above += evidence > 3
    assert above / 200 < 0.05


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: scorers.honest(x)[..., 1:],
        lambda x: scorers.honest(x) - 1,
        lambda x: scorers.honest(x) + 1,
        lambda x: scorers.honest(x).astype(int),
        lambda x: np.where(scorers.honest(x) > 3, np.nan, 1.0),
        lambda x: np.array([object()]),
    ],
)
def test_output_that_breaks_the_contract(bad, tmp_path):
    out = tmp_path / "nll.npy"
    np.save(out, bad(scorers.VAL), allow_pickle=True)
    code = f"import shutil, sys; shutil.copy({str(out)!r}, sys.argv[2])"
    score = audit.Scorer([sys.executable, "-c", code, "{tokens}", "{nll}"], tmp_path, AMPLE)
    with pytest.raises(audit.Broken):
        score(scorers.VAL)


def test_a_shard_scored_as_a_batch_of_one(tmp_path):
    """[1, n] is as good as [n]; the transpose is not, nor is [1, n] for a stream in a batch."""
    out = tmp_path / "nll.npy"
    code = f"import shutil, sys; shutil.copy({str(out)!r}, sys.argv[2])"
    score = audit.Scorer([sys.executable, "-c", code, "{tokens}", "{nll}"], tmp_path, AMPLE)
    nll = scorers.honest(scorers.VAL)
    np.save(out, nll[None])
    assert np.array_equal(score(scorers.VAL), nll)
    np.save(out, nll[:, None])
    with pytest.raises(audit.Broken):
        score(scorers.VAL)
    np.save(out, nll)
    with pytest.raises(audit.Broken):
        score(scorers.VAL[None])


MODEL = """
import torch


class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(257, 257)

    def forward(self, x):
        return self.table(x)
"""


class Page(audit.Scorer):
    """The scorer that audit.md shows, with a toy for the project's own model, in this process."""

    def run(self, sent, output, tokens):
        sys.argv = ["score.py", str(sent), str(output)]
        runpy.run_path(str(self.folder / "score.py"))


def test_the_scorer_in_audit_md(tmp_path, monkeypatch):
    page = (ROOT / "records" / "audit.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "score.py").write_text(block)
    (tmp_path / "my_train.py").write_text(MODEL)
    torch.save({"table.weight": torch.from_numpy(np.log(scorers.BIGRAM))}, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    score = Page([], tmp_path, AMPLE)
    expected = scorers.nll(scorers.BIGRAM, scorers.VAL)
    np.testing.assert_allclose(score(scorers.VAL), expected, rtol=0, atol=1e-4)
    claimed = blocks(expected)
    lines = []
    rng = np.random.default_rng(0)
    audit.Audit(score, scorers.VAL, 257, rng, claimed, part=20_000, show=lines.append).run()
    assert not any(line.startswith("FAULT") for line in lines), lines


def test_any_part_will_do():
    """From the smallest part on, and also one that is no multiple of a block."""
    claimed = blocks(scorers.honest(scorers.VAL))
    for part in (2000, 5500, 20_500):
        got = checks(scorers.honest, 0, claimed, part=part)
        assert all(got.values()), got


def test_a_claim_of_the_wrong_kind():
    for claimed in (np.array(1.0), np.array(["x"] * 60), np.ones((60, 1))):
        assert not reproduces(scorers.honest, 0, claimed)


def test_a_header_that_is_made_up(tmp_path):
    """Whatever its header says, a stranger's file is refused. A pipe is no file, and nobody waits for it."""
    for header in (
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",)}",
        "((((",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}",
        "{[]: 1}",
    ):
        text = header.encode() + b"\n"
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        (tmp_path / "x.npy").write_bytes(start + text)
        with pytest.raises(ValueError):
            reading.read_npy(tmp_path / "x.npy", 1 << 20)
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match="plain"):
        reading.read_npy(tmp_path / "pipe.npy", 1 << 20)


def test_what_a_program_prints_is_cut_and_cleaned():
    code = "print('x' * 10 ** 6); print('\\x1b[2Jhidden', 'y' * 1000)"
    status, last = audit.run_limited([sys.executable, "-c", code], AMPLE)
    assert status == 0 and last.startswith("?[2Jhidden yyy") and len(last) == 200


@pytest.mark.parametrize(
    "code, seconds, words",
    [
        ("raise SystemExit(3)", AMPLE, "exit status 3"),
        ("import time; time.sleep(3600)", 1, "longer than 1 s"),
        ("pass", AMPLE, "cannot be read"),
    ],
)
def test_a_scorer_that_fails(code, seconds, words, tmp_path):
    with pytest.raises(audit.Broken, match=words):
        audit.Scorer([sys.executable, "-c", code], tmp_path, seconds)(scorers.VAL)


@pytest.mark.parametrize("kind, status", [("honest", 0), ("peeking_across_edges", 1)])
def test_command_line(pocket, kind, status, tmp_path):
    """The same through processes and files: exit status 0 and 1, and the figures on the screen."""
    for name, split, n in (("a.bin", "val", 20_000), ("b.bin", "test", 60_000)):
        audit.write_shard(tmp_path / name, tokens_of(ROOT / "data" / "pocket" / f"{split}.bin")[:n])
    scorer = f"{sys.executable} tests/scorers.py {kind} {{tokens}} {{nll}}"
    command = [sys.executable, "records/audit.py", "--command", scorer, "--vocab_size", "257"]
    command += ["--val", tmp_path / "a.bin", "--unseen", tmp_path / "b.bin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("all checks hold" in done.stdout) == (status == 0)
    assert ("FAULT causality" in done.stdout) == (status == 1)
    assert "ok    tail" in done.stdout


def test_a_track_is_audited_with_its_budget(pocket, tmp_path, monkeypatch):
    audits = []

    def run(self):
        audits.append(self)
        return []

    monkeypatch.setattr(audit.Audit, "run", run)
    audit.audit_command(["x"], "pocket", tmp_path, AMPLE, np.random.default_rng(0))
    train = tokens_of(ROOT / "data" / "pocket" / "train.bin")
    assert np.array_equal(audits[0].budget, train[:1_000_000])
    assert np.array_equal(audits[0].beyond, train[1_000_000:])


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "name a run folder"),
        (["nowhere"], "nowhere/log.txt: No such file"),
        (["--command", "x"], "{tokens} and {nll}"),
        (["--command", "x {tokens} {nll}", "--track", "moon"], "choose one of pocket"),
        (["--command", "x {tokens} {nll}", "--claimed", "no.npy"], "no.npy"),
        (["x", "--track", "pocket"], "name a run folder"),
        (["--command", "x {tokens} {nll}", "--part", "10"], "--part 10"),
        (["--command", "x {tokens} {nll}", "--seed", "-1"], "--seed -1"),
        (["--command", "x '{tokens} {nll}"], "--command"),
        (["--command", "x {tokens} {nll}", "--val", "a.bin"], "--val and --vocab_size go together"),
        (["--command", "x {tokens} {nll}", "--unseen", "a.bin"], "--unseen goes with them"),
        (["--command", "x {tokens} {nll}", "--val", "a.bin", "--vocab_size", "9"], "a.bin: No such file"),
        (
            ["--command", "x {tokens} {nll}", "--val", "a", "--vocab_size", "9", "--track", "mini"],
            "one of them",
        ),
    ],
)
def test_mistakes_get_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        audit.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_a_script_finds_its_data_folder(finished_run, tmp_path):
    """A script that scores with training tokens looks for them beside itself, and the audit runs a copy."""
    command, _, _ = audit.run_command(finished_run, tmp_path)
    assert (Path(command[1]).parent / "data" / "prepare.py").exists()
