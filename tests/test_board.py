"""The board of this repository. A record's pull request leaves it stale; main draws it after the merge."""

import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.reference


def test_the_board_is_fresh():
    command = [sys.executable, "records/leaderboard.py", "render", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
