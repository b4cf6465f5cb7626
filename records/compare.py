"""
Is one loss better than another by more than chance, and would it be a record? leaderboard.py compare.
"""

import functools
import math
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from judge import faults_of
from reading import (
    BLOCK,
    ROOT,
    Refused,
    expected_hashes,
    mean_loss,
    read_json,
    read_npy,
    read_tracks,
    require_keys,
    same_folder,
    standing_record,
)

# A record's own spread of seeds counts from so many seeds on.
FEWEST_SEEDS = 3

# compare looks no further for a number of seeds that would show a difference.
MOST_SEEDS = 20


# ---- statistics --------------------------------------------------------------------------------------------


def read_runs(path):
    """[(claims, summed NLL of each block [n])] of each seed on one side of a comparison.

    path: a record, or run folders with commas between them. claims: a run's part of record.json.
    """
    runs = []
    for part in str(path).split(","):
        folder = Path(part)
        try:
            record = read_json(folder / "record.json")
            for claims in record.get("runs", [record]):
                require_keys(claims, "track", "val_tokens")
                file = Path(claims.get("val_nll", "val_nll.npy")).name
                runs.append((claims, read_npy(folder / file, 1 << 24)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            what = f"{type(e).__name__}: {e}"
            raise Refused(f"{part}: neither a record nor the folder of a finished run ({what})")
    return runs


def read_scores(path):
    """(summed NLL of each block [n], mean over the seeds; losses of the seeds; number of scored tokens).

    path: as read_runs() takes it. Refused where the seeds are scored on different streams.
    """
    runs = read_runs(path)
    sums = [run_sums for _, run_sums in runs]
    tokens = {claims["val_tokens"] for claims, _ in runs}
    if len(tokens) != 1 or len({len(s) for s in sums}) != 1:
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


def p_value(t, df):
    """The probability of a |t| at least as large in Student's t, both sides."""
    values, tail = student(df)
    return float(np.interp(t, values, tail))


def seed_spread(seeds, dataset):
    """(standard deviation of a side's loss from seed to seed, where it comes from).

    tracks.json states one for the dataset (seed_sd), measured once, because most records have a single seed.
    A side with enough seeds of its own that differ by more has shown a larger spread, and that one counts.
    """
    stated = dataset.get("seed_sd", 0.0)
    own = 0.0
    if len(seeds) >= FEWEST_SEEDS:
        own = float(seeds.std(ddof=1))
    if own > stated:
        return own, f"of its own {len(seeds)} seeds"
    if stated:
        return stated, "stated in tracks.json"
    return 0.0, f"not counted: tracks.json states none, and it has fewer than {FEWEST_SEEDS} seeds"


def compare_scores(a, b, dataset):
    """The paired test of two read_scores(), with each side's spread of seeds from seed_spread()."""
    spread_a, _ = seed_spread(a[1], dataset)
    spread_b, _ = seed_spread(b[1], dataset)
    return paired_test(a, b, spread_a, spread_b)


def paired_test(a, b, spread_a, spread_b):
    """Mean of the difference a - b in nats per token, its 95% interval and p-value, from two read_scores().

    Two things make it uncertain. The text: the difference varies from block to block, and neighboring blocks,
    often of one document, vary together. So their covariances up to sqrt(n) blocks apart count, too (Newey
    and West 1987, Bartlett weights). The seed: another one gives another loss, so a single lucky one must
    prove little. Each side's spread is divided by the square root of its number of seeds. Student's t has as
    many degrees of freedom as there are stretches of sqrt(n) blocks.
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
    seed_error = math.hypot(spread_a / math.sqrt(len(seeds_a)), spread_b / math.sqrt(len(seeds_b)))
    error = math.hypot(text_error, seed_error)

    mean = float(difference.sum() / tokens)
    df = max(1, n // (lags + 1) - 1)
    t, p = student(df)
    width = error * np.interp(-0.05, -p, t)
    if error > 0:
        chance = p_value(abs(mean) / error, df)
    else:
        chance = 1.0 if mean == 0 else 0.0
    return {
        "mean": mean,
        "interval": (mean - width, mean + width),
        "p": chance,
        "text": text_error,
        "seed": seed_error,
        "blocks": n,
        "df": df,
    }


def seeds_needed(c, n, spread_a, limit):
    """How many seeds A needs for p < limit, if its mean stays; None where even MOST_SEEDS are too few.

    c: a paired_test() of n seeds of A with this spread.
    """
    rest = c["text"] ** 2 + c["seed"] ** 2 - spread_a**2 / n
    for more in range(n + 1, MOST_SEEDS + 1):
        error = math.sqrt(max(0.0, rest) + spread_a**2 / more)
        if p_value(abs(c["mean"]) / error, c["df"]) < limit:
            return more
    return None


# ---- the verdict -------------------------------------------------------------------------------------------


def compare(a, b=None, root=ROOT):
    """Lines that say whether A is better than B, whether it would be a record, and what to type next.

    a and b: as read_runs() takes them. Without b, it is the record that A has to beat: the best of those that
    were submitted before A, or of all where A is a run.
    """
    claims = [run_claims for run_claims, _ in read_runs(a)]
    track = claims[0]["track"]
    tracks = read_tracks(root)
    if track not in tracks["tracks"]:
        raise Refused(
            f"{a}: its track {track!r} is not in records/tracks.json; choose a run of a track there"
        )
    dataset = tracks["datasets"][tracks["tracks"][track]["dataset"]]
    folder = Path(str(a).split(",")[0])
    record = read_json(folder / "record.json")
    standing = standing_record(root, track, folder)
    if b is None and standing is not None:
        b = os.path.relpath(standing[0])
    against_standing = b is not None and standing is not None and same_folder(b, standing[0])

    scores = read_scores(a)
    lines = side("A", a, scores)
    c = None
    if b is not None:
        scores_b = read_scores(b)
        c = compare_scores(scores, scores_b, dataset)
        lines += [*side("B", b, scores_b), *test_lines(c, scores, scores_b, dataset)]
    faults = all_faults(a, claims, root, tracks)
    lines += [f"A cannot become a record: {fault}" for fault in faults]

    limit = tracks["rule"]["p"]
    outcome = outcome_of(c, limit, against_standing, faults)
    lines.append(f"verdict: {verdict(outcome, c, limit, track, standing)}")
    if outcome == "chance" and c["mean"] < 0:
        lines.append(f"  {more_seeds(c, scores, dataset, limit)}")
    if "submitted" not in record:
        lines += ["next:", *next_steps(outcome, a, b, claims)]
    elif b is not None:
        lines += ["next:", f"  python records/leaderboard.py diff {b} {a}"]
    return lines


def side(letter, path, scores):
    """Lines about one side of a comparison: its loss, and those of its seeds."""
    _, seeds, _ = scores
    line = f"   val_loss {seeds.mean():.6f} nats per token"
    if len(seeds) > 1:
        losses = " ".join(f"{loss:.6f}" for loss in seeds)
        line += f", {len(seeds)} seeds: {losses}, standard deviation {seeds.std(ddof=1):.6f}"
    else:
        line += ", one seed"
    return [f"{letter}  {path}", line]


def test_lines(c, scores_a, scores_b, dataset):
    """Lines about a paired test: the difference, how uncertain it is, and why."""
    low, high = c["interval"]
    interval = f"95% interval {low:+.6f} to {high:+.6f}"
    lines = [
        f"A - B  {c['mean']:+.6f} nats per token, {interval}, p = {c['p']:.2g}",
        f"standard errors: the text {c['text']:.6f} (paired, {c['blocks']} blocks of {BLOCK:,} tokens), "
        f"the seeds {c['seed']:.6f}",
    ]
    for letter, (_, seeds, _) in (("A", scores_a), ("B", scores_b)):
        spread, source = seed_spread(seeds, dataset)
        lines.append(f"  spread of {letter} from seed to seed: {spread:.4f}, {source}")
    return lines


def all_faults(path, claims, root, tracks):
    """Why the runs of one side cannot become a record, each reason once."""
    hashes = expected_hashes(root, tracks, tracks["tracks"][claims[0]["track"]]["dataset"])
    faults = []
    try:
        for run_claims in claims:
            for fault in faults_of(run_claims, tracks, hashes):
                if fault not in faults:
                    faults.append(fault)
    except (KeyError, TypeError, AttributeError) as e:
        raise Refused(f"{path}: its record.json is incomplete ({type(e).__name__}: {e})")
    return faults


def outcome_of(c, limit, against_standing, faults):
    """What came out, in one word. c: a paired test, or None where there is no record to compare with."""
    if c is not None and c["p"] >= limit:
        return "chance"
    if c is not None and c["mean"] > 0:
        return "worse"
    if faults:
        return "faults"
    if c is None:
        return "first"
    if against_standing:
        return "record"
    return "better"


def verdict(outcome, c, limit, track, standing):
    if outcome == "first":
        return f"track {track} has no record to beat: this is the first"
    if c is None:
        return f"track {track} has no record to beat, but this is none, for the reasons above"
    p = f"p = {c['p']:.2g}"
    if outcome == "chance":
        return f"not more than chance, {p}; a record needs p < {limit:g}"
    if outcome == "worse":
        return f"worse, {p}"
    if outcome == "faults":
        return f"better, {p}, but no record, for the reasons above"
    if outcome == "record":
        return f"better, {p}: a record"
    if standing is None:
        return f"better, {p}; track {track} has no record to beat"
    return f"better, {p}; the record to beat is {standing[0].name}, {mean_loss(standing[1]):.4f}"


def more_seeds(c, scores, dataset, limit):
    """Whether more seeds of A would show the difference."""
    _, seeds, _ = scores
    spread, _ = seed_spread(seeds, dataset)
    n = seeds_needed(c, len(seeds), spread, limit)
    if n is None:
        return f"even {MOST_SEEDS} seeds of A with this mean would not show that A is better"
    return f"{n} seeds of A with this mean would show that A is better"


def next_steps(outcome, a, b, claims):
    """What to type next, after a comparison of runs."""
    track = claims[0]["track"]
    runs = [run.rstrip("/") for run in str(a).split(",")]
    if outcome in ("first", "record"):
        lines = [f"  python records/audit.py {run}" for run in runs]
        return [*lines, f"  python records/leaderboard.py submit {' '.join(runs)} --slug NAME --note NOTE.md"]
    if outcome == "chance":
        seed = 1 + max(run_claims["seed"] for run_claims in claims)
        other = f"{runs[0]}_seed{seed}"
        return [
            f"  python train_gpt.py --track {track} --seed {seed} --run_dir {other} [the other options of A]",
            f"  python records/leaderboard.py compare {','.join([*runs, other])}",
        ]
    if outcome == "faults":
        return [f"  python train_gpt.py --track {track} --run_dir runs/NAME [options within the limits]"]
    if outcome == "better":
        return [f"  python records/leaderboard.py compare {a}"]
    return [f"  python records/leaderboard.py diff {b} {runs[0]}"]


def compare_command(args):
    for line in compare(args.a, args.b):
        print(line)
