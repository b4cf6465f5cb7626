#!/usr/bin/env bash
# The records that this branch adds over BASE: they touch nothing else, and the referee's checks hold.
#
#     .github/check_records.sh origin/main
#
# Beside train_gpt.py and the record's own folder, only what `leaderboard.py render` writes may change: the board in README.md
# and the pictures. Exit status 1 if something does not hold.
set -euo pipefail
base=$(git merge-base "$1" HEAD)
folder='records/[a-z0-9_]+/[0-9]{4}-[0-9]{2}-[0-9]{2}_[a-z0-9-]+'
changed=$(git diff --name-only --no-renames "$base" HEAD)
added=$(git diff --name-only --no-renames --diff-filter=A "$base" HEAD | grep -oE "^$folder/record\.json$" | xargs -r -n1 dirname)

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
outside_board() { sed '/^<!-- board/,/^<!-- end of board/d'; }
if ! diff <(git show "$base:README.md" | outside_board) <(outside_board <README.md) >&2; then
  echo "README.md is changed outside the board" >&2
  exit 1
fi
if grep -qx train_gpt.py <<<"$changed"; then
  sha=$(python3 -c 'import hashlib; print(hashlib.sha256(open("train_gpt.py", "rb").read()).hexdigest())')
  grep -qF "$sha" $(sed 's|$|/record.json|' <<<"$added") || { echo "train_gpt.py is not the script of the record" >&2; exit 1; }
fi
python records/leaderboard.py render --check
python records/leaderboard.py verify $added
python records/leaderboard.py verify --smoke $added
