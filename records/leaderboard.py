"""
The referee's desk: makes records out of runs, recomputes what they claim, compares them, and draws the board.

    python records/leaderboard.py submit runs/NAME [runs/NAME2 ...] --slug loops --note note.md
    python records/leaderboard.py verify [RECORD ...] [--smoke]   exit status 0: all hold; 1: a line per fault
    python records/leaderboard.py compare A B        records or runs; commas between the seeds of one side
    python records/leaderboard.py diff A B           what changed in the script
    python records/leaderboard.py judge runs/NAME    what the track's rules make of a run, finished or not
    python records/leaderboard.py render [--check]   the tables of README.md and the pictures

A record is records/TRACK/DATE_SLUG/ with README.md (the note), record.json (what is claimed, and the names of
the other files), and for each seed the log, val_nll.npy and test_nll.npy. Nothing here imports train_gpt.py
or trusts it: a claim counts if it follows from the files, and the files count if they keep the rules of
tracks.json. records/README.md has the rules and their reasons.
"""

import argparse
import datetime
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import (
    BLOCK,
    OPEN,
    ROOT,
    Broken,
    Refused,
    Scorer,
    audit_run,
    printable,
    read_npy,
    read_shard,
    read_tracks,
    run_command,
    run_limited,
    split_log,
)

# Of a record's folder: enough for several seeds of a long chain.
MAX_BYTES = 20_000_000

# Tokens of the longest streams that verify --smoke scores.
STREAM = 100_000

SUFFIXES = {".md", ".txt", ".json", ".npy", ".png", ".svg"}
NAME = r"\d{4}-\d\d-\d\d_[a-z0-9][a-z0-9-]{0,39}"

# What stands on the board holds no markup.
TEXT = r"[^|<>\[\]`]{3,120}"
CONTRIBUTOR = r"[\w .@-]{1,40}"

# The types in record.json: of itself, and of each of its runs as a training script writes them.
RECORD = dict(track=str, date=str, submitted=str, description=str, contributors=list, runs=list)
CLAIMS = dict(
    track=str,
    trial=bool,
    seed=int,
    members=int,
    val_loss=float,
    val_bpb=float,
    val_tokens=int,
    train_seconds=float,
    compile_seconds=float,
    steps=int,
    train_tokens=int,
    tokens_seen=int,
    parameters=int,
    train_flops=float,
    score_flops_per_token=float,
    source_sha256=str,
    data_sha256=dict,
    hardware=str,
    ranks=int,
    threads=int,
    torch=str,
    finished=str,
)

# submit adds these to each run, and the second kind last, when it has scored the test stream.
ADDED = dict(log=str, val_nll=str, weights_sha256=str)
TESTED = dict(test_nll=str, test_loss=float)

# Lines of a log. The loss of a step is called bag_loss while each position holds several tokens; further
# terms of the loss may follow it, each with its name.
NUMBER = r"(\d{1,15}\.\d{1,15})"
STEP = re.compile(
    r"(?:member (\d{1,6}) )?step (\d{1,9})/(\d{1,9}) "
    rf"epoch {NUMBER} (?:bag_)?loss {NUMBER} .*?\btime {NUMBER}s"
)
HARDWARE = re.compile(r"hardware: (.*); (\d{1,9}) rank\(s\) of (\d{1,9}) thread\(s\)")
CHAIN = re.compile(r"chain (\d{1,6}) of \d+: ([1-9]\d{0,6}) rank\(s\)")
TRAINED = re.compile(rf"trained for {NUMBER} s, (\d[\d,]{{0,20}}) tokens seen")
SCORE = re.compile(
    rf"val_loss {NUMBER} nats per token, {NUMBER} bits per byte, (\d[\d,]{{0,15}}) tokens scored"
)


# ---- reading -----------------------------------------------------------------------------------------------


def read_json(path):
    """What a JSON file holds. ValueError if it is not JSON, which has no NaN and no Infinity."""

    def refuse(word):
        raise ValueError(f"holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def require_keys(content, *names):
    """TypeError or KeyError, unless this is a dict with these names."""
    if not isinstance(content, dict):
        raise TypeError(f"not an object but a {type(content).__name__}")
    for name in names:
        if name not in content:
            raise KeyError(name)


def mean_loss(record, what="val_loss"):
    return float(np.mean([run[what] for run in record["runs"]]))


def record_folders(root):
    """All records, by track and date."""
    return sorted(p for p in (root / "records").glob("*/*") if p.is_dir() and re.match(NAME, p.name))


def earlier_records(root, track, submitted):
    """Records of a track that were submitted before a time, the oldest first: [(folder, record)]."""
    found = []
    for folder in record_folders(root):
        if folder.parent.name != track:
            continue
        try:
            record = read_json(folder / "record.json")
            # Others read these of it.
            require_keys(record["runs"][0]["data_sha256"])
            mean_loss(record)
            when = str(record["submitted"])
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            # It has a fault of its own, which verify names when it comes to it.
            continue
        if when < submitted:
            found.append((when, folder, record))
    found.sort(key=lambda entry: entry[:2])
    return [(folder, record) for _, folder, record in found]


def all_records(root, track):
    """All readable records of a track, the oldest first."""
    return earlier_records(root, track, "~")


def standing_record(root, track, submitted="~"):
    """(folder, record) of the best record that was submitted before a time, or None where there is none."""
    before = earlier_records(root, track, submitted)
    return min(before, key=lambda entry: mean_loss(entry[1]), default=None)


def expected_hashes(root, tracks, name):
    """sha256 of a dataset's shards. Where tracks.json leaves them open, its oldest record has set them."""
    hashes = dict(tracks["datasets"][name]["sha256"])
    if OPEN in hashes.values():
        records = []
        for track, rules in tracks["tracks"].items():
            if rules["dataset"] == name:
                records += [record for _, record in all_records(root, track)]
        if records:
            oldest = min(records, key=lambda record: record["submitted"])
            hashes |= oldest["runs"][0]["data_sha256"]
    return hashes


def json_line(lines, word):
    """What the first line that begins with a word holds behind it."""
    line = next((line for line in lines if line.startswith(word)), None)
    if line is None:
        raise KeyError(word)
    return json.loads(line[len(word) :])


def read_log(path):
    """(source, lines behind it, config, data) of a log. ValueError where it lacks one of them."""
    source, _, rest = split_log(path.read_bytes())
    lines = rest.decode().splitlines()
    try:
        config = json_line(lines, "config ")
        data = json_line(lines, "data ")
        require_keys(config, "seed", "track")
        require_keys(data, "sha256")
        require_keys(data["sha256"], "val.bin", "train.bin")
    except (KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"lacks its config or data line, or what belongs in it ({type(e).__name__}: {e})")
    return source, lines, config, data


# ---- verify ------------------------------------------------------------------------------------------------


class Faults(list):
    """One line for each fault: the file, what is claimed, what was found."""

    def __init__(self, folder, root):
        super().__init__()
        self.folder = os.path.relpath(folder, root)

    def expect(self, holds, file, what, claimed=None, found=None):
        """Note a fault where this does not hold. Returns whether it holds."""
        if not holds:
            line = f"{self.folder}/{file}: {what}"
            if claimed is not None:
                line += f" is claimed {claimed}, found {found}"
            self.append(printable(line[:400]))
        return holds


def same(a, b, digits=None):
    """Equal as numbers, up to the rounding of float64 sums or to the digits that were printed."""
    if digits is None:
        return abs(a - b) <= 1e-9 * max(1.0, abs(b))
    return abs(a - b) <= 0.5001 * 10**-digits


def verify_record(folder, root=ROOT, tested=True):
    """Recompute all that a record claims from its files. Returns the faults.

    tested: its test stream has been scored. submit verifies a record once before that, in a folder of another
    name.
    """
    folder = Path(folder)
    faults = Faults(folder, root)
    verify_files(faults, folder, tested)
    if faults:
        # Nothing in it is worth opening.
        return faults
    record = read_record(faults, folder, tested)
    if record is None:
        return faults

    tracks = read_tracks(root)
    track = folder.parent.name
    in_place = track in tracks["tracks"] and record["track"] == track
    if not faults.expect(in_place, "record.json", "track", record["track"], f"folder of {track}"):
        return faults
    verify_words(faults, folder, record, tested)
    if not verify_runs_differ(faults, record["runs"], tested):
        return faults

    dataset = tracks["tracks"][track]["dataset"]
    hashes = expected_hashes(root, tracks, dataset)
    digests = set()
    for run in record["runs"]:
        sums = verify_run(faults, folder, run, tracks, hashes, tested)
        if sums is not None:
            digest = hashlib.sha256(sums.tobytes()).digest()
            different = digest not in digests
            faults.expect(
                different, "record.json", "two runs have the same val_nll: they are not different seeds"
            )
            digests.add(digest)
    if not faults:
        verify_better(faults, folder, record, tracks, root)
    return faults


def verify_files(faults, folder, tested):
    """Only plain files of known kinds, not too many bytes, and the two that every record has."""
    named = re.fullmatch(NAME, folder.name)
    faults.expect(named or not tested, "", f"a record's folder is named DATE_SLUG, not {folder.name!r}")
    size = 0
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink() and path.suffix in SUFFIXES
        kinds = " ".join(sorted(SUFFIXES))
        faults.expect(plain, path.relative_to(folder), f"not a plain file of {kinds}")
        size += path.lstat().st_size
    faults.expect(size <= MAX_BYTES, "", f"{size:,} bytes, {MAX_BYTES:,} are the most")
    for name in ("README.md", "record.json"):
        if not faults:
            faults.expect((folder / name).exists(), name, "missing")


def read_record(faults, folder, tested):
    """What record.json holds, or None where it lacks something, or something is of the wrong type."""
    try:
        record = read_json(folder / "record.json")
        broken = wrong_types(record, tested)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        record = None
        broken = [f"damaged or incomplete ({type(e).__name__}: {e})"]
    for what in broken:
        faults.expect(False, "record.json", what)
    return None if broken else record


def wrong_types(record, tested):
    """What in a record.json is not of its type, one line each."""
    broken = []
    for name, kind in RECORD.items():
        if type(record[name]) is not kind:
            broken.append(f"{name} is not a {kind.__name__}")
    claims = CLAIMS | ADDED
    if tested:
        claims |= TESTED
    for i, run in enumerate(record["runs"], 1):
        for name, kind in claims.items():
            if not has_type(run[name], kind):
                broken.append(f"{name} of run {i} is not a {kind.__name__} or is out of range")
    return broken


def has_type(value, kind):
    """Is it exactly of this type, and within range if it is a number? For a float, an int will do."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        return False
    return kind not in (int, float) or 0 <= value < 1e30


def verify_words(faults, folder, record, tested):
    """Date, time, description and names: what a reader of the board relies on."""

    def expect(holds, *rest):
        faults.expect(holds, "record.json", *rest)

    date = folder.name.split("_")[0]
    expect(record["date"] == date or not tested, "date", record["date"], f"folder of {date}")
    expect(
        time_has_come(record["submitted"], record["date"]),
        f"submitted is {record['submitted']!r}, not a time (UTC) on {record['date']} that has come",
    )
    texts = [("description", record["description"])]
    texts += [("hardware", run["hardware"]) for run in record["runs"]]
    for what, text in texts:
        plain = re.fullmatch(TEXT, text) and text.isprintable()
        expect(plain, f"{what}: one line of 3 to 120 characters, no markup")
    title = (folder / "README.md").read_text(errors="replace").partition("\n")[0]
    wanted = f"# {record['description']}"
    faults.expect(
        title.rstrip() == wanted,
        "README.md",
        "its first line",
        title,
        f"{wanted!r} by record.json's description",
    )
    names = record["contributors"]
    known = names and all(isinstance(name, str) and re.fullmatch(CONTRIBUTOR, name) for name in names)
    expect(known, "contributors: names of at most 40 letters")


def time_has_come(submitted, date):
    """Is this a time on that date that is not in the future? A clock may be off by a day."""
    try:
        when = datetime.datetime.strptime(submitted, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return False
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return len(submitted) == 20 and submitted.startswith(date) and when < now + datetime.timedelta(days=1)


def verify_runs_differ(faults, runs, tested):
    """The runs are different seeds of one script. Returns whether each names files of its own."""

    def expect(holds, what):
        return faults.expect(holds, "record.json", what)

    for what in ("seed", "weights_sha256"):
        values = [run[what] for run in runs]
        different = len(values) > 0 and len(set(values)) == len(values)
        expect(different, f"the runs' {what} must differ, they are {values}")
    scripts = {run["source_sha256"] for run in runs}
    expect(len(scripts) == 1, "the runs are of different scripts (source_sha256)")
    files = ["log", "val_nll"]
    if tested:
        files.append("test_nll")
    names = [run[file] for run in runs for file in files]
    return expect(
        len(set(names)) == len(names) <= 60,
        "each run's log, val_nll and test_nll are files of their own, of 20 runs at most",
    )


def verify_better(faults, folder, record, tracks, root):
    """A record beats the one that stood when it was submitted."""
    track = folder.parent.name
    before = standing_record(root, track, record["submitted"])
    if before is None:
        return
    standing, _ = before
    limit = tracks["rule"]["p"]
    dataset = tracks["datasets"][tracks["tracks"][track]["dataset"]]
    try:
        c = compare_scores(read_scores(folder), read_scores(standing), dataset)
    except Refused as e:
        faults.expect(False, "record.json", f"cannot be compared with the standing record: {e}")
        return
    figures = f"{c['mean']:+.6f} nats per token, p = {c['p']:.2g}"
    faults.expect(
        c["mean"] < 0 and c["p"] < limit,
        "record.json",
        f"does not beat {standing.name} at p < {limit}: {figures}",
    )


def over_the_limits(claims, rules, dataset):
    """(what, its value, the track's limit) of everything in which a run is over one. claims: train_tokens,
    train_seconds, ranks and threads, as in record.json."""
    values = {
        "train_tokens": (claims["train_tokens"], dataset["train_tokens"]),
        "train_seconds": (claims["train_seconds"], rules.get("max_seconds")),
        "ranks": (claims["ranks"], rules.get("max_ranks")),
        "cores": (claims["ranks"] * claims["threads"], rules.get("max_cores")),
    }
    return [(what, value, limit) for what, (value, limit) in values.items() if limit and value > limit]


def verify_run(faults, folder, run, tracks, hashes, tested):
    """Check one run of a record against its files. Returns the sums in val_nll.npy, or None if unreadable."""

    def expect(holds, *rest):
        faults.expect(holds, "record.json", *rest)

    track = folder.parent.name
    rules = tracks["tracks"][track]
    dataset = tracks["datasets"][rules["dataset"]]
    expect(run["track"] == track, "track of a run", run["track"], f"folder of {track}")
    expect(not run["trial"], "a trial (--steps) is no record")
    written = {"train_tokens": ("{:,}", "a budget of {:,}"), "train_seconds": ("{:.1f}", "a cap of {}")}
    for what, value, limit in over_the_limits(run, rules, dataset):
        claimed, found = written.get(what, ("{}", "a limit of {}"))
        expect(False, what, claimed.format(value), found.format(limit))
    for name, digest in run["data_sha256"].items():
        right = hashes.get(name)
        expect(right in (digest, OPEN), f"sha256 of {name}", digest, f"the track's {right}")
    for name in ("val.bin", "train.bin"):
        expect(name in run["data_sha256"], f"data_sha256 lacks {name}")

    val_sums = None
    path = own_file(faults, folder, run["val_nll"])
    if path:
        val_sums = verify_array(faults, path, run, "val", dataset)
    if tested:
        path = own_file(faults, folder, run["test_nll"])
        if path:
            verify_array(faults, path, run, "test", dataset)
    path = own_file(faults, folder, run["log"])
    if path:
        verify_log(faults, path, run, dataset, hashes)
    return val_sums


def own_file(faults, folder, name):
    """The path of a file that record.json names, or None where it is not a plain file in the folder."""
    path = folder / name
    plain = re.fullmatch(r"[\w.-]+", name) and path.is_file() and not path.is_symlink()
    faults.expect(plain, "record.json", f"names {name!r}, which is no file of this folder")
    return path if plain else None


def verify_array(faults, path, run, split, dataset):
    """The NLL of each block of 1,000 tokens, float64, adds up to the claimed loss. Returns it, or None."""

    def expect(holds, what):
        return faults.expect(holds, path.name, what)

    n = dataset[f"{split}_tokens"]
    blocks = -(-n // BLOCK)
    try:
        sums = read_npy(path, 8 * blocks + 1024)
    except ValueError as e:
        expect(False, f"cannot be read as plain numbers: {e}")
        return None
    right_shape = sums.dtype == np.float64 and sums.shape == (blocks,)
    if not expect(right_shape, f"holds {sums.dtype} {list(sums.shape)}, not float64 {[blocks]}"):
        return None
    if not expect(
        np.isfinite(sums).all() and sums.min() >= 0, "holds numbers that are not finite, or below 0"
    ):
        return None

    def expect_claim(name, found):
        claimed = run[name]
        holds = same(claimed, found)
        faults.expect(holds, "record.json", name, f"{claimed:.9f}", f"{found:.9f} in {path.name}")

    # The first token of the stream has no context, and is not scored.
    expect_claim(f"{split}_loss", sums.sum() / (n - 1))
    if split == "val":
        holds = run["val_tokens"] == n - 1
        faults.expect(holds, "record.json", "val_tokens", run["val_tokens"], n - 1)
        if dataset["val_bytes"] != OPEN:
            expect_claim("val_bpb", sums.sum() / math.log(2) / dataset["val_bytes"])
    return sums


def verify_log(faults, path, run, dataset, hashes):
    """The log: its source, its configuration, its steps, its result."""

    def expect(holds, *rest):
        return faults.expect(holds, path.name, *rest)

    try:
        source, lines, config, data = read_log(path)
    except ValueError as e:
        expect(False, f"{e}")
        return
    digest = hashlib.sha256(source).hexdigest()
    right = run["source_sha256"] == digest
    faults.expect(right, "record.json", "source_sha256", run["source_sha256"], f"{digest} in {path.name}")
    for what in ("track", "seed", "train_tokens"):
        claimed = config.get(what)
        expect(claimed == run[what], f"{what} of the config", claimed, f"{run[what]} in record.json")
    for name, digest in data["sha256"].items():
        right = hashes.get(name)
        expect(right in (digest, OPEN), f"sha256 of {name} in the data line", digest, f"the track's {right}")
    claimed = (data.get("tokenizer"), data.get("vocab_size"))
    found = (dataset["tokenizer"], dataset["vocab_size"])
    words = "{} with {} tokens"
    expect(claimed == found, "tokenizer", words.format(*claimed), words.format(*found))

    # What the model wrote on its own is no part of the log's claims.
    marks = [i for i, line in enumerate(lines) if line.startswith("----")]
    if len(marks) >= 2:
        del lines[marks[0] : marks[-1] + 1]
    expect(
        tells_hardware(lines, run),
        "its hardware lines do not tell what record.json claims of hardware, ranks and threads",
    )
    verify_steps(expect, step_lines(lines), run)
    verify_totals(expect, lines, run)


def tells_hardware(lines, run):
    """The last machine is the claimed one, and none had more ranks or threads than claimed."""
    found = [HARDWARE.fullmatch(line) for line in lines if line.startswith("hardware:")]
    if not found or not all(found):
        return False
    for match in found:
        if int(match[2]) > run["ranks"] or int(match[3]) > run["threads"]:
            return False
    return found[-1][1] == run["hardware"]


def step_lines(lines):
    """Matches of the lines of steps and of chains; None for each that has another form."""
    matches = []
    for line in lines:
        if line.startswith("chain "):
            matches.append(CHAIN.match(line))
        elif re.match(r"(member \S+ )?step ", line):
            matches.append(STEP.match(line))
    return matches


def verify_steps(expect, matches, run):
    """Step lines: each member's run from 1 to its last, and none is missing.

    The epochs that they tell make up the tokens seen. The clock runs forward and ends where the record says.
    Chains that were trained apart count as run side by side: each has its own clock, and their ranks add up.
    """
    form = "step i/n epoch e loss l ... time t s"
    if not expect(matches and all(matches), f"has no step lines, or some that are not '{form}'"):
        return
    count = 0
    members = 0
    longest = 0.0
    epochs = 0.0
    ranks = 0
    # The last step of a member that is not finished, the last epoch of a member, and the last time of a
    # chain.
    done = 0
    last_epoch = 0.0
    clock = 0.0
    for match in matches:
        if match.re is CHAIN:
            complete = done == 0
            what = f"a chain begins after step {done} of member {members}: steps are missing"
            if not expect(complete, what):
                return
            clock = 0.0
            ranks += int(match[2])
            continue
        count += 1
        member = int(match[1] or 1)
        step = int(match[2])
        total = int(match[3])
        epoch = float(match[4])
        loss = float(match[5])
        now = float(match[6])
        if done == 0:
            members += 1
            last_epoch = 0.0
        in_order = member == members and step == done + 1 and step <= total
        found = f"step {step} of {total} of member {member}"
        if not expect(in_order, f"after step {done} of member {members} comes {found}: steps are missing"):
            return
        forward = now >= clock and epoch >= last_epoch and math.isfinite(loss)
        if not expect(forward, f"step {step}: time, epoch or loss runs backward"):
            return
        clock = now
        last_epoch = epoch
        longest = max(longest, now)
        done = step
        if step == total:
            done = 0
            epochs += epoch

    complete = done == 0 and members == run["members"]
    expect(
        complete, f"ends at step {done} of member {members}, of {run['members']} members: steps are missing"
    )
    expect(count == run["steps"], "number of steps", count, f"{run['steps']} in record.json")
    expect(ranks <= run["ranks"], "ranks of all chains", ranks, f"{run['ranks']} in record.json")
    seconds = run["train_seconds"]
    within = longest <= seconds + 0.05
    expect(within, "time of the last step", f"{longest} s", f"{seconds:.1f} s in record.json")
    seen = epochs * run["train_tokens"]
    tolerance = 0.02 * seen + 0.001 * run["train_tokens"] * members
    expect(
        abs(seen - run["tokens_seen"]) <= tolerance,
        f"its {epochs:.3f} epochs of {run['train_tokens']:,} tokens",
        f"{seen:,.0f} tokens seen",
        f"{run['tokens_seen']:,} in record.json",
    )


def verify_totals(expect, lines, run):
    """The lines at the end: time, tokens and score."""
    trained = [TRAINED.match(line) for line in lines if line.startswith("trained for")]
    once = len(trained) == 1 and trained[0]
    if expect(once, "has no line, or several, that begins 'trained for'"):
        seconds = float(trained[0][1])
        seen = int(trained[0][2].replace(",", ""))
        claimed = run["train_seconds"]
        right = same(seconds, claimed, 1)
        expect(right, "seconds of training", seconds, f"{claimed:.1f} in record.json")
        right = seen == run["tokens_seen"]
        expect(right, "tokens seen", f"{seen:,}", f"{run['tokens_seen']:,} in record.json")

    scores = [SCORE.fullmatch(line) for line in lines if line.startswith("val_loss")]
    once = len(scores) == 1 and scores[0]
    form = "val_loss X nats per token, Y bits per byte, N tokens scored"
    if expect(once, f"has no line, or several, of the form '{form}'"):
        for what, text in zip(("val_loss", "val_bpb", "val_tokens"), scores[0].groups()):
            right = same(float(text.replace(",", "")), run[what], 6)
            expect(right, what, text, f"{run[what]} in record.json")


# ---- smoke -------------------------------------------------------------------------------------------------

# A recipe at toy size has these values, as far as its script has these options (probes and probe_tokens are
# older names). A vocab_size and a bos_id of 0 are taken from the data. For so small a model a second thread
# gains nothing, and beside another process it costs much.
TOY = dict(
    n_embd=64,
    n_head=2,
    mlp_hidden=128,
    train_tokens=100_000,
    epochs=1,
    evals=1,
    eval_windows=2,
    probes=1,
    probe_tokens=2000,
    vocab_size=0,
    bos_id=0,
    cpu_threads=1,
    dtype="fp32",
)

# It has at most these values.
TOY_LIMITS = dict(seq_len=256, window_short=64, n_layer=6, members=2, chains=1, cycles=2)


def toy_options(config, data=ROOT / "data" / "pocket"):
    """Options that train a record's recipe at toy size on these data: its own config, made small."""
    small = {}
    for name, value in config.items():
        if name in TOY_LIMITS:
            small[name] = min(value, TOY_LIMITS[name])
        elif name == "data":
            small[name] = data
        else:
            small[name] = TOY.get(name, value)
    # Few tokens for a step, so that there are enough steps, and many for a pass when it is scored.
    for name, rows in (("batch_tokens", 4), ("device_tokens", 32)):
        if name in config:
            small[name] = rows * small.get("seq_len", 256)
    # A range of layers remains one.
    for name in ("loop_first", "loop_last"):
        if name in config:
            small[name] = config[name] * small["n_layer"] // config["n_layer"]
    # The student is as small as the others.
    if config.get("student"):
        made_small = {*TOY, *TOY_LIMITS, "data", "batch_tokens", "device_tokens", "loop_first", "loop_last"}
        changes = config["student"].split(",")
        kept = [change for change in changes if change.partition("=")[0] not in made_small]
        small["student"] = ",".join(kept)
    words = []
    for name, value in small.items():
        if isinstance(value, bool):
            value = int(value)
        words += [f"--{name}", str(value)]
    return words


def smoke(folder, seconds, root=ROOT):
    """Train the script in a record's log for a few steps at toy size, and audit that. Returns the faults."""
    name = os.path.relpath(folder, root)
    print(f"{name}: running the submitted code, at toy size", flush=True)
    data = root / "data" / "pocket"
    if not (data / "meta.json").exists():
        subprocess.run([sys.executable, str(root / "data" / "prepare.py"), "pocket"], check=True)
    log = folder / read_json(folder / "record.json")["runs"][0]["log"]
    source, script, _ = split_log(log.read_bytes())
    _, _, config, _ = read_log(log)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / Path(script).name
        path.write_bytes(source)
        run = Path(tmp) / "run"
        command = [sys.executable, str(path), *toy_options(config, data), "--run_dir", str(run)]
        command += ["--steps", "12", "--device", "cpu", "--compile", "off"]
        status, last = run_limited(command, seconds)
        if status is None:
            return [f"{name}: its script does not train at toy size (over {seconds} s: {last})"]
        if status != 0 or not (run / "record.json").exists():
            return [f"{name}: its script does not train at toy size (exit status {status}: {last})"]
        # What is audited is the script in this new log.
        try:
            trained, _, _ = split_log((run / "log.txt").read_bytes())
        except (OSError, ValueError):
            trained = None
        if trained != source:
            return [f"{name}: its script writes another script into its log"]
        rng = np.random.default_rng()
        faults = audit_run(run, seconds, rng, STREAM, "pocket", show_indented, root)
        return [f"{name}: {fault}" for fault in faults]


def show_indented(line):
    print(f"  {line}", flush=True)


# ---- compare -----------------------------------------------------------------------------------------------


def read_scores(path):
    """(summed NLL of each block [n], mean over the seeds; losses of the seeds; number of scored tokens).

    path: a record, or run folders with commas between them.
    """
    sums = []
    tokens = set()
    for part in str(path).split(","):
        folder = Path(part)
        try:
            record = read_json(folder / "record.json")
            for run in record.get("runs", [record]):
                file = Path(run.get("val_nll", "val_nll.npy")).name
                sums.append(read_npy(folder / file, 1 << 24))
                tokens.add(run["val_tokens"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            what = f"{type(e).__name__}: {e}"
            raise Refused(f"{part}: neither a record nor the folder of a finished run ({what})")
    if len(tokens) > 1 or len({len(s) for s in sums}) > 1:
        raise Refused(f"{path}: scored on different streams")
    n = tokens.pop()
    return np.mean(sums, axis=0), np.array([s.sum() / n for s in sums]), n


@functools.cache
def student(df):
    """Student's t: (values of |t|, the probability to exceed each, both sides).

    By the integral in the angle atan(t / sqrt(df)), where the density is cos**(df - 1).
    """
    angle = np.linspace(0, math.pi / 2, 200_001)[:-1]
    density = np.cos(angle) ** (df - 1)
    tail = np.flip(np.cumsum(np.flip(density))) - density / 2
    return math.sqrt(df) * np.tan(angle), tail / tail[0]


def compare_scores(a, b, dataset):
    """Mean of the difference a - b in nats per token, its 95% interval and p-value, from two read_scores().

    Two things make it uncertain. The text: the difference varies from block to block, and neighboring blocks,
    often of one document, vary together. So their covariances up to sqrt(n) blocks apart count, too (Newey
    and West 1987, Bartlett weights). The seed: another one gives another loss, so a single lucky one must
    prove little. Records have too few seeds to estimate that spread from, so tracks.json states it for the
    dataset (seed_sd), measured once. Student's t has as many degrees of freedom as there are stretches of
    sqrt(n) blocks.
    """
    blocks_a, seeds_a, tokens = a
    blocks_b, seeds_b, tokens_b = b
    if len(blocks_a) != len(blocks_b) or tokens != tokens_b:
        raise Refused(f"scored on different streams: {tokens:,} and {tokens_b:,} tokens")
    difference = blocks_a - blocks_b
    n = len(difference)
    lags = math.isqrt(n)
    centered = difference - difference.mean()
    variance = (centered * centered).sum() / n
    for k in range(1, lags + 1):
        covariance = (centered[k:] * centered[: n - k]).sum() / n
        variance += 2 * (1 - k / (lags + 1)) * covariance
    text_error = math.sqrt(max(0.0, variance) * n) / tokens
    seed_error = dataset.get("seed_sd", 0.0) * math.sqrt(1 / len(seeds_a) + 1 / len(seeds_b))
    error = math.hypot(text_error, seed_error)

    mean = float(difference.sum() / tokens)
    t, p = student(max(1, n // (lags + 1) - 1))
    width = error * np.interp(-0.05, -p, t)
    if error > 0:
        chance = float(np.interp(abs(mean) / error, t, p))
    else:
        chance = 1.0 if mean == 0 else 0.0
    return {
        "mean": mean,
        "interval": (mean - width, mean + width),
        "p": chance,
        "text": text_error,
        "seed": seed_error,
        "blocks": n,
    }


def compare_command(args):
    scores = [read_scores(path) for path in (args.a, args.b)]
    tracks = read_tracks()
    track = read_json(Path(args.a.split(",")[0]) / "record.json").get("track")
    dataset = {}
    if track in tracks["tracks"]:
        dataset = tracks["datasets"][tracks["tracks"][track]["dataset"]]
    for letter, path, (_, seeds, _) in zip("AB", (args.a, args.b), scores):
        line = f"{letter}  {path}\n   val_loss {seeds.mean():.6f} nats per token"
        if len(seeds) > 1:
            losses = " ".join(f"{loss:.6f}" for loss in seeds)
            line += f", {len(seeds)} seeds: {losses}, standard deviation {seeds.std(ddof=1):.6f}"
        else:
            line += ", one seed"
        print(line)
    c = compare_scores(*scores, dataset)
    low, high = c["interval"]
    print(f"A - B  {c['mean']:+.6f} nats per token, 95% interval {low:+.6f} to {high:+.6f}, p = {c['p']:.2g}")
    text = f"the text {c['text']:.6f} (paired, {c['blocks']} blocks of {BLOCK:,} tokens)"
    if c["seed"]:
        seed = f"the seed {c['seed']:.6f} (from the dataset's spread, {dataset['seed_sd']})"
    else:
        seed = "the seed not counted: tracks.json knows no spread"
    print(f"standard errors: {text}, {seed}")


def source_of(path):
    """The script of a record or a run, as lines."""
    folder = Path(path)
    try:
        record = read_json(folder / "record.json")
        first = record.get("runs", [{}])[0]
        log = folder / Path(first.get("log", "log.txt")).name
        source, _, _ = split_log(log.read_bytes())
        return source.decode().splitlines()
    except (OSError, ValueError, AttributeError) as e:
        raise Refused(f"{path}: no log with a script in it ({e})")


def diff_command(args):
    colors = {}
    if sys.stdout.isatty():
        colors = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}
    a = source_of(args.a)
    b = source_of(args.b)
    for line in difflib.unified_diff(a, b, str(args.a), str(args.b), lineterm=""):
        # A stranger's script must not hide its lines.
        line = printable(line)
        if line[:1] in colors:
            line = f"{colors[line[0]]}{line}\033[0m"
        print(line)


# ---- submit ------------------------------------------------------------------------------------------------


def submit(runs, slug, note, by, root=ROOT, now=None):
    """Make a record of finished runs, the seeds of one recipe. Returns its folder."""
    now = now or datetime.datetime.now(datetime.UTC)
    date = f"{now:%Y-%m-%d}"
    if not re.fullmatch(NAME, f"{date}_{slug}"):
        raise Refused(f"--slug {slug}: small letters, digits and -, at most 40")
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
        (staged / "README.md").write_text(text)
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
    finally:
        if staged:
            shutil.rmtree(staged)
    return folder


def read_note(note):
    try:
        text = note.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise Refused(f"--note {note}: cannot be read ({e})")
    if not re.match(r"# \S.*\n", text):
        heading = "# What this record is"
        raise Refused(f"--note {note}: begin it with a line '{heading}', its description on the board")
    return text


def read_claims(run):
    """A run's record.json, with one hash of all its weights."""
    weights = sorted(run.glob("weights-*.pt"))
    try:
        claims = read_json(run / "record.json")
        require_keys(claims, "track")
        digests = [hashlib.sha256(path.read_bytes()).digest() for path in weights]
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
        shutil.copyfile(run / "log.txt", staged / claim["log"])
        shutil.copyfile(run / "val_nll.npy", staged / claim["val_nll"])


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


# ---- render ------------------------------------------------------------------------------------------------

BEGIN = "<!-- board: python records/leaderboard.py render -->"
END = "<!-- end of board -->"

# The columns of the tables: key of a row's cell, and heading.
RESULT = {
    "rank": "#",
    "loss": "val loss (nats per token)",
    "data": "data efficiency",
    "what": "description",
    "date": "date",
    "by": "contributors",
    "files": "files",
}
COST = {
    "rank": "#",
    "bpb": "bits per byte",
    "gap": "test gap",
    "compute": "compute multiplier",
    "params": "parameters",
    "use": "FLOPs per scored token",
    "seen": "tokens seen",
    "time": "training",
    "hardware": "hardware",
}
PUBLISHED = {
    "track": "track",
    "limit": "limit",
    "loss": "val loss",
    "data": "data efficiency",
    "what": "description",
    "date": "date",
    "time": "time",
    "by": "contributors",
    "files": "files",
}
TOP = {
    "track": "track",
    "loss": "val loss",
    "data": "data efficiency",
    "what": "the best so far",
    "date": "date",
}
TOP_BEGIN = "<!-- top of the board: python records/leaderboard.py render -->"
TOP_END = "<!-- end of the top -->"
ELSEWHERE = "published elsewhere, not verified here"


def on_curve(points, loss, what="train_tokens"):
    """(how many tokens, or `what`, the baseline needs for a loss; "", or "<" or "≥" where that is a bound).

    Linear between the measured points, and nothing beyond them.
    """
    points = sorted(points, key=lambda p: p["train_tokens"])
    losses = [p["val_loss"] for p in points]
    if loss > losses[0]:
        return points[0][what], "<"
    if loss < losses[-1]:
        return points[-1][what], "≥"
    return float(np.interp(-loss, [-x for x in losses], [p[what] for p in points])), ""


def data_efficiency(curve, loss, budget):
    """(baseline's tokens for this loss / budget, bound), or None where no baseline is measured."""
    if not curve["points"]:
        return None
    tokens, bound = on_curve(curve["points"], loss)
    return tokens / budget, bound


def compute_multiplier(curve, loss, flops):
    """(baseline's training FLOPs for this loss / flops, bound), or None where they are not known."""
    points = curve["points"]
    if not points or not all("train_flops" in p for p in points):
        return None
    needed, bound = on_curve(points, loss, "train_flops")
    return needed / flops, bound


def short(x):
    """1234567 -> 1.23M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def duration(seconds):
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def times(ratio):
    """(12.3, "<") -> <12.3x."""
    if ratio is None:
        return ""
    value, bound = ratio
    digits = 2 if value < 10 else 1
    return f"{bound}{value:.{digits}f}x"


def record_row(root, folder, record, curve, budget):
    """A record as cells of the tables; name, value and efficiency are for the pictures."""
    runs = record["runs"]

    def mean(what):
        return mean_loss(record, what)

    loss = mean("val_loss")
    loss_cell = f"{loss:.4f}"
    if len(runs) > 1:
        loss_cell += f" ({len(runs)} seeds)"
    # Adding zero keeps a gap that rounds to zero from being shown as -0.0000.
    gap = round(mean("test_loss") - loss, 4) + 0.0
    efficiency = data_efficiency(curve, loss, budget)
    link = folder.relative_to(root).as_posix()
    return {
        "loss": loss_cell,
        "bpb": f"{mean('val_bpb'):.4f}",
        "data": times(efficiency),
        "compute": times(compute_multiplier(curve, loss, mean("train_flops"))),
        "gap": f"{gap:+.4f}",
        "params": short(mean("parameters")),
        "use": short(mean("score_flops_per_token")),
        "seen": short(mean("tokens_seen")),
        "time": duration(mean("train_seconds")),
        "hardware": runs[0]["hardware"],
        "what": record["description"],
        "date": record["date"],
        "by": ", ".join(record["contributors"]),
        "files": f"[note]({link}/README.md) [log]({link}/{runs[0]['log']})",
        "value": loss,
        "efficiency": efficiency,
        "name": folder.name,
    }


def reference_row(reference, curve, budget):
    """A result that was published elsewhere, as cells of the tables."""
    loss = reference["val_loss"]
    return {
        "loss": f"{loss:.3f}",
        "data": times(data_efficiency(curve, loss, budget)),
        "what": f"*{reference['what']}*",
        "date": reference["date"],
        "time": reference["time"],
        "by": reference["by"],
        "files": f"[source]({reference['url']})",
        "value": loss,
    }


def board_rows(root, tracks, baselines, track):
    """The track's records, which have a rank, and the published results, best first; each a dict of cells."""
    rules = tracks["tracks"][track]
    budget = tracks["datasets"][rules["dataset"]]["train_tokens"]
    curve = baselines[rules["dataset"]]
    rows = [record_row(root, folder, record, curve, budget) for folder, record in all_records(root, track)]
    rows += [reference_row(reference, curve, budget) for reference in rules.get("references", [])]
    rows.sort(key=lambda row: row["value"])
    records = [row for row in rows if "name" in row]
    for rank, row in enumerate(records, 1):
        row["rank"] = str(rank)
    return rows


def table(columns, rows):
    """Lines of Markdown, one for each row, and an empty one."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def track_section(track, title, rows, drawn):
    """(lines, pictures) of a track that has records."""
    records = [row for row in rows if "name" in row]
    for row in rows:
        if "name" not in row:
            row["what"] += f" ({ELSEWHERE})"
    lines = [f"### {track}", "", f"{title}.", "", *table(RESULT, rows)]
    lines += ["Cost of each record:", "", *table(COST, records)]
    pictures = {}
    for kind, draw, words in (
        ("progress", draw_progress, "loss and data efficiency, record by record"),
        ("curve", draw_curve, "the baseline's loss on more tokens, and the records at the budget"),
    ):
        light = f"records/pictures/{track}_{kind}_light.svg"
        dark = f"records/pictures/{track}_{kind}_dark.svg"
        pictures[light] = (draw, drawn, "light")
        pictures[dark] = (draw, drawn, "dark")
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        image = f'<img alt="{track}: {words}" src="{light}">'
        lines += [f"<picture>{source}{image}</picture>", ""]
    return lines, pictures


def board(root):
    """The text between the markers of README.md, and the pictures to draw: {path: (function, data, theme)}.

    A track with records has a section. Those for which there are only results published elsewhere share a
    table, one for each kind of data. A track with neither is a line.
    """
    tracks = read_tracks(root)
    baselines = read_json(root / "records" / "baselines.json")
    sections = []
    pictures = {}
    published = {}
    empty = []
    for track, rules in tracks["tracks"].items():
        rows = board_rows(root, tracks, baselines, track)
        records = [row for row in rows if "name" in row]
        if records:
            by_loss = sorted(records, key=lambda row: -row["value"])
            drawn = {
                "records": [(row["name"], row["value"], row["efficiency"]) for row in by_loss],
                "track": track,
                "budget": tracks["datasets"][rules["dataset"]]["train_tokens"],
                "points": baselines[rules["dataset"]]["points"],
            }
            lines, new = track_section(track, rules["title"], rows, drawn)
            sections += lines
            pictures |= new
        elif rows:
            data, _, limit = rules["title"].partition(", ")
            for row in rows:
                row |= {"track": track, "limit": limit}
            published.setdefault(data, {})[track] = rows
        else:
            empty += [f"**{track}**: {rules['title']}. No record yet.", ""]
    for data, by_track in published.items():
        rows = [row for rows in by_track.values() for row in rows]
        sections += [f"### {', '.join(by_track)}", ""]
        sections += [f"{data}. No record here yet; these results are {ELSEWHERE}.", ""]
        sections += table(PUBLISHED, rows)
    return "\n".join([*sections, *empty]), pictures


INK = {
    "light": {"text": "#1f2328", "grid": "#d0d7de", "blue": "#0969da", "orange": "#bc4c00"},
    "dark": {"text": "#e6edf3", "grid": "#30363d", "blue": "#4493f8", "orange": "#f0883e"},
}


def figure(theme, columns, height):
    """A matplotlib figure as wide as a page of GitHub, on no background, and its axes.

    Text becomes paths, so that it looks the same everywhere.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = INK[theme]["text"]
    grid = INK[theme]["grid"]
    plt.rcParams.update(
        {
            "svg.hashsalt": "tokenrun",
            "svg.fonttype": "path",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": text,
            "axes.labelcolor": text,
            "xtick.color": text,
            "ytick.color": text,
            "axes.edgecolor": grid,
            "grid.color": grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    return plt.subplots(
        1, columns, figsize=(9, height), sharey=columns > 1, squeeze=False, layout="constrained"
    )


def draw_progress(data, theme):
    """Each record on a line of its own, the newest last: its loss, and its data efficiency."""
    names = [name[11:] for name, _, _ in data["records"]]
    losses = [loss for _, loss, _ in data["records"]]
    ratios = [efficiency[0] for _, _, efficiency in data["records"]]
    blue = INK[theme]["blue"]
    fig, [[left, right]] = figure(theme, 2, 1.4 + 0.32 * len(names))
    y = np.arange(len(names))
    left.plot(losses, y, "o-", color=blue)
    left.set(xlabel="validation loss (nats per token)", yticks=y, yticklabels=names)
    left.margins(x=0.18)
    right.barh(y, ratios, color=blue, height=0.6)
    right.set(xlabel="data efficiency (baseline tokens / budget)")
    right.margins(x=0.14)
    for i, (_, loss, efficiency) in enumerate(data["records"]):
        left.annotate(f"{loss:.4f}", (loss, i), (7, -3), textcoords="offset points", fontsize=9)
        right.annotate(times(efficiency), (efficiency[0], i), (4, -3), textcoords="offset points", fontsize=9)
    left.invert_yaxis()
    return fig


def draw_curve(data, theme):
    """The baseline's loss over its tokens, and each record at the budget.

    A line leads from each record to where the baseline needs as many tokens.
    """
    fig, [[ax]] = figure(theme, 1, 4.4)
    blue = INK[theme]["blue"]
    orange = INK[theme]["orange"]
    points = sorted((p["train_tokens"] / 1e6, p["val_loss"]) for p in data["points"])
    x = [tokens for tokens, _ in points]
    y = [loss for _, loss in points]
    # Data efficiency is read off straight lines between the points; on this axis they are bent.
    tokens = np.geomspace(x[0], x[-1], 200)
    ax.plot(tokens, np.interp(tokens, x, y), color=orange)
    ax.plot(x, y, "o", color=orange, label="baseline: one epoch of the plain recipe")

    budget = data["budget"] / 1e6
    for _, loss, (ratio, _) in data["records"]:
        ax.plot([budget, budget * ratio], [loss, loss], ":", color=blue, linewidth=1)
    losses = [loss for _, loss, _ in data["records"]]
    ax.plot([budget] * len(losses), losses, "D", color=blue, label=f"records on {budget:g}M tokens")
    name, loss, efficiency = min(data["records"], key=lambda record: record[1])
    ax.annotate(
        f"{name[11:]}: {times(efficiency)}",
        (budget * efficiency[0] ** 0.5, loss),
        (0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    ax.set(xscale="log", xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    ax.set_xticks(x, [f"{tokens:g}" for tokens in x])
    ax.minorticks_off()
    ax.legend()
    return fig


def between(page, begin, end, text):
    """The page with `text` between two of its marker lines."""
    head = page.split(begin)[0]
    tail = page.split(end)[1]
    return f"{head}{begin}\n{text}\n{end}{tail}"


def top_of_board(root):
    """Lines of a short table: each track's standing record, and the best published result of `limited`."""
    tracks = read_tracks(root)
    baselines = read_json(root / "records" / "baselines.json")
    rows = []
    for track in tracks["tracks"]:
        for row in board_rows(root, tracks, baselines, track)[:1]:
            if "name" in row or track == "limited":
                rows.append(row | {"track": track})
    return table(TOP, rows)[:-1]


def stale(root):
    """What render would change: {path: function that writes or removes it}."""
    for folder in record_folders(root):
        for fault in verify_record(folder, root):
            raise Refused(f"the board holds only what verifies: {fault}")
    text, pictures = board(root)
    changes = {}

    readme = root / "README.md"
    before = readme.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise Refused(f"{readme}: lacks the lines {BEGIN} and {END}, or has them twice")
    after = between(before, BEGIN, END, text)
    if TOP_BEGIN in before:
        after = between(after, TOP_BEGIN, TOP_END, "\n".join(top_of_board(root)))
    if after != before:
        changes[readme] = functools.partial(readme.write_text, after)

    for name, (draw, data, theme) in pictures.items():
        # matplotlib's output differs between versions, so a picture is known by what it was drawn from, not
        # by its bytes.
        source = inspect.getsource(draw) + inspect.getsource(figure)
        content = json.dumps([data, theme, INK]) + source
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        path = root / name
        if not path.exists() or digest not in path.read_text()[:2000]:
            changes[path] = functools.partial(draw_into, path, draw, data, theme, digest)
    for path in (root / "records" / "pictures").glob("*.svg"):
        if path.relative_to(root).as_posix() not in pictures:
            changes[path] = path.unlink
    return changes


def draw_into(path, draw, data, theme, digest):
    save_picture(path, draw(data, theme), digest)


def save_picture(path, fig, digest):
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, transparent=True, metadata={"Date": None, "Description": f"drawn from {digest}"})


def render_command(args):
    changes = stale(ROOT)
    for path, write in changes.items():
        name = os.path.relpath(path)
        if args.check:
            print(f"{name}: stale; run python records/leaderboard.py render")
        else:
            write()
            print(f"{name}: written")
    if not changes:
        print("the board is up to date")
    return bool(changes) and args.check


def judge_command(args):
    from judge import judge  # which reads records with this file's functions

    for line in judge(args.folder, args.seconds):
        print(line)


# ---- command line ------------------------------------------------------------------------------------------


def verify_command(args):
    folders = [path.resolve() for path in args.records] or record_folders(ROOT)
    for folder in folders:
        if not (folder / "record.json").exists() or folder.parent.parent != ROOT / "records":
            raise Refused(f"{folder}: no record; name folders like records/pocket/2026-11-22_name")
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

    one = commands.add_parser("compare", help="is the difference of two losses more than chance?")
    one.add_argument("a", metavar="A")
    one.add_argument("b", metavar="B")
    one.set_defaults(run=compare_command)

    one = commands.add_parser("diff", help="what changed in the script from A to B")
    one.add_argument("a", metavar="A")
    one.add_argument("b", metavar="B")
    one.set_defaults(run=diff_command)

    one = commands.add_parser("render", help="write the board into README.md and draw the pictures")
    one.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if something is stale"
    )
    one.set_defaults(run=render_command)

    one = commands.add_parser("judge", help="what the track's rules make of a run, finished or not")
    one.add_argument("folder", type=Path, metavar="RUN")
    one.add_argument("--seconds", type=float, metavar="S", help="when training will end, by its own estimate")
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
