"""
Is one loss better than another by more than chance, and what changed between their scripts?
"""

import difflib
import functools
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import BLOCK, Refused, printable, read_json, read_npy, read_tracks, split_log


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
