"""What a pull request may touch: .github/guard.py, run on branches of a small repository."""

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

RECORD = "records/pocket/2026-01-02_mine"
pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(not shutil.which("git"), reason="needs git"),
]


class Repository:
    def __init__(self, folder):
        self.folder = folder
        self.env = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
        self.git("init")

    def git(self, *argv):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(
            ["git", *identity, *argv], cwd=self.folder, env=self.env, check=True, capture_output=True
        )

    def write(self, path, text):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-m", "change")

    def guard(self):
        self.commit()
        command = [sys.executable, "-I", str(ROOT / ".github" / "guard.py"), "base"]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)

    def write_record(self, submitted="2026-01-02T00:00:00Z", script="new script\n", harness="harness\n"):
        run = {"source_sha256": hashlib.sha256(script.encode()).hexdigest()}
        if harness:
            run["harness_sha256"] = hashlib.sha256(harness.encode()).hexdigest()
        record = {"submitted": submitted, "runs": [run]}
        self.write(f"{RECORD}/record.json", json.dumps(record))
        self.write(f"{RECORD}/README.md", "# A note\n")


@pytest.fixture
def branch(tmp_path):
    """A repository whose branch adds a record over `base`, not committed yet."""
    repository = Repository(tmp_path)
    repository.write("README.md", "# Top\n")
    repository.write("train_gpt.py", "old script\n")
    repository.write("harness.py", "older harness\n")
    repository.commit()
    repository.write("harness.py", "harness\n")
    repository.write("records/pocket/2026-01-01_standing/record.json", "{}")
    repository.write("records/pictures/pocket_curve_light.svg", "<svg/>")
    repository.commit()
    repository.git("branch", "base")
    repository.write("train_gpt.py", "new script\n")
    repository.write_record()
    return repository


def test_a_record_with_its_script_is_let_in(branch):
    done = branch.guard()
    assert (done.returncode, done.stdout) == (0, f"{RECORD}\n"), done.stderr


def test_a_record_of_the_script_that_main_has(branch):
    """A record may change the recipe alone: its script is that of main or of an older commit."""
    branch.write("train_gpt.py", "old script\n")
    assert branch.guard().returncode == 0


def test_a_pull_request_without_a_record(branch):
    shutil.rmtree(branch.folder / RECORD)
    branch.write("records/leaderboard.py", "anything\n")
    done = branch.guard()
    assert (done.returncode, done.stdout) == (0, "adds no record\n"), done.stderr


@pytest.mark.parametrize(
    "path, words",
    [
        ("data/prepare.py", "nothing else"),
        ("tests/conftest.py", "nothing else"),
        ("harness.py", "nothing else"),
        ("requirements.txt", "nothing else"),
        ("README.md", "nothing else"),
        ("records/pictures/pocket_curve_light.svg", "nothing else"),
        ("records/order.json", "nothing else"),
        (f"{RECORD}/more/x.md", "nothing else"),
        (f"{RECORD}/rerun.json", "written by the referee"),
        ("records/pocket/2026-01-01_standing/record.json", "already stands"),
        ("records/pocket/2026-01-0２_mine/log.txt", "nothing else"),  # a digit, but not of ASCII
    ],
)
def test_what_a_record_may_not_touch(branch, path, words):
    branch.write(path, "changed\n")
    assert_refused(branch, words)


def test_a_rerun_without_a_record(branch):
    """Nobody but the referee says that a standing record was reproduced."""
    shutil.rmtree(branch.folder / RECORD)
    branch.write("records/pocket/2026-01-01_standing/rerun.json", "{}")
    assert_refused(branch, "belongs to a record that already stands")


def test_a_removed_file(branch):
    (branch.folder / "README.md").unlink()
    assert_refused(branch, "README.md: a record's pull request changes")


def test_a_link(branch):
    (branch.folder / RECORD / "log.txt").symlink_to("/etc/passwd")
    assert_refused(branch, "must be a plain file")


def test_a_program(branch):
    (branch.folder / RECORD / "README.md").chmod(0o755)
    assert_refused(branch, "must be a plain file")


def test_a_script_that_is_not_the_records(branch):
    branch.write("train_gpt.py", "another script\n")
    assert_refused(branch, "not the script of the record")


def test_the_harness_is_one_that_main_has_had(branch):
    """What decides what a run logs and how it is scored is not the contestant's. A script may do without."""
    for harness in ("harness\n", "older harness\n", None):
        branch.write_record(harness=harness)
        assert branch.guard().returncode == 0
    branch.write_record(harness="a harness that lies\n")
    assert_refused(branch, "its harness.py is none that main has had")


def test_a_time_that_has_not_come(branch):
    """A clock may be minutes ahead, not an hour."""
    now = datetime.datetime.now(datetime.UTC)
    for minutes, status in ((2, 0), (60, 1)):
        when = now + datetime.timedelta(minutes=minutes)
        branch.write_record(when.strftime("%Y-%m-%dT%H:%M:%SZ"))
        done = branch.guard()
        assert done.returncode == status, done.stderr
    assert "has not come yet" in done.stderr


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"submitted": 3, "runs": [{"source_sha256": 1}]}']
)
def test_a_damaged_record(branch, text):
    branch.write(f"{RECORD}/record.json", text)
    assert_refused(branch, "damaged or incomplete")


def assert_refused(branch, words):
    done = branch.guard()
    assert done.returncode == 1 and words in done.stderr, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
