"""
Is one loss better than another by more than chance, and would it be a record? leaderboard.py compare.
"""

import functools
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

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
    seeds_wanted,
    standing_record,
    today,
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


@functools.lru_cache(maxsize=64)
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


class Spread(NamedTuple):
    """Standard deviation of a loss from seed to seed, in nats per token.

    df: the degrees of freedom with which it is known. source: in words.
    """

    sd: float
    df: int
    source: str


def seed_spread(seeds, dataset):
    """The Spread that counts for a side with these losses.

    tracks.json states one for the dataset (seed_sd and seed_df, as leaderboard.py spread finds them), because
    most sides have too few seeds to tell. A side with FEWEST_SEEDS or more of its own that differ by more has
    shown a larger spread, and that one counts, with the degrees of freedom of the stated one.
    """
    stated = dataset.get("seed_sd", 0.0)
    own = 0.0
    if len(seeds) >= FEWEST_SEEDS:
        own = float(seeds.std(ddof=1))
    if own > stated:
        df = max(len(seeds) - 1, dataset.get("seed_df", 0))
        return Spread(own, df, f"of its own {len(seeds)} seeds")
    if stated:
        return Spread(stated, dataset["seed_df"], "stated in tracks.json")
    few = f"not counted: tracks.json states none, and it has fewer than {FEWEST_SEEDS} seeds"
    return Spread(0.0, 1, few)


def compare_scores(a, b, dataset):
    """The paired test of two read_scores(), with each side's spread of seeds from seed_spread()."""
    return paired_test(a, b, seed_spread(a[1], dataset), seed_spread(b[1], dataset))


def paired_test(a, b, spread_a, spread_b):
    """Mean of the difference a - b in nats per token, its 95% interval and p-value, from two read_scores().

    Two things make it uncertain. The text: the difference varies from block to block, and neighboring blocks,
    often of one document, vary together. So their covariances up to sqrt(n) blocks apart count, too (Newey
    and West 1987, Bartlett weights), and there are as many degrees of freedom as stretches of sqrt(n) blocks.
    The seed: another one gives another loss, so a single lucky one must prove little. Each side's Spread is
    divided by the square root of its number of seeds. standard_error() adds the two up.
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
    text = Spread(math.sqrt(max(0.0, variance) * n) / tokens, max(1, n // (lags + 1) - 1), "of the text")
    sides = [(spread_a, len(seeds_a)), (spread_b, len(seeds_b))]
    error, df = standard_error([(text, 1), *sides])

    mean = float(difference.sum() / tokens)
    t, p = student(df)
    width = error * np.interp(-0.05, -p, t)
    if error > 0:
        chance = p_value(abs(mean) / error, df)
    else:
        chance = 1.0 if mean == 0 else 0.0
    return {
        "mean": mean,
        "interval": (mean - width, mean + width),
        "error": error,
        "p": chance,
        "text": text,
        "seed": math.hypot(*(spread.sd / math.sqrt(count) for spread, count in sides)),
        "blocks": n,
        "df": df,
    }


def standard_error(parts):
    """(standard error, its degrees of freedom) of a sum of means. parts: [(Spread, number that is averaged)].

    The degrees of freedom are Welch's and Satterthwaite's: near those of the part that matters most. Where
    two parts have one spread, stated for both, an error in it is common to them, so they are one part.
    """
    variances = {}
    for spread, count in parts:
        variances[spread] = variances.get(spread, 0.0) + spread.sd**2 / count
    total = sum(variances.values())
    if total == 0:
        return 0.0, 1
    return math.sqrt(total), total**2 / sum(part**2 / spread.df for spread, part in variances.items())


def seeds_needed(c, sides, limit):
    """How many seeds A needs for p < limit, if its mean and spread stay; None where MOST_SEEDS are too few.

    c: a paired_test(). sides: (Spread, number of seeds) of A and of B in it.
    """
    (spread_a, n), side_b = sides
    for more in range(n + 1, MOST_SEEDS + 1):
        error, df = standard_error([(c["text"], 1), (spread_a, more), side_b])
        if p_value(abs(c["mean"]) / error, df) < limit:
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
        lines.append(f"  {more_seeds(c, scores, scores_b, dataset, limit)}")
    if "submitted" not in record:
        lines += ["next:", *next_steps(outcome, a, b, claims, tracks["tracks"][track])]
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
        f"standard errors: the text {c['text'].sd:.6f} (paired, {c['blocks']} blocks of {BLOCK:,} tokens), "
        f"the seeds {c['seed']:.6f}; together {c['df']:.1f} degrees of freedom",
    ]
    counted = True
    for letter, (_, seeds, _) in (("A", scores_a), ("B", scores_b)):
        spread = seed_spread(seeds, dataset)
        lines.append(f"  spread of {letter} from seed to seed: {spread.sd:.4f}, {spread.source}")
        counted = counted and spread.sd > 0
    if not counted:
        lines.append(
            "p leaves out that another seed gives another loss, so it is too small; "
            f"{FEWEST_SEEDS} seeds on each side would tell"
        )
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


def more_seeds(c, scores_a, scores_b, dataset, limit):
    """Whether more seeds of A would show the difference."""
    sides = [(seed_spread(seeds, dataset), len(seeds)) for _, seeds, _ in (scores_a, scores_b)]
    n = seeds_needed(c, sides, limit)
    if n is None:
        return f"even {MOST_SEEDS} seeds of A with this mean would not show that A is better"
    return f"{n} seeds of A with this mean would show that A is better"


def next_steps(outcome, a, b, claims, rules):
    """What to type next, after a comparison of runs."""
    track = claims[0]["track"]
    runs = [run.rstrip("/") for run in str(a).split(",")]
    enough = len(claims) >= seeds_wanted(rules, today())
    if outcome in ("first", "record") and enough:
        lines = [f"  python records/audit.py {run}" for run in runs]
        return [*lines, f"  python records/leaderboard.py submit {' '.join(runs)} --slug NAME --note NOTE.md"]
    if outcome in ("first", "record", "chance"):
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
