"""
The referee's desk: makes records out of runs, recomputes what they claim, compares them, and draws the board.

    python records/leaderboard.py submit runs/NAME [runs/NAME2 ...] --slug loops --note note.md
    python records/leaderboard.py verify [RECORD ...] [--smoke]   exit status 0: all hold; 1: a line per fault
    python records/leaderboard.py rerun RECORD ...   train their scripts again: RUNS THE SUBMITTED CODE
    python records/leaderboard.py compare A [B]      is A better than B [the standing record], and a record?
    python records/leaderboard.py diff A B           what changed in the options and in the script
    python records/leaderboard.py judge runs/NAME    what the track's rules make of a run, finished or not
    python records/leaderboard.py spread [DATASET]   how far losses vary from seed to seed, by the logs
    python records/leaderboard.py render [--check]   the tables of README.md and the pictures

A record is records/TRACK/DATE_SLUG/ with README.md (the note), record.json (what is claimed, and the names of
the other files), and for each seed the log, val_nll.npy and test_nll.npy. Nothing in records/ imports
train_gpt.py or trusts it: a claim counts if it follows from the files, and the files count if they keep the
rules of tracks.json. records/README.md has the rules and their reasons.

This file is the command line. The subjects have files of their own: reading.py (all files, logs above all),
verify.py, smoke.py, rerun.py, workshop.py (a stranger's script at work), walls.py, audit.py, compare.py
(statistics), spread.py, diff.py, judge.py, submit.py, board.py, efficiency.py, curves.py and pictures.py.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from board import render_command
from compare import compare_command
from diff import diff_command
from judge import judge
from reading import ROOT, Refused, record_folders
from rerun import rerun
from smoke import smoke
from spread import spread_command
from submit import submit_command
from verify import verify_record


def record_folder(path):
    """The folder of a record that the user named. Refused where it is none."""
    folder = path.resolve()
    if not (folder / "record.json").exists() or folder.parent.parent != ROOT / "records":
        raise Refused(f"{folder}: no record; name folders like records/pocket/2026-11-22_name")
    return folder


def verify_command(args):
    folders = [record_folder(path) for path in args.records] or record_folders(ROOT)
    found = False
    for folder in folders:
        faults = verify_record(folder)
        if not faults and args.smoke:
            faults = smoke(folder, args.seconds)
        if faults:
            found = True
            print("\n".join(faults), flush=True)
        else:
            print(f"{os.path.relpath(folder, ROOT)}: holds", flush=True)
    return found


def rerun_command(args):
    found = False
    for path in args.records:
        folder = record_folder(path)
        faults = verify_record(folder, rerun=False) or rerun(folder, args.seconds, args.keep)
        found = found or bool(faults)
        for fault in faults:
            print(fault, flush=True)
    return found


def judge_command(args):
    for line in judge(args.folder, args.seconds, args.flops):
        print(line)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("submit", help="make a record of finished runs, the seeds of one recipe")
    one.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    one.add_argument("--slug", required=True, help="the record's name: small letters, digits and -")
    one.add_argument(
        "--note", required=True, type=Path, help="Markdown: what changed, why it helps, what was measured"
    )
    one.add_argument("--by", help="contributors, with commas between [git config user.name]")
    one.set_defaults(run=submit_command)

    one = commands.add_parser("verify", help="recompute what records claim [all of them]")
    one.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    one.add_argument(
        "--smoke",
        action="store_true",
        help="also train each record's script at toy size and audit it: RUNS THE SUBMITTED CODE",
    )
    one.add_argument(
        "--seconds", type=int, default=600, metavar="S", help="with --smoke: time limit of each step [600]"
    )
    one.set_defaults(run=verify_command)

    one = commands.add_parser(
        "rerun", help="train records' scripts again and score them, on CPU tracks: RUNS THE SUBMITTED CODE"
    )
    one.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    one.add_argument(
        "--seconds", type=int, default=6 * 3600, metavar="S", help="time limit of each step [6 hours]"
    )
    one.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="keep the trainings here, and go on with those that are here already",
    )
    one.set_defaults(run=rerun_command)

    one = commands.add_parser("compare", help="is A better than B by more than chance? would it be a record?")
    one.add_argument("a", metavar="A", help="a record, or runs, with commas between the seeds of one recipe")
    one.add_argument("b", metavar="B", nargs="?", help="likewise [the record that A has to beat]")
    one.set_defaults(run=compare_command)

    one = commands.add_parser("diff", help="what changed from A to B, in the options and in the script")
    one.add_argument("a", metavar="A")
    one.add_argument("b", metavar="B")
    one.set_defaults(run=diff_command)

    one = commands.add_parser("spread", help="a dataset's spread from seed to seed, by the logs")
    one.add_argument("dataset", nargs="?", default="pocket", metavar="DATASET", help="[pocket]")
    one.set_defaults(run=spread_command)

    one = commands.add_parser("render", help="write the board into README.md and draw the pictures")
    one.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if something is stale"
    )
    one.set_defaults(run=render_command)

    one = commands.add_parser("judge", help="what the track's rules make of a run, finished or not")
    one.add_argument("folder", type=Path, metavar="RUN")
    one.add_argument("--seconds", type=float, metavar="S", help="when training will end, by its own estimate")
    one.add_argument("--flops", type=float, metavar="F", help="of its whole training, by its own count")
    one.set_defaults(run=judge_command)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        found = args.run(args)
    except Refused as e:
        print(f"leaderboard.py: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # As in `diff | head`.
        os._exit(0)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
