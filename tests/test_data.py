"""The loader's promises."""
import numpy as np
import pytest

import train_gpt as t
from conftest import TINY

BOS = 256


def made_up_lengths(n, seed=0, longest=300):
    """Lengths of n documents."""
    return [int(x) for x in np.random.default_rng(seed).integers(2, longest, n)]


def loader_of(lengths, rank=0, world_size=1, **changes):
    rng = np.random.default_rng(7)
    tokens = np.concatenate([[BOS, *rng.integers(0, 256, n - 1)] for n in lengths]).astype(np.uint16)
    c = t.Config(**(TINY | dict(train_tokens=len(tokens)) | changes))
    return t.Loader(tokens[:, None], BOS, c, rank, world_size), tokens, c


def epoch_stream(loader, epoch):
    """The epoch's stream, put together from its rows by their place."""
    loader.start_epoch(epoch)
    rows = [loader.row(i)[:, 0] for i in range(loader.rows_per_epoch)]
    return np.concatenate([row[:loader.T] for row in rows] + [rows[-1][loader.T:]])


def test_an_epoch_is_every_document_once():
    loader, tokens, _ = loader_of(made_up_lengths(60))
    documents = sorted(tuple(d) for d in np.split(tokens, np.flatnonzero(tokens == BOS)[1:]))
    for epoch in (0, 1):
        stream = epoch_stream(loader, epoch)
        assert len(stream) == len(tokens)
        assert sorted(tuple(d) for d in np.split(stream, np.flatnonzero(stream == BOS)[1:])) == documents


def test_every_token_is_a_target_once_per_epoch():
    """Counted over the batches of three epochs, which do not divide into batches: all but each epoch's first token."""
    loader, tokens, _ = loader_of(made_up_lengths(60), epochs=3.0)
    batches = -(-3 * loader.rows_per_epoch // loader.batch_rows)
    x, y, counts = zip(*(loader.batch(s) for s in range(batches)))
    x, y = np.concatenate([a.numpy()[..., 0] for a in x]), np.concatenate([b.numpy()[..., 0] for b in y])
    assert all(int((b >= 0).sum()) == n for b, n in zip(np.split(y, batches), counts))
    assert (y[:, :-1] == x[:, 1:])[y[:, 1:] >= 0].all()  # targets are the inputs, one later
    for epoch in range(3):
        rows = y[epoch * loader.rows_per_epoch:(epoch + 1) * loader.rows_per_epoch]
        seen = np.bincount(rows[rows >= 0], minlength=257)
        missing = np.bincount(tokens, minlength=257) - seen
        assert missing[BOS] == 1 and missing.sum() == 1


@pytest.mark.parametrize("bag", [2, 5])
def test_bags_against_a_plain_loop(bag):
    """Rows are bag times as long; bag i's targets are the tokens of bag i+1, wherever the row ends; every token of an epoch but its
    first bag is a target exactly once, and the count says how many."""
    tokens, c = loader_of(made_up_lengths(60))[1:]
    loader = t.Loader(tokens[:, None], BOS, c, bag=bag)
    stream = epoch_stream(loader, 0)
    for step in range(loader.rows_per_epoch // loader.batch_rows):
        x, y, n = loader.batch(step)
        assert x.shape == (loader.batch_rows, c.seq_len * bag, 1) and y.shape == (loader.batch_rows, c.seq_len, bag)
        assert int((y >= 0).sum()) == n
        for j in range(loader.batch_rows):
            at = int(loader.rows[step * loader.batch_rows + j]) * c.seq_len * bag
            for i in range(c.seq_len):
                wanted = stream[at + (i + 1) * bag:at + (i + 2) * bag]
                assert (y[j, i].numpy()[:len(wanted)] == wanted).all() and (y[j, i, len(wanted):] == -1).all()
            piece = stream[at:at + c.seq_len * bag]
            assert (x[j, :len(piece), 0].numpy() == piece).all()
    batches = [loader.batch(step)[1].flatten(1) for step in range(-(-loader.rows_per_epoch // loader.batch_rows))]
    seen = np.concatenate(batches)[:loader.rows_per_epoch]  # the last batch goes on into the next epoch
    assert (np.bincount(seen[seen >= 0], minlength=257) == np.bincount(stream[bag:], minlength=257)).all()


def test_nothing_beyond_the_budget():
    """Whatever lies behind the budget in the shard, the batches are the same."""
    loader, tokens, c = loader_of(made_up_lengths(30))
    longer = np.concatenate([tokens, np.full(5000, 77, np.uint16)])
    other = t.Loader(longer[:, None], BOS, c)
    assert other.steps == loader.steps
    for step in range(loader.steps + 2):
        assert all((a == b).all() for a, b in zip(loader.batch(step)[:2], other.batch(step)[:2]))


def recalled_by_a_loop(stream, recall, memory=(), known=(), own=True):
    """[length, 1 + lengths], written as the definition reads. known: the training tokens; own: whether the stream is these themselves."""
    out, known = np.full((len(stream), 1 + len(recall) + len(memory)), t.NOTHING), np.array(known)
    out[:, 0] = stream
    for i in range(len(stream)):
        first = max([0, *np.flatnonzero(stream[:i + 1] == BOS)])
        end = min([len(stream), *(np.flatnonzero(stream[i + 1:] == BOS) + i + 1)])
        for k, n in enumerate((*recall, *memory)):
            ngram, inside = stream[max(0, i - n + 1):i + 1], i - n + 1 >= first
            if k < len(recall):
                places = [j for j in range(first + n - 1, i) if (stream[j - n + 1:j + 1] == ngram).all()] if inside else []
                out[i, 1 + k] = stream[places[-1] + 1] if places else t.NOTHING
            else:
                places = [j for j in range(n - 1, len(known) - 1) if (known[j - n + 1:j + 1] == ngram).all() and not (own and first <= j < end)] if inside else []
                out[i, 1 + k] = known[places[-1] + 1] if places else t.NOTHING
    return out


def three_letters(*starts, n=150, seed=0):
    stream = np.random.default_rng(seed).integers(0, 3, n).astype(np.uint16)
    stream[list(starts)] = BOS
    return stream


def test_recall_against_a_loop():
    """Streams of three letters in several documents, short and long ones."""
    c = t.Config(recall="1,2,3,5,40", memory="1,3,4,40", train_tokens=200)
    known = three_letters(0, 50, 51, 120, n=230, seed=1)
    recall = t.Recall(known[:200], BOS, c)
    streams = np.stack([three_letters(0, 40, 41, 90), three_letters(30, 149, seed=2)])
    for some in (streams, streams[:, :4], streams[:1, :1]):
        got = recall.inputs(some)
        assert got.dtype == np.uint16
        assert (got == np.stack([recalled_by_a_loop(row, (1, 2, 3, 5, 40), (1, 3, 4, 40), known[:200], own=False) for row in some])).all()
    assert (got[..., 1:6] == t.NOTHING).all() and (recall.inputs(streams)[..., 1:] != t.NOTHING).mean() > 0.3
    assert t.Recall((), BOS, t.Config()).inputs(streams).shape == (2, 150, 1)


def test_training_documents_do_not_recall_themselves_from_memory():
    known = three_letters(0, 30, 31, 100, 170, n=200)
    got = t.Recall(known, BOS, t.Config(recall="2", memory="1,2,4", train_tokens=200)).inputs()[0]
    assert (got == recalled_by_a_loop(known, (2,), (1, 2, 4), known)).all()
    alone = t.Recall(known[:30], BOS, t.Config(memory="1,2,4", train_tokens=30)).inputs()[0]
    assert (alone[:, 1:] == t.NOTHING).all()  # a single document knows of no other


def test_what_is_recalled_travels_with_the_token():
    """Shuffled and cut into rows, each token keeps what its document recalls there."""
    _, tokens, c = loader_of(made_up_lengths(40))
    tokens[tokens != BOS] %= 4
    loader = t.Loader(t.Recall(tokens, BOS, t.Config(recall="2,4", train_tokens=len(tokens))).inputs()[0], BOS, c)
    loader.start_epoch(0)
    rows = np.concatenate([loader.row(i)[:loader.T] for i in range(loader.rows_per_epoch)])
    for document in np.split(rows, np.flatnonzero(rows[:, 0] == BOS)[1:]):
        assert (document == recalled_by_a_loop(document[:, 0], (2, 4))).all()


def test_epochs_and_seeds_differ_and_repeat():
    loader, _, c = loader_of(made_up_lengths(40))
    again, _, _ = loader_of(made_up_lengths(40))
    other, _, _ = loader_of(made_up_lengths(40), seed=1)
    assert (epoch_stream(loader, 0) == epoch_stream(again, 0)).all()
    assert (epoch_stream(loader, 0) != epoch_stream(loader, 1)).any() and (epoch_stream(loader, 0) != epoch_stream(other, 0)).any()


def test_any_step_without_those_before():
    """What resuming relies on: steps asked for in any order give the same batches."""
    loader, _, _ = loader_of(made_up_lengths(60), epochs=3.0)
    fresh, _, _ = loader_of(made_up_lengths(60), epochs=3.0)
    in_order = [loader.batch(s)[:2] for s in range(loader.steps)]
    for step in (loader.steps - 1, 0, loader.steps // 2):
        assert all((a == b).all() for a, b in zip(in_order[step], fresh.batch(step)[:2]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_batch(world_size):
    whole, _, _ = loader_of(made_up_lengths(60))
    parts = [loader_of(made_up_lengths(60), rank, world_size)[0] for rank in range(world_size)]
    for step in (0, whole.steps):
        x, y, n = whole.batch(step)
        shares = [part.batch(step) for part in parts]
        assert (np.concatenate([s[0] for s in shares]) == x.numpy()).all() and (np.concatenate([s[1] for s in shares]) == y.numpy()).all()
        assert {s[2] for s in shares} == {n}


def test_rows_start_at_documents_where_they_can():
    """Many short documents: most rows end with a document and the next begins with one. Plain concatenation gets about
    one in `mean length`."""
    loader, _, _ = loader_of(made_up_lengths(3000, longest=60))
    loader.start_epoch(0)
    starts = sum(loader.row(i)[0] == BOS for i in range(loader.rows_per_epoch))
    assert starts / loader.rows_per_epoch > 0.8


def test_steps_follow_from_epochs():
    loader, tokens, c = loader_of(made_up_lengths(60), epochs=2.5)
    assert loader.steps == int(2.5 * -(-(len(tokens) - 1) // c.seq_len)) // (c.batch_tokens // c.seq_len)
