"""The audit: each way to cheat is caught by the check meant for it, and unusual honest scorers pass."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scorers
from conftest import ROOT

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
    """{check: whether it holds} of a scorer on the toy validation stream."""
    lines = []
    rng = np.random.default_rng(seed)
    audit.Audit(Direct(scorer), scorers.VAL, 257, rng, claimed, show=lines.append, **kwargs).run()
    return {line[6:22].strip(): line.startswith("ok") for line in lines}


def reproduces(scorer, seed, claimed, part=None):
    """Does the check of a claimed NLL hold?"""
    rng = np.random.default_rng(seed)
    one = audit.Audit(Direct(scorer), scorers.VAL, 257, rng, claimed, part, show=lambda line: None)
    one.reproduction(scorer(one.text))
    return not one.faults


def blocks(nll):
    return np.add.reduceat(nll, np.arange(0, len(nll), 1000))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scorer", scorers.HONEST)
def test_honest_scorers_pass(scorer, seed):
    got = checks(scorer, seed, blocks(scorer(scorers.VAL)))
    assert all(got.values()) and len(got) == 14, got


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scorer", scorers.CHEATS)
def test_each_cheat_is_caught_by_the_check_meant_for_it(scorer, seed):
    got = checks(scorer, seed)
    assert not any(got[name] for name in scorers.CHEATS[scorer]), got
    if scorer not in (scorers.learning_from_other_rows, scorers.random):
        assert scorer(scorers.VAL).mean() < scorers.honest(scorers.VAL).mean()


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
        off = np.abs(scorers.honest(x) + rng.normal(0, 0.002, x.shape))
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
        evidence, _ = audit.noise_evidence(nll, 257)
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
def test_command_line(pocket, kind, status):
    """The same through processes and files, on pocket: exit status 0 and 1, and the figures on the screen."""
    scorer = f"{sys.executable} tests/scorers.py {kind} {{tokens}} {{nll}}"
    command = [sys.executable, "records/audit.py", "--command", scorer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("all checks hold" in done.stdout) == (status == 0)
    assert ("FAULT causality" in done.stdout) == (status == 1)


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
