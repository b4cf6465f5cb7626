"""
Black-box audit of a scorer: does each probability depend on the strict prefix alone, and do they sum to one?

    python records/audit.py runs/NAME
    python records/audit.py --command 'python my_scorer.py {tokens} {nll}' --track pocket [--claimed NLL.npy]

The scorer is any command that reads {tokens}, a shard (one stream) or a .npy of uint16 [n_streams, length]
(independent streams), and writes {nll}, a float .npy of the same shape: each token's negative log-likelihood
in nats, 0 for the first token of a stream. For a run it is the --score of the script in the run's own log, so
that code is run here. The audit looks at nothing but these files, draws new tests every time (--seed repeats
them), and prints one line for each check with its figure and its limit. Exit status: 0 if all checks hold, 1
if one does not, 2 for a mistake on the command line.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import (
    BLOCK,
    ROOT,
    Refused,
    known_hash,
    printable,
    read_json,
    read_npy,
    read_shard,
    read_tracks,
    split_log,
    write_shard,
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
    """A command with {tokens} and {nll} in it, as a function of token ids. Each call uses new file names."""

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
        name = os.urandom(6).hex()
        output = self.folder / f"{name}_out.npy"
        if tokens.ndim == 1:
            sent = self.folder / f"{name}.bin"
            write_shard(sent, tokens)
        else:
            sent = self.folder / f"{name}.npy"
            np.save(sent, tokens.astype(np.uint16))
        self.run(sent, output, tokens)
        try:
            nll = read_npy(output, 8 * tokens.size + 4096)
        except ValueError as e:
            raise Broken(f"its output cannot be read ({e})")
        check_nll(nll, tokens)
        sent.unlink()
        output.unlink()
        return nll.astype(np.float64)

    def run(self, sent, output, tokens):
        words = []
        for word in self.command:
            words.append(word.replace("{tokens}", str(sent)).replace("{nll}", str(output)))
        try:
            status, last = run_limited(words, self.seconds)
        except OSError as e:
            raise Broken(f"{words[0]}: {e.strerror}")
        if status is None:
            raise Broken(f"took longer than {self.seconds:,} s for {tokens.size:,} tokens")
        if status != 0:
            raise Broken(f"exit status {status} for {list(tokens.shape)} tokens: {last}")


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
# off by SUM.
TOKEN = 0.15
MEAN = 0.003
SUM = 0.02

# In noise, a fair scorer exceeds this much evidence with a probability of at most 1e-6 (Markov).
EVIDENCE = math.log(1e6)


class Audit:
    """The checks of one scorer.

    val: the track's validation stream, uint16 [n]. claimed: the content of the val_nll.npy that the scorer
    must reproduce. part: use only a random part of the stream, of about so many tokens. All checks draw from
    rng.
    """

    def __init__(self, score, val, vocab_size, rng, claimed=None, part=None, show=print):
        self.score = score
        self.val = np.asarray(val)
        self.V = vocab_size
        self.rng = rng
        self.claimed = claimed
        self.show = show
        self.faults = []

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

    def rows(self, n, length=None):
        """n random pieces of the validation text, [n, length]."""
        length = length or self.length
        starts = self.rng.integers(len(self.text) - length + 1, size=n)
        return np.stack([self.text[i : i + length] for i in starts])

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
        evidence, where = noise_evidence(nll, self.V)
        self.report(
            name,
            evidence <= EVIDENCE,
            f"{nll.size:,} uniform tokens: evidence of {evidence:.1f} nats against a fair scorer{where} "
            f"(limit {EVIDENCE:.1f}); mean {nll.mean():.3f}, a uniform scorer has {math.log(self.V):.3f}",
        )

    def run(self):
        """All checks, the cheapest first. Returns the faults, one line each."""
        try:
            base = self.rows(16)
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
        cut = base[source]
        for row, p, replacement in zip(cut, cuts, self.rng.permutation(other)):
            old = row[p]
            row[p:] = replacement[p:]
            if row[p] == old:
                row[p] = (old + 1) % self.V
        moved = self.score(cut) - nll[source]
        before += [row[:p] for row, p in zip(moved, cuts)]

        futures = f"{n + len(cuts)} changed futures ({len(window_ends)} window ends seen)"
        self.alike("causality", np.concatenate([part[-4:] for part in before]), f"{futures} just behind")
        self.alike("causality, far", np.concatenate([part[:-4] for part in before]), futures)

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
        for n, length in ((8, 48), (1, 500)):
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
        """The same after three long prefixes.

        Here the tokens that are most frequent in the text stand for a large vocabulary: the sum of their
        probabilities is at most one.
        """
        p = int(self.rng.integers(self.length // 3, self.length))
        prefixes = self.rows(3, p + 1)
        frequent = np.argsort(-np.bincount(self.text, minlength=self.V))[:257]
        likely = np.unique([*frequent, *prefixes[:, p]])
        rows = np.repeat(prefixes, len(likely), axis=0)
        rows[:, p] = np.tile(likely, 3)
        sums = np.exp(-self.score(rows)[:, p]).reshape(3, -1).sum(1)
        if len(likely) < self.V:
            sums = np.maximum(1.0, sums)
        return [(total, p) for total in sums]

    def long_streams(self):
        """Streams up to the validation's own length; the first is that itself, sent as a shard.

        A scorer that behaves on short rows only, or that knows the validation stream when it meets it, shows
        here.
        """
        nll = self.score(self.text)
        if self.claimed is not None:
            self.reproduction(nll)
        self.spliced(nll)
        self.likely_tokens()
        self.beginning(nll)
        n = len(self.text)
        length = int(self.rng.integers(min(3000, n // 8) // 2, n // 8 + 1))
        self.fair("noise, alone", self.score(self.noise(length))[None, 1:])

    def spliced(self, nll):
        """One stream for three tests: the text as it is, then text with some noise in it, then noise alone.

        It is sent as a row, in case the scorer knows shards.
        """
        n = len(self.text)
        first = int(self.rng.integers(n // 8, n // 2))
        pure = int(self.rng.integers(n // 2, 3 * n // 4))
        at = first + np.flatnonzero(self.rng.random(pure - first) < 0.03)
        mixed = self.text.copy()
        mixed[at] = self.noise(len(at))
        mixed[pure:] = self.noise(n - pure)
        got = self.score(mixed[None])[0]
        difference = got[:first] - nll[:first]
        self.alike("recognition", difference, f"noise from token {first:,} on, in the whole stream,")
        self.fair("noise, spliced", got[at][None])
        self.fair("noise, long", got[pure:][None])

    def beginning(self, nll):
        """Another text in the first tokens of a stream must not move what is scored long after them."""
        n = len(self.text)
        length = min(n, max(n // 8, 20_000))
        replaced = min(500, length // 8)
        other = self.text[:length].copy()
        other[:replaced] = self.rows(1, replaced)[0]
        shift = (self.score(other) - nll[:length])[length // 4 :]
        shift = shift[: len(shift) // 10 * 10].reshape(10, -1).mean(1)
        mean = shift.mean()
        limit = 0.005 + 4 * shift.std(ddof=1) / math.sqrt(10)
        self.report(
            "beginning",
            abs(mean) <= limit,
            f"another text in the first {replaced} tokens moved the mean of those from {length // 4:,} on by "
            f"{mean:+.2g} nats (limit {limit:.2g})",
        )

    def likely_tokens(self):
        """Text in which about every eighth token is drawn again, from a distribution q that is known.

        It is the token that was there (0.2), one that elsewhere follows the same two tokens (0.3) or the same
        one (0.3), or any token (0.2). Whatever came before, E[p / q] = 1 for a normalized scorer. One that
        raises the probability of what is likely anyway, which noise seldom hits, gains here.
        """
        share_same, share_two, share_one, share_any = (0.2, 0.3, 0.3, 0.2)
        text = self.text.astype(np.int64)
        n = len(text)
        at = 2 + np.flatnonzero(self.rng.random(n - 2) < 0.2)
        at = at[np.diff(at, prepend=-3) > 2]

        # What precedes each token of the text: two tokens, as one number, or one.
        two_before = np.append([-1, -1], text[:-2] * self.V + text[1:-1])
        one_before = np.append([-1], text[:-1])
        after_two, times_two = self.followers(text, two_before, at)
        after_one, times_one = self.followers(text, one_before, at)
        which = self.rng.choice(4, size=len(at), p=(share_same, share_two, share_one, share_any))
        anything = self.rng.integers(self.V, size=len(at))
        drawn = np.choose(which, [text[at], after_two, after_one, anything])

        q = share_same * (drawn == text[at]) + share_any / self.V
        for before, times, share in ((two_before, times_two, share_two), (one_before, times_one, share_one)):
            pairs = np.sort(before * self.V + text)
            low, high = occurrences(pairs, before[at] * self.V + drawn)
            q += share * (high - low) / times

        changed = self.text.copy()
        changed[at] = drawn
        p = np.exp(-self.score(changed)[at])
        evidence = log_mean_exp(bets_on(p / q))
        self.report(
            "likely tokens",
            evidence <= EVIDENCE,
            f"{len(at):,} tokens drawn from what is likely: evidence of {evidence:.1f} nats against a fair "
            f"scorer (limit {EVIDENCE:.1f})",
        )

    def followers(self, text, before, at):
        """For each place in `at`: a random token that somewhere follows the same context, how many do."""
        order = np.argsort(before, kind="stable")
        low, high = occurrences(before[order], before[at])
        return text[order[self.rng.integers(low, high)]], high - low

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


def bets_on(ratio):
    """ln of prod(1 + b (ratio - 1)) for ten bets b, from ratios p / q [n] on tokens drawn from q.

    Each product has an expectation of at most 1.
    """
    bets = np.array([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001])
    with np.errstate(divide="ignore"):
        return np.array([np.log1p(b * (ratio - 1)).sum() for b in bets])


def noise_evidence(nll, vocab_size):
    """(ln of an e-value against a fair scorer, where it comes from) on uniform tokens, nll [rows, n] in nats.

    Whatever came before, a causal and normalized scorer has E[V p] = 1 for a uniform token. So prod(1 + b (V
    p - 1)) has expectation 1 for any bet b in [0, 1], over any positions chosen beforehand, and so has the
    mean of several such products. A cheat at all positions is caught by a high bet, a sparse one by a low
    bet, one at fixed places in every row by the bets on each place, and one at every m-th token by those on
    each period. None of them sees a gain at fewer than about one token in V, at places that follow no period.
    """
    ratio = vocab_size * np.exp(-nll)
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
        source, _, _ = split_log((run / "log.txt").read_bytes())
        record = read_json(run / "record.json")
        claimed = read_npy(run / "val_nll.npy", 1 << 24)
        track = str(record["track"])
    except OSError as e:
        raise Refused(f"{e.filename}: {e.strerror}; name the folder of a finished run")
    except (ValueError, KeyError, TypeError) as e:
        raise Refused(f"{run}: not the folder of a finished run ({e})")
    script = Path(folder) / "script.py"
    script.write_bytes(source)
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
    val = read_shard(root / "data" / name / "val.bin", known_hash(dataset, "val.bin"))
    score = Scorer(command, folder, seconds)
    return Audit(score, val, dataset["vocab_size"], rng, claimed, part, show).run()


def check_args(args):
    if (args.run is None) == (args.command is None) or (args.run and (args.track or args.claimed)):
        raise Refused("name a run folder, or give --command with --track and --claimed as you need them")
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
    track = args.track or "pocket"
    with tempfile.TemporaryDirectory() as folder:
        return audit_command(words, track, folder, args.seconds, rng, claimed, args.part)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    parser.add_argument("--command", help="any scorer, with {tokens} and {nll} where the files go")
    parser.add_argument("--track", help="with --command: whose validation stream to use [pocket]")
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
