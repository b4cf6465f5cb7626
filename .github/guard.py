"""
What a pull request may touch, decided before anything of it is installed or run. Needs git and the standard
library alone.

    python3 guard.py BASE_REF

Prints the records that HEAD adds over BASE_REF, a folder a line, or "adds no record". A pull request that
adds a record changes nothing else but train_gpt.py, which then is the record's script: main draws the board
and the pictures after the merge. A harness that the record names is one that main has had. Exit status 1,
with one line that says why, if something does not hold.
"""

import datetime
import hashlib
import json
import re
import subprocess
import sys

FOLDER = r"records/[a-z0-9_]+/[0-9]{4}-[0-9]{2}-[0-9]{2}_[a-z0-9][a-z0-9-]*"
# Clocks differ by a few minutes. Whatever is dated further ahead would stay the newest record for that long.
MINUTES_AHEAD = 10


def git(*argv):
    return subprocess.run(["git", *argv], check=True, capture_output=True).stdout


def changes(base):
    """[(status, mode after the change, path)] of the files that differ between base and HEAD."""
    words = git("diff", "--raw", "-z", "--no-renames", base, "HEAD").decode("utf-8", "replace").split("\0")
    found = []
    for about, path in zip(words[:-1:2], words[1::2], strict=True):
        _, mode, _, _, status = about.split()
        found.append((status, mode, path))
    return found


def check(holds, message):
    if not holds:
        sys.exit(f"guard: {message}")


def added_records(changed):
    """The folders of the records that are added, after every check of what is touched."""
    added = []
    for status, _, path in changed:
        if status == "A" and re.fullmatch(f"({FOLDER})/record\\.json", path):
            added.append(path.rpartition("/")[0])
    for status, mode, path in changed:
        folder = re.match(f"({FOLDER})/", path)
        check(not folder or folder[1] in added, f"{path}: belongs to a record that already stands")
        if not added:
            continue
        in_folder = folder and "/" not in path[len(folder[0]) :]
        rule = "a record's pull request changes train_gpt.py and the record's own folder, nothing else"
        check(in_folder or path == "train_gpt.py", f"{path}: {rule}")
        check(mode == "100644" and status != "D", f"{path}: must be a plain file, no link and no program")
        check(not path.endswith("/rerun.json"), f"{path}: is written by the referee; leave it out")
    return added


def harnesses(base):
    """The sha256 of every harness.py that main has had."""
    commits = git("log", "--format=%H", "--diff-filter=AM", base, "--", "harness.py").decode().split()
    return {hashlib.sha256(git("show", f"{commit}:harness.py")).hexdigest() for commit in commits}


def check_record(folder, script, script_changed, base):
    try:
        record = json.loads(git("show", f"HEAD:{folder}/record.json"))
        scripts = {run["source_sha256"] for run in record["runs"]}
        named = {run["harness_sha256"] for run in record["runs"] if "harness_sha256" in run}
        submitted = datetime.datetime.strptime(record["submitted"], "%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        check(False, f"{folder}/record.json: damaged or incomplete ({type(e).__name__}: {e})")
    check(
        not script_changed or scripts == {script},
        f"{folder}: train_gpt.py is not the script of the record; commit the one that trained it",
    )
    remedy = "train with main's own; what an idea needs of it is a pull request before the record's"
    check(named <= harnesses(base), f"{folder}: its harness.py is none that main has had; {remedy}")
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    ahead = submitted > now + datetime.timedelta(minutes=MINUTES_AHEAD)
    check(
        not ahead, f"{folder}: submitted {record['submitted']}, which has not come yet; set it to now (UTC)"
    )


def main():
    base = git("merge-base", sys.argv[1], "HEAD").decode().strip()
    changed = changes(base)
    added = added_records(changed)
    script = hashlib.sha256(git("show", "HEAD:train_gpt.py")).hexdigest()
    script_changed = any(path == "train_gpt.py" for _, _, path in changed)
    for folder in added:
        check_record(folder, script, script_changed, base)
    print("\n".join(added) or "adds no record")


if __name__ == "__main__":
    main()
