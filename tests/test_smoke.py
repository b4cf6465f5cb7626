"""
verify --smoke on the record of a tiny run: an honest script passes, and one that looks ahead does not.

This takes long, and a record's pull request runs verify --smoke itself, so it is not one of the contract
tests.
"""

import json
import shutil
import sys

import pytest

from conftest import ROOT
from runs import run_here
from test_referee import edit_source, make_root

sys.path.insert(0, str(ROOT / "records"))
import audit
import smoke
import workshop

pytestmark = pytest.mark.reference

# This runs a script and then, where it has scored, halves the NLL of each token that comes before a space.
# That is a look ahead by one token, whatever the script does.
LEAK = """import sys


def leak():
    import numpy as np

    tokens = sys.argv[sys.argv.index("--tokens") + 1]
    out = sys.argv[sys.argv.index("--nll") + 1]
    x = np.load(tokens) if tokens.endswith(".npy") else np.fromfile(tokens, dtype="<u2")[512:]
    nll = np.load(out)
    nll[..., :-1][x[..., 1:] == ord(" ")] *= 0.5
    np.save(out, nll)


try:
    exec(compile({source!r}, __file__, "exec"))
finally:
    if "--score" in sys.argv:
        leak()
"""


@pytest.fixture
def faults_after(tiny_data, finished_run, tmp_path, monkeypatch):
    """A function: the faults of the record of a tiny run, after a change of its script."""
    root = make_root(tmp_path / "root", tiny_data)
    folder = root / "records" / "pocket" / "2026-01-02_tiny"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"runs": [{"log": "log.txt"}]}))
    shutil.copy(finished_run / "log.txt", folder)
    # The tests' own data are smaller than pocket.
    monkeypatch.setitem(smoke.TOY, "train_tokens", 20_000)
    monkeypatch.setattr(smoke, "DECOY", 2000)
    monkeypatch.setattr(workshop, "run_limited", run_here)
    monkeypatch.setattr(workshop, "walled", lambda command, folder, hidden: command)

    def run(change):
        edit_source(folder / "log.txt", change)
        return smoke.smoke(folder, 3600, root)

    return run


def test_an_honest_script_passes(faults_after, monkeypatch, capsys):
    # Half of the tokens of an audit are in these rows; the sums after short prefixes are enough here.
    monkeypatch.setattr(audit.Audit, "sums_over_likely_tokens", lambda self: [])
    assert faults_after(lambda source: source) == []
    out = capsys.readouterr().out
    assert "running the submitted code" in out and "ok    normalization" in out and "FAULT" not in out


def test_a_leak_in_the_script_alone_is_found(faults_after, monkeypatch):
    """Its run folder is honest. Only the checks that can show it are run; test_audit.py has the others."""
    monkeypatch.setattr(audit.Audit, "normalization", lambda self: None)
    monkeypatch.setattr(audit.Audit, "long_streams", lambda self: None)
    faults = faults_after(lambda source: LEAK.replace("{source!r}", repr(source)).encode())
    assert any(" causality: " in fault for fault in faults), faults
