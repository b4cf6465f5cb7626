"""
What the tests share. There are two kinds, by marker.

contract   knows a script by its command line and its files alone, and runs against any script:
           TOKENRUN_SCRIPT=path/to/script.py python -m pytest -m contract
reference  looks inside this repository's own train_gpt.py
"""

import functools
import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest.register_assert_rewrite("runs")

import runs
from data import prepare
from runs import PLAIN, ROOT, SCRIPT, TINY, options, resume, run_script, start, tokens_of

# What test modules import from here.
__all__ = ["PLAIN", "ROOT", "SCRIPT", "TINY", "options", "resume", "start", "tokens_of"]

# ---- the kinds of tests


@pytest.hookimpl(tryfirst=True)  # before -m leaves out what has no marker
def pytest_collection_modifyitems(items):
    for item in items:
        kinds = [kind for kind in ("contract", "reference") if item.get_closest_marker(kind)]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "neither"
            raise pytest.UsageError(f"{item.nodeid}: mark it as contract or as reference; it has {found}")
        if kinds == ["reference"]:
            if SCRIPT != ROOT / "train_gpt.py":
                item.add_marker(pytest.mark.skip(reason="describes train_gpt.py, not TOKENRUN_SCRIPT"))
            elif record_of_the_script():
                item.add_marker(pytest.mark.xfail(reason=described_before(), strict=False))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A reference module that cannot even be imported beside a record's script is skipped, for the same
    reason."""
    report = yield
    excused = record_of_the_script() and not collector.config.option.runxfail
    if report.failed and excused and isinstance(collector, pytest.Module):
        if "pytest.mark.reference" in collector.path.read_text():
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: {described_before()}")
    return report


@functools.cache
def record_of_the_script():
    """The folder of the record whose script train_gpt.py is, byte for byte; None where it is no record's."""
    script = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    for path in sorted((ROOT / "records").glob("*/*/record.json")):
        if script in path.read_text():
            return path.parent.relative_to(ROOT)
    return None


def described_before():
    """The reason why a reference test may fail: a stranger's record must not turn main red. --runxfail makes
    it count."""
    return f"train_gpt.py is now the script of {record_of_the_script()}: this describes the script before it"


# ---- running the script


@pytest.fixture
def call(capsys):
    """Call a tool's main() with a command line in this process. Returns (exit status, what it printed, what
    it printed as errors)."""

    def run(main, *argv):
        capsys.readouterr()
        status = runs.in_this_process(main, [main.__module__, *argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def cli(capsys):
    """Run a command line in this process. Returns (exit status, what it printed, what it printed as
    errors)."""

    def run(*argv, script=SCRIPT):
        capsys.readouterr()
        status = run_script(argv, script)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while runs.Forked.started:
        runs.Forked.started.pop().kill()


@pytest.fixture(scope="session")
def finished_run(tiny_data, tmp_path_factory):
    """A finished tiny run, trained once for all tests that only read it."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert run_script([*options(**TINY, data=tiny_data), "--run_dir", run, *PLAIN]) == 0
    return run


@pytest.fixture(scope="session")
def second_seed(tiny_data, tmp_path_factory):
    """The same with another seed."""
    run = tmp_path_factory.mktemp("runs") / "second"
    assert run_script([*options(**TINY | {"seed": 1}, data=tiny_data), "--run_dir", run, *PLAIN]) == 0
    return run


# ---- train_gpt.py from the inside


@pytest.fixture
def exact():
    """The test runs in float64."""
    # Not at the top: contract tests do not import the script.
    from reference import float64

    with float64():
        yield


# ---- data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of shards made from the text of this project's tools: it stays the same when the script
    changes."""
    folder = tmp_path_factory.mktemp("data") / "own"
    pieces = {}
    for path in sorted(ROOT.glob("*/*.py")):
        text = path.read_text()
        for i in range(0, len(text), 3000):
            pieces[f"{path.name}#{i}"] = text[i : i + 3000].encode("ascii", "replace")
    sizes = {"val": 3010, "test": 3000, "train": 30_000}
    splits = prepare.encode_documents(list(pieces), pieces.get, 256, sizes, "test")
    prepare.write_dataset(folder, splits, "bytes", "the tests")
    return folder


@pytest.fixture(scope="session")
def pocket():
    """The pocket shards, prepared where they are missing."""
    if not (ROOT / "data" / "pocket" / "meta.json").exists():
        prepare.prepare_pocket()
