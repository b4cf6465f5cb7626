"""The promises of the loader and of look-ups."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch

import harness
import train_gpt as t
from reference import BOS, config

pytestmark = pytest.mark.reference


def made_up_lengths(n, seed=0, longest=300):
    """Lengths of n documents."""
    return [int(x) for x in np.random.default_rng(seed).integers(2, longest, n)]


def loader_of(lengths, rank=0, world_size=1, **changes):
    """(loader, tokens, config) of random documents of these lengths."""
    rng = np.random.default_rng(7)
    documents = [[BOS, *rng.integers(0, 256, n - 1)] for n in lengths]
    tokens = np.concatenate(documents).astype(np.uint16)
    c = config(**(dict(train_tokens=len(tokens)) | changes))
    return t.Loader(tokens[:, None], c, rank, world_size), tokens, c


def epoch_stream(loader, epoch):
    """The epoch's stream, put together from its rows by their place."""
    loader.start_epoch(epoch)
    T = loader.row_tokens
    rows = [loader.row(i)[:, 0] for i in range(loader.rows_per_epoch)]
    return np.concatenate([row[:T] for row in rows] + [rows[-1][T:]])


def documents_of(stream):
    return [tuple(d) for d in np.split(stream, np.flatnonzero(stream == BOS)[1:])]


def counts(tokens):
    return np.bincount(tokens, minlength=257)


def test_an_epoch_is_every_document_once():
    loader, tokens, _ = loader_of(made_up_lengths(60))
    for epoch in (0, 1):
        stream = epoch_stream(loader, epoch)
        assert len(stream) == len(tokens)
        assert sorted(documents_of(stream)) == sorted(documents_of(tokens))


def test_every_token_is_a_target_once_per_epoch():
    """Counted over the batches of three epochs, which do not divide into batches: all but each epoch's first
    token."""
    loader, tokens, _ = loader_of(made_up_lengths(60), epochs=3.0)
    n_batches = -(-3 * loader.rows_per_epoch // loader.batch_rows)
    inputs, targets = [], []
    for step in range(n_batches):
        x, y, n_targets = loader.batch(step)
        assert int((y >= 0).sum()) == n_targets
        inputs.append(x[..., 0].numpy())
        targets.append(y[..., 0].numpy())
    x = np.concatenate(inputs)
    y = np.concatenate(targets)
    assert (y[:, :-1] == x[:, 1:])[y[:, 1:] >= 0].all()  # targets are the inputs, one later
    for epoch in range(3):
        rows = y[epoch * loader.rows_per_epoch : (epoch + 1) * loader.rows_per_epoch]
        missing = counts(tokens) - counts(rows[rows >= 0])
        assert missing[BOS] == 1 and missing.sum() == 1


@pytest.mark.parametrize("bag_size", [2, 5])
def test_bags_against_a_plain_loop(bag_size):
    """Rows are bag_size times as long; bag i's targets are the tokens of bag i+1, wherever the row ends;
    every token of an epoch but its first bag is a target exactly once, and the count says how many."""
    _, tokens, c = loader_of(made_up_lengths(60))
    loader = t.Loader(tokens[:, None], c, bag_size=bag_size)
    stream = epoch_stream(loader, 0)
    for step in range(loader.rows_per_epoch // loader.batch_rows):
        x, y, n_targets = loader.batch(step)
        assert x.shape == (loader.batch_rows, c.seq_len * bag_size, 1)
        assert y.shape == (loader.batch_rows, c.seq_len, bag_size)
        assert int((y >= 0).sum()) == n_targets
        for j in range(loader.batch_rows):
            at = int(loader.rows[step * loader.batch_rows + j]) * c.seq_len * bag_size
            for i in range(c.seq_len):
                wanted = stream[at + (i + 1) * bag_size : at + (i + 2) * bag_size]
                assert (y[j, i].numpy()[: len(wanted)] == wanted).all()
                assert (y[j, i, len(wanted) :] == -1).all()
            piece = stream[at : at + c.seq_len * bag_size]
            assert (x[j, : len(piece), 0].numpy() == piece).all()
    n_batches = -(-loader.rows_per_epoch // loader.batch_rows)
    targets = np.concatenate([loader.batch(step)[1].flatten(1) for step in range(n_batches)])
    seen = targets[: loader.rows_per_epoch]  # the last batch goes on into the next epoch
    assert (counts(seen[seen >= 0]) == counts(stream[bag_size:])).all()


def test_nothing_beyond_the_budget():
    """Whatever lies behind the budget in the shard, the batches are the same."""
    loader, tokens, c = loader_of(made_up_lengths(30))
    longer = np.concatenate([tokens, np.full(5000, 77, np.uint16)])
    other = t.Loader(longer[:, None], c)
    assert other.steps == loader.steps
    for step in range(loader.steps + 2):
        for a, b in zip(loader.batch(step)[:2], other.batch(step)[:2]):
            assert (a == b).all()


def test_epochs_and_seeds_differ_and_repeat():
    loader, _, _ = loader_of(made_up_lengths(40))
    again, _, _ = loader_of(made_up_lengths(40))
    other, _, _ = loader_of(made_up_lengths(40), seed=1)
    assert (epoch_stream(loader, 0) == epoch_stream(again, 0)).all()
    assert (epoch_stream(loader, 0) != epoch_stream(loader, 1)).any()
    assert (epoch_stream(loader, 0) != epoch_stream(other, 0)).any()


def test_any_step_without_those_before():
    """What resuming relies on: steps asked for in any order give the same batches."""
    loader, _, _ = loader_of(made_up_lengths(60), epochs=3.0)
    fresh, _, _ = loader_of(made_up_lengths(60), epochs=3.0)
    in_order = [loader.batch(step)[:2] for step in range(loader.steps)]
    for step in (loader.steps - 1, 0, loader.steps // 2):
        for a, b in zip(in_order[step], fresh.batch(step)[:2]):
            assert (a == b).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_batch(world_size):
    whole, _, _ = loader_of(made_up_lengths(60))
    parts = [loader_of(made_up_lengths(60), rank, world_size)[0] for rank in range(world_size)]
    for step in (0, whole.steps):
        x, y, n_targets = whole.batch(step)
        shards = [part.batch(step) for part in parts]
        assert (np.concatenate([shard[0] for shard in shards]) == x.numpy()).all()
        assert (np.concatenate([shard[1] for shard in shards]) == y.numpy()).all()
        assert {shard[2] for shard in shards} == {n_targets}


def test_rows_start_at_documents_where_they_can():
    """Many short documents: most rows end with a document and the next begins with one. Plain concatenation
    gets about one in `mean length`."""
    loader, _, _ = loader_of(made_up_lengths(3000, longest=60))
    loader.start_epoch(0)
    starts = sum(loader.row(i)[0] == BOS for i in range(loader.rows_per_epoch))
    assert starts / loader.rows_per_epoch > 0.8


def test_steps_follow_from_epochs():
    loader, tokens, c = loader_of(made_up_lengths(60), epochs=2.5)
    rows_per_epoch = -(-(len(tokens) - 1) // c.seq_len)
    assert loader.steps == int(2.5 * rows_per_epoch) // (c.batch_tokens // c.seq_len)


def test_bags_come_first_and_count_as_steps():
    """The batches of one model: bags for a fraction of its steps, then single tokens from the beginning of
    their own epoch; `epoch` counts passes over the budget."""
    _, tokens, c = loader_of(made_up_lengths(60), bag_size=3, bag_until=0.25, epochs=4.0)
    m = harness.Machine(torch.device("cpu"), None)
    batches = t.Batches(tokens[:, None], c, m)
    bags = t.Loader(tokens[:, None], c, bag_size=3)
    singles = t.Loader(tokens[:, None], c)
    assert batches.steps == singles.steps
    n_bag_steps = sum(phase.bag_size == 3 for phase in batches.phases)
    assert n_bag_steps == round(0.25 * batches.steps)
    for step, expected in (
        (0, bags.batch(0)),
        (n_bag_steps, singles.batch(0)),
        (n_bag_steps + 1, singles.batch(1)),
    ):
        for a, b in zip(batches.batch(step)[:2], expected[:2]):
            assert (a == b).all()
    assert batches.tokens_seen() == c.batch_tokens * (batches.steps + 2 * n_bag_steps)
    # Rows are rounded up to whole ones, so an epoch is up to a row of bags longer than the budget.
    row_share = 3 * c.seq_len / len(tokens)
    epochs = batches.tokens_seen() / len(tokens)
    assert batches.epochs_done(batches.steps) == pytest.approx(epochs, rel=row_share)
    assert t.Batches(tokens[:, None], c, m, steps=5).steps == 5


def test_a_batch_is_that_of_its_step():
    """Whichever was made before, as after a resume."""
    _, tokens, c = loader_of(made_up_lengths(60), bag_size=3, bag_until=0.25, epochs=4.0)
    m = harness.Machine(torch.device("cpu"), None)
    batches = t.Batches(tokens[:, None], c, m)
    n_bag_steps = batches.n_bag_steps
    for before, asked in ((1, 1), (2, 1), (n_bag_steps, n_bag_steps), (n_bag_steps, n_bag_steps + 1)):
        batches.batch(before)
        expected = t.Batches(tokens[:, None], c, m).batch(asked)
        for a, b in zip(batches.batch(asked)[:2], expected[:2]):
            assert (a == b).all()


# ---- look-ups


def looked_up_by_a_loop(stream, recall, memory=(), known=(), own=True):
    """[length, 1 + lengths], written as the definition reads. known: the training tokens; own: whether the
    stream is these themselves."""
    known = np.array(known)
    out = np.full((len(stream), 1 + len(recall) + len(memory)), t.NO_TOKEN)
    out[:, 0] = stream
    for i in range(len(stream)):
        first = max([0, *np.flatnonzero(stream[: i + 1] == BOS)])
        end = min([len(stream), *(np.flatnonzero(stream[i + 1 :] == BOS) + i + 1)])
        for k, n in enumerate((*recall, *memory)):
            ngram = stream[max(0, i - n + 1) : i + 1]
            if i - n + 1 < first:  # it would begin before its document
                continue
            if k < len(recall):
                ends = [j for j in range(first + n - 1, i) if (stream[j - n + 1 : j + 1] == ngram).all()]
                source = stream
            else:
                ends = [j for j in range(n - 1, len(known) - 1) if (known[j - n + 1 : j + 1] == ngram).all()]
                ends = [j for j in ends if not (own and first <= j < end)]
                source = known
            if ends:
                out[i, 1 + k] = source[ends[-1] + 1]
    return out


def three_letters(*starts, n=150, seed=0):
    stream = np.random.default_rng(seed).integers(0, 3, n).astype(np.uint16)
    stream[list(starts)] = BOS
    return stream


def test_look_ups_against_a_loop():
    """Streams of three letters in several documents, short and long ones."""
    recall = (1, 2, 3, 5, 40)
    memory = (1, 3, 4, 40)
    c = config(recall="1,2,3,5,40", memory="1,3,4,40")
    known = three_letters(0, 50, 51, 120, n=200, seed=1)
    lookup = t.Lookup(known, c)
    streams = np.stack([three_letters(0, 40, 41, 90), three_letters(30, 149, seed=2)])
    for some in (streams, streams[:, :4], streams[:1, :1]):
        got = lookup.inputs(some)
        expected = [looked_up_by_a_loop(row, recall, memory, known, own=False) for row in some]
        assert got.dtype == np.uint16 and (got == np.stack(expected)).all()
    assert (got[..., 1:6] == t.NO_TOKEN).all()  # a stream of one token
    assert (lookup.inputs(streams)[..., 1:] != t.NO_TOKEN).mean() > 0.3
    assert t.Lookup((), config()).inputs(streams).shape == (2, 150, 1)


class CountsByALoop:
    """For contexts of these lengths, from dictionaries."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.hits = {n: Counter() for n in sizes}  # (context, token) -> how often it counts
        self.seen = {n: set() for n in sizes}

    def learn(self, text, i):
        is_new = True
        for n in reversed(self.sizes):
            if i >= n:
                pair = (*text[i - n : i + 1],)
                self.hits[n][pair] += is_new
                is_new = pair not in self.seen[n]
                self.seen[n].add(pair)
            else:
                is_new = True

    def interpolate(self, p, context, vocab_size):
        """Of shorter contexts' probabilities p and this one."""
        n = len(context)
        if not any(pair[:n] == context for pair in self.seen[n]):
            return p
        counts = np.array([self.hits[n][*context, token] for token in range(vocab_size)])
        return (np.maximum(counts - 0.8, 0) + 0.8 * (counts > 0).sum() * p) / counts.sum()


def ngrams_by_a_loop(known, stream, sizes, vocab_size, bos_id, own=True):
    """The probabilities of all tokens behind each token of a stream: [n, vocab_size]. Interpolated
    Kneser-Ney. own: whether the stream counts, too."""
    everywhere = CountsByALoop(sizes)
    for i in range(len(known)):
        everywhere.learn(known, i)
    here = CountsByALoop(sizes)
    rows = []
    for i in range(len(stream)):
        if own:
            everywhere.learn(stream, i)
            if i > 0:
                here.learn(stream, i)
        if stream[i] == bos_id:
            here = CountsByALoop(sizes)
        p = np.full(vocab_size, 1 / vocab_size)
        for n in sizes:
            if i + 1 >= n:
                context = (*stream[i + 1 - n : i + 1],)
                p = everywhere.interpolate(p, context, vocab_size)
                p = here.interpolate(p, context, vocab_size)
        rows.append(p)
    return np.stack(rows)


def bytes_of_five(*starts, **kwargs):
    """Three letters and a BOS of 4, for a vocabulary of 5."""
    stream = three_letters(*starts, **kwargs)
    return np.where(stream == BOS, 4, stream).astype(np.uint16)


@pytest.mark.parametrize("own", [True, False])
def test_n_grams_against_a_loop(own):
    """Streams in several documents, which learn from the training tokens, from themselves and from their
    documents alone; the second one begins as the first ends."""
    c = config(vocab_size=5, bos_id=4, ngrams="5,1,2")
    known = bytes_of_five(0, 10, n=40, seed=1)
    first = bytes_of_five(0, 40, 41)
    streams = np.stack([first, np.concatenate([first[-60:], first[:90]])])
    model = t.NgramModel(known, c)
    for some in (streams, streams[:, :4], streams[:1, :1]):
        got = model.nll(some, hide_own=not own)
        assert got.dtype == np.uint16
        for row, stream in zip(got, some.tolist(), strict=True):
            expected = ngrams_by_a_loop(known.tolist(), stream, (1, 2, 5), 5, 4, own)
            np.testing.assert_allclose(expected.sum(1), 1)
            # Rounded to units; float32 is closer than a hundredth of one.
            assert np.abs(row + 4096 * np.log(np.maximum(expected, 1e-6))).max() < 0.51


def test_n_grams_in_pieces(monkeypatch):
    """As many entries at a time as fit into memory are written; the columns are the same."""
    c = config(vocab_size=5, bos_id=4, ngrams="5,1,2")
    streams = np.stack([bytes_of_five(0, 40, 41), bytes_of_five(30, seed=2)])
    model = t.NgramModel(bytes_of_five(0, 10, n=40, seed=1), c)
    whole = model.nll(streams)
    in_pieces = functools.partial(t.ranges, at_once=10)
    monkeypatch.setattr(t, "ranges", in_pieces)
    assert (model.nll(streams) == whole).all()
    starts, lengths = np.array([5, 0, 100, 7]), np.array([3, 0, 25, 1])
    pairs = [np.stack(piece) for piece in in_pieces(starts, lengths)]
    expected = [(i, starts[i] + j) for i in range(4) for j in range(lengths[i])]
    assert len(pairs) > 1 and np.concatenate(pairs, axis=1).T.tolist() == [list(pair) for pair in expected]


def test_n_grams_of_training_tokens_do_not_count_themselves():
    """What follows in a document, or in a later one of its fold, is of no consequence for its columns; what
    stands in other folds' documents is."""
    starts = range(0, 600, 20)  # thirty documents in ten folds
    tokens = bytes_of_five(*starts, n=600)
    c = config(vocab_size=5, bos_id=4, ngrams="1,2,5", train_tokens=600)
    before = t.Lookup(tokens, c).training_inputs()
    assert before.shape == (600, t.n_inputs(c)) and (before[:, 0] == tokens).all()
    changed = tokens.copy()
    changed[230:240] = (tokens[230:240] + 1) % 3
    after = t.Lookup(changed, c).training_inputs()
    columns = (before[:, 1:] != after[:, 1:]).any(1)
    document = np.arange(600) // 20
    of_fold = document % 10 == 230 // 20 % 10
    assert not columns[of_fold & (np.arange(600) < 230)].any()
    assert columns[~of_fold].mean() > 0.5 and columns[of_fold & (np.arange(600) > 240)].any()
    # Fewer documents than folds: even one, whose model has nothing to count.
    alone = t.Lookup(tokens[:20], config(vocab_size=5, bos_id=4, ngrams="1,2,5")).training_inputs()
    assert alone.shape == (20, 6)


def test_training_documents_do_not_find_themselves_in_memory():
    known = three_letters(0, 30, 31, 100, 170, n=200)
    got = t.Lookup(known, config(recall="2", memory="1,2,4")).training_inputs()
    assert (got == looked_up_by_a_loop(known, (2,), (1, 2, 4), known)).all()
    alone = t.Lookup(known[:30], config(memory="1,2,4")).training_inputs()
    assert (alone[:, 1:] == t.NO_TOKEN).all()  # a single document knows of no other


def test_look_ups_travel_with_the_token():
    """Shuffled and cut into rows, each token keeps what its document finds there."""
    _, tokens, c = loader_of(made_up_lengths(20, longest=150), recall="2,4")
    tokens[tokens != BOS] %= 4
    loader = t.Loader(t.Lookup(tokens, c).training_inputs(), c)
    loader.start_epoch(0)
    rows = np.concatenate([loader.row(i)[: loader.row_tokens] for i in range(loader.rows_per_epoch)])
    for document in np.split(rows, np.flatnonzero(rows[:, 0] == BOS)[1:]):
        assert (document == looked_up_by_a_loop(document[:, 0], (2, 4))).all()
