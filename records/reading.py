"""
Files as the referee reads them: the rules, records, logs, token shards and arrays.

A log is read in one place, here. Everything that looks at one (verify, compare, forecast, sweeps, judge) gets
the same lines, and the same reading of each. Nothing here imports train_gpt.py or trusts what it wrote.
"""

import datetime
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# The header of a shard; data/README.md has the format.
HEADER_INTS = 256
MAGIC = 20240520

# In tracks.json, this takes the place of a hash or a size that no record has set yet.
OPEN = "set by the first record"

# Each number of val_nll.npy is the summed NLL of this many tokens.
BLOCK = 1000

# The name of a record's folder.
NAME = r"\d{4}-\d\d-\d\d_[a-z0-9][a-z0-9-]{0,39}"


class Refused(Exception):
    """A mistake of the user: one line, exit status 2."""


def printable(text):
    """A stranger's text, unable to steer a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


# ---- files -------------------------------------------------------------------------------------------------

# The most bytes that a file may have, by what it is. A token file is at most five times as large as the
# largest of a track.
MAX_JSON_BYTES = 2**22
MAX_LOG_BYTES = 2**28
MAX_TOKEN_BYTES = 2**30
MAX_WEIGHTS_BYTES = 2**36


def open_plain(path, max_bytes):
    """Open a file that somebody else may have made, to read its bytes. ValueError where it is a pipe or a
    device, which might never end, or has more than max_bytes; OSError where it cannot be opened."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a plain file")
    if found.st_size > max_bytes:
        raise ValueError(f"{found.st_size:,} bytes, but it cannot need more than {max_bytes:,}")
    return open(path, "rb")


def reason(error):
    """What an OSError or a ValueError of the functions here says, without the name of the file."""
    return error.strerror if isinstance(error, OSError) else str(error)


def read_plain(path, max_bytes):
    """The bytes of such a file."""
    with open_plain(path, max_bytes) as f:
        return f.read(max_bytes)


def file_digest(path, max_bytes):
    """sha256 of such a file, as bytes, without holding the file in memory."""
    with open_plain(path, max_bytes) as f:
        return hashlib.file_digest(f, "sha256").digest()


# ---- JSON --------------------------------------------------------------------------------------------------


def parse_json(text):
    """What a JSON text holds. ValueError if it is not JSON, which has no NaN and no Infinity."""

    def refuse(word):
        raise ValueError(f"holds {word}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply")


def read_json(path):
    """What a JSON file holds. OSError or ValueError where there is none."""
    return parse_json(read_plain(path, MAX_JSON_BYTES))


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def require_keys(content, *names):
    """TypeError or KeyError, unless this is a dict with these names."""
    if not isinstance(content, dict):
        raise TypeError(f"not an object but a {type(content).__name__}")
    for name in names:
        if name not in content:
            raise KeyError(name)


# ---- arrays ------------------------------------------------------------------------------------------------


def known_hash(dataset, shard):
    """A shard's sha256, or None where tracks.json leaves it open."""
    digest = dataset["sha256"][shard]
    return None if digest == OPEN else digest


def prepare_again(path):
    """The command that makes a shard, by the folder that it lies in."""
    name = Path(path).resolve().parent.name
    known = name in read_tracks()["datasets"]
    return f"prepare the data with python data/prepare.py {name if known else '--help'}"


def read_shard(path, sha256=None):
    """Token ids of a shard, uint16 [n]. Refused where its bytes do not have the given sha256."""
    try:
        data = read_plain(path, MAX_TOKEN_BYTES)
    except (OSError, ValueError) as e:
        raise Refused(f"{path}: {reason(e)}; {prepare_again(path)}")
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise Refused(f"{path}: its sha256 is not the one in records/tracks.json; {prepare_again(path)}")
    header_bytes = 4 * HEADER_INTS
    header = np.frombuffer(data[:header_bytes].ljust(header_bytes), dtype="<i4")
    is_shard = header[0] == MAGIC and header[1] == 1
    if not is_shard or len(data) != header_bytes + 2 * int(header[2]):
        raise Refused(f"{path}: not a token shard; data/README.md has the format")
    return np.frombuffer(data, dtype="<u2", offset=header_bytes)


def write_shard(path, tokens):
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def read_npy(path, max_bytes):
    """The array in a .npy file. ValueError where it is none, holds objects, or is larger than max_bytes."""
    try:
        f = open_plain(path, max_bytes)
    except OSError as e:
        raise ValueError(reason(e))
    try:
        with f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except Exception as e:
        # A header that somebody made up can raise anything.
        raise ValueError(f"not a .npy file of numbers ({type(e).__name__}: {e})")


# ---- tracks and records ------------------------------------------------------------------------------------


def read_tracks(root=ROOT):
    return read_json(root / "records" / "tracks.json")


def mean_loss(record, what="val_loss"):
    return float(np.mean([run[what] for run in record["runs"]]))


def record_folders(root):
    """All records, by track and date."""
    return sorted(p for p in (root / "records").glob("*/*") if p.is_dir() and re.match(NAME, p.name))


def read_order(root):
    """{"merged": {track: [names of records in the order of merging]}, "overtaken": ["TRACK/NAME"]}.

    leaderboard.py render keeps the file, on main. Overtaken is a record that was no longer better than the
    standing one when it was merged, because another had been merged meanwhile. It stays, but it has no rank.
    """
    path = root / "records" / "order.json"
    if not path.exists():
        return {"merged": {}, "overtaken": []}
    return read_json(path)


def is_overtaken(root, folder):
    return f"{folder.parent.name}/{folder.name}" in read_order(root)["overtaken"]


def all_records(root, track):
    """All readable records of a track that have a rank, in the order of merging: [(folder, record)].

    Those that are not on main yet come last, by the time at which they were submitted.
    """
    order = read_order(root)
    merged = order["merged"].get(track, [])
    place = {name: i for i, name in enumerate(merged)}
    found = []
    for folder in record_folders(root):
        if folder.parent.name != track or f"{track}/{folder.name}" in order["overtaken"]:
            continue
        try:
            record = read_json(folder / "record.json")
            # Others read these of it.
            require_keys(record["runs"][0]["data_sha256"])
            mean_loss(record)
            when = str(record["submitted"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            # It has a fault of its own, which verify names when it comes to it.
            continue
        found.append((place.get(folder.name, len(merged)), when, folder, record))
    found.sort(key=lambda entry: entry[:3])
    return [(folder, record) for _, _, folder, record in found]


def same_folder(a, b):
    return Path(a).resolve() == Path(b).resolve()


def today():
    """The day in UTC, YYYY-MM-DD."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def seeds_wanted(rules, day):
    """How many seeds a record of this day (YYYY-MM-DD) brings, by a track's rules."""
    wanted = rules.get("seeds")
    if wanted and day >= wanted["from"]:
        return wanted["least"]
    return 1


def standing_record(root, track, before=None):
    """(folder, record) of the best record of a track, or of those before the record in the folder `before`;
    None where there is none."""
    best = None
    for folder, record in all_records(root, track):
        if before is not None and same_folder(folder, before):
            break
        if best is None or mean_loss(record) < mean_loss(best[1]):
            best = (folder, record)
    return best


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


# ---- logs --------------------------------------------------------------------------------------------------

SOURCE_HEADER = re.compile(r"==== source ([^ ]*) bytes=([0-9]{1,9}) sha256=([^ ]*)")
SOURCE_END = b"\n==== end of source\n"


# What a script may bring along: the file that it is run by. Older scripts, and those of other houses, are
# whole by themselves.
HARNESS = "harness.py"


class Source(NamedTuple):
    """A source at the head of a log. content: None where the log was kept without it (baselines and
    ablations); sha256 is then what its header claims."""

    name: str
    sha256: str
    content: bytes | None


def split_log(log):
    """(Sources, rest of the log) from the bytes of a log.txt: the script, and HARNESS if the script has one.
    ValueError if it is no log.

    Each header states the length and the sha256 of its source, and an end mark follows that. Nothing is
    searched for inside a source, so it may contain any line.
    """
    script, rest = split_source(log)
    if not rest.startswith(b"==== source "):
        return [script], rest
    harness, rest = split_source(rest)
    if harness.name != HARNESS:
        raise ValueError(f"its second source is {printable(harness.name[:80])}, not {HARNESS}")
    return [script, harness], rest


def split_source(log):
    """(the Source with which a log or its rest begins, what follows)"""
    header, _, rest = log.partition(b"\n")
    found = SOURCE_HEADER.fullmatch(header.decode("utf-8", "replace"))
    if found:
        name, length, claimed = found.groups()
        if rest.startswith(SOURCE_END[1:]):
            return Source(name, claimed, None), rest[len(SOURCE_END) - 1 :]
        content = rest[: int(length)]
        after = rest[int(length) :]
        if len(content) == int(length) and after.startswith(SOURCE_END):
            digest = hashlib.sha256(content).hexdigest()
            if digest != claimed:
                raise ValueError(f"the header of the source claims sha256 {claimed}, the source has {digest}")
            return Source(name, digest, content), after[len(SOURCE_END) :]
    raise ValueError("does not begin with '==== source NAME bytes=N sha256=HEX' and a source of that length")


def write_sources(folder, sources):
    """Write a log's script, as script.py, and what it brings along into a folder. Returns the script's
    path."""
    for source in sources:
        if source.content is None:
            raise ValueError("its log was kept without the script; name a record or a run")
        name = HARNESS if source.name == HARNESS else "script.py"
        (folder / name).write_bytes(source.content)
    return folder / "script.py"


# Parts of a line. Numbers have bounds: somebody else wrote them, and one of 400 digits is read as infinity.
INT = r"\d{1,9}"
FLOAT = r"\d{1,15}\.\d{1,15}"
COUNT = r"\d[\d,]{0,20}"
MEMBER = rf"(?:member (?P<member>{INT}) )?"
AT = rf"(?P<step>{INT})/(?P<steps>{INT})"


def parse_count(text):
    """12,345 -> 12345"""
    return int(text.replace(",", ""))


# How the text of a field is read, by the field's type; and what a line means that leaves the field out.
PARSERS = {int: parse_count, float: float, float | None: float, bool: bool, str: str}
LEFT_OUT = {"member": 1, "of_bags": False, "flops": None, "together": None}

# The kinds of lines, each with its form, whose groups have the names of the fields. A member is a model of an
# ensemble, counted from 1; a line that names none is about the first. Losses are in nats per token, and
# seconds are on the run's clock.


class Step(NamedTuple):
    """A training step. Its loss is that of a bag of tokens at each position where the log says bag_loss."""

    member: int
    step: int
    steps: int
    epoch: float
    loss: float
    of_bags: bool
    seconds: float

    # Other terms may follow the loss, each with its name, and then rates.
    form = (
        rf"{MEMBER}step {AT} epoch (?P<epoch>{FLOAT}) (?P<of_bags>bag_)?loss (?P<loss>{FLOAT}) "
        rf".*?\btime (?P<seconds>{FLOAT})s\b.*"
    )


class Eval(NamedTuple):
    """A look at the validation loss during training. word: "eval", or "probe" in old logs."""

    member: int
    step: int
    steps: int
    loss: float
    word: str

    form = rf"{MEMBER}(?P<word>eval|probe) {AT} val_loss (?P<loss>{FLOAT}) on .*"


class Done(NamedTuple):
    """The evaluation after a member's last step: of it alone, and of the members so far together."""

    member: int
    alone: float
    together: float

    form = (
        rf"member (?P<member>{INT}) done: val_loss (?P<alone>{FLOAT}), "
        rf"the members so far together (?P<together>{FLOAT}), on .*"
    )


class Alone(NamedTuple):
    """A member's own loss on the whole validation stream, known once the run is scored, and that of the
    members so far together."""

    member: int
    loss: float
    together: float | None

    form = (
        rf"member (?P<member>{INT}) alone: (?P<loss>{FLOAT}); "
        rf"(?:the members so far together: (?P<together>{FLOAT}) )?.*"
    )


class Without(NamedTuple):
    """The loss of the members together, before their mean is mixed with anything or adapts."""

    loss: float

    form = rf"without [^:]+: (?P<loss>{FLOAT}) nats per token"


class Compiled(NamedTuple):
    """The seconds of compilation that a part of the run left out of its clock."""

    seconds: float

    form = rf"compiled: .*; (?P<seconds>{FLOAT}) s, which the clock leaves out"


class Chain(NamedTuple):
    """What follows is a chain that was trained apart, with a clock of its own, on so many ranks."""

    ranks: int

    form = rf"chain {INT} of {INT}: (?P<ranks>[1-9]\d{{0,6}}) rank\(s\).*"


class Hardware(NamedTuple):
    """The machine, said again after each resumption. threads: of each rank."""

    name: str
    ranks: int
    threads: int

    form = rf"hardware: (?P<name>.*); (?P<ranks>{INT}) rank\(s\) of (?P<threads>{INT}) thread\(s\)"


class Size(NamedTuple):
    """The line at the beginning that tells the size of the first model."""

    parameters: int

    form = rf"run .*?\b(?P<parameters>{COUNT}) parameters,.*"


class Trained(NamedTuple):
    """The end of training. flops: None where the script did not count them."""

    seconds: float
    tokens_seen: int
    flops: float | None

    form = (
        rf"trained for (?P<seconds>{FLOAT}) s, (?P<tokens_seen>{COUNT}) tokens seen"
        r"(?:, (?P<flops>\d{1,15}(?:\.\d{1,15})?(?:e\+\d{1,2})?) FLOPs)?(?:, .*)?"
    )


class Score(NamedTuple):
    """The result on the whole validation stream. val_tokens: how many of its tokens are scored."""

    val_loss: float
    val_bpb: float
    val_tokens: int

    form = (
        rf"val_loss (?P<val_loss>{FLOAT}) nats per token, (?P<val_bpb>{FLOAT}) bits per byte, "
        rf"(?P<val_tokens>{COUNT}) tokens scored"
    )


class Malformed(NamedTuple):
    """A line that begins like one of a kind (a class above), and goes on in another way."""

    kind: type
    line: str


# By the word that a line begins with, or that follows "member N".
KINDS = {
    "step": Step,
    "eval": Eval,
    "probe": Eval,
    "done:": Done,
    "alone:": Alone,
    "without": Without,
    "chain": Chain,
    "compiled:": Compiled,
    "hardware:": Hardware,
    "run": Size,
    "trained": Trained,
    "val_loss": Score,
}


def parse_line(line):
    """What a line of a log says, as one of the kinds above; None where it is none of these."""
    words = line.split(" ", 3)
    word = words[0]
    if word == "member" and len(words) > 2:
        word = words[2]
    kind = KINDS.get(word)
    if kind is None:
        return None
    # Digits of other alphabets are none.
    found = re.fullmatch(kind.form, line, re.ASCII)
    if found is None:
        return Malformed(kind, line)
    fields = {}
    for name, text in found.groupdict().items():
        fields[name] = LEFT_OUT[name] if text is None else PARSERS[kind.__annotations__[name]](text)
    return kind(**fields)


class Log(NamedTuple):
    """A log.txt.

    sources: the Source of the script, and that of HARNESS if it has one. lines: what stands behind them,
    without what the model wrote. config: every field of the run's configuration. data: what the run was
    trained on, or None. entries: what the lines say, in order.
    """

    sources: list
    lines: list
    config: dict
    data: dict | None
    entries: list

    def of(self, *kinds):
        """The entries of these kinds, in order."""
        return [entry for entry in self.entries if isinstance(entry, kinds)]

    def malformed(self, *kinds):
        """The lines that begin like one of these kinds and have another form."""
        return [entry.line for entry in self.of(Malformed) if entry.kind in kinds]


def json_line(lines, word):
    """The object that the first line that begins with a word holds behind it; None without such a line.

    ValueError where it holds something else.
    """
    line = next((line for line in lines if line.startswith(word)), None)
    if line is None:
        return None
    try:
        content = parse_json(line[len(word) :])
        require_keys(content)
    except (ValueError, TypeError) as e:
        raise ValueError(f"its {word.strip()} line is damaged ({type(e).__name__}: {e})")
    return content


def read_log(path):
    """The Log in a file, of a run that goes on as well as of a finished one.

    OSError where it cannot be read, ValueError where it is no log or lacks its config line.
    """
    sources, rest = split_log(read_plain(path, MAX_LOG_BYTES))
    # The end of a log that is being written may be half a character.
    lines = rest.decode("utf-8", "replace").splitlines()
    # What the model wrote on its own is no part of what the log says.
    marks = [i for i, line in enumerate(lines) if line.startswith("----")]
    if len(marks) >= 2:
        del lines[marks[0] : marks[-1] + 1]
    config = json_line(lines, "config ")
    if config is None:
        raise ValueError("lacks its config line")
    entries = []
    for line in lines:
        entry = parse_line(line)
        if entry is not None:
            entries.append(entry)
    return Log(sources, lines, config, json_line(lines, "data "), entries)
