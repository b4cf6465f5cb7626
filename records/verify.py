"""
Do a record's claims follow from its files?

leaderboard.py verify asks, submit before it makes a record, and render before it shows one. A claim counts if
it follows from the files, and the files count if they keep the rules of tracks.json.
"""

import datetime
import hashlib
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import compare_scores, read_scores
from judge import over_the_limits
from reading import (
    BLOCK,
    NAME,
    OPEN,
    ROOT,
    Chain,
    Hardware,
    Refused,
    Score,
    Step,
    Trained,
    expected_hashes,
    printable,
    read_json,
    read_log,
    read_npy,
    read_tracks,
    require_keys,
    standing_record,
)

# Of a record's folder: enough for several seeds of a long chain.
MAX_BYTES = 20_000_000

SUFFIXES = {".md", ".txt", ".json", ".npy", ".png", ".svg"}

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
        log = read_log(path)
        require_keys(log.config, "seed", "track")
        require_keys(log.data, "sha256")
        require_keys(log.data["sha256"], "val.bin", "train.bin")
    except ValueError as e:
        expect(False, f"{e}")
        return
    except (KeyError, TypeError) as e:
        expect(False, f"lacks its data line, or what belongs in it or in config ({type(e).__name__}: {e})")
        return
    if not expect(log.source is not None, "lacks the source of the script"):
        return
    digest = hashlib.sha256(log.source).hexdigest()
    right = run["source_sha256"] == digest
    faults.expect(right, "record.json", "source_sha256", run["source_sha256"], f"{digest} in {path.name}")
    for what in ("track", "seed", "train_tokens"):
        claimed = log.config.get(what)
        expect(claimed == run[what], f"{what} of the config", claimed, f"{run[what]} in record.json")
    for name, digest in log.data["sha256"].items():
        right = hashes.get(name)
        expect(right in (digest, OPEN), f"sha256 of {name} in the data line", digest, f"the track's {right}")
    claimed = (log.data.get("tokenizer"), log.data.get("vocab_size"))
    found = (dataset["tokenizer"], dataset["vocab_size"])
    words = "{} with {} tokens"
    expect(claimed == found, "tokenizer", words.format(*claimed), words.format(*found))

    expect(
        tells_hardware(log, run),
        "its hardware lines do not tell what record.json claims of hardware, ranks and threads",
    )
    verify_steps(expect, log, run)
    verify_totals(expect, log, run)


def tells_hardware(log, run):
    """The last machine is the claimed one, and none had more ranks or threads than claimed."""
    machines = log.of(Hardware)
    if not machines or log.malformed(Hardware):
        return False
    for machine in machines:
        if machine.ranks > run["ranks"] or machine.threads > run["threads"]:
            return False
    return machines[-1].name == run["hardware"]


def verify_steps(expect, log, run):
    """Step lines: each member's run from 1 to its last, and none is missing.

    The epochs that they tell make up the tokens seen. The clock runs forward and ends where the record says.
    Chains that were trained apart count as run side by side: each has its own clock, and their ranks add up.
    """
    entries = log.of(Step, Chain)
    form = "step i/n epoch e loss l ... time t s"
    complete = entries and not log.malformed(Step, Chain)
    if not expect(complete, f"has no step lines, or some that are not '{form}'"):
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
    for entry in entries:
        if isinstance(entry, Chain):
            complete = done == 0
            what = f"a chain begins after step {done} of member {members}: steps are missing"
            if not expect(complete, what):
                return
            clock = 0.0
            ranks += entry.ranks
            continue
        count += 1
        step = entry.step
        if done == 0:
            members += 1
            last_epoch = 0.0
        in_order = entry.member == members and step == done + 1 and step <= entry.steps
        found = f"step {step} of {entry.steps} of member {entry.member}"
        if not expect(in_order, f"after step {done} of member {members} comes {found}: steps are missing"):
            return
        forward = entry.seconds >= clock and entry.epoch >= last_epoch
        if not expect(forward, f"step {step}: time or epoch runs backward"):
            return
        clock = entry.seconds
        last_epoch = entry.epoch
        longest = max(longest, clock)
        done = step
        if step == entry.steps:
            done = 0
            epochs += entry.epoch

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


def verify_totals(expect, log, run):
    """The lines at the end: time, tokens and score."""
    found = log.of(Trained)
    once = len(found) == 1 and not log.malformed(Trained)
    if expect(once, "has no line, or several, that begins 'trained for'"):
        trained = found[0]
        claimed = run["train_seconds"]
        right = same(trained.seconds, claimed, 1)
        expect(right, "seconds of training", trained.seconds, f"{claimed:.1f} in record.json")
        claimed = run["tokens_seen"]
        right = trained.tokens_seen == claimed
        expect(right, "tokens seen", f"{trained.tokens_seen:,}", f"{claimed:,} in record.json")

    found = log.of(Score)
    once = len(found) == 1 and not log.malformed(Score)
    form = "val_loss X nats per token, Y bits per byte, N tokens scored"
    if expect(once, f"has no line, or several, of the form '{form}'"):
        for what, value in found[0]._asdict().items():
            right = same(value, run[what], 6)
            expect(right, what, value, f"{run[what]} in record.json")
