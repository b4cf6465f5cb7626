"""
Black-box audit of a scorer: is each token's probability made from its strict prefix, and do the probabilities sum to one?

    python records/audit.py runs/NAME
    python records/audit.py --command 'python my_scorer.py {tokens} {nll}' --track pocket [--claimed val_nll.npy]

The scorer is any command that reads {tokens}, a shard (one stream) or a .npy of uint16 [n_streams, length] (independent streams),
and writes {nll}, a float .npy of the same shape: each token's negative log-likelihood in nats, 0 for the first of a stream. For
a run it is the --score of the script in the run's own log: that code is run here. The audit looks at nothing but these files,
draws its tests anew each time (--seed repeats them), and prints one line for each check, with its figure and its limit. Exit
status: 0 if all hold, 1 if one does not, 2 for a mistake on the command line.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HEADER_INTS, MAGIC = 256, 20240520  # the shard format of data/README.md
OPEN = "set by the first record"    # in tracks.json, in place of a hash, where the shards cannot be had yet
BLOCK = 1000                        # tokens whose NLL val_nll.npy sums to one number

class Refused(Exception):
    """A mistake of whoever runs this: one line, exit status 2."""

class Broken(Exception):
    """The scorer did not keep the contract: it failed, or wrote something that is not the NLL of its tokens."""

# ---- files ------------------------------------------------------------------------------------------------------------

def read_tracks(root=ROOT):
    return json.loads((root / "records" / "tracks.json").read_text())

def known_hash(dataset, shard):
    """A shard's sha256, or None where tracks.json leaves it open."""
    return None if dataset["sha256"][shard] == OPEN else dataset["sha256"][shard]

def read_shard(path, sha256=None):
    """Token ids of a shard, uint16 [n], if its bytes are those that sha256 says."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise Refused(f"{path}: {e.strerror}; prepare the data: python data/prepare.py --help")
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise Refused(f"{path}: its sha256 is not the one of records/tracks.json; prepare the data again")
    header = np.frombuffer(data[:4 * HEADER_INTS], dtype="<i4")
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != 1 or len(data) != 4 * HEADER_INTS + 2 * int(header[2]):
        raise Refused(f"{path}: not a token shard; data/README.md has the format")
    return np.frombuffer(data, dtype="<u2", offset=4 * HEADER_INTS)

def write_shard(path, tokens):
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())

def read_npy(path, max_bytes):
    """The array of a .npy file. ValueError where it is not one, holds objects, or is larger than max_bytes."""
    if not os.path.isfile(path):
        raise ValueError("no such file, or not a plain one")
    size = os.path.getsize(path)
    if size > max_bytes:
        raise ValueError(f"{size:,} bytes, where {max_bytes:,} are the most that it can need")
    try:
        with open(path, "rb") as f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except Exception as e:  # a made-up header can raise anything
        raise ValueError(f"not a .npy file of numbers ({type(e).__name__}: {e})")

def split_log(log):
    """(source, name of the script, what follows in the log) of a run's log.txt, bytes. The source stands between its header, which tells its
    length and sha256, and an end mark, and is not searched for anything: it may contain any line."""
    header, _, rest = log.partition(b"\n")
    words = header.decode("utf-8", "replace").split(" ")
    end = b"\n==== end of source\n"
    if len(words) == 5 and words[:2] == ["====", "source"] and words[3].startswith("bytes=") and words[4].startswith("sha256="):
        n = int(words[3][6:]) if words[3][6:].isdecimal() and len(words[3]) < 16 else -1
        if 0 <= n <= len(rest) and rest[n:n + len(end)] == end:
            digest = hashlib.sha256(rest[:n]).hexdigest()
            if digest != words[4][7:]:
                raise ValueError(f"the header of the source claims sha256 {words[4][7:]}, the source has {digest}")
            return rest[:n], words[2], rest[n + len(end):]
    raise ValueError("does not begin with '==== source NAME bytes=N sha256=HEX' and a source of that length")

# ---- the scorer -------------------------------------------------------------------------------------------------------

def run_limited(command, seconds):
    """Run a command, and what it starts in its process group, for at most so many seconds. Returns (exit status or None, the last line that it
    printed, fit for a terminal)."""
    # a script taken out of a log stands elsewhere, and may import data.prepare
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also what it left in the background
            except ProcessLookupError:
                pass
            process.wait()
        out.seek(max(0, out.seek(0, os.SEEK_END) - 10_000))
        last = (out.read().decode("utf-8", "replace").strip().splitlines() or ["nothing printed"])[-1][:200]
        return status, printable(last)

def printable(text):
    """A stranger's text, unable to steer a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)

class Scorer:
    """A command with {tokens} and {nll} in it, as a function of token ids. Its files have new names every time."""
    def __init__(self, command, folder, seconds):
        self.command, self.folder, self.seconds, self.calls, self.tokens = command, Path(folder), seconds, 0, 0

    def __call__(self, tokens):
        """NLL in nats, float64, in the shape of tokens: [n] is sent as a shard, [n_streams, length] as .npy."""
        self.calls, self.tokens = self.calls + 1, self.tokens + tokens.size
        name = os.urandom(6).hex()
        sent, got = self.folder / f"{name}.{'bin' if tokens.ndim == 1 else 'npy'}", self.folder / f"{name}_out.npy"
        if tokens.ndim == 1:
            write_shard(sent, tokens)
        else:
            np.save(sent, tokens.astype(np.uint16))
        words = [word.replace("{tokens}", str(sent)).replace("{nll}", str(got)) for word in self.command]
        try:
            status, last = run_limited(words, self.seconds)
        except OSError as e:
            raise Broken(f"{words[0]}: {e.strerror}")
        if status is None:
            raise Broken(f"took longer than {self.seconds:,} s for {tokens.size:,} tokens")
        if status:
            raise Broken(f"exit status {status} for {list(tokens.shape)} tokens: {last}")
        try:
            nll = read_npy(got, 8 * tokens.size + 4096)
        except ValueError as e:
            raise Broken(f"its output cannot be read ({e})")
        if nll.shape != tokens.shape or nll.dtype.kind != "f":
            raise Broken(f"wrote {nll.dtype} {list(nll.shape)} for tokens {list(tokens.shape)}")
        sent.unlink()
        got.unlink()
        if not np.isfinite(nll).all() or nll.min() < 0:
            where = np.argwhere(~np.isfinite(nll) | (nll < 0))[0]
            raise Broken(f"NLL {nll[tuple(where)]} at {where.tolist()}: must be finite and 0 or more")
        if np.any(nll[..., 0]):
            raise Broken(f"NLL {np.max(nll[..., 0]):.6g} for the first token of a stream: it has no context, and counts 0")
        return nll.astype(np.float64)

# ---- checks -----------------------------------------------------------------------------------------------------------

# Two scores of the same token may differ by rounding: in another batch, kernels add in another order. A logit of 15 in bf16 is
# exact to 2**-8 of itself, 0.06; the softmax's mean over them is far steadier. So single tokens may move by TOKEN nats, their
# absolute differences may average MEAN, and a probability may be off by a few parts in a thousand, hence SUM.
TOKEN, MEAN, SUM = 0.15, 0.003, 0.02
EVIDENCE = math.log(1e6)  # a fair scorer exceeds it in noise with probability 1e-6 at most (Markov)

class Audit:
    """The checks of one scorer. val: its track's validation stream, uint16 [n]; all checks draw from rng."""
    def __init__(self, score, val, vocab_size, rng, claimed=None, part=None, show=print):
        self.score, self.val, self.V, self.rng, self.claimed, self.show = score, np.asarray(val), vocab_size, rng, claimed, show
        part = part and part // BLOCK * BLOCK
        self.whole = not part or part >= len(val)
        # a part begins with a block in which a document begins: what a scorer remembers of a document is all there from the second block on
        begins = np.unique(np.flatnonzero(self.val == self.val[0]) // BLOCK)
        self.at = 0 if self.whole else BLOCK * int(rng.choice(begins[begins <= (len(val) - part) // BLOCK]))
        self.text = self.val[self.at:] if self.whole else self.val[self.at:self.at + part]  # the longest stream that is scored
        self.length = min(2304, len(self.text) // 4)  # of the rows of short tests: longer than most windows
        self.faults = []

    def report(self, name, holds, figure):
        self.faults += [] if holds else [f"{name}: {figure}"]
        self.show(f"{'ok   ' if holds else 'FAULT'} {name:<15} {figure}")

    def rows(self, n, length=None):
        """n random pieces of the validation text, [n, length]."""
        length = length or self.length
        return np.stack([self.text[i:i + length] for i in self.rng.integers(len(self.text) - length + 1, size=n)])

    def noise(self, *shape):
        return self.rng.integers(self.V, size=shape).astype(np.uint16)

    def alike(self, name, difference, what):
        """Report differences that ought to be rounding: an array of nats."""
        difference = np.abs(difference)
        worst, mean = difference.max(), difference.mean()
        self.report(name, worst <= TOKEN and mean <= MEAN,
                    f"{what} moved {difference.size:,} tokens by {worst:.2g} nats at most (limit {TOKEN}), {mean:.2g} on average ({MEAN})")

    def run(self):
        """All checks, cheapest first. Returns the faults, one line each."""
        try:
            base = self.rows(16)
            nll = self.score(base)
            self.determinism(base, nll)
            self.causality(base, nll)
            self.normalization()
            self.long_streams()
            self.report("contract", True, f"{self.score.calls} calls, {self.score.tokens:,} tokens: all NLL finite, 0 or more, 0 for first tokens")
        except Broken as e:
            self.report("contract", False, str(e))
        return self.faults

    def determinism(self, base, nll):
        again = self.score(base) - nll
        self.rounding = np.abs(again).max()
        self.alike("determinism", again, "scoring the same rows again")

    def causality(self, base, nll):
        """What stands at a position or after it must not move the NLL of those before it. A look one token ahead at one place
        shows only if the text is cut exactly there, so cuts fall where windows may end: at multiples of powers of two, and where the influence
        of a single changed token is seen to end."""
        n, L = base.shape
        changed, at = base.copy(), self.rng.integers(1, L, size=n)
        changed[range(n), at] = (changed[range(n), at] + self.rng.integers(1, self.V, size=n)) % self.V
        moved = np.abs(self.among_others(base, nll, changed) - nll)
        before = [row[:p] for row, p in zip(moved, at)]
        ends = {int(np.flatnonzero(row > self.rounding)[-1]) + 1 for row in moved if (row > self.rounding).any()} - {L}
        edges = [*self.rng.permutation([*ends])[:8], *(size * int(self.rng.integers(1, L // size + 1)) for size in 2 ** np.arange(6, 12) if size < L)]
        cuts = [int(e) + i for e in edges for i in (0, 1, 2)] + self.rng.integers(1, L, size=16).tolist()
        cuts = np.array([p for p in cuts if p < L])
        source = self.rng.integers(n, size=len(cuts))
        cut, other = base[source], np.concatenate([self.rows(len(cuts) // 2, L), self.noise(len(cuts) - len(cuts) // 2, L)])
        for row, p, replacement in zip(cut, cuts, self.rng.permutation(other)):
            old, row[p:] = row[p], replacement[p:]
            row[p] = (old + 1) % self.V if row[p] == old else row[p]
        moved = self.score(cut) - nll[source]
        before += [row[:p] for row, p in zip(moved, cuts)]
        futures = f"{n + len(cuts)} changed futures ({len(ends)} window ends seen)"
        self.alike("causality", np.concatenate([part[-4:] for part in before]), f"{futures} just behind")
        self.alike("causality, far", np.concatenate([part[:-4] for part in before]), futures)

    def among_others(self, base, nll, rows):
        """The NLL of `rows`, in a batch with half of the base rows, each twice, and with rows of noise. On the way: a row's NLL must not
        depend on its neighbours, neither on their order nor on a copy of itself among them; and the noise is tested as noise."""
        half, noise = self.rng.permutation(len(base))[:len(base) // 2], self.noise(16, self.length)
        got = np.split(self.score(np.concatenate([base[half], rows, noise, base[half]])), np.cumsum([len(half), len(rows), len(noise)]))
        self.alike("independence", np.concatenate([got[0], got[3]]) - nll[np.tile(half, 2)], "other neighbours, another order and a copy in the batch")
        self.fair("noise, rows", got[2][:, 1:])
        return got[1]

    def normalization(self):
        """Rows that share a prefix and enumerate the vocabulary in its next token: their probabilities sum to one. After three long prefixes the
        tokens that are most frequent in the text stand in for a large vocabulary: the sum of theirs is at most one."""
        sums = []
        for length, n in ((48, 8), (500, 1)):
            n, length = min(n, 2_000_000 // (self.V * length)), min(length, self.length)
            if not n and sums or length < 2:
                continue
            if not n:  # a large vocabulary
                n, length = 1, 16
            prefixes, ends = self.rows(n, length), self.rng.integers(max(1, length // 2), length, size=n)
            rows = np.repeat(prefixes, self.V, axis=0)
            for i, p in enumerate(ends):
                rows[i * self.V:(i + 1) * self.V, p] = np.arange(self.V)
            nll = self.score(rows).reshape(n, self.V, length)
            sums += [(np.exp(-nll[i, :, p]).sum(), int(p)) for i, p in enumerate(ends)]
        p = int(self.rng.integers(self.length // 3, self.length))
        prefixes = self.rows(3, p + 1)
        likely = np.unique([*np.argsort(-np.bincount(self.text, minlength=self.V))[:257], *prefixes[:, p]])
        rows = np.repeat(prefixes, len(likely), axis=0)
        rows[:, p] = np.tile(likely, 3)
        for total in np.exp(-self.score(rows)[:, p]).reshape(3, -1).sum(1):
            sums.append((total if len(likely) == self.V else max(1.0, total), p))
        worst, where = max(sums, key=lambda s: abs(s[0] - 1))
        self.report("normalization", abs(worst - 1) <= SUM,
                    f"the probabilities after each of {len(sums)} prefixes sum to 1 within {abs(worst - 1):.2g} (limit {SUM}): "
                    f"{worst:.4f} after {where} tokens")

    def long_streams(self):
        """Streams up to the validation's own length, sent as it is: as shards. A scorer that behaves on short rows only, or knows
        the validation stream when it meets it, shows here."""
        n = len(self.text)
        nll = self.score(self.text)
        if self.claimed is not None:
            self.reproduction(nll)
        # one stream for three tests: text as it is, then text in which some tokens are noise, then noise; sent as a row, for a scorer may know shards
        mixed, first, pure = self.text.copy(), *(int(self.rng.integers(*span)) for span in ((n // 8, n // 2), (n // 2, 3 * n // 4)))
        at = first + np.flatnonzero(self.rng.random(pure - first) < 0.03)
        mixed[at], mixed[pure:] = self.noise(len(at)), self.noise(n - pure)
        got = self.score(mixed[None])[0]
        self.alike("recognition", got[:first] - nll[:first], f"noise from token {first:,} on, in the whole stream,")
        self.fair("noise, spliced", got[at][None])
        self.fair("noise, long", got[pure:][None])
        self.likely_tokens()
        length = min(n, max(n // 8, 20_000))
        other, replaced = self.text[:length].copy(), min(500, length // 8)
        other[:replaced] = self.rows(1, replaced)[0]
        shift = (self.score(other) - nll[:length])[length // 4:]
        shift = shift[:len(shift) // 10 * 10].reshape(10, -1).mean(1)
        mean, limit = shift.mean(), 0.005 + 4 * shift.std(ddof=1) / math.sqrt(10)
        self.report("beginning", abs(mean) <= limit, f"another text in the first {replaced} tokens moved the mean of those from {length // 4:,} on by "
                    f"{mean:+.2g} nats (limit {limit:.2g})")
        self.fair("noise, alone", self.score(self.noise(int(self.rng.integers(min(3000, n // 8) // 2, n // 8 + 1))))[None, 1:])

    def likely_tokens(self):
        """Text in which every eighth token or so is drawn anew, from a q that is known: the token that stood there (0.2), one that elsewhere follows
        the same two (0.3) or the same one (0.3), any (0.2). Whatever came before, E[p / q] = 1 for a normalized scorer. Who raises the probability
        of what is likely anyway, which noise seldom hits, gains here."""
        text, n, share = self.text.astype(np.int64), len(self.text), (0.2, 0.3, 0.3, 0.2)
        at = 2 + np.flatnonzero(self.rng.random(n - 2) < 0.2)
        at = at[np.diff(at, prepend=-3) > 2]
        two, one = np.append([-1, -1], text[:-2] * self.V + text[1:-1]), np.append([-1], text[:-1])  # what stands before each token
        drawn, spans = [text[at]], []
        for before in (two, one):
            order = np.argsort(before, kind="stable")
            spans.append([np.searchsorted(before[order], before[at], side) for side in ("left", "right")])
            drawn.append(text[order[self.rng.integers(*spans[-1])]])
        drawn = np.choose(self.rng.choice(4, size=len(at), p=share), [*drawn, self.rng.integers(self.V, size=len(at))])
        q = share[0] * (drawn == text[at]) + share[3] / self.V
        for before, (low, high), part in zip((two, one), spans, share[1:3]):
            followed, wanted = np.sort(before * self.V + text), before[at] * self.V + drawn
            q += part * (np.searchsorted(followed, wanted, "right") - np.searchsorted(followed, wanted)) / (high - low)
        changed = self.text.copy()
        changed[at] = drawn
        evidence = log_mean_exp(bets_on(np.exp(-self.score(changed)[at]) / q))
        self.report("likely tokens", evidence <= EVIDENCE, f"{len(at):,} tokens drawn from what is likely: evidence of {evidence:.1f} nats against a fair "
                    f"scorer (limit {EVIDENCE:.1f})")

    def reproduction(self, nll):
        """val_nll.npy against the scorer's own NLL: block by block where the whole stream was scored, else in the mean and without the first block,
        for a part has other windows than the whole, and the document in which it begins is cut."""
        sums, blocks = np.add.reduceat(nll, np.arange(0, len(nll), BLOCK)), -(-len(self.val) // BLOCK)
        if self.claimed.shape != (blocks,) or self.claimed.dtype.kind != "f":
            self.report("reproduction", False, f"{self.claimed.dtype} {list(self.claimed.shape)} is claimed, the stream has {blocks} blocks")
            return
        claimed = self.claimed[self.at // BLOCK:][:len(sums)]
        difference = (sums - claimed) / np.minimum(BLOCK, len(nll) - np.arange(0, len(nll), BLOCK))
        difference = difference if self.whole else difference[1:]
        mean, worst = abs(difference.mean()), np.abs(difference).max()
        if self.whole:
            holds, limits = worst <= 0.01 and mean <= 0.0005, "0.01 and 0.0005: another machine rounds otherwise"
        else:
            limit = min(0.02, 0.002 + 4 * difference.std() / math.sqrt(len(difference))) if len(difference) > 4 else 0.02
            holds, limits = mean <= limit, f"mean {limit:.2g}: a part of the stream has other windows"
        self.report("reproduction", holds, f"{len(difference)} blocks of the claimed NLL are off by {worst:.2g} nats per token at most, {mean:.2g} in the mean "
                    f"(limits {limits})")

    def fair(self, name, nll):
        """Tokens drawn uniformly from the vocabulary, nll [rows, n] of them: no fair scorer gains on them."""
        evidence, where = noise_evidence(nll, self.V)
        self.report(name, evidence <= EVIDENCE, f"{nll.size:,} uniform tokens: evidence of {evidence:.1f} nats against a fair scorer{where} "
                    f"(limit {EVIDENCE:.1f}); mean {nll.mean():.3f}, a uniform one has {math.log(self.V):.3f}")

def log_mean_exp(x):
    top = np.max(x)
    return float(top + np.log(np.mean(np.exp(x - top))))

def bets_on(ratio):
    """ln of prod(1 + b (ratio - 1)) for ten bets b, of ratios p / q [n] on tokens drawn from q: each has expectation 1, or less."""
    bets = np.array([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001])
    with np.errstate(divide="ignore"):
        return np.array([np.log1p(b * (ratio - 1)).sum() for b in bets])

def noise_evidence(nll, vocab_size):
    """(ln of an e-value against a fair scorer, where it comes from) on uniform tokens, nll [rows, n] in nats.

    Whatever came before, a causal and normalized scorer has E[V p] = 1 for a uniform token, so prod(1 + b (V p - 1)) has
    expectation 1 for any bet b in [0, 1], over any positions chosen beforehand, and so has the mean of several such
    products. A cheat at all positions is caught by a high bet, a sparse one by a low bet, one at fixed places in every row by
    the bets on each place, one at every m-th token by those on each period. What none of them sees is a gain at fewer than about one token in
    V, at places that follow no period."""
    ratio = vocab_size * np.exp(-nll)
    half = np.log1p(0.5 * (ratio - 1))  # for places where the cheat is certain, if it is there at all
    parts = {"": log_mean_exp(bets_on(ratio))}
    if len(half) > 1:
        place = half.sum(0)
        parts[f", at position {place.argmax() + 1} of each row"] = log_mean_exp(place)
    flat = half[0] if len(half) == 1 else np.zeros(0)
    periods = {m: log_mean_exp(flat[:len(flat) // m * m].reshape(-1, m).sum(0)) for m in [*range(2, 2049), 4096, 8192] if 4 * m <= len(flat)}
    if periods:
        parts[f", at every {max(periods, key=periods.get)} tokens"] = log_mean_exp(np.array([*periods.values()]))
    where = max(parts, key=parts.get)
    total = log_mean_exp(np.array([*parts.values()]))
    return total, where if total > EVIDENCE else ""

# ---- command line -----------------------------------------------------------------------------------------------------

def run_command(run, folder):
    """(scorer command, track, claimed val_nll) of a run folder. Its script is taken from its log and written to `folder`."""
    try:
        source, _, _ = split_log((run / "log.txt").read_bytes())
        record = json.loads((run / "record.json").read_text())
        claimed, track = read_npy(run / "val_nll.npy", 1 << 24), str(record["track"])
    except OSError as e:
        raise Refused(f"{e.filename}: {e.strerror}; name the folder of a finished run")
    except (ValueError, KeyError, TypeError) as e:
        raise Refused(f"{run}: not the folder of a finished run ({e})")
    script = Path(folder) / "script.py"
    script.write_bytes(source)
    (Path(folder) / "data").symlink_to(ROOT / "data")  # where it finds its training tokens, if it scores with their help
    return [sys.executable, str(script), "--score", str(run.resolve()), "--tokens", "{tokens}", "--nll", "{nll}"], track, claimed

def audit_run(run, seconds, rng, part=None, track=None, show=print):
    """Audit a run folder on its track's validation stream, or on that of the track given. Returns the faults."""
    with tempfile.TemporaryDirectory() as folder:
        command, own_track, claimed = run_command(run, folder)
        return audit_command(command, track or own_track, folder, seconds, rng, claimed, part, show)

def audit_command(command, track, folder, seconds, rng, claimed=None, part=None, show=print):
    tracks = read_tracks()
    if track not in tracks["tracks"]:
        raise Refused(f"track {track!r} is not in records/tracks.json; choose one of {', '.join(tracks['tracks'])}")
    name = tracks["tracks"][track]["dataset"]
    dataset = tracks["datasets"][name]
    val = read_shard(ROOT / "data" / name / "val.bin", known_hash(dataset, "val.bin"))
    score = Scorer(command, folder, seconds)
    return Audit(score, val, dataset["vocab_size"], rng, claimed, part, show).run()

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    parser.add_argument("--command", help="any scorer, with {tokens} and {nll} where the files go")
    parser.add_argument("--track", help="with --command: whose validation stream to use [pocket]")
    parser.add_argument("--claimed", type=Path, metavar="NPY", help="with --command: a val_nll.npy that the scorer must reproduce")
    parser.add_argument("--part", type=int, metavar="N", help="use a random part of the validation stream, N tokens long, where all of it takes too long")
    parser.add_argument("--seconds", type=int, default=3600, metavar="S", help="time limit of one call of the scorer [3600]")
    parser.add_argument("--seed", type=int, help="repeat the tests of an earlier audit")
    args = parser.parse_args(argv)
    try:
        if (args.run is None) == (args.command is None) or args.run and (args.track or args.claimed):
            raise Refused("name a run folder, or give --command with --track and --claimed as you need them")
        if args.command and not ("{tokens}" in args.command and "{nll}" in args.command):
            raise Refused(f"--command {args.command!r}: must hold {{tokens}} and {{nll}}")
        if args.seed is not None and args.seed < 0:
            raise Refused(f"--seed {args.seed}: must be 0 or more")
        if args.part is not None and args.part < 2 * BLOCK:
            raise Refused(f"--part {args.part}: must be {2 * BLOCK} or more")
        seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
        print(f"audit of {args.run or args.command}, --seed {seed}; this runs the scorer's code", flush=True)
        rng = np.random.default_rng(seed)
        if args.run:
            faults = audit_run(args.run, args.seconds, rng, args.part)
        else:
            try:
                claimed = read_npy(args.claimed, 1 << 24) if args.claimed else None
                words = shlex.split(args.command)
            except ValueError as e:
                raise Refused(f"--claimed {args.claimed} --command {args.command!r}: {e}")
            with tempfile.TemporaryDirectory() as folder:
                faults = audit_command(words, args.track or "pocket", folder, args.seconds, rng, claimed, args.part)
    except Refused as e:
        print(f"audit.py: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(faults)} fault(s)" if faults else "all checks hold")
    sys.exit(1 if faults else 0)

if __name__ == "__main__":
    main()
