"""The model's invariants, and each fast path against a plain one written here."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import harness
import train_gpt as t
from reference import (
    BOS,
    EPS,
    EXACT,
    assert_equal,
    config,
    head_logits,
    make_machine,
    make_params,
    plain_attention,
    random_tokens,
    trainable,
)

pytestmark = pytest.mark.reference

LOOK_UP = dict(recall="1,2", memory="1,2")
SCORED = {
    "plain": {},
    "look-ups": LOOK_UP,
    "learning": LOOK_UP | dict(ngrams="1,2", online_lr=0.1),
    "learning, no n-grams": dict(online_lr=0.1),
}


def forward(p, x, c, m, phase, **kwargs):
    """Of tokens alone, without look-ups."""
    return t.forward(p, x[..., None], c, m, phase, **kwargs)


def stream_nll(p, x, c, m):
    """Of tokens [n_streams, length] and what they look up, also among some made-up training tokens; as
    run_nll() scores a single model."""
    known = np.random.default_rng(5).integers(0, 256, 300).astype(np.uint16)
    known[[0, 100]] = BOS
    x = np.asarray(x)
    inputs = t.Lookup(known, c).inputs(x)
    if c.online_lr:
        return t.online_nll(t.stream_nll(p, inputs, c, m, of_all=True), inputs, c)
    return t.stream_nll(p, inputs, c, m)


# ---- attention


def random_heads(tokens, n_head=3, head_dim=8):
    return [torch.randn(*tokens.shape, n_head, head_dim, device=tokens.device) for _ in range(3)]


@pytest.mark.parametrize("window", [1, 7, 12, 24, 40, 48])  # 1, 12 and 24 go in blocks
def test_attention_is_a_masked_softmax(exact, window):
    tokens = random_tokens(2, 48)
    q, k, v = random_heads(tokens)
    mask = t.attention_masks(tokens == BOS, [window], make_machine(dtype=q.dtype))[window]
    assert_equal(t.attention(q, k, v, mask, "sdpa"), plain_attention(q, k, v, tokens, window))


# ---- the model


def plain_model(p, tokens, c):
    """The whole model as one would write it for a single sequence, from the description in the docstrings.
    Logits [T, V]."""
    H, d, T = c.n_head, c.n_embd // c.n_head, len(tokens)

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    x = x0 = rms(p["wte"][tokens])
    outputs = {}
    for i in range(c.n_layer):
        if i >= (c.n_layer + 1) // 2:
            x = x + p["skip"][c.n_layer - 1 - i] * outputs[c.n_layer - 1 - i]
        x = p["mix"][i, 0] * x + p["mix"][i, 1] * x0
        h = rms(x)
        wq, wk, wv, wo, wx = p["attn"][i]
        heads = []
        for n in range(H):
            part = slice(n * d, (n + 1) * d)
            q = rms(h @ wq[part].T)
            k = rms(h @ wk[part].T)
            v = h @ wv[part].T
            v = v + 2 * torch.sigmoid(h[:, :32] @ p["gates"][i, 0, n])[:, None] * (x0 @ wx[part].T)
            for pair in range(d // 4):  # the other d/4 pairs of channels are not rotated
                angle = torch.arange(T, device=x.device) * 10_000 ** (-pair / (d // 4))
                for z in (q, k):
                    a = z[:, pair].clone()
                    b = z[:, pair + d // 2].clone()
                    z[:, pair] = a * angle.cos() + b * angle.sin()
                    z[:, pair + d // 2] = b * angle.cos() - a * angle.sin()
            is_short = c.window_pattern[i % 2] == "S" and i < c.n_layer - 1
            window = c.window_short if is_short else c.seq_len
            y = plain_attention(q[None, :, None], k[None, :, None], v[None, :, None], tokens[None], window)
            heads.append(y[0, :, 0] * torch.sigmoid(h[:, :32] @ p["gates"][i, 1, n])[:, None])
        x = x + torch.cat(heads, -1) @ wo.T
        h = rms(x)
        x = x + (F.silu(h @ p["mlp_in"][i, 0].T) * (h @ p["mlp_in"][i, 1].T)) @ p["mlp_out"][i].T
        outputs[i] = x
    return head_logits(rms(x), p["lm_head"], c)


@pytest.mark.parametrize("n_layer", [3, 4])
def test_forward_is_the_model_written_out(exact, n_layer):
    c = config(n_layer=n_layer)
    p = make_params(c)
    tokens = random_tokens(2, c.seq_len)
    h = forward(p, tokens, c, make_machine(), t.phase_schedule(1.0, c))
    for row in range(2):
        assert_equal(head_logits(h[row], p["lm_head"], c), plain_model(p, tokens[row], c))


def test_compiled_layers_equal_plain_ones():
    """Losses and gradients, where this machine has a compiler: all in float64 but the logits and the head's
    gradient, which compiled code may round elsewhere. Logits are at most c.softcap, so their exponentials
    differ by a few times softcap * 2**-24 of themselves, and the gradients are linear in these."""
    c = config(n_layer=2, seq_len=32, window_short=16, loss_chunk=128, mtp_weight=0.3)
    bound = 10 * c.softcap * EPS
    compiled = make_machine(dtype=torch.float64)
    harness.set_compiled(compiled, "auto")
    if not compiled.compiled:
        pytest.skip(f"nothing to compare: {compiled.reasons['compiled']}")
    x = random_tokens(4, 32)[..., None]
    weights = make_params(c)
    weights = {name: w if name == "lm_head" else w.double() for name, w in weights.items()}
    losses, grads = [], []
    for m in (make_machine(dtype=torch.float64), compiled):
        p = trainable(weights)
        losses.append(t.train_pass(p, x, x, x.numel(), c, m, t.phase_schedule(0.0, c), (0,)))
        grads.append({name: w.grad for name, w in p.items()})
    for name in losses[0]:
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=bound)
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < bound * grad.norm(), name


def test_looped_layers_equal_the_unrolled_model(exact):
    """Layers 1-2 run twice more: the same as a model whose banks hold copies of them."""
    loop = dict(loop_first=1, loop_last=2, loop_times=2, loop_from=0.5)
    c = config(n_layer=4, unet=False, window_pattern="L", **loop)
    assert t.phase_schedule(0.49, c).layers == (0, 1, 2, 3)
    phase = t.phase_schedule(0.5, c)
    assert phase.layers == (0, 1, 2, 1, 2, 1, 2, 3)
    p = make_params(c)
    x = random_tokens(2, c.seq_len)
    stacked = [name for name, entry in t.param_table(c).items() if entry.n_stack]
    unrolled = p | {name: p[name][list(phase.layers)] for name in stacked}
    deep = dataclasses.replace(c, n_layer=8, loop_times=0)
    m = make_machine()
    assert_equal(forward(p, x, c, m, phase), forward(unrolled, x, deep, m, t.Phase(tuple(range(8)), 1)))


def by_document(p, table, starts, c, m, phase):
    """Hidden states of positions whose embeddings are the rows of `table`, one document after the other: only
    one id can be the BOS. RoPE is relative, so a document may stand anywhere."""
    B, T = starts.shape
    ids = torch.arange(B * T, device=table.device).view(B, T)
    alone = dataclasses.replace(c, bos_id=-1)
    rows = []
    for b in range(B):
        firsts = [0] + [i for i in range(1, T) if starts[b, i]] + [T]
        parts = []
        for first, end in zip(firsts, firsts[1:]):
            parts.append(forward(p | {"wte": table}, ids[b : b + 1, first:end], alone, m, phase))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def test_bags_against_a_plain_loop(exact):
    """A bag's input is the mean embedding of those of its tokens that belong to its last document; from there
    on it is the plain model, in which a bag that holds a BOS begins a document."""
    c = config(n_layer=2)
    bag_size = 3
    m = make_machine()
    p = make_params(c)
    x = random_tokens(2, 20 * bag_size)
    for row, place in ((0, 7), (0, 13), (1, 3), (1, 5), (1, 30)):
        x[row, place] = BOS
    means = torch.zeros(2, 20, c.n_embd, device=m.device)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    for b in range(2):
        for i in range(20):
            tokens = x[b, i * bag_size : (i + 1) * bag_size].tolist()
            starts[b, i] = BOS in tokens
            if BOS in tokens:
                last = len(tokens) - 1 - tokens[::-1].index(BOS)
                tokens = tokens[last:]
            means[b, i] = p["wte"][tokens].mean(0)
    got = forward(p, x, c, m, t.Phase((0, 1), bag_size))
    assert_equal(got, by_document(p, means.flatten(0, 1), starts, c, m, t.Phase((0, 1), 1)))


def test_bags_of_one_are_the_plain_model():
    c = config()
    bags = dataclasses.replace(c, bag_size=4, bag_until=0.5)
    m = make_machine()
    p = make_params(c)
    x = random_tokens(2, 64)
    off = forward(p, x, c, m, t.phase_schedule(0.0, c))
    on = forward(p, x, bags, m, t.phase_schedule(0.5, bags))
    assert torch.equal(off, on)


@pytest.mark.parametrize("switch", ["value_proj", "attn_gate", "unet"])
def test_switches_take_their_parameters_with_them(exact, switch):
    """Off: the parameters are gone, and the result is that of the full model with the part made harmless."""
    c = config()
    off = dataclasses.replace(c, **{switch: False})
    m = make_machine()
    x = random_tokens(2, 64)
    p = make_params(c)
    harmless = {name: w.clone() for name, w in p.items()}
    without = dict(p)
    if switch == "value_proj":
        harmless["attn"][:, 4] = 0
        without |= {"attn": p["attn"][:, :4], "gates": p["gates"][:, 1:]}
    elif switch == "attn_gate":  # a gate of one half everywhere halves the heads' outputs
        harmless["gates"][:, 1] = 0
        harmless["attn"][:, 3] *= 2
        without |= {"gates": p["gates"][:, :1]}
    else:
        harmless["skip"][:] = 0
        without.pop("skip")
    assert {name: tuple(w.shape) for name, w in without.items()} == t.param_shapes(off)
    phase = t.phase_schedule(1.0, c)
    assert_equal(forward(without, x, off, m, phase), forward(harmless, x, c, m, phase))


def test_iha_mixes_heads(exact):
    """The identity is the model without, and a mixture is that of the heads' projections."""
    c = config(n_layer=1, iha=True, attn_gate=False, value_proj=False)
    off = dataclasses.replace(c, iha=False)
    m = make_machine()
    p = make_params(c)
    x = random_tokens(2, 40)
    H = c.n_head
    phase = t.phase_schedule(1.0, c)
    p["iha"][:] = torch.eye(H)
    plain = {name: w for name, w in p.items() if name != "iha"}
    assert_equal(forward(p, x, c, m, phase), forward(plain, x, off, m, phase))
    mixture = torch.randn(1, 3, H, H, device=m.device)
    by_hand = plain["attn"].clone()
    heads = plain["attn"][0, :3].view(3, H, -1, c.n_embd)
    for part in range(3):
        for i in range(H):
            mixed = sum(mixture[0, part, i, j] * heads[part, j] for j in range(H))
            by_hand[0, part].view(H, -1, c.n_embd)[i] = mixed
    mixed = forward(p | {"iha": mixture}, x, c, m, phase)
    assert_equal(mixed, forward(plain | {"attn": by_hand}, x, off, m, phase))


def test_look_ups_are_added_to_the_embedding(exact):
    """Against the plain model with a token of its own for each triple of ids."""
    c = config(recall="2,4")
    plain = config()
    m = make_machine()
    p = make_params(c)
    phase = t.phase_schedule(1.0, c)
    inputs = torch.stack([random_tokens(2, 64, seed=seed) for seed in range(3)], dim=-1)
    nothing = torch.rand(2, 64, 2, generator=torch.Generator().manual_seed(0)) < 0.3
    inputs[..., 1:][nothing.to(m.device)] = t.NO_TOKEN
    tables = [p["wte"], *p["lookup"]]
    columns = inputs.clamp_max(257).unbind(-1)  # row 257 of a look-up's table stands for NO_TOKEN
    table = sum(rows[ids] for rows, ids in zip(tables, columns)).flatten(0, 1)
    without = {name: w for name, w in p.items() if name != "lookup"}
    expected = by_document(without, table, inputs[..., 0] == BOS, plain, m, phase)
    got = t.forward(p, inputs, c, m, phase)
    assert_equal(got, expected)
    assert (got - forward(without, inputs[..., 0], plain, m, phase)).abs().max() > 0.01


def test_dropout_only_in_training():
    c = config(dropout=0.3)
    m = make_machine()
    p = make_params(c)
    x = random_tokens(8, 64)
    phase = t.phase_schedule(1.0, c)
    plain = forward(p, x, config(), m, phase)
    assert torch.equal(forward(p, x, c, m, phase), plain)  # scoring, and whatever else does not ask for it
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(forward(p, x, c, m, phase, dropout=c.dropout))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], plain)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_pass_drops_by_its_seed_alone(dropout):
    """What was drawn before does not matter, and without dropout neither does the seed."""
    c = config(dropout=dropout)
    m = make_machine()
    weights = make_params(c)
    x = random_tokens(4, 64)[..., None]
    grads = []
    for drawn, seed in ((0, 5), (3, 5), (0, 6)):
        torch.manual_seed(drawn)
        p = trainable(weights)
        t.train_pass(p, x, x, x.numel(), c, m, t.phase_schedule(0.0, c), (seed,))
        grads.append(p["attn"].grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2]) == (dropout == 0)


def test_first_loss_is_uniform():
    """The output head starts at 0.001 and hidden states are of length sqrt(32), so logits are near 0.006: a
    loss is off by about as much in a single token, and by far less in the mean."""
    c = config()
    m = make_machine()
    p = {name: w.to(m.device) for name, w in t.init_params(c).items()}
    nll = stream_nll(p, random_tokens(2, 150).cpu(), c, m)
    assert abs(t.mean_nll(nll) - math.log(257)) < 0.006


# ---- the parameter table

# Every kind of parameter, and models that lack some.
TABLES = {
    "all": dict(mtp_weight=0.3, iha=True, **LOOK_UP),
    "few": dict(value_proj=False, attn_gate=False, unet=False),
    "one layer": dict(n_layer=1, iha=True),
    "bags and loops": dict(bag_size=2, bag_until=0.9, loop_first=1, loop_last=1, loop_times=1, loop_from=0.0),
}


@pytest.mark.parametrize("changes", TABLES.values(), ids=TABLES)
def test_table_is_complete(changes):
    """Every parameter gets a start, a gradient, optimizer state and an update."""
    c = config(**changes)
    m = make_machine()
    table = t.param_table(c)
    shapes = t.param_shapes(c)
    assert list(t.init_params(c)) == list(table) == list(shapes)
    assert t.n_params(c) == sum(w.numel() for w in t.init_params(c).values())
    p = trainable(make_params(c))
    before = {name: w.detach().clone() for name, w in p.items()}
    phase = t.phase_schedule(0.5, c)
    inputs = torch.stack(
        [random_tokens(2, 64 * phase.bag_size, seed=s) for s in range(1 + t.n_lookups(c))], -1
    )
    y = inputs[..., 0].unflatten(1, (-1, phase.bag_size))
    t.train_pass(p, inputs, y, y.numel(), c, m, phase, (0,))
    for name, w in p.items():
        assert w.grad.shape == shapes[name] and w.grad.abs().sum() > 0, name
        parts = w.grad.view(max(1, table[name].n_stack), -1)
        assert (parts.abs().sum(1) > 0).all(), f"a layer of {name}"
    optimizer = t.MuonAdamW(p, c, m)
    assert list(optimizer.state) == list(table)
    optimizer.step(0, 1.0, 1.0, 0.9)
    for name, w in p.items():
        assert w.grad is None and not torch.equal(w, before[name]), name


@pytest.mark.parametrize("changes", TABLES.values(), ids=TABLES)
def test_table_decides_what_flops_count(changes, monkeypatch):
    """Each parameter counts twice its size for every layer that runs it, exactly where it is `multiplied`."""
    c = config(**changes)
    table = t.param_table(c)
    phase = t.phase_schedule(0.5, c)
    whole = t.flops_per_token(c, phase)
    for name, entry in table.items():
        monkeypatch.setattr(
            t, "param_table", lambda c, name=name: {k: e for k, e in table.items() if k != name}
        )
        runs = len(phase.layers) if entry.n_stack else 1
        expected = 2 * math.prod(entry.shape) * runs if entry.multiplied else 0
        assert whole - t.flops_per_token(c, phase) == pytest.approx(expected), name


def test_an_entry_is_all_that_a_new_parameter_needs(monkeypatch):
    """A shift in every layer: it starts, reaches the layer, trains, and takes its learning rate and decay
    from its line."""
    param_table = t.param_table
    block = t.block
    c = config()

    def longer_table(c):
        entry = t.Param((c.n_embd,), t.constant(0.5), "adamw", "scalar_lr", False, c.n_layer, False, True)
        return param_table(c) | {"shift": entry}

    def shifted(x, x0, skip, w, *args):
        return block(x, x0, skip, w, *args) + w["shift"]

    plain = t.init_params(c)
    monkeypatch.setattr(t, "param_table", longer_table)
    monkeypatch.setattr(t, "block", shifted)
    assert t.param_shapes(c)["shift"] == (3, 32)
    p = t.init_params(c)
    assert (p["shift"] == 0.5).all() and all(torch.equal(p[name], w) for name, w in plain.items())
    m = make_machine()
    p = trainable({name: w.to(m.device) for name, w in p.items()})
    optimizer = t.MuonAdamW(p, c, m)
    x = random_tokens(2, 64)[..., None]
    for step in range(2):
        t.train_pass(p, x, x, x.numel(), c, m, t.phase_schedule(1.0, c), (0,))
        before = p["shift"].detach().clone()
        optimizer.step(step, 1.0, 1.0, 0.9)
    moved = (p["shift"] - before).abs()
    assert (moved > 0).all()
    assert moved.max() < 10 * c.scalar_lr


def test_layers_may_share_a_parameter(exact, monkeypatch):
    """A stack of two under four layers: layer i has entry i % 2, and their gradients add up."""
    param_table = t.param_table
    c = config(n_layer=4)

    def shared_table(c):
        return {
            name: entry._replace(n_stack=2) if name.startswith("mlp") else entry
            for name, entry in param_table(c).items()
        }

    m = make_machine()
    x = random_tokens(2, 64)[..., None]
    phase = t.phase_schedule(1.0, c)
    with monkeypatch.context() as patch:
        patch.setattr(t, "param_table", shared_table)
        shared = trainable(make_params(c))
        assert shared["mlp_in"].shape == (2, 2, 48, 32)
        flops = t.flops_per_token(c, phase)
        t.train_pass(shared, x, x, x.numel(), c, m, phase, (0,))
        t.MuonAdamW(shared, c, m)
    copied = trainable(
        {name: w.detach()[[0, 1, 0, 1]] if "mlp" in name else w.detach() for name, w in shared.items()}
    )
    assert t.flops_per_token(c, phase) == flops
    t.train_pass(copied, x, x, x.numel(), c, m, phase, (0,))
    for name, w in copied.items():
        grad = w.grad.view(2, 2, *w.shape[1:]).sum(0) if "mlp" in name else w.grad
        torch.testing.assert_close(shared[name].grad, grad, **EXACT, msg=name)


def test_starts_are_drawn_from_the_seed():
    a, again, b = (t.init_params(config(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert {name for name in a if not torch.equal(a[name], b[name])} == {"wte", "lm_head", "attn", "mlp_in"}


# ---- invariants of the benchmark


@pytest.mark.parametrize("changes", SCORED.values(), ids=SCORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_sees_its_future(dtype, changes):
    """Every position of a stream of several windows, window edges included: what comes later changes nothing
    before."""
    c = config(**changes)
    m = make_machine(dtype=dtype)
    p = make_params(c)
    x = random_tokens(1, 200).cpu().numpy()
    before = stream_nll(p, x, c, m)
    rng = np.random.default_rng(1)
    for at in [1, 63, 64, 65, 127, 128, 129, 192, 193, 199]:
        changed = x.copy()
        changed[:, at:] = rng.integers(0, 257, changed[:, at:].shape)
        changed[:, at] = (x[:, at] + 1) % 257
        after = stream_nll(p, changed, c, m)
        assert np.array_equal(after[:, :at], before[:, :at]), at
        assert after[0, at] != before[0, at]


@pytest.mark.parametrize("changes", SCORED.values(), ids=SCORED)
def test_probabilities_sum_to_one(exact, changes):
    """Rows that share a prefix and go through the whole vocabulary."""
    c = config(**changes)
    p = make_params(c)
    for length in (2, 40, 66):
        streams = random_tokens(1, length).cpu().numpy().repeat(257, 0)
        streams[:, -1] = np.arange(257)
        nll = stream_nll(p, streams, c, make_machine())
        assert np.exp(-nll[:, -1]).sum() == pytest.approx(1, rel=EXACT["rtol"])


@pytest.mark.parametrize("changes", SCORED.values(), ids=SCORED)
def test_rows_are_scored_independently(exact, changes):
    """Alone, in company, and in another order."""
    c = config(**changes)
    m = make_machine()
    p = make_params(c)
    x = random_tokens(7, 150).cpu().numpy()
    together = stream_nll(p, x, c, m)
    assert (together[:, 0] == 0).all() and (together[:, 1:] > 0).all()
    np.testing.assert_allclose(stream_nll(p, x[::-1], c, m)[::-1], together, **EXACT)
    for row in range(7):
        np.testing.assert_allclose(stream_nll(p, x[row : row + 1], c, m)[0], together[row], **EXACT)


@pytest.mark.parametrize("stride", [0, 16, 5, 1])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 50])
def test_each_token_is_scored_from_its_own_window(exact, stride, length):
    """A loop over tokens: each from the first of the windows, which begin every `stride` tokens and are 16
    long, that holds it. Without a stride these are consecutive."""
    c = config(seq_len=16, window_short=8, score_stride=stride)
    m = make_machine()
    p = make_params(c)
    x = random_tokens(1, length)
    nll = stream_nll(p, x.cpu(), c, m)[0]
    assert nll[0] == 0
    for i in range(1, length):
        start = next(at for at in range(0, length, stride or 16) if i <= at + 16)
        h = forward(p, x[:, start:i], c, m, t.phase_schedule(1.0, c))
        logits = head_logits(h[0, -1], p["lm_head"], c)
        assert nll[i] == pytest.approx(-logits.log_softmax(-1)[x[0, i]].item(), rel=EXACT["rtol"])


@pytest.mark.parametrize("length", [40, 65, 193, 900])
@pytest.mark.parametrize("n_windows", [1, 4, 1000])
def test_evaluation_windows_are_windows_of_the_score(exact, length, n_windows):
    """An evaluation gives its tokens what the score of the whole stream gives them; its windows differ, and
    reach from the stream's beginning to its end."""
    c = config(eval_windows=n_windows, recall="1,2", memory="1,2")
    m = make_machine()
    p = make_params(c)
    x = random_tokens(1, length).cpu().numpy()
    known = random_tokens(1, 300, seed=5)[0].cpu().numpy().astype(np.uint16)
    inputs = t.Lookup(known, c).inputs(x)
    whole = t.stream_nll(p, inputs, c, m)[0]
    windows = harness.evaluation_inputs(inputs[0], c)
    T = min(64, length - 1)
    n_whole = (length - 1) // T
    assert windows.shape == (min(n_windows, n_whole), T + 1, t.n_inputs(c))
    nll = t.stream_nll(p, windows, c, m)
    starts = []
    for window, values in zip(windows, nll):
        start = next(s for s in range(0, length, T) if np.array_equal(inputs[0, s : s + T + 1], window))
        np.testing.assert_allclose(values[1:], whole[start + 1 : start + T + 1], **EXACT)
        starts.append(start)
    assert len(set(starts)) == len(starts) and starts[0] == 0
    if len(starts) > 1:
        assert starts[-1] == (n_whole - 1) * T
        gaps = np.diff(starts) // T
        assert gaps.max() - gaps.min() <= 1  # evenly


def test_flops_count_what_is_multiplied():
    """Against PyTorch's own counter, which sees all products of a mask-free forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    c = config(window_pattern="L")
    m = make_machine()
    p = make_params(c)
    phase = t.phase_schedule(1.0, c)
    with FlopCounterMode(display=False) as counter:
        h = forward(p, random_tokens(1, 64), c, m, phase)
        head_logits(h[0], p["lm_head"], c)
    # On a CPU the counter does not see SDPA, on a GPU it does not know of the mask: 64 keys instead of 32.5.
    attention = 4 * 32.5 * c.n_embd * c.n_layer
    products = t.flops_per_token(c, phase) - attention
    assert counter.get_total_flops() / 64 in (products, products + attention * 64 / 32.5)


# ---- objective


def plain_objective(h, w, targets, c, teacher=None):
    """All logits at once, one target after the other: (cross-entropy, KL to the teacher), sums."""
    logits = head_logits(h, w, c)
    ce = torch.zeros((), dtype=h.dtype, device=h.device)
    kl = torch.zeros((), dtype=h.dtype, device=h.device)
    for n in range(len(h)):
        for target in targets[n].tolist():
            if target >= 0:
                ce = ce - logits[n].softmax(-1)[target].log()
        if teacher and targets[n, 0] >= 0:
            taught = (head_logits(teacher[0][n], teacher[1], c) / c.distill_temp).softmax(-1)
            own = (logits[n] / c.distill_temp).softmax(-1)
            kl = kl + (taught * (taught.log() - own.log())).sum()
    return ce, kl


def chunked(h, w, targets, c, m, scale=1.0, teacher=None):
    """objective() with heads of float32: (gradient of h, gradient of the head, logged sums)."""
    if teacher:
        teacher = t.LogitParts(teacher[0], t.padded_head(teacher[1], h.dtype))
    scale = torch.tensor(scale, device=m.device)
    parts = t.LogitParts(h, t.padded_head(w, h.dtype))
    grad, logged = t.objective(parts, targets, scale, c, m, teacher)
    return grad.h, grad.head, logged


def hidden_and_head(N=40, D=16, V=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    device = make_machine().device
    return torch.randn(N, D, generator=g).to(device), 3 * torch.randn(V, D, generator=g).to(device)


@pytest.mark.parametrize("teacher_temp", [None, 1.0, 1.7], ids=["no teacher", "teacher", "softened"])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("chunk", [7, 64])
def test_objective_against_whole_logits(exact, K, chunk, teacher_temp):
    """Losses, gradient of the hidden states, gradient of the head: one target a token and several, some of
    them missing, with a teacher of a width of its own and without."""
    c = config(vocab_size=50, loss_chunk=chunk, distill_alpha=0.3, distill_temp=teacher_temp or 1.0)
    m = make_machine()
    h, w = hidden_and_head()
    teacher = None
    if teacher_temp:
        teacher = hidden_and_head(D=9, seed=1)
    targets = torch.randint(-1, 50, (40, K), generator=torch.Generator().manual_seed(0)).to(m.device)
    targets[5] = targets[5, 0]  # the same target K times
    targets[3] = -1
    a = h.clone().requires_grad_()
    b = w.clone().requires_grad_()
    ce, kl = plain_objective(a, b, targets, c, teacher)
    loss = ce
    if teacher:
        loss = 0.7 * ce + 0.3 * c.distill_temp**2 * kl
    (0.1 * loss).backward()
    grad_h, grad_head, logged = chunked(h, w, targets, c, m, 0.1, teacher)
    assert_equal(logged["loss"], ce.detach())
    assert ("kl" in logged) == bool(teacher)
    if teacher:
        assert_equal(logged["kl"], kl.detach())
    assert_equal(grad_h, a.grad)
    assert_equal(grad_head[:50], b.grad)
    assert len(grad_head) == 56 and grad_head[50:].abs().max() == 0  # rows that only fill up
    assert grad_h[3].abs().max() == 0


def test_objective_with_n_grams(exact):
    """The gate times the n-grams' log-probabilities is added behind the softcap; all three gradients, also
    with a teacher that has a gate of its own, are autograd's over whole logits."""
    c = config(vocab_size=50, loss_chunk=7, distill_alpha=0.3)
    m = make_machine()
    g = torch.Generator().manual_seed(0)
    columns = torch.randint(0, 60000, (40, 50), generator=g).to(m.device)
    targets = torch.randint(-1, 50, (40, 1), generator=g).to(m.device)
    h, w = hidden_and_head()
    weights = [x.clone().requires_grad_() for x in (h, w, torch.rand(40, 1, generator=g).to(h))]
    teacher_gate = torch.rand(40, 1, generator=g).to(h)

    def logits(h, w, gate):
        return head_logits(h, w, c) - gate * columns / 4096

    expected = t.loss_function(logits(*weights), targets, c, logits(h, w, teacher_gate))[0]
    (0.1 * expected).backward()
    a, b, gate = (x.detach() for x in weights)
    parts = t.LogitParts(a, t.padded_head(b, a.dtype), gate, columns)
    taught = parts._replace(gate=teacher_gate)
    grad, logged = t.objective(parts, targets, torch.tensor(0.1, device=m.device), c, m, taught)
    assert logged["kl"] > 1
    for got, x in zip((grad.h, grad.head[:50], grad.gate), weights, strict=True):
        assert_equal(got, x.grad)
    nll = t.token_nll(parts, targets[:, 0].clamp_min(0), c)
    expected = logits(a, b, gate).log_softmax(-1).gather(1, targets.clamp_min(0))[:, 0]
    assert_equal(nll, -expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [15.0, 50.0])
def test_objective_near_its_limits(dtype, softcap):
    """Logits from one end of the softcap to the other, and sixteen chunks whose gradients of the head add up.
    Against float64, from the same rounded inputs. What rounding may cost, with e the dtype's relative error:

    A logit z before the softcap is a sum of 16 products, in float32, then rounded: off by e * |z| + 17 *
    EPS * sum |h w|. Behind the softcap that is at most 0.45 * softcap * e, the largest x / cosh(x)**2 being
    0.45. A probability is off by twice that of itself. The slope of the softcap, at most 1, is off by at
    most 0.77 * e, twice the largest x * tanh(x) / cosh(x)**2. Two further roundings: of a gradient of z,
    and of a product."""
    g = torch.Generator().manual_seed(0)
    device = make_machine().device
    h = (6 * torch.randn(96, 16, generator=g)).to(device, dtype)
    w = (6 * torch.randn(50, 16, generator=g)).to(device, dtype)
    targets = torch.randint(50, (96, 2), generator=g).to(device)
    c = config(vocab_size=50, loss_chunk=6, softcap=softcap)
    a = h.double().requires_grad_()
    b = w.double().requires_grad_()
    assert (a @ b.T).abs().max() > 3 * softcap
    expected, _ = plain_objective(a, b, targets, c)
    expected.backward()
    grad_h, grad_head, logged = chunked(h, w, targets, c, make_machine(dtype=dtype))
    e = 2**-9 if dtype == torch.bfloat16 else 17 * EPS
    bound = (2 * 0.45 * softcap + 0.77 + 2) * e
    # The gradient of z is at most slope * (2 p + one for each target), and every entry's error a share of
    # that.
    p = head_logits(h.double(), w.double(), c).softmax(-1)
    z_grad = 2 * p + F.one_hot(targets, 50).sum(1)
    assert abs(logged["loss"].item() - expected.item()) < targets.numel() * 2 * 0.45 * softcap * e
    assert grad_h.dtype == dtype and grad_head.dtype == torch.float32
    assert ((grad_h.double() - a.grad).abs() <= bound * (z_grad @ w.double().abs())).all()
    assert ((grad_head[:50].double() - b.grad).abs() <= bound * (z_grad.T @ h.double().abs())).all()
    # Errors of both signs cancel in a norm: over the hundreds of terms behind each only a part is left.
    assert (grad_h.double() - a.grad).norm() < bound * a.grad.norm()


def label_smoothing(loss_function):
    def smoothed(logits, targets, c, teacher_logits=None):
        loss, logged = loss_function(logits, targets, c, teacher_logits)
        uniform = -(logits.log_softmax(-1).mean(-1) * (targets[:, 0] >= 0)).sum()
        return 0.9 * loss + 0.1 * uniform, logged | {"uniform": uniform}

    return smoothed


def z_loss(loss_function):
    def with_z_loss(logits, targets, c, teacher_logits=None):
        loss, logged = loss_function(logits, targets, c, teacher_logits)
        z = (logits.logsumexp(-1).square() * (targets[:, 0] >= 0)).sum()
        return loss + 0.01 * z, logged | {"z": z}

    return with_z_loss


@pytest.mark.parametrize("change", [label_smoothing, z_loss])
def test_a_term_of_the_loss_is_one_line(exact, monkeypatch, change):
    """A contestant's loss_function: gradients are autograd's over whole logits, and its term is logged."""
    c = config(vocab_size=50, loss_chunk=7)
    m = make_machine()
    h, w = hidden_and_head()
    targets = torch.randint(-1, 50, (40, 1), generator=torch.Generator().manual_seed(0)).to(m.device)
    plain = chunked(h, w, targets, c, m)
    changed = change(t.loss_function)
    a = h.clone().requires_grad_()
    b = w.clone().requires_grad_()
    loss, sums = changed(head_logits(a, b, c), targets, c)
    loss.backward()
    monkeypatch.setattr(t, "loss_function", changed)
    grad_h, grad_head, logged = chunked(h, w, targets, c, m)
    assert_equal(grad_h, a.grad)
    assert_equal(grad_head[:50], b.grad)
    assert (grad_h - plain[0]).abs().max() > 0.001
    assert list(logged) == list(sums)
    for name, value in sums.items():
        assert_equal(logged[name], value.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_objective_in_memory_full_of_nan(monkeypatch, dtype):
    """What lay in its buffers before is of no consequence, also where rows of 257 are filled up."""
    m = make_machine(dtype=dtype)
    h = torch.randn(512, 64, device=m.device).to(dtype)
    w = torch.randn(257, 64, device=m.device)
    targets = torch.randint(257, (512, 1), device=m.device)
    empty_like = torch.empty_like
    nan_like = functools.partial(torch.full_like, fill_value=math.nan)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: nan_like(empty_like(x, **kwargs)))
    grad_h, grad_head, logged = chunked(h, w, targets, config(loss_chunk=200), m)
    assert grad_h.isfinite().all() and grad_head.isfinite().all() and logged["loss"].isfinite()


def test_objective_never_holds_all_logits():
    """A head for which the logits of the whole batch would take 40 times the chunk's."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest.append(x.numel())
            return out

    m = make_machine()
    h, w = hidden_and_head(2000, 8, 997)
    c = config(vocab_size=997, loss_chunk=50)
    targets = torch.randint(997, (2000, 1), device=m.device)
    with Watch():
        chunked(h, w, targets, c, m)
        t.token_nll(t.LogitParts(h, t.padded_head(w, h.dtype)), targets[:, 0], c)
    assert max(largest) == 50 * 1000  # in rows of a multiple of 8


def test_token_nll_is_the_objective(exact):
    h, w = hidden_and_head(30, 8, 20)
    m = make_machine()
    targets = torch.randint(20, (30, 1), device=m.device)
    c = config(vocab_size=20, loss_chunk=7)
    nll = t.token_nll(t.LogitParts(h, t.padded_head(w, h.dtype)), targets[:, 0], c)
    assert_equal(nll.sum(), chunked(h, w, targets, c, m)[2]["loss"])


@pytest.mark.parametrize("bag_size", [1, 2])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_pass_logs_the_cross_entropy_alone(exact, with_teacher, bag_size):
    """`loss` is the next token's cross-entropy, whatever else is trained on: the token after the next, a
    teacher, bags. Each stands beside it under its own name, as the mean over the batch's targets."""
    c = config(mtp_weight=0.3, distill_alpha=0.4, distill_temp=1.5)
    c_teacher = config(n_embd=16, mlp_hidden=32)
    m = make_machine()
    p = trainable(make_params(c))
    p_teacher = make_params(c_teacher, seed=1)
    phase = t.Phase((0, 1, 2), bag_size)
    x = random_tokens(2, 64 * bag_size)
    y = torch.randint(257, (2, 64, bag_size), device=m.device)
    y[1, 60:] = -1
    n_targets = 2 * int((y >= 0).sum())  # this is one of two micro-batches
    teacher = (c_teacher, p_teacher) if with_teacher else None
    logged = t.train_pass(p, x[..., None], y, n_targets, c, m, phase, (0,), teacher)
    h = forward(p, x, c, m, phase)
    taught = forward(p_teacher, x, c_teacher, m, phase).flatten(0, 1), p_teacher["lm_head"]
    ce, kl = plain_objective(h.flatten(0, 1), p["lm_head"], y.flatten(0, 1), c, taught)
    h_mtp = t.norm(h @ p["mtp"][0].T)
    mtp, _ = plain_objective(h_mtp[:, :-1].flatten(0, 1), p["lm_head"], y[:, 1:].flatten(0, 1), c)
    expected = {"bag_loss" if bag_size > 1 else "loss": ce, "mtp": mtp}
    loss = ce + 0.3 * mtp
    if with_teacher and bag_size == 1:  # a teacher of single tokens has nothing to say of bags
        expected["kl"] = kl
        loss = 0.6 * ce + 0.4 * 1.5**2 * kl + 0.3 * mtp
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal(logged[name], value.detach() / n_targets)
    grads = torch.autograd.grad(loss / n_targets, p.values())
    for (name, w), grad in zip(p.items(), grads):
        torch.testing.assert_close(w.grad, grad, **EXACT, msg=name)


def test_the_second_target_leaves_scoring_alone():
    """Scoring does not use the projection for the token after the next."""
    c = config(mtp_weight=0.3)
    off = config()
    m = make_machine()
    p = make_params(c)
    x = random_tokens(2, 64)
    without = {name: w for name, w in p.items() if name != "mtp"}
    phase = t.phase_schedule(1.0, c)
    assert torch.equal(forward(without, x, off, m, phase), forward(p, x, c, m, phase))


def test_gradients_of_micro_batches_add_up(exact):
    """Two passes over halves of a batch leave the gradient of one over the whole."""
    c = config(mtp_weight=0.3)
    m = make_machine()
    weights = make_params(c)
    x = random_tokens(4, 64)[..., None]
    phase = t.phase_schedule(1.0, c)
    whole, halves = trainable(weights), trainable(weights)
    t.train_pass(whole, x, x, x.numel(), c, m, phase, (0,))
    for part in x.split(2):
        t.train_pass(halves, part, part, x.numel(), c, m, phase, (0,))
    for name in weights:
        torch.testing.assert_close(halves[name].grad, whole[name].grad, **EXACT, msg=name)


@pytest.mark.parametrize("iha", [False, True])
def test_weights_of_a_step_change_no_gradient(exact, iha):
    """Two passes with weights that were cast and mixed once leave the gradients of two passes that do it
    themselves."""
    c = config(mtp_weight=0.3, iha=iha)
    m = make_machine()
    weights = make_params(c)
    x = random_tokens(4, 64)[..., None]
    phase = t.phase_schedule(1.0, c)
    once, each = trainable(weights), trainable(weights)
    with t.step_weights(once, c, m) as of_the_step:
        for part in x.split(2):
            t.train_pass(of_the_step, part, part, x.numel(), c, m, phase, (0,))
    for part in x.split(2):
        t.train_pass(each, part, part, x.numel(), c, m, phase, (0,))
    for name in weights:
        torch.testing.assert_close(once[name].grad, each[name].grad, **EXACT, msg=name)


def test_gradients_add_up_in_float32():
    """Products in bf16: the sum over two passes is that of their gradients, bit for bit, and is not rounded
    to bf16."""
    c = config()
    m = make_machine(dtype=torch.bfloat16)
    weights = make_params(c)
    x = random_tokens(4, 64)[..., None]
    phase = t.phase_schedule(1.0, c)

    def gradients(*parts):
        p = trainable(weights)
        with t.step_weights(p, c, m) as of_the_step:
            for part in parts:
                t.train_pass(of_the_step, part, part, x.numel(), c, m, phase, (0,))
        return {name: w.grad for name, w in p.items()}

    first, second = x.split(2)
    together = gradients(first, second)
    apart = gradients(first), gradients(second)
    for name, entry in t.param_table(c).items():
        if entry.n_stack:
            assert together[name].dtype == torch.float32
            assert torch.equal(together[name], apart[0][name] + apart[1][name]), name


def test_of_all_tokens_each_is_what_it_is_alone(exact):
    c = config(ngrams="1")
    p = make_params(c)
    x = np.asarray(random_tokens(2, 150).cpu())
    inputs = t.Lookup(np.arange(300, dtype=np.uint16) % 256, c).inputs(x)
    m = make_machine()
    of_all = t.stream_nll(p, inputs, c, m, of_all=True)
    assert of_all.shape == (2, 150, c.vocab_size)
    alone = np.take_along_axis(of_all, inputs[:, :, :1].astype(np.int64), 2)[:, :, 0]
    np.testing.assert_allclose(alone, t.stream_nll(p, inputs, c, m), **EXACT)
    np.testing.assert_allclose(np.exp(-of_all[:, 1:]).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("ngrams", ["", "1"])
@pytest.mark.parametrize("first", [4, 0])  # a document's beginning, or not
def test_learning_from_the_stream_descends_the_loss(ngrams, first):
    """By autograd, token by token: two weights, without n-grams one, and a bias for each context of at most
    three tokens, which begin anew with each document."""
    rng = np.random.default_rng(0)
    c = config(vocab_size=5, bos_id=4, ngrams=ngrams, online_lr=0.3)
    tokens = rng.integers(0, 4, 80)
    tokens[[0, 25, 26, 60]] = first, 4, 4, 4
    counted = rng.integers(0, 5 * t.UNITS_PER_NAT, (80, 5))
    columns = [tokens[:, None], counted] if ngrams else [tokens[:, None]]
    inputs = np.concatenate(columns, axis=1).astype(np.uint16)
    log_p = np.log(rng.dirichlet(np.ones(5), 80))
    got = t.online_nll(-log_p[None], inputs[None], c)[0]

    contexts = {"".join(word) for n in range(4) for word in itertools.product("01234", repeat=n)}
    number = {word: k for k, word in enumerate(sorted(contexts))}
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(len(number), 5, dtype=torch.float64, requires_grad=True)
    words = "".join(map(str, tokens))
    assert got[0] == 0
    for i in range(1, 80):
        begin = max(0, words.rfind("4", 0, i))
        if words[i - 1] == "4":
            biases.data.zero_()
        rows = [number[words[i - n : i]] for n in range(4) if i - n >= begin]
        features = torch.tensor(np.stack([log_p[i], counted[i - 1] / -4096 if ngrams else np.zeros(5)]))
        loss = -(weights @ features + biases[rows].sum(0)).log_softmax(-1)[tokens[i]]
        assert got[i] == pytest.approx(loss.item(), rel=1e-9), i
        weights.grad = biases.grad = None
        loss.backward()
        weights.data -= 0.025 * 0.3 * weights.grad
        biases.data -= 0.3 * biases.grad


def test_the_streaming_ensemble_is_the_plain_mean():
    p = np.random.default_rng(0).random((5, 2, 30))
    total = np.inf
    for member in p:
        total = t.add_model(total, -np.log(member))
    np.testing.assert_allclose(total + math.log(5), -np.log(p.mean(0)), **EXACT)
