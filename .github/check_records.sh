#!/usr/bin/env bash
# The referee's checks of the records that a pull request adds, and the contract tests of the script that comes with
# them. The reference tests, which describe the model as main has it, are not run. Last, because it takes longest, the
# records of CPU tracks are trained again. RUNS THE SUBMITTED CODE.
#
#     .github/check_records.sh records/pocket/2026-11-24_name ...
set -euo pipefail
python records/leaderboard.py verify "$@"
python records/leaderboard.py verify --smoke "$@"
python -m pytest -q -m contract
python records/leaderboard.py rerun "$@"
