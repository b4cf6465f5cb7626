"""
Do a record's claims follow from its files?

leaderboard.py verify asks, submit before it makes a record, and render before it shows one. A claim counts if
it follows from the files, and the files count if they keep the rules of tracks.json.
"""

import datetime
import math
import os
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import compare_scores, read_scores
from judge import other_hardware, over_the_limits
from reading import (
    BLOCK,
    NAME,
    OPEN,
    ROOT,
    Alone,
    Chain,
    Compiled,
    Done,
    Eval,
    Hardware,
    Refused,
    Score,
    Size,
    Step,
    Trained,
    Without,
    expected_hashes,
    is_overtaken,
    printable,
    read_json,
    read_log,
    read_npy,
    read_tracks,
    require_keys,
    seeds_wanted,
    standing_record,
)
from rerun import judge_rerun, loss_limit, train_flops_limit

# Of a record's folder: enough for several seeds of a long chain.
MAX_BYTES = 20_000_000

SUFFIXES = {".md", ".txt", ".json", ".npy", ".png", ".svg"}

# The text of a script is read by people.
MAX_SOURCE_BYTES = 300_000

# What stands on the board holds no markup.
TEXT = r"[^|<>\[\]`]{3,120}"

# A name of the board, or an address: no link, and nobody is called by an @ before a name. Brackets may stand
# in it, but not as a link has them.
CONTRIBUTOR = r"[\w(][\w .'‘’()\[\]&+@-]{0,59}"
LINK = r"(?i)www\.|(^|[^\w.+-])@|\]\("

# A clock may be this much ahead of the referee's, which is at most a few minutes off.
MINUTES_AHEAD = 10

# No processor of today multiplies faster, in FLOPs per second: an H100's cores at half precision, and a CPU's
# core with matrix instructions. These catch a clock that was made up.
GPU_FLOPS = 2e15
CPU_FLOPS = 3e12

# Compilation is outside of the clock; this bounds what it could hide.
MAX_COMPILE_SECONDS = 1800

# Evaluations look at a part of validation, and the last one comes before the end of training. They must still
# be in sight of the result, in nats: those of the committed records are up to 0.12 below it and 0.04 above.
EVAL_BELOW = 0.3
EVAL_ABOVE = 0.5

# Two seeds differ by far more than this, in nats per token, root mean square over the blocks: the three of
# pocket's baseline by 0.035 to 0.120.
LEAST_DISTANCE = 0.001

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

# What rerun.json holds. forward_flops_per_token and limit may be null.
RERUN = dict(
    date=str,
    machine=str,
    walls_missing=list,
    val_loss=float,
    claimed=float,
    limit=float,
    seconds=float,
    train_flops=float,
    claimed_train_flops=float,
    train_flops_limit=float,
    score_flops_per_token=float,
    forward_flops_per_token=float,
    audited_tokens=int,
    faults=list,
)


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


def verify_record(folder, root=ROOT, tested=True, better=True, rerun=True):
    """Recompute all that a record claims from its files. Returns the faults.

    tested: its test stream has been scored. submit verifies a record once before that, in a folder of another
    name. better: it also beats the record that stood before it. rerun: its rerun.json holds, too; a new rerun
    replaces that file.
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
    sums = []
    configs = []
    for run in record["runs"]:
        run_sums, config = verify_run(faults, folder, run, tracks, hashes, tested)
        sums.append(run_sums)
        configs.append(config)
    # A run whose files cannot be read has a fault already.
    verify_distances(faults, [run_sums for run_sums in sums if run_sums is not None])
    if None not in configs:
        verify_recipes(faults, record["runs"], configs)
    verify_number_of_seeds(faults, record, tracks["tracks"][track])
    if rerun and (folder / "rerun.json").exists():
        verify_rerun(faults, folder, record, configs[0] or {}, tracks)
    if better and not faults and not is_overtaken(root, folder):
        verify_better(faults, folder, tracks, root)
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
    except (ValueError, KeyError, TypeError) as e:
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
        if type(run.get("harness_sha256", "")) is not str:  # only a script with a harness claims one
            broken.append(f"harness_sha256 of run {i} is not a str")
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
    readme = (folder / "README.md").read_text(encoding="utf-8-sig", errors="replace")
    title = readme.partition("\n")[0]
    wanted = f"# {record['description']}"
    faults.expect(
        title.rstrip() == wanted,
        "README.md",
        "its first line",
        title,
        f"{wanted!r} by record.json's description",
    )
    names = record["contributors"]
    known = names and all(isinstance(name, str) and is_name(name) for name in names)
    rule = "names of at most 60 letters of one alphabet each, no links and no @mentions"
    expect(known, f"contributors {names}: {rule}")


def is_name(text):
    """Is this a contributor's name, which nobody could mistake for another's?"""
    # Full-width letters and the like have a plain form. Letters of two alphabets in one word look alike.
    plain = unicodedata.normalize("NFKC", text) == text
    one_alphabet = True
    for word in re.findall(r"[^\W\d_]+", text):
        alphabets = {unicodedata.name(letter, "?").split()[0] for letter in word}
        one_alphabet = one_alphabet and not ("LATIN" in alphabets and len(alphabets) > 1)
    ascii_digits = all(not digit.isdigit() or digit in "0123456789" for digit in text)
    # Of a letter that is written with marks (vowels, in many scripts), \w does not take the marks.
    marks = [unicodedata.category(c)[0] == "M" for c in text]
    letters = "".join(c for c, is_mark in zip(text, marks) if not is_mark)
    few_marks = sum(marks) <= len(letters)
    form = few_marks and re.fullmatch(CONTRIBUTOR, letters) and not re.search(LINK, text)
    return bool(form and plain and one_alphabet and ascii_digits)


def time_has_come(submitted, date):
    """Is this a time on that date that is not in the future, up to MINUTES_AHEAD?"""
    try:
        when = datetime.datetime.strptime(submitted, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return False
    latest = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=MINUTES_AHEAD)
    well_formed = submitted.isascii() and len(submitted) == 20 and submitted.startswith(date)
    return well_formed and when < latest.replace(tzinfo=None)


def verify_runs_differ(faults, runs, tested):
    """The runs are different seeds of one script. Returns whether each names files of its own."""

    def expect(holds, what):
        return faults.expect(holds, "record.json", what)

    for what in ("seed", "weights_sha256"):
        values = [run[what] for run in runs]
        different = len(values) > 0 and len(set(values)) == len(values)
        expect(different, f"the runs' {what} must differ, they are {values}")
    scripts = {(run["source_sha256"], run.get("harness_sha256")) for run in runs}
    expect(len(scripts) == 1, "the runs are of different scripts (source_sha256, harness_sha256)")
    files = ["log", "val_nll"]
    if tested:
        files.append("test_nll")
    names = [run[file] for run in runs for file in files]
    return expect(
        len(set(names)) == len(names) <= 60,
        "each run's log, val_nll and test_nll are files of their own, of 20 runs at most",
    )


def verify_distances(faults, sums):
    """Different seeds give different losses, block by block. sums: each run's val_nll, [blocks]."""
    for i, a in enumerate(sums):
        for b in sums[:i]:
            if a.shape == b.shape:
                distance = math.sqrt(np.square((a - b) / BLOCK).mean())
                faults.expect(
                    distance >= LEAST_DISTANCE,
                    "record.json",
                    f"two runs' val_nll differ by {distance:.2g} nats per token, block by block: "
                    f"different seeds differ by more than {LEAST_DISTANCE}",
                )


# Fields of a config in which the seeds of one recipe may differ: the seed, and what suits it to a machine.
NOT_RECIPE = ("seed", "data", "cpu_threads", "device_tokens", "loss_chunk")


def verify_recipes(faults, runs, configs):
    """The runs of a record are seeds of one recipe, on whatever machine each was trained."""
    recipes = [config | dict.fromkeys(NOT_RECIPE) for config in configs]
    for run, recipe in zip(runs, recipes, strict=True):
        other = sorted(name for name in recipe | recipes[0] if recipe.get(name) != recipes[0].get(name))
        faults.expect(not other, run["log"], f"another recipe than {runs[0]['log']} has: {', '.join(other)}")


def verify_number_of_seeds(faults, record, rules):
    """Since a track asks for several seeds, its records bring them."""
    wanted = seeds_wanted(rules, record["date"])
    n = len(record["runs"])
    faults.expect(n >= wanted, "record.json", "number of runs", n, f"the track asks for {wanted} seeds")


def verify_rerun(faults, folder, record, config, tracks):
    """What the rerun wrote has its form, is about this record, and tells the faults that its numbers make."""

    def expect(holds, *rest):
        return faults.expect(holds, "rerun.json", *rest)

    try:
        result = read_json(folder / "rerun.json")
        broken = wrong_rerun(result)
    except (ValueError, KeyError, TypeError) as e:
        broken = [f"damaged or incomplete ({type(e).__name__}: {e})"]
    for what in broken:
        expect(False, what)
    if broken:
        return
    rules = tracks["tracks"][record["track"]]
    run = record["runs"][0]
    for name, found, source in (
        ("claimed", run["val_loss"], "record.json"),
        ("claimed_train_flops", run["train_flops"], "record.json"),
        ("train_flops_limit", train_flops_limit(run, config), "the claims make"),
    ):
        expect(same(result[name], found), name, result[name], f"{found} in {source}")
    # The stated spread changes with the logs of ablations. A limit of a day when it was smaller is stricter.
    most = loss_limit(record, tracks["datasets"][rules["dataset"]])
    limit = result["limit"]
    if most is not None:
        strict = limit is not None and (limit < most or same(limit, most))
        expect(strict, "limit", "none" if limit is None else limit, f"{most} by the spread of seeds")
    day = result["date"]
    in_time = time_has_come(f"{day}T00:00:00Z", day) and day >= record["date"]
    expect(in_time, f"date is {day!r}, not a day from the record's own on that has come")
    # The audit's faults are in it, too, and do not follow from the numbers.
    for fault in judge_rerun(result, rules):
        expect(fault in result["faults"], f"its faults lack what follows from its numbers: {fault}")


def wrong_rerun(result):
    """What in a rerun.json is not of its type, one line each."""
    broken = []
    for name, kind in RERUN.items():
        missing = name in ("forward_flops_per_token", "limit") and result[name] is None
        if not (missing or has_type(result[name], kind)):
            broken.append(f"{name} is not a {kind.__name__} or is out of range")
    for text in (*result["walls_missing"], *result["faults"]):
        if type(text) is not str or not text.isprintable():
            broken.append("walls_missing and faults are not lines of text")
    machine = str(result["machine"])
    if not re.fullmatch(TEXT, machine) or not machine.isprintable():
        broken.append("machine: one line of 3 to 120 characters, no markup")
    return broken


def verify_better(faults, folder, tracks, root):
    """A record beats the one that stood when it was merged."""
    track = folder.parent.name
    before = standing_record(root, track, folder)
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
    """Check one run of a record against its files.

    Returns the sums in val_nll.npy and the config of its log, each None where it cannot be read.
    """

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
    wanted = other_hardware(run, rules)
    expect(wanted is None, "hardware", run["hardware"], f"a track for {wanted}")
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
        gap = run["test_loss"] - run["val_loss"]
        most = dataset.get("max_test_gap", math.inf)
        holds = abs(gap) <= most
        expect(holds, f"the test loss is {gap:+.3f} from the validation loss, {most} are the most")
    config = None
    path = own_file(faults, folder, run["log"])
    if path:
        config = verify_log(faults, path, run, dataset, hashes)
    return val_sums, config


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
    """The log: its source, its configuration, its steps, its result. Returns the config, or None."""

    def expect(holds, *rest):
        return faults.expect(holds, path.name, *rest)

    try:
        log = read_log(path)
        require_keys(log.config, "seed", "track")
        require_keys(log.data, "sha256")
        require_keys(log.data["sha256"], "val.bin", "train.bin")
    except ValueError as e:
        expect(False, f"{e}")
        return None
    except (KeyError, TypeError) as e:
        expect(False, f"lacks its data line, or what belongs in it or in config ({type(e).__name__}: {e})")
        return None
    claims = [run["source_sha256"]]
    if "harness_sha256" in run:
        claims.append(run["harness_sha256"])
    if not expect(len(log.sources) == len(claims), "record.json tells of another number of sources"):
        return log.config
    for source, name, claimed in zip(log.sources, ("source_sha256", "harness_sha256"), claims):
        if not expect(source.content is not None, f"lacks the source of {source.name}"):
            return log.config
        size = len(source.content)
        expect(
            size <= MAX_SOURCE_BYTES, f"{source.name} has {size:,} bytes, {MAX_SOURCE_BYTES:,} are the most"
        )
        found = f"{source.sha256} in {path.name}"
        faults.expect(claimed == source.sha256, "record.json", name, claimed, found)
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
    verify_config(expect, log, run)
    verify_cost(expect, log, run, dataset)
    verify_evaluations(expect, log, run)
    return log.config


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


def verify_config(expect, log, run):
    """Members and epochs by the config are those of the steps, where the script has such options."""
    config = {name: value for name, value in log.config.items() if type(value) in (int, float, str)}
    student = bool(config.get("student"))
    members = config.get("members", run["members"] - student)
    if type(members) is int:
        # In older scripts "cycles", where it is not 0, counts the models of a chain.
        models = members * (config.get("cycles") or 1) + student
        # A run may grow when it is resumed; the config at the head of its log is that of its start.
        grown = any(line.startswith("resumed at step") for line in log.lines)
        right = models == run["members"] or (grown and models < run["members"])
        expect(right, "models by the config", models, f"{run['members']} in record.json")
    epochs = config.get("epochs")
    known = type(epochs) in (int, float) and run["members"] and not student
    if not known:
        # A student may have a number of epochs of its own.
        return
    found = run["tokens_seen"] / run["train_tokens"] / run["members"]
    batch = config.get("batch_tokens", 0) / run["train_tokens"]
    # A step on bags counts as one step, and sees as many times the tokens.
    most = epochs
    if config.get("bag_until"):
        most = epochs * config.get("bag_size", 1)
    expect(
        epochs - 2 * batch - 0.02 * epochs <= found <= 1.02 * most + batch,
        "epochs by the config",
        epochs,
        f"{found:.3f} by the tokens seen",
    )


def verify_cost(expect, log, run, dataset):
    """FLOPs, parameters and times are possible, and are those that the log tells."""
    claimed = run["train_flops"]
    for trained in log.of(Trained):
        told = trained.flops
        right = told is None or abs(told - claimed) <= 1e-3 * claimed
        expect(right, "training FLOPs", f"{told}", f"{claimed:.4g} in record.json")
    least = least_flops(log.config, dataset["vocab_size"], run["tokens_seen"])
    expect(
        claimed >= least,
        f"training FLOPs are claimed {claimed:.4g}, but a model of these sizes takes {least:.3g} or more",
    )
    speed = GPU_FLOPS * run["ranks"]
    if "cores" in run["hardware"]:
        speed = CPU_FLOPS * run["ranks"] * run["threads"]
    seconds = run["train_seconds"]
    expect(
        seconds > 0 and claimed <= speed * seconds,
        f"{claimed:.4g} FLOPs in {seconds:.1f} s: no machine of {run['hardware']} is as fast",
    )
    compiled = run["compile_seconds"]
    expect(
        compiled <= MAX_COMPILE_SECONDS,
        f"{compiled:.0f} s of compilation, {MAX_COMPILE_SECONDS} are the most",
    )
    told = sum(entry.seconds for entry in log.of(Compiled))
    if not log.of(Chain):
        # Each part of a run tells its own; those of parts that were killed before a checkpoint are not
        # claimed.
        expect(compiled <= told + 0.1, "compile seconds", f"{told:.1f}", f"{compiled:.1f} in record.json")
    for size in log.of(Size)[:1]:
        # The first model; members have its size, a student may be smaller or larger.
        one = size.parameters
        right = run["parameters"] >= one or bool(log.config.get("student"))
        expect(right, "parameters of the first model", f"{one:,}", f"{run['parameters']:,} in record.json")
    # A student is scored alone, and may be smaller than the model that the config tells of.
    # Layers may share all their weights.
    sizes = log.config | {"n_layer": 1}
    least = 0 if log.config.get("student") else plain_weights(sizes, dataset["vocab_size"]) / 3
    claimed = run["parameters"]
    expect(
        claimed >= least,
        f"{claimed:,} parameters are claimed, but a model of these sizes has {least:,.0f} or more",
    )


def plain_weights(config, vocab_size):
    """Weights of a plain transformer of the config's sizes; 0 where it does not tell them.

    verify asks for a third: shared or sparse weights may take less than the plain way, but not so much less.
    """
    try:
        width = config["n_embd"]
        layer = 4 * width * width + 3 * width * config["mlp_hidden"]
        return float(config["n_layer"] * layer + vocab_size * width)
    except (KeyError, TypeError, OverflowError):
        return 0.0


def least_flops(config, vocab_size, tokens_seen):
    """A third of what training a plain transformer of these sizes takes: 6 per weight and position."""
    try:
        positions = tokens_seen / config.get("bag_size", 1)
    except (TypeError, ZeroDivisionError):
        return 0.0
    return 6 * plain_weights(config, vocab_size) * positions / 3


def verify_evaluations(expect, log, run):
    """What the log tells of validation before the result is in sight of it."""
    result = run["val_loss"]
    # Evaluations during training are of the members, without what is mixed in and without adaptation.
    alone = log.of(Without)[0].loss if log.of(Without) else result
    last = {}
    for entry in log.of(Eval):
        last[entry.member] = ("last evaluation", entry.loss)
    for entry in log.of(Done):
        last["together"] = ("last evaluation of the members together", entry.together)
    for what, loss in last.values():
        expect(
            alone - EVAL_BELOW <= loss <= alone + EVAL_ABOVE,
            f"its {what}",
            f"{loss:.4f}",
            f"{alone:.4f} at the end, farther away than evaluations are",
        )
    # Members alone, on the whole stream: the last line is about all. What is mixed in or adapts comes after.
    together = [entry.together for entry in log.of(Alone)]
    if together and len(together) == run["members"] and together[-1] is not None:
        where = "what it says without mixture or adaptation" if log.of(Without) else "record.json"
        right = same(together[-1], alone, 6)
        expect(right, "loss of all members together", together[-1], f"{alone:.6f} in {where}")
