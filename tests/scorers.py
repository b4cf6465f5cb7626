"""
Small scorers of bytes for the tests of the referee: honest ones, and one for each way to cheat. A scorer is a function of uint16
tokens [n_streams, length] or [n] that returns the NLL of each in nats. Every cheat gains on real text, as cheats do.

    python tests/scorers.py KIND TOKENS OUT.npy       the same as a command, for the audit's --command
"""
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
V, BOS = 257, 256

# a script as a record's log holds it: real text that does not change as the project does
TEXT = np.frombuffer((ROOT / "records" / "pocket" / "2026-11-22_mtp-iha" / "log.txt").read_bytes(), np.uint8).astype(np.uint16)
TEXT[:-1][(TEXT[:-1] == 10) & (TEXT[1:] == 10)] = BOS  # what stands between two blank lines is a document
TRAIN, VAL = (np.append(BOS, part).astype(np.uint16) for part in (TEXT[:59_999], TEXT[59_999:119_998]))

def pairs(first, second):
    """How often each token follows each, [V, V]."""
    return np.bincount(first.astype(np.int64) * V + second, minlength=V * V).reshape(V, V).astype(float)

def conditional(counts):
    """P[i, j]: of j after i, every row summing to one."""
    smooth = counts + 0.2 * (counts.sum(0) + 1) / (counts.sum() + V) * V
    return smooth / smooth.sum(1, keepdims=True)

BIGRAM, BACKWARD = conditional(pairs(TRAIN[:-1], TRAIN[1:])), conditional(pairs(TRAIN[1:], TRAIN[:-1]))
UNIGRAM = np.tile(conditional(pairs(TRAIN[:-1], TRAIN[1:]).sum(0, keepdims=True)), (V, 1))

def nll(table, x):
    """Of x under P(next | token before), 0 for the first of each stream."""
    out = np.zeros(x.shape)
    out[..., 1:] = -np.log(table[x[..., :-1].astype(np.int64), x[..., 1:]])
    return out

def windowed(x, T):
    """Honest: the first token of each window of T is predicted without context."""
    out, plain = nll(BIGRAM, x), nll(UNIGRAM, x)
    at = np.arange(x.shape[-1]) % T == 1
    out[..., at] = plain[..., at]
    return out

def honest(x):
    return windowed(x, 256)

def other_context(x):
    return windowed(x, 777)

def adaptive(x):
    """Honest: counts pairs as the stream goes, each stream from nothing."""
    if x.ndim > 1:
        return np.stack([adaptive(row) for row in x])
    before = x[:-1].astype(np.int64)
    seen, of_pair = earlier(before), earlier(before * V + x[1:])
    p = (of_pair + 5 * np.exp(-honest(x)[1:])) / (seen + 5)
    return np.append(0, -np.log(p))

def remembering(x):
    """Honest: counts pairs as a document goes, each from nothing."""
    starts = np.flatnonzero((x == BOS) | (np.arange(len(x)) == 0)) if x.ndim == 1 else None
    return np.stack([remembering(row) for row in x]) if starts is None else np.concatenate([
        np.append(honest(x)[at], adaptive(x[at:end])[1:]) for at, end in zip(starts, [*starts[1:], len(x)])])

def earlier(keys):
    """How often each key occurred before its place."""
    order = np.argsort(keys, kind="stable")
    s = keys[order]
    first = np.flatnonzero(np.append(True, s[1:] != s[:-1]))
    rank = np.arange(len(s)) - np.repeat(first, np.diff(np.append(first, len(s))))
    out = np.empty(len(s))
    out[order] = rank
    return out

def peeking(x):
    """Predicts each token from the one after it as well."""
    out = honest(x)
    later = -np.log(BACKWARD[x[..., 2:].astype(np.int64), x[..., 1:-1]])
    out[..., 1:-1] = -np.log(0.5 * np.exp(-out[..., 1:-1]) + 0.5 * np.exp(-later))
    return out

def peeking_across_edges(x, T=256):
    """Does so for the last token of each window only."""
    out, peek, at = honest(x), peeking(x), np.arange(x.shape[-1]) % T == 0
    out[..., at] = peek[..., at]
    return out

def unnormalized(x):
    return 0.6 * honest(x)

def sometimes(x, at):
    return np.where(at & (np.arange(x.shape[-1]) > 0), np.minimum(honest(x), 0.1), honest(x))

def unnormalized_rarely(x):
    """Gives the right token a high probability at each 97th position."""
    return sometimes(x, np.arange(x.shape[-1]) % 97 == 50)

def unnormalized_after_a_letter(x):
    """... wherever the token before is one of a few rare ones."""
    return sometimes(x, np.isin(np.roll(x, 1, axis=-1), list(b"%/{}")))

def unnormalized_in_long_streams(x):
    return 0.6 * honest(x) if x.shape[-1] > 20_000 else honest(x)

def better_of_two(x):
    """Scores twice and keeps, for each token, the better."""
    return np.minimum(honest(x), nll(UNIGRAM, x))

def learning_from_other_rows(x):
    rows = np.atleast_2d(x)
    if len(rows) == 1:
        return honest(x)
    counts = pairs(TRAIN[:-1], TRAIN[1:])
    return np.stack([nll(conditional(counts + pairs(np.delete(rows, i, 0)[:, :-1].ravel(), np.delete(rows, i, 0)[:, 1:].ravel())), row)
                     for i, row in enumerate(rows)])

def random(x, rng=np.random.default_rng()):
    return honest(x) * rng.uniform(0.5, 1.5, size=(*x.shape[:-1], 1))

def knowing_validation(x):
    """Knows the validation stream when it meets all of it."""
    return 0.8 * honest(x) if x.shape == VAL.shape and (x == VAL).mean() == 1 else honest(x)

def knowing_how_validation_begins(x):
    return 0.8 * honest(x) if (np.ravel(x)[:300] == VAL[:300]).all() else honest(x)

def peeking_in_shards(x):
    return peeking(x) if x.ndim == 1 else honest(x)

def likelier(x, at, factor=1.5):
    """Raises the probability of what is likely anyway."""
    out = honest(x)
    return np.where(at & (out < 2.3) & (np.arange(x.shape[-1]) > 0), np.maximum(0, out - np.log(factor)), out)

def likelier_late(x):
    return likelier(x, np.arange(x.shape[-1]) >= 600)

def likelier_in_long_streams(x):
    return likelier(x, x.shape[-1] > 20_000, 2)

HONEST = [honest, other_context, adaptive, remembering]
CHEATS = {  # the checks that must catch each; others may, too
    peeking: ["causality"], peeking_across_edges: ["causality"], unnormalized: ["normalization", "noise, rows"],
    unnormalized_rarely: ["noise, rows", "noise, long"], unnormalized_after_a_letter: ["noise, rows", "noise, long"],
    unnormalized_in_long_streams: ["noise, long", "noise, spliced"], better_of_two: ["normalization"],
    learning_from_other_rows: ["independence"], random: ["determinism"], knowing_validation: ["recognition"],
    knowing_how_validation_begins: ["beginning"], peeking_in_shards: ["recognition"], likelier_late: ["normalization"],
    likelier_in_long_streams: ["likely tokens"]}

if __name__ == "__main__":
    kind, source, out = sys.argv[1:]
    tokens = np.load(source) if source.endswith(".npy") else np.fromfile(source, dtype="<u2")[512:]
    np.save(out, globals()[kind](tokens))
