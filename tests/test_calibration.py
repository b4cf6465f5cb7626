"""What records/forecast/README.md says of the forecasts holds for the runs that this repository has."""

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.reference


def test_calibration_on_the_repositorys_runs():
    """No run is predicted from its own recipe.

    Of more than 130 models, 80% are expected in the interval, with a standard deviation of 3.5%: 70% to 90%
    are within 3 of these.
    """
    # The matrices are small: more threads would only wait for each other.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "records/forecast.py", "calibrate"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = {}
    for line in lines:
        words = line.split()
        if re.fullmatch(r"\d+\.\d%", words[0]):
            rows[words[0]] = words[1:]
    for at in ("25.0%", "50.0%", "75.0%"):
        inside, forecast, present, line = rows[at][:4]
        assert 70 <= int(inside.rstrip("%")) <= 90, done.stdout
        assert 2 * float(forecast) < min(float(present), float(line)), done.stdout

    for line, share in ((lines[-2], 0), (lines[-1], 0.05)):
        found = re.search(r": (\d+)% of failed FLOPs saved, (\d+) of (\d+) records stopped", line)
        saved, lost, records = map(int, found.groups())
        assert saved >= 25 and lost <= share * records, done.stdout
