"""
Black-box audit of a scorer: does each probability depend on the strict prefix alone, and do they sum to one?

    python records/audit.py runs/NAME
    python records/audit.py --command 'python my_scorer.py {tokens} {nll}' --track pocket [--claimed NLL.npy]
    python records/audit.py --command '...' --val SHARD --vocab_size V [--unseen SHARD]

The scorer is any command that reads {tokens}, a shard (one stream) or a .npy of uint16 [n_streams, length]
(independent streams), and writes {nll}, a float .npy of the same shape: each token's negative log-likelihood
in nats, 0 for the first token of a stream. For a run it is the --score of the script in the run's own log, so
that code is run here. The audit looks at nothing but these files, draws new tests every time (--seed repeats
them), and prints one line for each check with its figure and its limit. Exit status: 0 if all checks hold, 1
if one does not, 2 for a mistake on the command line. audit.md shows how to audit another project's scorer.
"""

import argparse
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import (
    BLOCK,
    MAX_LOG_BYTES,
    ROOT,
    Refused,
    known_hash,
    printable,
    read_json,
    read_npy,
    read_plain,
    read_shard,
    read_tracks,
    split_log,
    write_shard,
    write_sources,
)


class Broken(Exception):
    """The scorer broke the contract: it failed, or what it wrote is not the NLL of its tokens."""


# ---- the scorer --------------------------------------------------------------------------------------------


def run_limited(command, seconds):
    """Run a command, and what it starts in its process group, for at most so many seconds.

    Returns its exit status, None if it took too long, and the last line that it printed, fit for a terminal.
    """
    # A script that was taken out of a log is in another folder, and may import data.prepare.
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # This also ends what it left in the background.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        size = out.seek(0, os.SEEK_END)
        out.seek(max(0, size - 10_000))
        lines = out.read().decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else "nothing printed"
    return status, printable(last[:200])


class Scorer:
    """A command with {tokens} and {nll} in it, as a function of token ids. Each call has its own folder."""

    def __init__(self, command, folder, seconds):
        self.command = command
        self.folder = Path(folder)
        self.seconds = seconds
        self.calls = 0
        self.tokens = 0

    def __call__(self, tokens):
        """NLL in nats, float64, in the shape of tokens: [n], sent as a shard, or [n_streams, length]."""
        self.calls += 1
        self.tokens += tokens.size
        folder = self.folder / os.urandom(6).hex()
        folder.mkdir()
        output = folder / "nll.npy"
        if tokens.ndim == 1:
            sent = folder / "tokens.bin"
            write_shard(sent, tokens)
        else:
            sent = folder / "tokens.npy"
            np.save(sent, tokens.astype(np.uint16))
        self.run(sent, output, tokens)
        try:
            nll = read_npy(output, 8 * tokens.size + 4096)
        except ValueError as e:
            raise Broken(f"its output cannot be read ({e})")
        if tokens.ndim == 1 and nll.shape == (1, len(tokens)):
            # Many scorers keep a shard as a batch of one stream.
            nll = nll[0]
        check_nll(nll, tokens)
        shutil.rmtree(folder)
        return nll.astype(np.float64)

    def run(self, sent, output, tokens):
        words = []
        for word in self.command:
            words.append(word.replace("{tokens}", str(sent)).replace("{nll}", str(output)))
        try:
            status, last = self.start(words, sent.parent)
        except OSError as e:
            raise Broken(f"{words[0]}: {e.strerror}")
        if status is None:
            raise Broken(f"took longer than {self.seconds:,} s for {tokens.size:,} tokens")
        if status != 0:
            raise Broken(f"exit status {status} for {list(tokens.shape)} tokens: {last}")

    def start(self, words, folder):
        """Run a command that writes into this folder. Returns what run_limited() does."""
        return run_limited(words, self.seconds)


def check_nll(nll, tokens):
    """Broken, where this cannot be the NLL of these tokens."""
    if nll.shape != tokens.shape or nll.dtype.kind != "f":
        raise Broken(f"wrote {nll.dtype} {list(nll.shape)} for tokens {list(tokens.shape)}")
    bad = ~np.isfinite(nll) | (nll < 0)
    if bad.any():
        where = np.argwhere(bad)[0]
        raise Broken(f"NLL {nll[tuple(where)]} at {where.tolist()}: must be finite and 0 or more")
    first = nll[..., 0]
    if np.any(first):
        raise Broken(
            f"NLL {np.max(first):.6g} for the first token of a stream: it has no context, and counts 0"
        )


# ---- checks ------------------------------------------------------------------------------------------------

# Two scores of the same token may differ by rounding: in another batch, kernels add in another order. A logit
# of 15 in bf16 is exact to 2**-8 of itself, 0.06; the softmax's mean over them is far steadier. So a single
# token may move by TOKEN nats, the absolute differences may average MEAN, and a sum of probabilities may be
# off by SUM. MEAN leaves room for a GPU whose scores have a noise of 0.003 nats: two scores then differ by
# 0.0034 on average.
TOKEN = 0.15
MEAN = 0.005
SUM = 0.02

# In noise, a fair scorer exceeds this much evidence with a probability of at most 1e-6 (Markov).
EVIDENCE = math.log(1e6)


class Audit:
    """The checks of one scorer.

    val: the track's validation stream, uint16 [n]. claimed: the content of the val_nll.npy that the scorer
    must reproduce. part: use only a random part of the stream, of about so many tokens. budget and beyond:
    the tokens that a run may train on, and those that follow them in train.bin, uint16. Without the latter,
    there is no tail check. All checks draw from rng.
    """

    def __init__(
        self, score, val, vocab_size, rng, claimed=None, part=None, show=print, budget=(), beyond=()
    ):
        self.score = score
        self.val = np.asarray(val)
        self.V = vocab_size
        self.rng = rng
        self.claimed = claimed
        self.show = show
        self.budget = np.asarray(budget)
        self.beyond = np.asarray(beyond)
        self.faults = []

        # The NLL of `text`, once it is scored.
        self.nll = None

        # `text` is the longest stream that is scored; it begins at token `at` of validation.
        part = (part or 0) // BLOCK * BLOCK
        self.whole = part == 0 or part >= len(self.val)
        if self.whole:
            self.at = 0
            self.text = self.val
        else:
            # A part begins with a block in which a document begins. So from the second block on, a scorer has
            # seen all that it could remember of the current document.
            begins = np.unique(np.flatnonzero(self.val == self.val[0]) // BLOCK)
            begins = begins[begins <= (len(self.val) - part) // BLOCK]
            self.at = BLOCK * int(self.rng.choice(begins))
            self.text = self.val[self.at : self.at + part]

        # Rows of the short tests have this length: longer than most windows.
        self.length = min(2304, len(self.text) // 4)

    def report(self, name, holds, figure):
        if holds:
            self.show(f"ok    {name:<15} {figure}")
        else:
            self.show(f"FAULT {name:<15} {figure}")
            self.faults.append(f"{name}: {figure}")

    def rows(self, n, length):
        """n random pieces of the validation text, [n, length]."""
        starts = self.rng.integers(len(self.text) - length + 1, size=n)
        return self.text[starts[:, None] + np.arange(length)]

    def noise(self, *shape):
        return self.rng.integers(self.V, size=shape).astype(np.uint16)

    def alike(self, name, difference, what):
        """Report differences that ought to be rounding: an array of nats."""
        difference = np.abs(difference)
        worst = difference.max()
        mean = difference.mean()
        self.report(
            name,
            worst <= TOKEN and mean <= MEAN,
            f"{what} moved {difference.size:,} tokens by {worst:.2g} nats at most (limit {TOKEN}), "
            f"{mean:.2g} on average ({MEAN})",
        )

    def fair(self, name, nll):
        """nll [rows, n] of tokens drawn uniformly from the vocabulary: no fair scorer gains on them."""
        evidence, where = evidence_against(self.V * np.exp(-nll))
        self.report(
            name,
            evidence <= EVIDENCE,
            f"{nll.size:,} uniform tokens: evidence of {evidence:.1f} nats against a fair scorer{where} "
            f"(limit {EVIDENCE:.1f}); mean {nll.mean():.3f}, a uniform scorer has {math.log(self.V):.3f}",
        )

    def run(self):
        """All checks, the cheapest first. Returns the faults, one line each."""
        try:
            base = self.rows(16, self.length)
            nll = self.score(base)
            self.determinism(base, nll)
            self.causality(base, nll)
            self.normalization()
            self.long_streams()
            counts = f"{self.score.calls} calls, {self.score.tokens:,} tokens"
            self.report("contract", True, f"{counts}: all NLL finite, 0 or more, 0 for first tokens")
        except Broken as e:
            self.report("contract", False, str(e))
        return self.faults

    def determinism(self, base, nll):
        again = self.score(base) - nll
        self.rounding = np.abs(again).max()
        self.alike("determinism", again, "scoring the same rows again")

    def causality(self, base, nll):
        """What comes at a position or after it must not move the NLL of the tokens before it.

        A look one token ahead at a single place shows only if the text is cut exactly there. So cuts fall
        where windows may end: at multiples of powers of two, and where the influence of one changed token is
        seen to end.
        """
        n, length = base.shape
        changed = base.copy()
        at = self.rng.integers(1, length, size=n)
        step = self.rng.integers(1, self.V, size=n)
        changed[range(n), at] = (changed[range(n), at] + step) % self.V
        moved = np.abs(self.among_others(base, nll, changed) - nll)
        before = [row[:p] for row, p in zip(moved, at)]
        window_ends = set()
        for row in moved:
            felt = np.flatnonzero(row > self.rounding)
            if len(felt) and felt[-1] + 1 < length:
                window_ends.add(int(felt[-1]) + 1)

        # From each cut on, a row is replaced by other text or by noise.
        cuts = self.cuts(window_ends, length)
        source = self.rng.integers(n, size=len(cuts))
        texts = len(cuts) // 2
        other = np.concatenate([self.rows(texts, length), self.noise(len(cuts) - texts, length)])
        changed = []
        for row, p, replacement in zip(base[source], cuts, self.rng.permutation(other)):
            changed.append(self.branch(row, p, replacement[p:]))
        moved = self.score(np.stack(changed)) - nll[source]
        before += [row[:p] for row, p in zip(moved, cuts)]

        futures = f"{n + len(cuts)} changed futures ({len(window_ends)} window ends seen)"
        self.alike("causality", np.concatenate([part[-4:] for part in before]), f"{futures} just behind")
        self.alike("causality, far", np.concatenate([part[:-4] for part in before]), futures)

    def branch(self, stream, cut, future):
        """The stream up to the cut, then this future, its first token changed where it is no change."""
        changed = np.concatenate([stream[:cut], future])
        if changed[cut] == stream[cut]:
            changed[cut] = (changed[cut] + 1) % self.V
        return changed

    def cuts(self, window_ends, length):
        """Where to cut rows of this length: at and just behind the ends of windows, and anywhere."""
        edges = list(self.rng.permutation(sorted(window_ends))[:8])
        for size in 2 ** np.arange(6, 12):
            if size < length:
                edges.append(size * int(self.rng.integers(1, length // size + 1)))
        cuts = []
        for edge in edges:
            cuts += [int(edge), int(edge) + 1, int(edge) + 2]
        cuts += self.rng.integers(1, length, size=16).tolist()
        return np.array([p for p in cuts if p < length])

    def among_others(self, base, nll, rows):
        """The NLL of `rows`, in a batch with half of the base rows, each twice, and with rows of noise.

        On the way, a row's NLL must not depend on its neighbors, neither on their order nor on a copy of
        itself among them; and the noise is tested as noise.
        """
        half = self.rng.permutation(len(base))[: len(base) // 2]
        noise = self.noise(16, self.length)
        batch = np.concatenate([base[half], rows, noise, base[half]])
        ends = np.cumsum([len(half), len(rows), len(noise)])
        first, of_rows, of_noise, second = np.split(self.score(batch), ends)
        self.alike(
            "independence",
            np.concatenate([first, second]) - nll[np.tile(half, 2)],
            "other neighbors, another order and a copy in the batch",
        )
        self.fair("noise, rows", of_noise[:, 1:])
        return of_rows

    def normalization(self):
        """The probabilities of all tokens that may follow a prefix sum to one."""
        sums = []
        for n, length in ((8, 32), (1, 300)):
            # With a large vocabulary, there are fewer prefixes, so that two million tokens are enough.
            n = min(n, 2_000_000 // (self.V * length))
            length = min(length, self.length)
            if n > 0 and length >= 2:
                sums += self.sums_over_vocabulary(n, length)
        if not sums:
            sums += self.sums_over_vocabulary(1, 16)
        sums += self.sums_over_likely_tokens()
        worst, where = max(sums, key=lambda found: abs(found[0] - 1))
        self.report(
            "normalization",
            abs(worst - 1) <= SUM,
            f"the probabilities after each of {len(sums)} prefixes sum to 1 within {abs(worst - 1):.2g} "
            f"(limit {SUM}): {worst:.4f} after {where} tokens",
        )

    def sums_over_vocabulary(self, n, length):
        """[(sum of the probabilities of all tokens, length of the prefix)] for n prefixes below `length`."""
        prefixes = self.rows(n, length)
        ends = self.rng.integers(max(1, length // 2), length, size=n)
        rows = np.repeat(prefixes, self.V, axis=0).reshape(n, self.V, length)
        for i, p in enumerate(ends):
            rows[i, :, p] = np.arange(self.V)
        nll = self.score(rows.reshape(n * self.V, length)).reshape(n, self.V, length)
        return [(np.exp(-nll[i, :, p]).sum(), int(p)) for i, p in enumerate(ends)]

    def sums_over_likely_tokens(self):
        """The same after three long prefixes, for the 32 likeliest tokens: their sum is at most one.

        These are the tokens that follow the prefix's last token most often in the text.
        """
        p = int(self.rng.integers(self.length // 3, self.length))
        prefixes = self.rows(3, p + 1)
        likely = []
        for prefix in prefixes:
            followers = self.text[1:][self.text[:-1] == prefix[p - 1]]
            likely.append(np.argsort(-np.bincount(followers, minlength=self.V))[:32])
        rows = np.repeat(prefixes, len(likely[0]), axis=0)
        rows[:, p] = np.concatenate(likely)
        sums = np.exp(-self.score(rows)[:, p]).reshape(3, -1).sum(1)
        return [(total, p) for total in np.maximum(1.0, sums)]

    def long_streams(self):
        """The validation stream itself, sent as a shard, and a second stream of its length."""
        nll = self.score(self.text)
        self.nll = nll
        if self.claimed is not None:
            self.reproduction(nll)
        self.another_beginning(nll)
        self.another_end(nll)
        length = int(self.rng.integers(min(3000, len(self.text) // 8) // 2, len(self.text) // 8 + 1))
        self.fair("noise, alone", self.score(self.noise(length))[None, 1:])

    def another_end(self, nll):
        """A stream that is the validation stream up to a cut: no scorer can tell it from that by its length.

        What follows the cut must not move the tokens before it. It serves checks of its own: text that no run
        may know, text with jumps, noise, and text with some noise in it.
        """
        n = len(self.text)
        cut, other = self.fork(nll, n // 4, 5 * n // 8)
        left = n - cut
        unseen, is_unseen = self.unseen_text(3 * left // 8)
        jumping, at, q = self.jumping_text(nll, 3 * left // 8)
        noise = self.noise(left // 8)
        noisy = self.rows(1, left - len(unseen) - len(jumping) - len(noise))[0]
        spliced = np.flatnonzero(self.rng.random(len(noisy)) < 0.05)
        noisy[spliced] = self.noise(len(spliced))
        ends = np.cumsum([cut, len(unseen), len(jumping), len(noise)])
        stream = np.concatenate([self.text[:cut], unseen, jumping, noise, noisy])
        stream[cut] = other
        got = self.score(stream)

        moved = got[:cut] - nll[:cut]
        self.alike("late cut", moved[-32:], f"what follows the cut at token {cut:,}")
        self.alike("recognition", moved[:-32], "the same, from the beginning of the stream on,")
        total = np.exp(-got[cut]) + np.exp(-nll[cut])
        self.report(
            "late sum",
            total <= 1 + SUM,
            f"the probabilities of two likely tokens there sum to {total:.4f} (limit {1 + SUM})",
        )
        _, of_unseen, of_jumping, of_noise, of_noisy = np.split(got, ends)
        if is_unseen:
            self.tail(nll, of_unseen, reference_nll(self.budget, stream, self.V)[:, cut : ends[1]])
        else:
            needed = f"{len(unseen):,} consecutive tokens that the scorer cannot know"
            self.show(f"skip  {'tail':<15} needs {needed}, past the budget in train.bin")
        self.jumps(of_jumping, at, q)
        self.fair("noise, long", of_noise[None])
        self.fair("noise, spliced", of_noisy[spliced][None])

    def fork(self, nll, low, high):
        """A place in this part of the text where two tokens share nearly all of the probability.

        Returns the place and the token that the text does not have there. Short rows tell: some places that
        are neither certain nor hopeless are scored with 8 other tokens each. In a long stream, too, the
        probabilities of the two add up to at most one. The token before the place is a hard one, if there
        are such places, for there a look ahead is worth most.
        """
        stream = self.text
        places = np.arange(low, high)
        p = np.exp(-nll[places])
        for wanted in ((p > 0.2) & (p < 0.8) & (nll[places - 1] > 1), (p > 0.2) & (p < 0.8)):
            if np.count_nonzero(wanted) >= 32:
                places = places[wanted]
                break
        places = self.rng.choice(places, size=32, replace=False)
        length = min(256, self.length)
        before = np.roll(stream, 1)
        two_before = np.roll(stream, 2)
        rows = []
        for place in places:
            after_one = before == before[place]
            after_two = after_one & (two_before == two_before[place])
            times = len(stream) * np.bincount(stream[after_two], minlength=self.V)
            times += np.bincount(stream[after_one], minlength=self.V)
            times[stream[place]] = -1
            tokens = [stream[place], *np.argsort(-times)[:8]]
            of_place = np.tile(stream[place - length + 1 : place + 1], (len(tokens), 1))
            of_place[:, -1] = tokens
            rows.append(of_place)
        rows = np.stack(rows)
        p = np.exp(-self.score(rows.reshape(-1, length))[:, -1]).reshape(rows.shape[:2])
        best = np.argmax(p[:, 0] + p[:, 1:].max(1))
        return int(places[best]), rows[best, 1 + np.argmax(p[best, 1:]), -1]

    def another_beginning(self, nll):
        """The beginning of a stream must not move what is scored long after it.

        The stream is the first third of the text with another text in its first tokens. It is sent as a row,
        in case the scorer knows shards.
        """
        n = len(self.text) // 3
        replaced = min(500, n // 8)
        stream = self.text[:n].copy()
        stream[:replaced] = self.rows(1, replaced)[0]
        shift = (self.score(stream[None])[0] - nll[:n])[n // 4 :]
        shift = shift[: len(shift) // 10 * 10].reshape(10, -1).mean(1)
        mean = shift.mean()
        limit = 0.005 + 4 * shift.std(ddof=1) / math.sqrt(10)
        self.report(
            "beginning",
            abs(mean) <= limit,
            f"another text in the first {replaced} tokens moved the mean of those from {n // 4:,} to {n:,} "
            f"by {mean:+.2g} nats (limit {limit:.2g})",
        )

    def unseen_text(self, length):
        """(tokens that no run may know [length], whether they are that).

        They are what follows the training budget in train.bin, from the beginning of a document on. Both
        are drawn from the same shuffled documents. So a scorer is as good on one as on the other, unless it
        has seen one of them. Where train.bin has no such text, they are another place of validation.
        """
        begins = np.flatnonzero(self.beyond == self.val[0])
        begins = begins[begins <= len(self.beyond) - length]
        if len(begins) == 0:
            return self.rows(1, length)[0], False
        begin = int(self.rng.choice(begins))
        return self.beyond[begin : begin + length].copy(), True

    def tail(self, nll, unseen_nll, unseen_reference):
        """Is the scorer as good on unseen text as on validation? A reference tells how hard each is.

        nll: of the text. unseen_nll, unseen_reference: of unseen text, [n] and [2, n]. Each token is compared
        with the validation tokens that are as hard for the reference.
        """
        reference = reference_nll(self.budget, self.text, self.V)
        cells, unseen_cells = cells_of(reference, unseen_reference)
        expected = np.bincount(cells, nll) / np.maximum(1, np.bincount(cells))
        residual = nll - expected[cells]
        unseen_residual = unseen_nll - expected[unseen_cells]
        gap = unseen_residual.mean()

        # Documents differ, so the standard error is that of the means of long pieces.
        n = len(nll)
        variance = 0
        for part in (residual, unseen_residual):
            means = part[: len(part) // (n // 40) * (n // 40)].reshape(-1, n // 40).mean(1)
            variance += means.var(ddof=1) / len(means)
        limit = 20_000 / n + 6 * math.sqrt(variance)
        self.report(
            "tail",
            abs(gap) <= limit,
            f"{len(unseen_nll):,} tokens past the training budget cost {gap:+.3f} nats more than "
            f"validation tokens that are as hard for a reference scorer (limit {limit:.2g})",
        )

    def jumping_text(self, nll, n):
        """n tokens that are pieces of the text. Returns (tokens, where tokens were drawn, their q).

        Where a piece ends, the next token is drawn from a distribution q that is known, and the text goes on
        from there. It is the token that came next in the text, with about the probability that the scorer
        gave it, or one that elsewhere follows the same two tokens (half of the rest), the same one (0.3 of
        it), or anything (0.2).
        """
        text = self.text.astype(np.int64)
        share = np.clip(np.exp(-nll), 0.05, 0.9)
        weights = (0.5, 0.3, 0.2)
        contexts = [np.roll(text, 2) * self.V + np.roll(text, 1), np.roll(text, 1), np.zeros_like(text)]
        order = [np.argsort(context, kind="stable") for context in contexts]
        ranges = [occurrences(context[o], context) for context, o in zip(contexts, order)]

        lengths = self.rng.integers(8, 40, size=n // 8 + 1)
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), n) + 1]
        goes_on = self.rng.random(len(lengths))
        which = self.rng.choice(len(contexts), size=len(lengths), p=weights)
        among = self.rng.random(len(lengths))
        starts = [int(self.rng.integers(len(text)))]
        ends = []
        for i, length in enumerate(lengths):
            end = (starts[-1] + int(length)) % len(text)
            ends.append(end)
            if goes_on[i] < share[end]:
                starts.append(end)
            else:
                low, high = ranges[which[i]]
                rank = low[end] + int(among[i] * (high[end] - low[end]))
                starts.append(int(order[which[i]][rank]))
        pieces = [text[np.arange(start, start + m) % len(text)] for start, m in zip(starts, lengths)]
        tokens = np.concatenate(pieces)[:n].astype(self.text.dtype)

        # The last piece is cut off, and no token was drawn where it ends.
        ends = np.array(ends[:-1])
        drawn = text[starts[1:-1]]
        at = np.cumsum(lengths[:-1])
        elsewhere = 0
        for weight, context, (low, high) in zip(weights, contexts, ranges):
            pairs = np.sort(context * self.V + text)
            of_pair, beyond_it = occurrences(pairs, context[ends] * self.V + drawn)
            elsewhere += weight * (beyond_it - of_pair) / (high - low)[ends]
        q = share[ends] * (drawn == text[ends]) + (1 - share[ends]) * elsewhere
        return tokens, at, q

    def jumps(self, nll, at, q):
        """nll: of what jumping_text() made. Whatever came before, E[p / q] = 1 for a causal and normalized
        scorer. One that raises the probability of what is likely anyway, which noise seldom hits, gains here.
        So does one that looks ahead: what follows the drawn token gives it away."""
        ratio = np.ones(len(nll))
        ratio[at] = np.exp(-nll[at]) / q
        evidence, where = evidence_against(ratio[None])
        self.report(
            "jumps",
            evidence <= EVIDENCE,
            f"{len(at):,} tokens drawn from what is likely, with text that goes on from them: evidence of "
            f"{evidence:.1f} nats against a fair scorer{where} (limit {EVIDENCE:.1f})",
        )

    def reproduction(self, nll):
        """val_nll.npy against the scorer's own NLL.

        Where the whole stream was scored, they are compared block by block. A part of the stream has other
        windows than the whole, and the document in which it begins is cut: there the mean is compared,
        without the first block.
        """
        starts = np.arange(0, len(nll), BLOCK)
        sums = np.add.reduceat(nll, starts)
        blocks = -(-len(self.val) // BLOCK)
        if self.claimed.shape != (blocks,) or self.claimed.dtype.kind != "f":
            claim = f"{self.claimed.dtype} {list(self.claimed.shape)}"
            self.report("reproduction", False, f"{claim} is claimed, the stream has {blocks} blocks")
            return
        claimed = self.claimed[self.at // BLOCK :][: len(sums)]
        difference = (sums - claimed) / np.minimum(BLOCK, len(nll) - starts)
        if not self.whole:
            difference = difference[1:]
        mean = abs(difference.mean())
        worst = np.abs(difference).max()
        if self.whole:
            holds = worst <= 0.01 and mean <= 0.0005
            limits = "0.01 and 0.0005: another machine rounds differently"
        else:
            limit = 0.02
            if len(difference) > 4:
                limit = min(limit, 0.002 + 4 * difference.std() / math.sqrt(len(difference)))
            holds = mean <= limit
            limits = f"mean {limit:.2g}: a part of the stream has other windows"
        self.report(
            "reproduction",
            holds,
            f"{len(difference)} blocks of the claimed NLL are off by {worst:.2g} nats per token at most, "
            f"{mean:.2g} in the mean (limits {limits})",
        )


def occurrences(ordered, keys):
    """(first index, one past the last index) of each key in an ordered array."""
    return np.searchsorted(ordered, keys, "left"), np.searchsorted(ordered, keys, "right")


def log_mean_exp(x):
    top = np.max(x)
    return float(top + np.log(np.mean(np.exp(x - top))))


def reference_nll(budget, stream, vocab_size):
    """The NLL of a stream under two simple scorers that know the training budget: [2, n] in nats.

    Both blend the counts of n-grams, each order discounted in favor of the next shorter one (Kneser and Ney,
    1995). The first counts in the budget alone, the second in what came before in the stream, too.
    """
    tokens = np.concatenate([budget, stream]).astype(np.uint64) + np.uint64(1)
    n = len(tokens)
    counted = np.stack([np.arange(n) < len(budget), np.ones(n, dtype=bool)])
    p = np.full((2, n), 1 / vocab_size)
    # A context is known by a hash: a polynomial modulo 2**64.
    context = np.zeros(n, dtype=np.uint64)
    reach = 0
    discount = 0.6
    for order in (0, 1, 2, 3, 4, 6, 8, 12, 20):
        while reach < order:
            reach += 1
            context = context * np.uint64(0x9E3779B97F4A7C15) + np.roll(tokens, reach)
        [times] = earlier(context * np.uint64(0xBF58476D1CE4E5B9) + tokens, counted)
        contexts, kinds = earlier(context, counted, counted & (times == 0))
        blend = (np.maximum(times - discount, 0) + discount * kinds * p) / np.maximum(contexts, 1)
        p = np.where(contexts > 0, blend, p)
    return -np.log(p[:, len(budget) :])


def earlier(keys, *flags):
    """How often the key of each place occurs before it, at places that are flagged.

    keys: [n]. flags: arrays of bool [2, n]. Returns an array of int [2, n] for each of them.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    firsts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    first = np.repeat(firsts, np.diff(np.append(firsts, len(keys))))
    counts = []
    for flag in flags:
        flag = flag[:, order]
        before = np.cumsum(flag, axis=1) - flag
        count = np.empty_like(before)
        count[:, order] = before - before[:, first]
        counts.append(count)
    return counts


def cells_of(reference, others, parts=8):
    """For tokens with these two reference NLLs, [2, n], and for others, [2, m]: the cell of each.

    The first NLL divides the n tokens into equal parts, and within each, the second one does.
    """
    cells = np.zeros(reference.shape[1], dtype=int)
    other_cells = np.zeros(others.shape[1], dtype=int)
    inner = np.arange(1, parts) / parts
    edges = np.quantile(reference[0], inner)
    part = np.searchsorted(edges, reference[0])
    other_part = np.searchsorted(edges, others[0])
    for i in range(parts):
        of_part = part == i
        of_other_part = other_part == i
        if of_part.any():
            edges = np.quantile(reference[1, of_part], inner)
            cells[of_part] = i * parts + np.searchsorted(edges, reference[1, of_part])
            other_cells[of_other_part] = i * parts + np.searchsorted(edges, others[1, of_other_part])
    return cells, other_cells


def bets_on(ratio):
    """ln of prod(1 + b (ratio - 1)) for ten bets b, from ratios p / q [n] on tokens drawn from q.

    Each product has an expectation of at most 1.
    """
    bets = np.array([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001])
    with np.errstate(divide="ignore"):
        return np.array([np.log1p(b * (ratio - 1)).sum() for b in bets])


def evidence_against(ratio):
    """(ln of an e-value against a fair scorer, where it comes from), from ratio [rows, n].

    A ratio is p / q for a token that was drawn from q, such as V p for a uniform one, and 1 for any other.
    Whatever came before, a causal and normalized scorer has E[p / q] = 1. So prod(1 + b (p / q - 1)) has
    expectation 1 for any bet b in [0, 1], over any positions chosen beforehand, and so has the mean of
    several such products. A cheat at all positions is caught by a high bet, a sparse one by a low bet, one at
    fixed places in every row by the bets on each place, and one at every m-th token by those on each period.
    On noise, none of them sees a gain at fewer than about one token in V, at places that follow no period.
    """
    parts = {"": log_mean_exp(bets_on(ratio))}

    # A bet of a half is for places where the cheat is certain, if it is there at all.
    half = np.log1p(0.5 * (ratio - 1))
    if len(half) > 1:
        place = half.sum(0)
        parts[f", at position {place.argmax() + 1} of each row"] = log_mean_exp(place)
    else:
        stream = half[0]
        periods = {}
        for m in [*range(2, 2049), 4096, 8192]:
            if 4 * m <= len(stream):
                periods[m] = log_mean_exp(stream[: len(stream) // m * m].reshape(-1, m).sum(0))
        if periods:
            best = max(periods, key=periods.get)
            parts[f", at every {best} tokens"] = log_mean_exp(np.array(list(periods.values())))

    total = log_mean_exp(np.array(list(parts.values())))
    where = max(parts, key=parts.get) if total > EVIDENCE else ""
    return total, where


# ---- command line ------------------------------------------------------------------------------------------


def run_command(run, folder):
    """(scorer command, track, claimed val_nll) of a run. The script in its log is written into `folder`."""
    try:
        sources, _ = split_log(read_plain(run / "log.txt", MAX_LOG_BYTES))
        script = write_sources(Path(folder), sources)
        record = read_json(run / "record.json")
        claimed = read_npy(run / "val_nll.npy", 1 << 24)
        track = str(record["track"])
    except OSError as e:
        raise Refused(f"{e.filename}: {e.strerror}; name the folder of a finished run")
    except (ValueError, KeyError, TypeError) as e:
        raise Refused(f"{run}: not the folder of a finished run ({e})")
    # A script that scores with the help of its training tokens looks for them beside itself.
    (Path(folder) / "data").symlink_to(ROOT / "data")
    command = [sys.executable, str(script), "--score", str(run.resolve())]
    return [*command, "--tokens", "{tokens}", "--nll", "{nll}"], track, claimed


def audit_run(run, seconds, rng, part=None, track=None, show=print, root=ROOT):
    """Audit a run on its track's validation stream, or on that of another track. Returns the faults."""
    with tempfile.TemporaryDirectory() as folder:
        command, own_track, claimed = run_command(run, folder)
        track = track or own_track
        return audit_command(command, track, folder, seconds, rng, claimed, part, show, root)


def audit_command(command, track, folder, seconds, rng, claimed=None, part=None, show=print, root=ROOT):
    tracks = read_tracks(root)
    if track not in tracks["tracks"]:
        choices = ", ".join(tracks["tracks"])
        raise Refused(f"track {track!r} is not in records/tracks.json; choose one of {choices}")
    name = tracks["tracks"][track]["dataset"]
    dataset = tracks["datasets"][name]
    data = root / "data" / name
    val = read_shard(data / "val.bin", known_hash(dataset, "val.bin"))
    train = np.empty(0, dtype=np.uint16)
    if (data / "train.bin").exists():
        train = read_shard(data / "train.bin", known_hash(dataset, "train.bin"))
    budget, beyond = np.split(train, [dataset["train_tokens"]])
    score = Scorer(command, folder, seconds)
    return Audit(score, val, dataset["vocab_size"], rng, claimed, part, show, budget, beyond).run()


def check_args(args):
    of_command = (args.track, args.claimed, args.val, args.vocab_size, args.unseen)
    if (args.run is None) == (args.command is None) or (args.run and any(of_command)):
        raise Refused("name a run folder, or give --command with --track and --claimed as you need them")
    if (args.val is None) != (args.vocab_size is None) or (args.unseen and not args.val):
        raise Refused("--val and --vocab_size go together, and --unseen goes with them")
    if args.val and args.track:
        raise Refused(f"--val {args.val} --track {args.track}: give one of them")
    if args.command and not ("{tokens}" in args.command and "{nll}" in args.command):
        raise Refused(f"--command {args.command!r}: must hold {{tokens}} and {{nll}}")
    if args.seed is not None and args.seed < 0:
        raise Refused(f"--seed {args.seed}: must be 0 or more")
    if args.part is not None and args.part < 2 * BLOCK:
        raise Refused(f"--part {args.part}: must be {2 * BLOCK} or more")


def audit(args):
    """The faults of what the command line names."""
    check_args(args)
    seed = args.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
    print(f"audit of {args.run or args.command}, --seed {seed}; this runs the scorer's code", flush=True)
    rng = np.random.default_rng(seed)
    if args.run:
        return audit_run(args.run, args.seconds, rng, args.part)
    claimed = None
    try:
        words = shlex.split(args.command)
        if args.claimed:
            claimed = read_npy(args.claimed, 1 << 24)
    except ValueError as e:
        raise Refused(f"--claimed {args.claimed} --command {args.command!r}: {e}")
    with tempfile.TemporaryDirectory() as folder:
        if args.val:
            val = read_tokens(args.val, args.vocab_size)
            unseen = read_tokens(args.unseen, args.vocab_size) if args.unseen else ()
            score = Scorer(words, folder, args.seconds)
            return Audit(score, val, args.vocab_size, rng, claimed, args.part, beyond=unseen).run()
        track = args.track or "pocket"
        return audit_command(words, track, folder, args.seconds, rng, claimed, args.part)


def read_tokens(path, vocab_size):
    """Tokens of a shard that is no track's. Refused where they are too few, or not of this vocabulary."""
    tokens = read_shard(path)
    if len(tokens) < 2 * BLOCK:
        raise Refused(f"{path}: {len(tokens):,} tokens; the audit needs {2 * BLOCK:,} or more")
    if tokens.max() >= vocab_size:
        raise Refused(f"{path}: holds token {tokens.max()}; --vocab_size must be larger")
    return tokens


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    parser.add_argument("--command", help="any scorer, with {tokens} and {nll} where the files go")
    parser.add_argument("--track", help="with --command: whose validation stream to use [pocket]")
    parser.add_argument(
        "--val", type=Path, metavar="SHARD", help="with --command: a validation stream that is no track's"
    )
    parser.add_argument("--vocab_size", type=int, metavar="V", help="with --val: the size of its vocabulary")
    parser.add_argument(
        "--unseen",
        type=Path,
        metavar="SHARD",
        help="with --val: text of the same kind that the scorer cannot know, for the tail check",
    )
    parser.add_argument(
        "--claimed", type=Path, metavar="NPY", help="with --command: a val_nll.npy that it must reproduce"
    )
    parser.add_argument(
        "--part",
        type=int,
        metavar="N",
        help="use a random part of the validation stream, N tokens long, where all of it takes too long",
    )
    parser.add_argument(
        "--seconds", type=int, default=3600, metavar="S", help="time limit of one call of the scorer [3600]"
    )
    parser.add_argument("--seed", type=int, help="repeat the tests of an earlier audit")
    args = parser.parse_args(argv)
    try:
        faults = audit(args)
    except Refused as e:
        print(f"audit.py: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(faults)} fault(s)" if faults else "all checks hold")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
