"""
The referee's desk: makes records out of runs, recomputes what they claim, compares them, and draws the board.

    python records/leaderboard.py submit runs/NAME [runs/NAME2 ...] --slug loops --note note.md
    python records/leaderboard.py verify [RECORD ...] [--smoke]     exit status 0: all hold; 1: one line for each fault; 2: usage
    python records/leaderboard.py compare A B                       records or run folders; seeds of one side with commas between
    python records/leaderboard.py diff A B                          what changed in the script
    python records/leaderboard.py render [--check]                  the tables of README.md and the pictures

A record is records/TRACK/DATE_SLUG/ with README.md (the note), record.json (what is claimed, and the names of the other
files), and for each seed the log, val_nll.npy and test_nll.npy. Nothing here imports train_gpt.py or trusts it: a claim counts if
it follows from the files, the files if they keep the rules of tracks.json. records/README.md has the rules and their reasons.
"""
import argparse
import datetime
import difflib
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
from audit import BLOCK, OPEN, ROOT, Broken, Refused, Scorer, audit_run, printable, read_npy, read_shard, read_tracks, run_command, run_limited, split_log  # noqa: E402

MAX_BYTES = 20_000_000  # of a record: several seeds of a long chain
STREAM = 100_000       # tokens of the longest streams that verify --smoke scores
SUFFIXES = {".md", ".txt", ".json", ".npy", ".png", ".svg"}
NAME = r"\d{4}-\d\d-\d\d_[a-z0-9][a-z0-9-]{0,39}"
CLAIMS = {  # of each run in record.json, as train_gpt.py writes them: name -> type
    "track": str, "trial": bool, "seed": int, "members": int, "val_loss": float, "val_bpb": float, "val_tokens": int, "train_seconds": float,
    "compile_seconds": float, "steps": int, "train_tokens": int, "tokens_seen": int, "parameters": int, "train_flops": float,
    "score_flops_per_token": float, "source_sha256": str, "data_sha256": dict, "hardware": str, "ranks": int, "threads": int, "torch": str,
    "finished": str}
ADDED = {"log": str, "val_nll": str, "weights_sha256": str}  # by submit
TESTED = {"test_nll": str, "test_loss": float}               # by submit, last
NUMBER = r"(\d{1,15}\.\d{1,15})"
STEP = re.compile(rf"(?:member (\d{{1,6}}) )?step (\d{{1,9}})/(\d{{1,9}}) epoch {NUMBER} loss {NUMBER} .*?\btime {NUMBER}s")
HARDWARE = re.compile(r"hardware: (.*); (\d{1,9}) rank\(s\) of (\d{1,9}) thread\(s\)")
CHAIN = re.compile(r"chain (\d{1,6}) of \d+: ([1-9]\d{0,6}) rank\(s\)")
SCORE = re.compile(rf"val_loss {NUMBER} nats per token, {NUMBER} bits per byte, (\d[\d,]{{0,15}}) tokens scored")
TEXT = r"[^|<>\[\]`]{3,120}"  # of what stands on the board: no markup

# ---- reading ----------------------------------------------------------------------------------------------------------

def read_json(path):
    """What a JSON file holds. ValueError where it is none, or holds NaN or Infinity, which JSON does not have."""
    def refuse(word):
        raise ValueError(f"holds {word}")
    return json.loads(path.read_text(), parse_constant=refuse)

def record_folders(root):
    """All records, by track and date."""
    return sorted(p for p in (root / "records").glob("*/*") if p.is_dir() and re.match(NAME, p.name))

def earlier_records(root, track, submitted):
    """Records of a track submitted before a time, first the oldest: [(folder, record)]."""
    found = []
    for folder in record_folders(root):
        if folder.parent.name == track:
            try:
                record = read_json(folder / "record.json")
                dict(record["runs"][0]["data_sha256"]), mean_loss(record)  # what others read of it
                found.append((str(record["submitted"]), folder, record))
            except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
                pass  # it has a fault of its own, which verify names when it comes to it
    return [(folder, record) for when, folder, record in sorted(found, key=lambda f: f[:2]) if when < submitted]

def expected_hashes(root, tracks, name):
    """sha256 of a dataset's shards. Where the table leaves them open, the dataset's oldest record has set them."""
    hashes = dict(tracks["datasets"][name]["sha256"])
    if OPEN in hashes.values():
        same = [track for track, rules in tracks["tracks"].items() if rules["dataset"] == name]
        first = sorted((e for track in same for e in earlier_records(root, track, "~")), key=lambda e: e[1]["submitted"])
        for _, record in first[:1]:
            hashes |= record["runs"][0]["data_sha256"]
    return hashes

# ---- verify -----------------------------------------------------------------------------------------------------------

class Faults(list):
    """One line for each: the file, what was claimed, what was found."""
    def __init__(self, folder, root):
        self.folder = os.path.relpath(folder, root)

    def expect(self, holds, file, what, claimed=None, found=None):
        if not holds:
            line = f"{self.folder}/{file}: {what}" + (f" is claimed {claimed}, found {found}" if claimed is not None else "")
            self.append(printable(line[:400]))
        return holds

def same(a, b, digits=None):
    """Equal as numbers, up to the rounding of float64 sums or to the digits that were printed."""
    return abs(a - b) <= (0.5001 * 10 ** -digits if digits is not None else 1e-9 * max(1.0, abs(b)))

def verify_record(folder, root=ROOT, tested=True):
    """Recompute all that a record claims from its files. Returns the faults. tested: the test stream is scored already."""
    folder, faults = Path(folder), Faults(folder, root)
    tracks, track = read_tracks(root), folder.parent.name
    faults.expect(re.fullmatch(NAME, folder.name) or not tested, "", f"a record's folder is named DATE_SLUG, not {folder.name!r}")
    size = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        faults.expect(path.is_file() and not path.is_symlink() and path.suffix in SUFFIXES, name, f"not a plain file of {' '.join(sorted(SUFFIXES))}")
        size += path.lstat().st_size
    if not faults.expect(size <= MAX_BYTES, "", f"{size:,} bytes, {MAX_BYTES:,} are the most") or faults:
        return faults  # nothing in it is worth opening
    for name in ("README.md", "record.json"):
        if not faults.expect((folder / name).exists(), name, "missing"):
            return faults
    try:
        record = read_json(folder / "record.json")
        runs = record["runs"]
        broken = [f"{name} is not a {kind.__name__}" for name, kind in dict(track=str, date=str, submitted=str, description=str, contributors=list,
                                                                           runs=list).items() if type(record[name]) is not kind]
        broken += [f"{name} of run {i + 1} is not a {kind.__name__} or is out of range" for i, run in enumerate(runs)
                   for name, kind in (CLAIMS | ADDED | (TESTED if tested else {})).items()
                   if not (type(run[name]) is kind or kind is float and type(run[name]) is int) or kind in (int, float) and not 0 <= run[name] < 1e30]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        broken, runs = [f"damaged or incomplete ({type(e).__name__}: {e})"], []
    for what in broken:
        faults.expect(False, "record.json", what)
    if broken:
        return faults
    if not faults.expect(track in tracks["tracks"] and record["track"] == track, "record.json", "track", record["track"], f"folder of {track}"):
        return faults
    date = folder.name.split("_")[0]
    faults.expect(record["date"] == date or not tested, "record.json", "date", record["date"], f"folder of {date}")
    try:
        submitted = datetime.datetime.strptime(record["submitted"], "%Y-%m-%dT%H:%M:%SZ")
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        known = len(record["submitted"]) == 20 and record["submitted"].startswith(record["date"]) and submitted < now + datetime.timedelta(days=1)
    except ValueError:
        known = False
    faults.expect(known, "record.json", f"submitted is {record['submitted']!r}, not a time (UTC) on {record['date']} that has come")
    for what, text in (("description", record["description"]), *(("hardware", run["hardware"]) for run in runs)):
        faults.expect(re.fullmatch(TEXT, text) and text.isprintable(), "record.json", f"{what}: one line of 3 to 120 characters, no markup")
    title = (folder / "README.md").read_text(errors="replace").partition("\n")[0]
    faults.expect(title.rstrip() == f"# {record['description']}", "README.md", "its first line", title, f"'# {record['description']}' by record.json's description")
    faults.expect(record["contributors"] and all(isinstance(c, str) and re.fullmatch(r"[\w .@-]{1,40}", c) for c in record["contributors"]),
                  "record.json", "contributors: names of at most 40 letters")
    for what in ("seed", "weights_sha256"):
        values = [run[what] for run in runs]
        faults.expect(runs and len(set(values)) == len(values), "record.json", f"the runs' {what} must differ, they are {values}")
    faults.expect(len({run["source_sha256"] for run in runs}) == 1, "record.json", "the runs are of different scripts (source_sha256)")
    names = [run[what] for run in runs for what in ("log", "val_nll", *(["test_nll"] if tested else []))]
    if not faults.expect(len(set(names)) == len(names) <= 60, "record.json", "each run's log, val_nll and test_nll are files of their own, of 20 runs at most"):
        return faults
    hashes = expected_hashes(root, tracks, tracks["tracks"][track]["dataset"])
    arrays = [verify_run(faults, folder, run, tracks, hashes, tested) for run in runs]
    digests = [hashlib.sha256(a.tobytes()).digest() for a in arrays if a is not None]
    faults.expect(len(set(digests)) == len(digests), "record.json", "two runs have the same val_nll: they are not different seeds")
    if not faults:
        before = earlier_records(root, track, record["submitted"])
        if before:
            standing, limit = min(before, key=lambda e: mean_loss(e[1]))[0], tracks["rule"]["p"]
            try:
                c = compare_scores(read_scores(folder), read_scores(standing), tracks["datasets"][tracks["tracks"][track]["dataset"]])
                faults.expect(c["mean"] < 0 and c["p"] < limit, "record.json", f"does not beat {standing.name} at p < {limit}: "
                              f"{c['mean']:+.6f} nats per token, p = {c['p']:.2g}")
            except Refused as e:
                faults.expect(False, "record.json", f"cannot be compared with the standing record: {e}")
    return faults

def own_file(faults, folder, name):
    """The path of a file that record.json names, or None where it is not a plain file in the folder."""
    ok = re.fullmatch(r"[\w.-]+", name) and (folder / name).is_file() and not (folder / name).is_symlink()
    return folder / name if faults.expect(ok, "record.json", f"names {name!r}, which is no file of this folder") else None

def verify_run(faults, folder, run, tracks, hashes, tested):
    """Check one run of a record against its files. Returns the sums of val_nll.npy, or None where they cannot be read."""
    expect, track = faults.expect, folder.parent.name
    rules = tracks["tracks"][track]
    dataset = tracks["datasets"][rules["dataset"]]
    expect(run["track"] == track, "record.json", "track of a run", run["track"], f"folder of {track}")
    expect(not run["trial"], "record.json", "a trial (--steps) is no record")
    expect(run["train_tokens"] <= dataset["train_tokens"], "record.json", "train_tokens", f"{run['train_tokens']:,}", f"a budget of {dataset['train_tokens']:,}")
    seconds = rules.get("max_seconds")
    expect(not seconds or run["train_seconds"] <= seconds, "record.json", "train_seconds", f"{run['train_seconds']:.1f}", f"a cap of {seconds}")
    for what, value in (("ranks", run["ranks"]), ("cores", run["ranks"] * run["threads"])):
        limit = rules.get(f"max_{what}")
        expect(not limit or value <= limit, "record.json", what, value, f"a limit of {limit}")
    for name, digest in run["data_sha256"].items():
        right = hashes.get(name)
        expect(right in (digest, OPEN), "record.json", f"sha256 of {name}", digest, f"the track's {right}")
    for name in ("val.bin", "train.bin"):
        expect(name in run["data_sha256"], "record.json", f"data_sha256 lacks {name}")
    sums = {}
    for split in ("val", "test") if tested else ("val",):
        path = own_file(faults, folder, run[f"{split}_nll"])
        if path:
            sums[split] = verify_array(faults, path, run, split, dataset)
    log = own_file(faults, folder, run["log"])
    if log:
        verify_log(faults, log, run, dataset, hashes)
    return sums.get("val")

def verify_array(faults, path, run, split, dataset):
    """The sums of NLL over blocks of 1,000 tokens, float64; their loss is the claimed one."""
    n = dataset[f"{split}_tokens"]
    shape = (-(-n // BLOCK),)
    try:
        sums = read_npy(path, 8 * shape[0] + 1024)
    except ValueError as e:
        faults.expect(False, path.name, f"cannot be read as plain numbers: {e}")
        return None
    if not faults.expect(sums.dtype == np.float64 and sums.shape == shape, path.name, f"holds {sums.dtype} {list(sums.shape)}, not float64 {list(shape)}"):
        return None
    if not faults.expect(np.isfinite(sums).all() and sums.min() >= 0, path.name, "holds numbers that are not finite, or below 0"):
        return None
    loss = sums.sum() / (n - 1)  # the first token of the stream has no context, and is not scored
    faults.expect(same(run[f"{split}_loss"], loss), "record.json", f"{split}_loss", f"{run[f'{split}_loss']:.9f}", f"{loss:.9f} in {path.name}")
    if split == "val":
        faults.expect(run["val_tokens"] == n - 1, "record.json", "val_tokens", run["val_tokens"], n - 1)
        if dataset["val_bytes"] != OPEN:
            bpb = sums.sum() / math.log(2) / dataset["val_bytes"]
            faults.expect(same(run["val_bpb"], bpb), "record.json", "val_bpb", f"{run['val_bpb']:.9f}", f"{bpb:.9f} in {path.name}")
    return sums

def verify_log(faults, path, run, dataset, hashes):
    """The log: its source, its configuration, its steps, its result."""
    def expect(holds, *rest):
        return faults.expect(holds, path.name, *rest)
    try:
        source, _, rest = split_log(path.read_bytes())
        lines = rest.decode().splitlines()
        config, data = (json.loads(next(line for line in lines if line.startswith(word))[len(word):]) for word in ("config ", "data "))
        config["seed"], config["track"], data["sha256"]["val.bin"], data["sha256"]["train.bin"]
    except ValueError as e:
        expect(False, f"{e}")
        return
    except (StopIteration, KeyError, TypeError, RecursionError) as e:
        expect(False, f"lacks its config or data line, or what belongs in it ({type(e).__name__}: {e})")
        return
    digest = hashlib.sha256(source).hexdigest()
    faults.expect(run["source_sha256"] == digest, "record.json", "source_sha256", run["source_sha256"], f"{digest} in {path.name}")
    for what in ("track", "seed", "train_tokens"):
        expect(config.get(what) == run[what], f"{what} of the config", config.get(what), f"{run[what]} in record.json")
    for name, digest in data["sha256"].items():
        expect(hashes.get(name) in (digest, OPEN), f"sha256 of {name} in the data line", digest, f"the track's {hashes.get(name)}")
    expect(data.get("tokenizer") == dataset["tokenizer"] and data.get("vocab_size") == dataset["vocab_size"], "tokenizer",
           f"{data.get('tokenizer')} with {data.get('vocab_size')} tokens", f"{dataset['tokenizer']} with {dataset['vocab_size']}")
    marks = [i for i, line in enumerate(lines) if line.startswith("----")]
    if len(marks) >= 2:
        del lines[marks[0]:marks[-1] + 1]  # what the model wrote on its own is no part of the log's claims
    machines = [HARDWARE.fullmatch(line) for line in lines if line.startswith("hardware:")]
    expect(machines and all(machines) and machines[-1][1] == run["hardware"] and all(int(m[2]) <= run["ranks"] and int(m[3]) <= run["threads"] for m in machines),
           "its hardware lines do not tell what record.json claims of hardware, ranks and threads")
    verify_steps(expect, [(CHAIN if line[0] == "c" else STEP).match(line) for line in lines if re.match(r"(member \S+ )?step |chain ", line)], run)
    trained = [re.match(rf"trained for {NUMBER} s, (\d[\d,]{{0,20}}) tokens seen", line) for line in lines if line.startswith("trained for")]
    if expect(len(trained) == 1 and trained[0], "has no line, or several, that begins 'trained for'"):
        seconds, seen = float(trained[0][1]), int(trained[0][2].replace(",", ""))
        expect(same(seconds, run["train_seconds"], 1), "seconds of training", seconds, f"{run['train_seconds']:.1f} in record.json")
        expect(seen == run["tokens_seen"], "tokens seen", f"{seen:,}", f"{run['tokens_seen']:,} in record.json")
    scores = [SCORE.fullmatch(line) for line in lines if line.startswith("val_loss")]
    if expect(len(scores) == 1 and scores[0], "has no line, or several, of the form 'val_loss X nats per token, Y bits per byte, N tokens scored'"):
        for what, text in zip(("val_loss", "val_bpb", "val_tokens"), scores[0].groups()):
            number = float(text.replace(",", ""))
            expect(same(number, run[what], 6), what, text, f"{run[what]} in record.json")

def verify_steps(expect, steps, run):
    """Step lines: each member's run from 1 to its last, none missing; the epochs they tell make up the tokens seen; the clock runs
    forward and ends where the record says. Chains that were trained apart count as run side by side: each has its clock, and their ranks add up."""
    if not expect(steps and all(steps), "has no step lines, or some that are not 'step i/n epoch e loss l ... time t s'"):
        return
    members, expected, epochs, clock, longest, ranks = 0, 0, 0.0, 0.0, 0.0, 0
    for match in steps:
        if match.re is CHAIN and expected == 0:
            clock, ranks = 0.0, ranks + int(match[2])
            continue
        if not expect(match.re is STEP, f"a chain begins after step {expected} of member {members}: steps are missing"):
            return
        member, i, n = (int(g or 1) for g in match.groups()[:3])
        epoch, loss, now = map(float, match.groups()[3:])
        if expected == 0:
            members, last = members + 1, 0.0
        if not expect(member == members and i == expected + 1 and i <= n,
                      f"after step {expected} of member {members} comes step {i} of {n} of member {member}: steps are missing"):
            return
        if not expect(now >= clock and epoch >= last and math.isfinite(loss), f"step {i}: time, epoch or loss runs backward"):
            return
        expected, clock, last, longest = i % n, now, epoch, max(longest, now)
        epochs += epoch if i == n else 0.0
    expect(expected == 0 and members == run["members"], f"ends at step {expected} of member {members}, of {run['members']} members: steps are missing")
    count = sum(match.re is STEP for match in steps)
    expect(count == run["steps"], "number of steps", count, f"{run['steps']} in record.json")
    expect(ranks <= run["ranks"], "ranks of all chains", ranks, f"{run['ranks']} in record.json")
    expect(longest <= run["train_seconds"] + 0.05, "time of the last step", f"{longest} s", f"{run['train_seconds']:.1f} s in record.json")
    seen = epochs * run["train_tokens"]
    expect(abs(seen - run["tokens_seen"]) <= 0.02 * seen + 0.001 * run["train_tokens"] * members,
           f"its {epochs:.3f} epochs of {run['train_tokens']:,} tokens", f"{seen:,.0f} tokens seen", f"{run['tokens_seen']:,} in record.json")

# ---- smoke ------------------------------------------------------------------------------------------------------------

def toy_options(config):
    """Options that train a record's recipe at toy size on pocket: its own config, made small."""
    toy = dict(n_embd=64, n_head=2, mlp_hidden=128, train_tokens=100_000, epochs=1, probes=1, probe_tokens=2000,
               cpu_threads=2, dtype="fp32", data=str(ROOT / "data" / "pocket"))
    most = dict(seq_len=256, window_short=64, n_layer=6, members=2, chains=1, cycles=2)
    small = {name: min(value, most[name]) if name in most else toy.get(name, value) for name, value in config.items()}
    small["batch_tokens"] = small["device_tokens"] = 4 * small.get("seq_len", 256)
    kept = [change for change in config.get("student", "").split(",") if change.partition("=")[0] not in (*toy, *most, "batch_tokens", "device_tokens", "loop_first", "loop_last")]
    if config.get("student"):  # as small as the others
        small["student"] = ",".join(kept)
    for name in ("loop_first", "loop_last"):  # a range of layers stays one
        if name in config:
            small[name] = config[name] * small["n_layer"] // config["n_layer"]
    return [word for name, value in small.items() for word in (f"--{name}", str(int(value) if isinstance(value, bool) else value))]

def smoke(folder, seconds):
    """Train the script in a record's log for a few steps at toy size, and audit that. Returns the faults."""
    name = os.path.relpath(folder, ROOT)
    print(f"{name}: running the submitted code, at toy size", flush=True)
    if not (ROOT / "data" / "pocket" / "meta.json").exists():
        subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), "pocket"], check=True)
    source, script, rest = split_log((folder / read_json(folder / "record.json")["runs"][0]["log"]).read_bytes())
    config = json.loads(next(line for line in rest.decode().splitlines() if line.startswith("config "))[7:])
    with tempfile.TemporaryDirectory() as tmp:
        path, run = Path(tmp) / Path(script).name, Path(tmp) / "run"
        path.write_bytes(source)
        status, last = run_limited([sys.executable, str(path), *toy_options(config), "--steps", "12", "--device", "cpu", "--compile", "off",
                                       "--run_dir", str(run)], seconds)
        if status != 0 or not (run / "record.json").exists():
            return [f"{name}: its script does not train at toy size ({f'exit status {status}' if status is not None else f'over {seconds} s'}: {last})"]
        try:
            trained = split_log((run / "log.txt").read_bytes())[0]
        except (OSError, ValueError):
            trained = None
        if trained != source:  # what is audited is the script in that log
            return [f"{name}: its script writes another script into its log"]
        return [f"{name}: {fault}" for fault in audit_run(run, seconds, np.random.default_rng(), STREAM, "pocket", lambda line: print(f"  {line}", flush=True))]

# ---- compare ----------------------------------------------------------------------------------------------------------

def mean_loss(record, what="val_loss"):
    return float(np.mean([run[what] for run in record["runs"]]))

def read_scores(path):
    """(summed NLL of each block [n], mean over the seeds; the seeds' losses; number of scored tokens) of a record, or of run folders
    with commas between."""
    sums, tokens = [], set()
    for part in str(path).split(","):
        folder = Path(part)
        try:
            record = read_json(folder / "record.json")
            for run in record.get("runs", [record]):
                sums.append(read_npy(folder / Path(run.get("val_nll", "val_nll.npy")).name, 1 << 24))
                tokens.add(run["val_tokens"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Refused(f"{part}: neither a record nor the folder of a finished run ({type(e).__name__}: {e})")
    if len(tokens) > 1 or len({len(s) for s in sums}) > 1:
        raise Refused(f"{path}: scored on different streams")
    n = tokens.pop()
    return np.mean(sums, axis=0), np.array([s.sum() / n for s in sums]), n

def student(df):
    """Student's t: (values of |t|, the probability to exceed each, both sides), by the integral in the angle atan(t / sqrt(df)), where
    the density is cos**(df - 1)."""
    angle = np.linspace(0, math.pi / 2, 200_001)[:-1]
    density = np.cos(angle) ** (df - 1)
    tail = np.flip(np.cumsum(np.flip(density))) - density / 2
    return math.sqrt(df) * np.tan(angle), tail / tail[0]

def compare_scores(a, b, dataset):
    """Mean of the difference a - b in nats per token, its 95% interval and p-value, from two read_scores().

    Two things make it uncertain. The text: the difference varies from block to block, and neighbouring blocks, often of one document,
    vary together, so their covariances up to sqrt(n) blocks apart count, too (Newey and West 1987, Bartlett weights). The seed:
    another one gives another loss, so a single lucky one must prove little. Records have too few seeds to estimate that
    spread from, so tracks.json states it for the dataset (seed_sd), measured once. Student's t, with as many degrees
    of freedom as there are stretches of sqrt(n) blocks."""
    (blocks_a, seeds_a, tokens), (blocks_b, seeds_b, tokens_b) = a, b
    if len(blocks_a) != len(blocks_b) or tokens != tokens_b:
        raise Refused(f"scored on different streams: {tokens:,} and {tokens_b:,} tokens")
    d = blocks_a - blocks_b
    n, lags = len(d), math.isqrt(len(d))
    centred = d - d.mean()
    covariance = [(centred[k:] * centred[:n - k]).sum() / n for k in range(lags + 1)]
    text = max(0.0, covariance[0] + 2 * sum((1 - k / (lags + 1)) * covariance[k] for k in range(1, lags + 1))) * n / tokens ** 2
    seed = dataset.get("seed_sd", 0.0) ** 2 * (1 / len(seeds_a) + 1 / len(seeds_b))
    mean, error = float(d.sum() / tokens), math.sqrt(text + seed)
    t, p = student(max(1, n // (lags + 1) - 1))
    width = error * np.interp(-0.05, -p, t)
    chance = float(np.interp(abs(mean) / error, t, p)) if error else float(mean == 0)
    return {"mean": mean, "interval": (mean - width, mean + width), "p": chance, "text": math.sqrt(text), "seed": math.sqrt(seed), "blocks": n}

def compare_command(args):
    scores, tracks = [read_scores(path) for path in (args.a, args.b)], read_tracks()
    track = read_json(Path(args.a.split(",")[0]) / "record.json").get("track")
    dataset = tracks["datasets"][tracks["tracks"][track]["dataset"]] if track in tracks["tracks"] else {}
    for letter, path, (_, seeds, _) in zip("AB", (args.a, args.b), scores):
        print(f"{letter}  {path}\n   val_loss {seeds.mean():.6f} nats per token" + (
            f", {len(seeds)} seeds: {' '.join(f'{s:.6f}' for s in seeds)}, standard deviation {seeds.std(ddof=1):.6f}" if len(seeds) > 1 else ", one seed"))
    c = compare_scores(*scores, dataset)
    print(f"A - B  {c['mean']:+.6f} nats per token, 95% interval {c['interval'][0]:+.6f} to {c['interval'][1]:+.6f}, p = {c['p']:.2g}")
    seed = f"the seed {c['seed']:.6f} (from the dataset's spread, {dataset['seed_sd']})" if c["seed"] else "the seed not counted: tracks.json knows no spread"
    print(f"standard errors: the text {c['text']:.6f} (paired, {c['blocks']} blocks of {BLOCK:,} tokens), {seed}")

def source_of(path):
    """The script of a record or run folder, as lines."""
    folder = Path(path)
    try:
        record = read_json(folder / "record.json")
        return split_log((folder / Path(record.get("runs", [{}])[0].get("log", "log.txt")).name).read_bytes())[0].decode().splitlines()
    except (OSError, ValueError, AttributeError) as e:
        raise Refused(f"{path}: no log with a script in it ({e})")

def diff_command(args):
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"} if sys.stdout.isatty() else {}
    for line in difflib.unified_diff(source_of(args.a), source_of(args.b), str(args.a), str(args.b), lineterm=""):
        line = printable(line)  # a stranger's script must not hide its lines
        print(f"{colours[line[0]]}{line}\033[0m" if line[:1] in colours else line)

# ---- submit -----------------------------------------------------------------------------------------------------------

def submit(runs, slug, note, by, root=ROOT, now=None):
    """Make a record of finished runs, the seeds of one recipe. Returns its folder."""
    now = now or datetime.datetime.now(datetime.UTC)
    if not re.fullmatch(NAME, f"{now:%Y-%m-%d}_{slug}"):
        raise Refused(f"--slug {slug}: small letters, digits and -, at most 40")
    try:
        text = note.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise Refused(f"--note {note}: cannot be read ({e})")
    if not re.match(r"# \S.*\n", text):
        raise Refused(f"--note {note}: begin it with a line '# What this record is'; it becomes the description on the board")
    if not by:
        raise Refused("--by: name the contributors, with commas between; git config user.name gives none")
    claims = []
    for run in runs:
        try:
            claims.append(read_json(run / "record.json"))
            weights = sorted(run.glob("weights-*.pt"))
            digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in weights)).hexdigest()
            claims[-1]["weights_sha256"] = digest
            track = claims[0]["track"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Refused(f"{run}: not the folder of a finished run ({type(e).__name__}: {e})")
        if not weights:
            raise Refused(f"{run}: holds no weights, so its test stream cannot be scored")
    tracks = read_tracks(root)
    if track not in tracks["tracks"]:
        raise Refused(f"{runs[0]}: track {track!r} is not in records/tracks.json")
    name = tracks["tracks"][track]["dataset"]
    folder = root / "records" / track / f"{now:%Y-%m-%d}_{slug}"
    if folder.exists():
        raise Refused(f"{folder}: exists; choose another --slug")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".submit-", dir=folder.parent))
    try:
        (staged / "README.md").write_text(text)
        for i, (run, claim) in enumerate(zip(runs, claims)):
            number = f"_{i + 1}" if i else ""
            claim |= {"log": f"log{number}.txt", "val_nll": f"val_nll{number}.npy"}
            for kept, made in (("log.txt", claim["log"]), ("val_nll.npy", claim["val_nll"])):
                shutil.copyfile(run / kept, staged / made)
        record = {"track": track, "date": f"{now:%Y-%m-%d}", "submitted": f"{now:%Y-%m-%dT%H:%M:%SZ}", "description": text.splitlines()[0][2:].strip(),
                  "contributors": by, "runs": claims}
        write_json(staged / "record.json", record)
        refuse_faults(verify_record(staged, root, tested=False), staged, folder)
        # only now, with nothing left to mend, is the test stream looked at: once for each run, by the script in its own log
        digest = expected_hashes(root, tracks, name)["test.bin"]
        test = read_shard(root / "data" / name / "test.bin", digest if digest != OPEN else None)
        for i, (run, claim) in enumerate(zip(runs, claims)):
            print(f"{run}: scoring the test stream", flush=True)
            with tempfile.TemporaryDirectory() as tmp:
                nll = Scorer(run_command(run, tmp)[0], tmp, 24 * 3600)(test)
            sums = np.add.reduceat(nll, np.arange(0, len(nll), BLOCK))
            claim |= {"test_nll": claim["val_nll"].replace("val", "test"), "test_loss": float(sums.sum() / (len(test) - 1))}
            np.save(staged / claim["test_nll"], sums)
        write_json(staged / "record.json", record)
        staged.chmod(0o755)
        staged.rename(folder)
        staged = folder  # taken away again if it does not hold
        refuse_faults(verify_record(folder, root), folder, folder)
        staged = None
    except OSError as e:
        raise Refused(f"{e.filename}: {e.strerror}")
    finally:
        if staged:
            shutil.rmtree(staged)
    return folder

def refuse_faults(faults, staged, folder):
    if faults:
        lines = "\n".join(fault.replace(staged.name, folder.name) for fault in faults)
        raise Refused(f"no record was made, for it would not verify:\n{lines}")

def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")

def submit_command(args):
    by = [name.strip() for name in (args.by or git_name()).split(",") if name.strip()]
    try:
        folder = submit(args.runs, args.slug, args.note, by)
    except Broken as e:
        raise Refused(f"no record was made: --score {e}")
    print(f"{os.path.relpath(folder)} holds the record; python records/leaderboard.py render puts it on the board")

def git_name():
    return subprocess.run(["git", "config", "user.name"], cwd=ROOT, capture_output=True, text=True).stdout.strip()

# ---- render -----------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- board: python records/leaderboard.py render -->", "<!-- end of board -->"

def on_curve(points, loss, what="train_tokens"):
    """(how many tokens, or `what`, the baseline needs for a loss; "", or "<" or "≥" where that is a bound): linear between the
    measured points, and nothing beyond them."""
    points = sorted(points, key=lambda p: p["train_tokens"])
    losses = [p["val_loss"] for p in points]
    if loss > losses[0]:
        return points[0][what], "<"
    if loss < losses[-1]:
        return points[-1][what], "≥"
    return float(np.interp(-loss, [-x for x in losses], [p[what] for p in points])), ""

def data_efficiency(curve, loss, budget):
    """(baseline's tokens for this loss / budget, bound)."""
    tokens, bound = on_curve(curve["points"], loss)
    return tokens / budget, bound

def compute_multiplier(curve, loss, flops):
    if not all("train_flops" in p for p in curve["points"]):
        return None
    needed, bound = on_curve(curve["points"], loss, "train_flops")
    return needed / flops, bound

def short(x):
    """1234567 -> 1.23M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"

def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

def times(ratio):
    return "" if ratio is None else f"{ratio[1]}{ratio[0]:.2f}x" if ratio[0] < 10 else f"{ratio[1]}{ratio[0]:.1f}x"

def board_rows(root, tracks, baselines, track):
    """The track's records and the published ones, best first, each a dict of cells."""
    rules = tracks["tracks"][track]
    budget, curve = tracks["datasets"][rules["dataset"]]["train_tokens"], baselines[rules["dataset"]]
    rows = []
    for folder, record in earlier_records(root, track, "~"):
        mean, runs, loss = (lambda what: mean_loss(record, what)), record["runs"], mean_loss(record)
        link = folder.relative_to(root).as_posix()
        efficiency = data_efficiency(curve, loss, budget) if curve["points"] else None
        rows.append({
            "loss": f"{loss:.4f}" + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""), "bpb": f"{mean('val_bpb'):.4f}",
            "data": times(efficiency), "compute": times(compute_multiplier(curve, loss, mean("train_flops"))) if curve["points"] else "",
            "gap": f"{round(mean('test_loss') - loss, 4) + 0.0:+.4f}", "params": short(mean("parameters")), "use": short(mean("score_flops_per_token")),
            "seen": short(mean("tokens_seen")), "time": duration(mean("train_seconds")), "hardware": runs[0]["hardware"],
            "what": record["description"], "date": record["date"], "by": ", ".join(record["contributors"]),
            "files": f"[note]({link}/README.md) [log]({link}/{runs[0]['log']})", "value": loss, "efficiency": efficiency, "name": folder.name})
    for r in tracks["tracks"][track].get("references", []):
        rows.append({"loss": f"{r['val_loss']:.3f}", "data": times(data_efficiency(curve, r["val_loss"], budget)), "what": f"*{r['what']}*",
                     "date": r["date"], "by": r["by"], "files": f"[source]({r['url']})", "value": r["val_loss"]})
    rank = 0
    for row in sorted(rows, key=lambda r: r["value"]):
        if "name" in row:
            rank += 1
            row["rank"] = str(rank)
        yield row

RESULT = {"rank": "#", "loss": "val loss (nats per token)", "data": "data efficiency", "what": "description", "date": "date", "by": "contributors", "files": "files"}
COST = {"rank": "#", "bpb": "bits per byte", "gap": "test gap", "compute": "compute multiplier", "params": "parameters",
        "use": "FLOPs per scored token", "seen": "tokens seen", "time": "training", "hardware": "hardware"}

def table(columns, rows):
    """Lines of Markdown, one for each row, and an empty one."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns.values(), *([row.get(name, "") for name in columns] for row in rows))]
    return [lines[0], "|" + " --- |" * len(columns), *lines[1:], ""]

def board(root):
    """The text between the markers of README.md, and the pictures to draw: {path: (function, data)}."""
    tracks = read_tracks(root)
    baselines = read_json(root / "records" / "baselines.json")
    text, pictures = [], {}
    for track, rules in tracks["tracks"].items():
        rows = list(board_rows(root, tracks, baselines, track))
        text += [f"### {track}", "", f"{rules['title']}."]
        if not rows:
            text += ["", "No record yet.", ""]
            continue
        own = [row for row in rows if "name" in row]
        text += ["", *table(RESULT, rows)]
        if own:
            text += ["What they cost, by the same numbers:", "", *table(COST, own)]
            curve = baselines[rules["dataset"]]
            drawn = {"records": [(r["name"], r["value"], r["efficiency"]) for r in sorted(own, key=lambda r: -r["value"])], "track": track,
                     "budget": tracks["datasets"][rules["dataset"]]["train_tokens"], "points": curve["points"]}
            for kind, draw, words in (("progress", draw_progress, "loss and data efficiency, record by record"),
                                      ("curve", draw_curve, "the baseline's loss on more tokens, and the records at the budget")):
                paths = {theme: f"records/pictures/{track}_{kind}_{theme}.svg" for theme in ("light", "dark")}
                pictures |= {path: (draw, drawn, theme) for theme, path in paths.items()}
                text += [f'<picture><source media="(prefers-color-scheme: dark)" srcset="{paths["dark"]}">'
                         f'<img alt="{track}: {words}" src="{paths["light"]}"></picture>', ""]
    return "\n".join(text), pictures

INK = {"light": ("#1f2328", "#d0d7de", "#0969da", "#bc4c00"), "dark": ("#e6edf3", "#30363d", "#4493f8", "#f0883e")}  # text, grid, records, baseline

def figure(theme, columns, height):
    """A matplotlib figure as wide as a page of GitHub, on no background, and its axes. Text becomes paths: it looks the same everywhere."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    text, grid, _, _ = INK[theme]
    plt.rcParams.update({"svg.hashsalt": "tokenrun", "svg.fonttype": "path", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                         "text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text, "axes.edgecolor": grid,
                         "grid.color": grid, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False})
    return plt.subplots(1, columns, figsize=(9, height), sharey=columns > 1, squeeze=False, layout="constrained")

def draw_progress(data, theme):
    """Each record a line of its own, the newest last: its loss, and its data efficiency."""
    names = [name[11:] for name, _, _ in data["records"]]
    fig, [[left, right]] = figure(theme, 2, 1.4 + 0.32 * len(names))
    _, _, blue, _ = INK[theme]
    y = np.arange(len(names))
    left.plot([loss for _, loss, _ in data["records"]], y, "o-", color=blue)
    left.set(xlabel="validation loss (nats per token)", yticks=y, yticklabels=names)
    left.margins(x=0.18)
    right.barh(y, [e[0] for _, _, e in data["records"]], color=blue, height=0.6)
    right.set(xlabel="data efficiency (baseline tokens / budget)")
    right.margins(x=0.14)
    for i, (_, loss, efficiency) in enumerate(data["records"]):
        left.annotate(f"{loss:.4f}", (loss, i), (7, -3), textcoords="offset points", fontsize=9)
        right.annotate(times(efficiency), (efficiency[0], i), (4, -3), textcoords="offset points", fontsize=9)
    left.invert_yaxis()
    return fig

def draw_curve(data, theme):
    """The baseline's loss against its tokens; each record at the budget, and a line to where the baseline needs as much."""
    fig, [[ax]] = figure(theme, 1, 4.4)
    _, _, blue, orange = INK[theme]
    points = sorted((p["train_tokens"] / 1e6, p["val_loss"]) for p in data["points"])
    tokens = np.geomspace(points[0][0], points[-1][0], 200)  # linear between the points, as data efficiency is read, is bent on this axis
    ax.plot(tokens, np.interp(tokens, *zip(*points)), color=orange)
    ax.plot(*zip(*points), "o", color=orange, label="baseline: one epoch of the plain recipe")
    budget = data["budget"] / 1e6
    for name, loss, (ratio, bound) in data["records"]:
        ax.plot([budget, budget * ratio], [loss, loss], ":", color=blue, linewidth=1)
    ax.plot([budget] * len(data["records"]), [loss for _, loss, _ in data["records"]], "D", color=blue, label=f"records on {budget:g}M tokens")
    name, loss, efficiency = min(data["records"], key=lambda r: r[1])
    ax.annotate(f"{name[11:]}: {times(efficiency)}", (budget * efficiency[0] ** 0.5, loss), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    ax.set(xscale="log", xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    ax.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
    ax.minorticks_off()
    ax.legend()
    return fig

def stale(root):
    """What render would change: {path: function that writes it}."""
    for folder in record_folders(root):
        for fault in verify_record(folder, root):
            raise Refused(f"the board holds only what verifies: {fault}")
    text, pictures = board(root)
    readme, changes = root / "README.md", {}
    before = readme.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise Refused(f"{readme}: lacks the lines {BEGIN} and {END}, or has them twice")
    head, tail = before.split(BEGIN)[0], before.split(END)[1]
    after = f"{head}{BEGIN}\n{text}\n{END}{tail}"
    if after != before:
        changes[readme] = lambda: readme.write_text(after)
    for name, (draw, data, theme) in pictures.items():
        # matplotlib's output differs between versions, so a picture is known by what it was drawn from, not by its bytes
        digest = hashlib.sha256((json.dumps([data, theme, INK]) + inspect.getsource(draw) + inspect.getsource(figure)).encode()).hexdigest()[:16]
        path = root / name
        if not path.exists() or digest not in path.read_text()[:2000]:
            changes[path] = lambda path=path, draw=draw, data=data, theme=theme, digest=digest: save_picture(path, draw(data, theme), digest)
    for path in (root / "records" / "pictures").glob("*.svg"):
        if path.relative_to(root).as_posix() not in pictures:
            changes[path] = path.unlink
    return changes

def save_picture(path, fig, digest):
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, transparent=True, metadata={"Date": None, "Description": f"drawn from {digest}"})

def render_command(args):
    changes = stale(ROOT)
    for path, write in changes.items():
        print(f"{os.path.relpath(path)}: {'stale; run python records/leaderboard.py render' if args.check else 'written'}")
        if not args.check:
            write()
    if not changes:
        print("the board is up to date")
    return bool(changes and args.check)

# ---- command line -----------------------------------------------------------------------------------------------------

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
        print("\n".join(faults) if faults else f"{os.path.relpath(folder, ROOT)}: holds", flush=True)
        found = found or bool(faults)
    return found

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("submit", help="make a record of finished runs, the seeds of one recipe")
    one.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    one.add_argument("--slug", required=True, help="the record's name: small letters, digits and -")
    one.add_argument("--note", required=True, type=Path, help="Markdown: what changed, why it helps, what was measured")
    one.add_argument("--by", help="contributors, with commas between [git config user.name]")
    one.set_defaults(run=submit_command)
    one = commands.add_parser("verify", help="recompute what records claim [all of them]")
    one.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    one.add_argument("--smoke", action="store_true", help="also train each record's script at toy size and audit it: RUNS THE SUBMITTED CODE")
    one.add_argument("--seconds", type=int, default=600, metavar="S", help="with --smoke: time limit of each step of it [600]")
    one.set_defaults(run=verify_command)
    for name, command, what in (("compare", compare_command, "is the difference of two losses more than chance?"),
                                ("diff", diff_command, "what changed in the script from A to B")):
        one = commands.add_parser(name, help=what)
        one.add_argument("a", metavar="A")
        one.add_argument("b", metavar="B")
        one.set_defaults(run=command)
    one = commands.add_parser("render", help="write the board into README.md and draw the pictures")
    one.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is stale")
    one.set_defaults(run=render_command)
    args = parser.parse_args(argv)
    try:
        sys.exit(1 if args.run(args) else 0)
    except Refused as e:
        print(f"leaderboard.py: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # diff | head
        os._exit(0)

if __name__ == "__main__":
    main()
