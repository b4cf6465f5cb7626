"""
Small scorers of bytes for the tests of the referee: honest ones, and one for each way to cheat.

    python tests/scorers.py KIND TOKENS OUT.npy       the same as a command, for the audit's --command

A scorer is a function of uint16 tokens [n_streams, length] or [n] that returns the NLL of each in nats. Every
cheat gains on real text, as cheats do.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
V = 257
BOS = 256

# The text is a script as a record's log holds it: it does not change when the project does.
LOG = ROOT / "records" / "pocket" / "2026-11-22_mtp-iha" / "log.txt"
TEXT = np.frombuffer(LOG.read_bytes(), np.uint8).astype(np.uint16)

# What lies between two blank lines is a document.
NEWLINE = ord("\n")
TEXT[:-1][(TEXT[:-1] == NEWLINE) & (TEXT[1:] == NEWLINE)] = BOS
TRAIN = np.append(BOS, TEXT[:59_999]).astype(np.uint16)
VAL = np.append(BOS, TEXT[59_999:119_998]).astype(np.uint16)


# ---- tables of probabilities -------------------------------------------------------------------------------


def pairs(first, second):
    """How often each token follows each, [V, V]."""
    both = first.astype(np.int64) * V + second
    return np.bincount(both, minlength=V * V).reshape(V, V).astype(float)


def conditional(counts):
    """P[i, j]: of j after i, every row summing to one."""
    smooth = counts + 0.2 * (counts.sum(0) + 1) / (counts.sum() + V) * V
    return smooth / smooth.sum(1, keepdims=True)


FOLLOWING = pairs(TRAIN[:-1], TRAIN[1:])
BIGRAM = conditional(FOLLOWING)
UNIGRAM = np.tile(conditional(FOLLOWING.sum(0, keepdims=True)), (V, 1))
BACKWARD = conditional(FOLLOWING.T)


# For scorers that are not deterministic.
GENERATOR = np.random.default_rng()


def nll(table, x):
    """Of x under P(next | token before), 0 for the first of each stream."""
    out = np.zeros(x.shape)
    out[..., 1:] = -np.log(table[x[..., :-1].astype(np.int64), x[..., 1:]])
    return out


# ---- honest scorers ----------------------------------------------------------------------------------------


def windowed(x, length):
    """The first token of each window of this length is predicted without context."""
    out = nll(BIGRAM, x)
    at = np.arange(x.shape[-1]) % length == 1
    out[..., at] = nll(UNIGRAM, x)[..., at]
    return out


def honest(x):
    return windowed(x, 256)


def other_context(x):
    return windowed(x, 777)


def adaptive(x):
    """Counts pairs as the stream goes, each stream from nothing."""
    if x.ndim > 1:
        return np.stack([adaptive(row) for row in x])
    before = x[:-1].astype(np.int64)
    seen = earlier(before)
    of_pair = earlier(before * V + x[1:])
    p = (of_pair + 5 * np.exp(-honest(x)[1:])) / (seen + 5)
    return np.append(0, -np.log(p))


def remembering(x):
    """Counts pairs as a document goes, each document from nothing."""
    if x.ndim > 1:
        return np.stack([remembering(row) for row in x])
    starts = np.flatnonzero((x == BOS) | (np.arange(len(x)) == 0))
    plain = honest(x)
    parts = []
    for start, end in zip(starts, [*starts[1:], len(x)]):
        parts += [plain[start : start + 1], adaptive(x[start:end])[1:]]
    return np.concatenate(parts)


def learning(x):
    """Test-time training: after every 32 tokens, a step of SGD on a bias for each token."""
    if x.ndim > 1:
        return np.stack([learning(row) for row in x])
    out = np.zeros(len(x))
    bias = np.zeros(V)
    for start in range(1, len(x), 32):
        after = x[start : start + 32]
        before = x[start - 1 : start - 1 + len(after)]
        p = BIGRAM[before] * np.exp(bias)
        p /= p.sum(1, keepdims=True)
        out[start : start + 32] = -np.log(p[range(len(after)), after])
        bias += 0.05 * (np.bincount(after, minlength=V) - p.sum(0))
    return out


def overlapping(stride):
    """Adaptive windows of 300 tokens, one beginning every `stride`. Each token is scored in the first."""

    def scorer(x):
        if x.ndim > 1:
            return np.stack([scorer(row) for row in x])
        parts = [adaptive(x[:300])]
        for start in range(stride, len(x) - 300 + stride, stride):
            parts.append(adaptive(x[start : start + 300])[300 - stride :])
        return np.concatenate(parts)

    scorer.__name__ = f"overlapping_{stride}"
    return scorer


def noisy(x):
    """Errors of 0.003 nats, other ones each time, as on a GPU."""
    out = np.abs(honest(x) + GENERATOR.normal(0, 0.003, x.shape))
    out[..., 0] = 0
    return out


def knowing(text):
    """A scorer that has learned this text by heart: it blends the counts of its n-grams, up to n = 6."""
    text = text.astype(np.int64)

    def scorer(x):
        x = x.astype(np.int64)
        p = np.full(x.shape, 1 / V)
        context = np.zeros_like(text)
        context_of_x = np.zeros_like(x)
        for n in range(1, 7):
            of_pair = occurring(context * V + text, context_of_x * V + x)
            blend = (of_pair + 2 * p) / (occurring(context, context_of_x) + 2)
            p = np.where(np.arange(x.shape[-1]) >= n - 1, blend, p)
            context = context * V + np.roll(text, n)
            context_of_x = context_of_x * V + np.roll(x, n, axis=-1)
        p[..., 0] = 1
        return -np.log(p)

    return scorer


def looking_up(text, scorer):
    """A scorer that finds its last eight tokens in this text and expects the token that follows there."""
    text = text.astype(np.int64)
    known = {text[i : i + 8].tobytes(): text[i + 8] for i in range(len(text) - 8)}

    def with_look_up(x):
        x = x.astype(np.int64)
        p = np.exp(-scorer(x))
        for i in range(8, len(x)):
            expected = known.get(x[i - 8 : i].tobytes())
            if expected is not None:
                p[i] = 0.1 * p[i] + 0.9 * (expected == x[i])
        return -np.log(p)

    return with_look_up


def occurring(keys, sought):
    """How often each of the sought keys occurs among the keys."""
    keys = np.sort(keys)
    return np.searchsorted(keys, sought, "right") - np.searchsorted(keys, sought, "left")


def earlier(keys):
    """How often each key occurred before its place."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(first, len(ordered)))
    out = np.empty(len(ordered))
    out[order] = np.arange(len(ordered)) - np.repeat(first, sizes)
    return out


sharp = knowing(TRAIN)
sharp.__name__ = "sharp"


# ---- cheats ------------------------------------------------------------------------------------------------


def peeking(x):
    """Predicts each token from the one after it as well."""
    out = honest(x)
    from_behind = BACKWARD[x[..., 2:].astype(np.int64), x[..., 1:-1]]
    out[..., 1:-1] = -np.log(0.5 * np.exp(-out[..., 1:-1]) + 0.5 * from_behind)
    return out


def peeking_across_edges(x):
    """Does so for the last token of each window only."""
    out = honest(x)
    at = np.arange(x.shape[-1]) % 256 == 0
    out[..., at] = peeking(x)[..., at]
    return out


def unnormalized(x):
    return 0.6 * honest(x)


def raised(x, at):
    """Gives the right token a high probability at these places."""
    at = at & (np.arange(x.shape[-1]) > 0)
    return np.where(at, np.minimum(honest(x), 0.1), honest(x))


def unnormalized_rarely(x):
    """At each 97th position."""
    return raised(x, np.arange(x.shape[-1]) % 97 == 50)


def unnormalized_after_a_letter(x):
    """Wherever the token before is one of a few rare ones."""
    return raised(x, np.isin(np.roll(x, 1, axis=-1), list(b"%/{}")))


def unnormalized_in_long_streams(x):
    if x.shape[-1] > 20_000:
        return 0.6 * honest(x)
    return honest(x)


def better_of_two(x):
    """Scores twice and keeps, for each token, the better."""
    return np.minimum(honest(x), nll(UNIGRAM, x))


def learning_from_other_rows(x):
    rows = np.atleast_2d(x)
    if len(rows) == 1:
        return honest(x)
    known = FOLLOWING + pairs(rows[:, :-1].ravel(), rows[:, 1:].ravel())
    return np.stack([nll(conditional(known - pairs(row[:-1], row[1:])), row) for row in rows])


def random(x):
    return honest(x) * GENERATOR.uniform(0.5, 1.5, size=(*x.shape[:-1], 1))


def knowing_validation(x):
    """Knows the validation stream when it meets all of it."""
    if np.array_equal(x, VAL):
        return 0.8 * honest(x)
    return honest(x)


def knowing_how_validation_begins(x):
    if np.array_equal(np.ravel(x)[:300], VAL[:300]):
        return 0.8 * honest(x)
    return honest(x)


def peeking_in_shards(x):
    return peeking(x) if x.ndim == 1 else honest(x)


def peeking_in_long_streams(x):
    """Looks ahead in streams of more than 20,000 tokens only."""
    return peeking(x) if x.shape[-1] > 20_000 else honest(x)


def peeking_late(x):
    """Looks ahead past token 20,000 only."""
    return np.where(np.arange(x.shape[-1]) > 20_000, peeking(x), honest(x))


def likelier(x, at, factor, scorer=honest):
    """Raises the probability of what is likely anyway."""
    out = scorer(x)
    at = at & (out < 2.3) & (np.arange(x.shape[-1]) > 0)
    return np.where(at, np.maximum(0, out - np.log(factor)), out)


def likelier_late(x):
    return likelier(x, np.arange(x.shape[-1]) >= 600, 1.5)


def likelier_in_long_streams(x):
    return likelier(x, x.shape[-1] > 20_000, 3)


def likelier_by_a_fifth(x):
    """In long streams, for a scorer that is often nearly sure."""
    return likelier(x, x.shape[-1] > 20_000, 1.2, sharp)


HONEST = [
    honest,
    sharp,
    other_context,
    adaptive,
    remembering,
    learning,
    noisy,
    overlapping(100),
    overlapping(256),
]

# The checks that must catch each; others may, too.
CHEATS = {
    peeking: ["causality"],
    peeking_across_edges: ["causality"],
    unnormalized: ["normalization", "noise, rows"],
    unnormalized_rarely: ["noise, rows", "noise, long"],
    unnormalized_after_a_letter: ["noise, rows", "noise, long"],
    unnormalized_in_long_streams: ["noise, long", "noise, spliced"],
    better_of_two: ["normalization"],
    learning_from_other_rows: ["independence"],
    random: ["determinism"],
    knowing_validation: ["recognition"],
    knowing_how_validation_begins: ["beginning"],
    peeking_in_shards: ["late cut", "jumps"],
    peeking_in_long_streams: ["late cut", "jumps"],
    peeking_late: ["late cut", "jumps"],
    likelier_late: ["normalization"],
    likelier_in_long_streams: ["jumps", "late sum"],
    likelier_by_a_fifth: ["late sum"],
}


def main(kind, source, out):
    tokens = np.load(source) if source.endswith(".npy") else np.fromfile(source, dtype="<u2")[512:]
    np.save(out, globals()[kind](tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
