"""
Makes a record of finished runs: leaderboard.py submit.
"""

import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import Broken, Scorer, run_command
from reading import (
    BLOCK,
    MAX_WEIGHTS_BYTES,
    NAME,
    OPEN,
    ROOT,
    Refused,
    expected_hashes,
    file_digest,
    read_json,
    read_plain,
    read_shard,
    read_tracks,
    reason,
    require_keys,
    write_json,
)
from verify import MAX_BYTES, verify_record

MAX_NOTE_BYTES = 10**6


def submit(runs, slug, note, by, root=ROOT, now=None):
    """Make a record of finished runs, the seeds of one recipe. Returns its folder."""
    now = now or datetime.datetime.now(datetime.UTC)
    date = f"{now:%Y-%m-%d}"
    if not re.fullmatch(NAME, f"{date}_{slug}"):
        words = re.sub("[^a-z0-9]+", "-", slug.lower()).strip("-")[:40].strip("-")
        raise Refused(
            f"--slug {slug}: small letters, digits and -, at most 40; try --slug {words or 'my-idea'}"
        )
    text = read_note(note)
    if not by:
        raise Refused("--by: name the contributors, with commas between; git config user.name gives none")
    claims = [read_claims(run) for run in runs]
    track = claims[0]["track"]
    if track not in read_tracks(root)["tracks"]:
        raise Refused(f"{runs[0]}: track {track!r} is not in records/tracks.json")
    folder = root / "records" / track / f"{date}_{slug}"
    if folder.exists():
        raise Refused(f"{folder}: exists; choose another --slug")

    record = {
        "track": track,
        "date": date,
        "submitted": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "description": text.splitlines()[0][2:].strip(),
        "contributors": by,
        "runs": claims,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".submit-", dir=folder.parent))
    try:
        (staged / "README.md").write_text(text, encoding="utf-8")
        copy_runs(runs, claims, staged)
        write_json(staged / "record.json", record)
        refuse_faults(verify_record(staged, root, tested=False), staged, folder)
        # Only now, when nothing is left to mend, is the test stream looked at.
        score_test(runs, claims, staged, root)
        write_json(staged / "record.json", record)
        staged.chmod(0o755)
        staged.rename(folder)
        # It is removed again if it does not hold.
        staged = folder
        refuse_faults(verify_record(folder, root), folder, folder)
        staged = None
    except OSError as e:
        raise Refused(f"{e.filename}: {e.strerror}")
    except ValueError as e:
        raise Refused(f"no record was made: {e}")
    finally:
        if staged:
            shutil.rmtree(staged)
    return folder


def read_note(note):
    """The text of a note, with plain line ends and without the byte order mark that some editors write."""
    heading = "# What this record is"
    try:
        text = read_plain(note, MAX_NOTE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(f"--note {note}: is not UTF-8; save it as UTF-8")
    except (OSError, ValueError) as e:
        raise Refused(f"--note {note}: {reason(e)}; begin one with: echo '{heading}' > note.md")
    lines = text.splitlines()
    if not lines or not re.match(r"# \S", lines[0]):
        raise Refused(f"--note {note}: begin it with a line '{heading}', its description on the board")
    return "\n".join(lines) + "\n"


def read_claims(run):
    """A run's record.json, with one hash of all its weights."""
    weights = sorted(run.glob("weights-*.pt"))
    try:
        claims = read_json(run / "record.json")
        require_keys(claims, "track")
        digests = [file_digest(path, MAX_WEIGHTS_BYTES) for path in weights]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Refused(f"{run}: not the folder of a finished run ({type(e).__name__}: {e})")
    if not weights:
        raise Refused(f"{run}: holds no weights, so its test stream cannot be scored")
    return claims | {"weights_sha256": hashlib.sha256(b"".join(digests)).hexdigest()}


def copy_runs(runs, claims, staged):
    """Copy each run's log and NLL into the record, under names that its claims tell."""
    for i, (run, claim) in enumerate(zip(runs, claims), 1):
        number = "" if i == 1 else f"_{i}"
        claim["log"] = f"log{number}.txt"
        claim["val_nll"] = f"val_nll{number}.npy"
        for name, copy in (("log.txt", claim["log"]), ("val_nll.npy", claim["val_nll"])):
            (staged / copy).write_bytes(read_plain(run / name, MAX_BYTES))


def score_test(runs, claims, staged, root):
    """Score the test stream, once for each run, by the script in its own log."""
    tracks = read_tracks(root)
    name = tracks["tracks"][claims[0]["track"]]["dataset"]
    digest = expected_hashes(root, tracks, name)["test.bin"]
    if digest == OPEN:
        digest = None
    test = read_shard(root / "data" / name / "test.bin", digest)
    for run, claim in zip(runs, claims):
        print(f"{run}: scoring the test stream", flush=True)
        with tempfile.TemporaryDirectory() as tmp:
            command, _, _ = run_command(run, tmp)
            nll = Scorer(command, tmp, 24 * 3600)(test)
        sums = np.add.reduceat(nll, np.arange(0, len(nll), BLOCK))
        claim["test_nll"] = claim["val_nll"].replace("val", "test")
        claim["test_loss"] = float(sums.sum() / (len(test) - 1))
        np.save(staged / claim["test_nll"], sums)


def refuse_faults(faults, staged, folder):
    if faults:
        lines = "\n".join(fault.replace(staged.name, folder.name) for fault in faults)
        raise Refused(f"no record was made, because it would not verify:\n{lines}")


def submit_command(args):
    by = []
    for name in (args.by or git_name()).split(","):
        if name.strip():
            by.append(name.strip())
    try:
        folder = submit(args.runs, args.slug, args.note, by)
    except Broken as e:
        raise Refused(f"no record was made: --score {e}")
    path = os.path.relpath(folder)
    print(f"{path} holds the record; python records/leaderboard.py render puts it on the board")


def git_name():
    command = ["git", "config", "user.name"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
