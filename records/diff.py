"""
What changed from one record or run to another, as a research note: leaderboard.py diff.

First what changed in the configuration, then in the script. Where main was changed between the two, most
of what differs between their scripts is the work of neither: then each script is shown against the commit of
main that it came from, and the commits in between are listed.
"""

import difflib
import functools
import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import ROOT, Refused, printable, read_json, read_log

SCRIPT = "train_gpt.py"


class Side(NamedTuple):
    """A record or a run. log: the path of its log. script: its lines. harness: the sha256 of the harness that
    ran it, in a list; empty for a script that needs none. config: all options of the script."""

    name: str
    log: Path
    script: list
    harness: list
    config: dict


class Commit(NamedTuple):
    """A commit of main that changed the script."""

    hash: str
    date: str
    subject: str


def read_side(name):
    """The Side in the folder of a record or of a run, finished or not. Of several seeds, it is the first."""
    folder = Path(name)
    claims = {}
    try:
        if (folder / "record.json").exists():
            record = read_json(folder / "record.json")
            claims = record.get("runs", [record])[0]
        path = folder / Path(claims.get("log", "log.txt")).name
        log = read_log(path)
        # A run that was resumed with more members has the number of the beginning in its log's config line.
        config = {option: claims.get(option, value) for option, value in log.config.items()}
    except (OSError, ValueError, AttributeError, IndexError, TypeError) as e:
        raise Refused(f"{name}: no log with a script in it; name a record or a run ({e})")
    script, *others = log.sources
    if script.content is None:
        raise Refused(f"{name}: its log was kept without the script; name a record or a run")
    return Side(str(name), path.resolve(), lines_of(script.content), [s.sha256 for s in others], config)


def lines_of(source):
    return source.decode("utf-8", "replace").splitlines()


# ---- the configuration -------------------------------------------------------------------------------------


def config_lines(a, b):
    """A line for each option that both scripts have and that changed, and one for those that only one has."""
    lines = []
    for option, value in b.config.items():
        if option in a.config and a.config[option] != value:
            lines.append(f"  {option}: {json.dumps(a.config[option])} -> {json.dumps(value)}")
    for letter, side, other in (("A", a, b), ("B", b, a)):
        own = []
        for option, value in side.config.items():
            if option not in other.config:
                own.append(f"{option} {json.dumps(value)}")
        if own:
            text = f"options of {letter} alone: {', '.join(own)}"
            lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")
    if not lines:
        return ["config: equal"]
    return ["config, A -> B", *lines]


# ---- the script --------------------------------------------------------------------------------------------


def git(root, *argv):
    """What a git command prints, or None where there is no git, no repository, or no such thing in it."""
    try:
        done = subprocess.run(["git", *argv], cwd=root, capture_output=True)
    except OSError:
        return None
    if done.returncode != 0:
        return None
    return done.stdout.decode("utf-8", "replace")


def commits_until(root, revision):
    """The commits of main that changed the script, up to a revision, the newest first; [] without git."""
    # The first parents are main itself: a branch that was merged counts as one change.
    form = "--format=%h%x09%as%x09%s"
    out = git(root, "log", "--first-parent", form, revision, "--", SCRIPT) or ""
    return [Commit(*line.split("\t", 2)) for line in out.splitlines()]


@functools.cache
def script_at(root, commit):
    """The lines of the script at a commit, as a tuple."""
    return tuple((git(root, "show", f"{commit}:./{SCRIPT}") or "").splitlines())


def changed_lines(old, new):
    """(number of lines that only the new script has, number of those that only the old one has)"""
    old = Counter(old)
    new = Counter(new)
    return (new - old).total(), (old - new).total()


def origin(side, root):
    """The commit of main that a script came from, or None where git knows none.

    That is the one with the fewest changed lines, unless most lines of the script are new. A committed record
    may have brought its own script to main, so only the commits before it count.
    """
    arrived = None
    if side.log.is_relative_to(root.resolve()):
        arrived = git(root, "log", "-1", "--first-parent", "--format=%H", "--", str(side.log))
    revision = f"{arrived.strip()}^" if arrived else "HEAD"
    commits = commits_until(root, revision)

    def distance(commit):
        return sum(changed_lines(script_at(root, commit.hash), side.script))

    nearest = min(commits, key=distance, default=None)
    if nearest is None:
        return None
    added, _ = changed_lines(script_at(root, nearest.hash), side.script)
    return nearest if added <= len(side.script) / 2 else None


def script_lines(a, b, root):
    """Lines that tell what changed from A's script to B's, without what main changed in between."""
    if a.script == b.script:
        return ["script: equal"]
    direct = list(difflib.unified_diff(a.script, b.script, a.name, b.name, lineterm=""))
    origins = (origin(a, root), origin(b, root))
    came_from_a, came_from_b = origins
    if came_from_a is None or came_from_b is None:
        unknown = "A" if came_from_a is None else "B"
        reason = f"git knows no commit of {SCRIPT} here that {unknown} came from"
        return [f"script ({reason}, so what main changed is shown, too)", *direct]
    if came_from_a == came_from_b:
        return [f"script (both came from commit {words(came_from_a)})", *direct]
    own = 0
    for side, commit in zip((a, b), origins):
        own += sum(changed_lines(script_at(root, commit.hash), side.script))
    if sum(changed_lines(a.script, b.script)) <= own:
        return ["script (no commit of main is nearer to them than they are to each other)", *direct]
    lines = [
        "script: main was changed between the two, so each is shown against the commit that it came from"
    ]
    lines += against_origin("A", a, came_from_a, root)
    lines += against_origin("B", b, came_from_b, root)
    return [*lines, *commits_between(came_from_a, came_from_b, root)]


def words(commit):
    return f"{commit.hash} of {commit.date}, {short(commit.subject)}"


def short(subject):
    return textwrap.shorten(subject, 90, placeholder=" ...")


def against_origin(letter, side, commit, root):
    """Lines that tell how a script differs from the commit that it came from."""
    before = script_at(root, commit.hash)
    if list(before) == side.script:
        return [f"{letter} is the script of commit {words(commit)}"]
    header = f"{letter} came from commit {words(commit)}:"
    names = (f"{SCRIPT} at {commit.hash}", side.name)
    return [header, *difflib.unified_diff(before, side.script, *names, lineterm="")]


def commits_between(a, b, root):
    """Lines that list what main changed from the one commit to the other, the oldest first."""
    commits = commits_until(root, "HEAD")
    if a not in commits or b not in commits:
        return []
    at_a = commits.index(a)
    at_b = commits.index(b)
    if at_a > at_b:
        title = "what main changed from A to B"
        between = commits[at_b:at_a]
    else:
        title = "what main changed from B to A, and A -> B takes back"
        between = commits[at_a:at_b]
    lines = [f"{title}, as `git diff {a.hash} {b.hash} -- {SCRIPT}` shows it:"]
    for commit in reversed(between):
        before = commits[commits.index(commit) + 1]
        added, removed = changed_lines(script_at(root, before.hash), script_at(root, commit.hash))
        lines.append(f"  {f'+{added} -{removed}':<11} {commit.hash} {short(commit.subject)}")
    return lines


def diff(a, b, root=ROOT):
    """Lines that tell what changed from A to B, each a record's folder or a run's."""
    a = read_side(a)
    b = read_side(b)
    lines = [*config_lines(a, b), "", *script_lines(a, b, root)]
    if a.harness and b.harness and a.harness != b.harness:
        lines.append("harness.py: another one, and records do not change it: see `git log -- harness.py`")
    return lines


def diff_command(args):
    colors = {}
    if sys.stdout.isatty():
        colors = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}
    for line in diff(args.a, args.b):
        # A stranger's script must not hide its lines.
        line = printable(line)
        if line[:1] in colors:
            line = f"{colors[line[0]]}{line}\033[0m"
        print(line)
