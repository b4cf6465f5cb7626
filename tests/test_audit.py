"""The audit: each way to cheat is caught by the check that is meant for it, and honest scorers of unusual kinds pass."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scorers
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import audit  # noqa: E402


class Direct:
    """A scorer without a process around it."""
    def __init__(self, f):
        self.f, self.calls, self.tokens = f, 0, 0

    def __call__(self, x):
        return self.f(x)


def checks(scorer, seed, claimed=None, **kwargs):
    """{check: whether it holds} of a scorer on the toy validation stream."""
    lines = []
    audit.Audit(Direct(scorer), scorers.VAL, 257, np.random.default_rng(seed), claimed, show=lines.append, **kwargs).run()
    return {line[6:22].strip(): line.startswith("ok") for line in lines}


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
    assert scorer in (scorers.learning_from_other_rows, scorers.random) or scorer(scorers.VAL).mean() < scorers.honest(scorers.VAL).mean()


def test_a_claimed_nll_that_is_not_the_scorers_own():
    honest = blocks(scorers.honest(scorers.VAL))
    better, one_block, short = honest * 0.999, honest.copy(), honest[:-1]
    one_block[7] -= 20
    for claimed in (better, one_block, short):
        assert not checks(scorers.honest, 0, claimed)["reproduction"]
    # a random part has other windows than the whole: honest passes, a claim that is worth anything does not
    for seed in range(5):
        assert checks(scorers.other_context, seed, blocks(scorers.other_context(scorers.VAL)), part=20_000)["reproduction"]
        assert not checks(scorers.other_context, seed, honest * 0.98, part=20_000)["reproduction"]
        assert checks(scorers.remembering, seed, blocks(scorers.remembering(scorers.VAL)), part=20_000)["reproduction"]


def test_a_peek_of_two_parts_in_a_hundred():
    """Worth 0.02 nats here: single tokens move little, those just behind a cut move on average."""
    def weak(x):
        return -np.log(0.98 * np.exp(-scorers.honest(x)) + 0.02 * np.exp(-scorers.peeking(x)))
    assert not any(checks(weak, seed)["causality"] for seed in range(5))


def test_rounding_is_no_fault():
    """bf16 kernels add in another order in another batch: errors of a hundredth of a nat, which depend on the shape."""
    def rounding(x):
        rng = np.random.default_rng(x.size)
        return np.abs(scorers.honest(x) + rng.normal(0, 0.002, x.shape)) * (np.arange(x.shape[-1]) > 0)
    assert all(checks(rounding, 0, blocks(scorers.honest(scorers.VAL))).values())


def test_evidence_is_fair():
    """Of fair scorers of noise, at most one in e**3 has evidence above 3 nats (Markov): here the boldest fair scorer there is."""
    rng = np.random.default_rng(0)
    p = np.full(257, 0.5 / 256)
    p[0] = 0.5
    above = [audit.noise_evidence(-np.log(p[rng.integers(257, size=(1, 3000))]), 257)[0] > 3 for _ in range(200)]
    assert np.mean(above) < 0.05


@pytest.mark.parametrize("bad", [
    lambda x: scorers.honest(x)[..., 1:], lambda x: scorers.honest(x) - 1, lambda x: scorers.honest(x) + 1, lambda x: scorers.honest(x).astype(int),
    lambda x: np.where(scorers.honest(x) > 3, np.nan, 1.0), lambda x: np.array([object()])])
def test_output_that_breaks_the_contract(bad, tmp_path):
    out = tmp_path / "nll.npy"
    np.save(out, bad(scorers.VAL), allow_pickle=True)
    score = audit.Scorer([sys.executable, "-c", f"import shutil, sys; shutil.copy({str(out)!r}, sys.argv[2])", "{tokens}", "{nll}"], tmp_path, 60)
    with pytest.raises(audit.Broken):
        score(scorers.VAL)


def test_any_part_will_do():
    """From the smallest part on, also one that is no multiple of a block, and a claim of the wrong kind is a fault."""
    for part in (2000, 5500, 20_500):
        got = checks(scorers.honest, 0, blocks(scorers.honest(scorers.VAL)), part=part)
        assert all(got.values()), got
    for claimed in (np.array(1.0), np.array(["x"] * 60), np.ones((60, 1))):
        assert not checks(scorers.honest, 0, claimed)["reproduction"]


def test_a_header_that_is_made_up(tmp_path):
    """Whatever a .npy's header says, a stranger's file is refused as such; a pipe is no file, and nobody waits for it."""
    for header in ("{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}" % 10 ** 30, "((((", "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}", "{[]: 1}"):
        text = header.encode() + b"\n"
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        with pytest.raises(ValueError):
            audit.read_npy(tmp_path / "x.npy", 1 << 20)
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match="plain"):
        audit.read_npy(tmp_path / "pipe.npy", 1 << 20)


def test_what_a_program_prints_is_cut_and_cleaned():
    status, last = audit.run_limited([sys.executable, "-c", "print('x' * 10 ** 6); print('\\x1b[2Jhidden', 'y' * 1000)"], 20)
    assert status == 0 and last.startswith("?[2Jhidden yyy") and len(last) == 200


@pytest.mark.parametrize("code, words", [("raise SystemExit(3)", "exit status 3"), ("import time; time.sleep(60)", "longer than 1 s"), ("pass", "cannot be read")])
def test_a_scorer_that_fails(code, words, tmp_path):
    with pytest.raises(audit.Broken, match=words):
        audit.Scorer([sys.executable, "-c", code], tmp_path, 1)(scorers.VAL)


def test_command_line(pocket, tmp_path):
    """The same through processes and files, on pocket: exit status 0 and 1, and the figures on the screen."""
    for kind, status in (("honest", 0), ("peeking_across_edges", 1)):
        done = subprocess.run([sys.executable, "records/audit.py", "--command", f"{sys.executable} tests/scorers.py {kind} {{tokens}} {{nll}}"],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert ("all checks hold" in done.stdout) == (status == 0) and ("FAULT causality" in done.stdout) == (status == 1)


@pytest.mark.parametrize("argv, words", [
    ([], "name a run folder"), (["nowhere"], "nowhere/log.txt: No such file"), (["--command", "x"], "{tokens} and {nll}"),
    (["--command", "x {tokens} {nll}", "--track", "moon"], "choose one of pocket"), (["--command", "x {tokens} {nll}", "--claimed", "no.npy"], "no.npy"),
    (["x", "--track", "pocket"], "name a run folder"), (["--command", "x {tokens} {nll}", "--part", "10"], "--part 10"),
    (["--command", "x {tokens} {nll}", "--seed", "-1"], "--seed -1"), (["--command", "x '{tokens} {nll}"], "--command")])
def test_mistakes_get_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        audit.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_a_script_finds_its_data_folder(finished_run, tmp_path):
    """Scripts that score with the help of training tokens look for them beside themselves, and the audit runs a copy."""
    command, _, _ = audit.run_command(finished_run, tmp_path)
    assert (Path(command[1]).parent / "data" / "prepare.py").exists()
