#!/usr/bin/env bash
# The records that this branch adds over BASE: they touch nothing else, the referee's checks hold, and the script keeps
# the contract. The reference tests, which describe the model as main has it, are not run.
#
#     .github/check_records.sh origin/main
#
# Beside train_gpt.py and the record's own folder, only what `leaderboard.py render` writes may change: the board in README.md
# and the pictures. Exit status 1 if something does not hold.
set -euo pipefail
base=$(git merge-base "$1" HEAD)
folder='records/[a-z0-9_]+/[0-9]{4}-[0-9]{2}-[0-9]{2}_[a-z0-9-]+'
changed=$(git diff --name-only --no-renames "$base" HEAD)
added=$(git diff --name-only --no-renames --diff-filter=A "$base" HEAD | sed -nE "s|^($folder)/record\.json$|\1|p")

# a record that stands is history
others=$(grep -oE "^$folder/" <<<"$changed" | sort -u | grep -vxF "$(sed 's|$|/|' <<<"$added")" || true)
if [ -n "$others" ]; then
  printf 'changes records that already stand:\n%s\n' "$others" >&2
  exit 1
fi
[ -n "$added" ] || { echo "adds no record"; exit 0; }

allowed="^(train_gpt\.py|README\.md|records/pictures/[a-z_]+\.svg|($(paste -sd'|' <<<"$added"))/[^/]+)$"
if other=$(grep -vE "$allowed" <<<"$changed"); then
  printf 'a record touches only train_gpt.py, its own folder and what render writes, but this changes:\n%s\n' "$other" >&2
  exit 1
fi
if git diff --raw --no-renames "$base" HEAD | grep -vE '^:[0-9]+ (100644|000000) ' >&2; then
  echo "a record brings plain files only, no links and no programs" >&2
  exit 1
fi
outside_board() {
  sed -e '/^<!-- board/,/^<!-- end of board/d' -e '/^<!-- top of the board/,/^<!-- end of the top/d'
}
if ! diff <(git show "$base:README.md" | outside_board) <(outside_board <README.md) >&2; then
  echo "README.md is changed outside the board" >&2
  exit 1
fi
python3 - "$changed" $added <<'END'
import hashlib, json, sys
from pathlib import Path
changed, *added = sys.argv[1:]
script = hashlib.sha256(Path("train_gpt.py").read_bytes()).hexdigest()
for folder in map(Path, added):
    record = json.loads((folder / "record.json").read_text())
    if "train_gpt.py" in changed.split() and {run["source_sha256"] for run in record["runs"]} != {script}:
        sys.exit("train_gpt.py is not the script of the record")
    for other in folder.parent.glob("*/record.json"):
        if str(other.parent) not in added and json.loads(other.read_text()).get("submitted", "") >= record["submitted"]:
            sys.exit(f"{folder}: says that it was submitted before {other.parent.name}, which stands; set submitted to now")
END
python records/leaderboard.py render --check
python records/leaderboard.py verify $added
python records/leaderboard.py verify --smoke $added
python -m pytest -q -m contract
