"""The model's invariants, and each fast path against a plain one written here."""
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

import train_gpt as t
from conftest import TINY

BOS = 256


def config(**changes):
    return t.Config(**(TINY | changes))


def random_tokens(B, T, seed=0, bos_share=0.05, device="cpu"):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (B, T))
    x[rng.random((B, T)) < bos_share] = BOS
    return torch.from_numpy(x).to(device)


def forward(p, x, *args, **kwargs):
    return t.forward(p, x[..., None], *args, **kwargs)  # of tokens alone, with nothing recalled


def stream_nll(p, x, c, *args):
    known = np.random.default_rng(5).integers(0, 256, 300).astype(np.uint16)
    known[[0, 100]] = BOS
    return t.stream_nll(p, t.Recall(known, BOS, dataclasses.replace(c, train_tokens=300)).inputs(x), c, *args)


def plain_attention(q, k, v, tokens, window):
    """Softmax over every score, the forbidden ones at -inf; pairs decided one by one."""
    B, T, H, d = q.shape
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d)
    for b in range(B):
        document = np.cumsum(tokens[b].cpu().numpy() == BOS)
        for i in range(T):
            for j in range(T):
                if j > i or i - j >= window or document[i] != document[j]:
                    scores[b, :, i, j] = -math.inf
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [1, 7, 12, 24, 40, 48])  # 1, 12 and 24 go in blocks
def test_attention_is_a_masked_softmax(machine, window):
    tokens = random_tokens(2, 48, device=machine.device)
    q, k, v = (torch.randn(2, 48, 3, 8, device=machine.device) for _ in range(3))
    mask = t.attention_masks(tokens == BOS, [window], "sdpa", torch.float32)[window]
    torch.testing.assert_close(t.attention(q, k, v, mask, "sdpa"), plain_attention(q, k, v, tokens, window), atol=1e-5, rtol=1e-4)


def test_flex_sees_the_same_pairs(machine, monkeypatch):
    monkeypatch.setattr(t, "flex", flex_attention, raising=False)
    tokens = random_tokens(2, 256, device=machine.device)
    q, k, v = (torch.randn(2, 256, 2, 16, device=machine.device) for _ in range(3))
    for window in (50, 256):
        mask = t.attention_masks(tokens == BOS, [window], "flex", torch.float32)[window]
        with torch.no_grad():
            y = t.flex.flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
        torch.testing.assert_close(y, plain_attention(q, k, v, tokens, window), atol=1e-4, rtol=1e-3)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
    """What the flash kernel computes, one sequence after the other: it needs a GPU, the bookkeeping around it does not."""
    assert cu_q is cu_k and cu_q.dtype == torch.int32 and window_size[1] == 0
    y = torch.full_like(q, math.nan)
    for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:]):
        assert 0 <= b - a <= max_q
        if b > a:
            i, j = torch.arange(b - a)[:, None], torch.arange(b - a)
            allowed = (j <= i) & (i - j <= window_size[0])
            scores = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) / math.sqrt(q.size(-1))
            y[a:b] = torch.einsum("hij,jhd->ihd", scores.masked_fill(~allowed, -math.inf).softmax(-1), v[a:b])
    return y


@pytest.mark.parametrize("bos_share", [0.0, 0.05, 0.9])
def test_varlen_sees_the_same_pairs(monkeypatch, bos_share):
    monkeypatch.setattr(t, "varlen", SimpleNamespace(varlen_attn=plain_varlen), raising=False)
    tokens = random_tokens(2, 48, bos_share=bos_share)
    q, k, v = (torch.randn(2, 48, 3, 8) for _ in range(3))
    for window in (5, 48):
        y = t.attention(q, k, v, t.attention_masks(tokens == BOS, [window], "varlen", torch.float32)[window], "varlen")
        torch.testing.assert_close(y, plain_attention(q, k, v, tokens, window), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernel and a backward pass of FlexAttention need a GPU")
@pytest.mark.parametrize("impl", ["varlen", "flex"])
def test_gpu_attention_equals_sdpa(machine, impl):
    tokens = random_tokens(2, 256, device="cuda")
    inputs = [torch.randn(2, 256, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    for window in (64, 256):
        y, grads = {}, {}
        for name in (impl, "sdpa"):
            y[name] = t.attention(*inputs, t.attention_masks(tokens == BOS, [window], name, torch.bfloat16)[window], name)
            grads[name] = torch.autograd.grad(y[name].float().square().sum(), inputs)
        torch.testing.assert_close(y[impl], y["sdpa"], atol=2e-2, rtol=2e-2)
        for a, b in zip(grads[impl], grads["sdpa"]):
            torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)


def plain_model(p, tokens, c):
    """The whole model as one would write it for a single sequence, from the description in the docstrings. Logits [T, V]."""
    H, d, T = c.n_head, c.n_embd // c.n_head, len(tokens)
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()  # noqa: E731
    x = x0 = rms(p["wte"][tokens])
    outputs = {}
    for i in range(c.n_layer):
        if i >= (c.n_layer + 1) // 2:
            x = x + p["skip"][c.n_layer - 1 - i] * outputs[c.n_layer - 1 - i]
        x = p["mix"][i, 0] * x + p["mix"][i, 1] * x0
        h, (wq, wk, wv, wo, wx) = rms(x), p["attn"][i]
        heads = []
        for n in range(H):
            part = slice(n * d, (n + 1) * d)
            q, k, v = rms(h @ wq[part].T), rms(h @ wk[part].T), h @ wv[part].T
            v = v + 2 * torch.sigmoid(h[:, :32] @ p["gates"][i, 0, n])[:, None] * (x0 @ wx[part].T)
            for pair in range(d // 4):  # the other d/4 pairs of channels are not rotated
                angle = torch.arange(T) * 10_000 ** (-pair / (d // 4))
                for z in (q, k):
                    a, b = z[:, pair].clone(), z[:, pair + d // 2].clone()
                    z[:, pair], z[:, pair + d // 2] = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
            window = c.window_short if c.window_pattern[i % 2] == "S" and i < c.n_layer - 1 else c.seq_len
            y = plain_attention(q[None, :, None], k[None, :, None], v[None, :, None], tokens[None], window)[0, :, 0]
            heads.append(y * torch.sigmoid(h[:, :32] @ p["gates"][i, 1, n])[:, None])
        x = x + torch.cat(heads, -1) @ wo.T
        h = rms(x)
        x = x + (F.silu(h @ p["mlp_in"][i, 0].T) * (h @ p["mlp_in"][i, 1].T)) @ p["mlp_out"][i].T
        outputs[i] = x
    return c.softcap * torch.tanh(rms(x) @ p["lm_head"].T / c.softcap)


def test_forward_is_the_model_written_out(params, machine):
    c = config()
    p = {k: v.cpu().double() for k, v in params(c).items()}
    m = dataclasses.replace(machine, device=torch.device("cpu"), dtype=torch.float64)
    tokens = random_tokens(2, c.seq_len)
    h = forward(p, tokens, c, m, BOS, t.phase_schedule(1.0, c))
    for row in range(2):
        logits = c.softcap * torch.tanh(h[row] @ p["lm_head"].T / c.softcap)
        torch.testing.assert_close(logits, plain_model(p, tokens[row], c), atol=1e-6, rtol=1e-5)


def test_compiled_layers_equal_plain_ones(params, machine):
    """Loss and gradients, where this machine has a compiler."""
    c = config(seq_len=32, n_embd=64, mlp_hidden=64)
    t.set_compiled(machine, "auto")
    if not machine.compiled:
        pytest.skip(f"nothing to compare: {machine.why['compiled']}")
    x = random_tokens(4, 32)
    losses, grads = [], []
    for block, chunk in ((t.block, t.objective_chunk), (machine.block, machine.objective_chunk)):
        m = dataclasses.replace(machine, block=block, objective_chunk=chunk)
        p = {k: v.requires_grad_() for k, v in params(c).items()}
        losses.append(t.train_pass(p, x[..., None], x[..., None], x.numel(), c, m, BOS, t.phase_schedule(0.0, c), (0,)))
        grads.append({k: v.grad for k, v in p.items()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-3, atol=1e-4, msg=name)


def test_looped_layers_equal_the_unrolled_model(params, machine):
    """Layers 1-2 run twice more: the same as a model whose banks hold copies of them."""
    c = config(n_layer=4, loop_first=1, loop_last=2, loop_times=2, loop_from=0.5, unet=False, window_pattern="L")
    assert t.phase_schedule(0.49, c)[0] == (0, 1, 2, 3)
    layers = t.phase_schedule(0.5, c)[0]
    assert layers == (0, 1, 2, 1, 2, 1, 2, 3)
    p, x = params(c), random_tokens(2, c.seq_len, device=machine.device)
    unrolled = {k: v if k in ("wte", "lm_head") else v[list(layers)] for k, v in p.items()}
    wide = dataclasses.replace(c, n_layer=8, loop_times=0)
    torch.testing.assert_close(forward(p, x, c, machine, BOS, (layers, 1)),
                               forward(unrolled, x, wide, machine, BOS, (tuple(range(8)), 1)), rtol=0, atol=0)


def test_bags_against_a_plain_loop(params, machine):
    """A bag's input is the mean embedding of those of its tokens that belong to its last document; from there on it is the plain
    model, in which a bag that holds a BOS begins a document."""
    c, bag = config(n_layer=2), 3
    p, x = params(c), random_tokens(2, 20 * bag, device=machine.device)
    x[0, 7], x[0, 13], x[1, 3], x[1, 5], x[1, 30] = BOS, BOS, BOS, BOS, BOS
    means, starts = torch.zeros(2, 20, c.n_embd, device=machine.device), torch.zeros(2, 20, dtype=torch.bool, device=machine.device)
    for b in range(2):
        for i in range(20):
            tokens = x[b, i * bag:(i + 1) * bag].tolist()
            starts[b, i] = BOS in tokens
            if BOS in tokens:
                tokens = tokens[len(tokens) - 1 - tokens[::-1].index(BOS):]
            means[b, i] = p["wte"][tokens].mean(0)
    got = forward(p, x, c, machine, BOS, ((0, 1), bag))
    # the same positions as single tokens of a vocabulary of their own: 1 begins a document, the embedding is the mean
    table = means.flatten(0, 1)
    ids = torch.arange(40, device=machine.device).view(2, 20)
    for b in range(2):  # one row at a time, for only one id can be the BOS: documents by hand
        firsts = [0] + [i for i in range(1, 20) if starts[b, i]] + [20]
        for first, end in zip(firsts, firsts[1:]):
            alone = forward(p | {"wte": table}, ids[b:b + 1, first:end], c, machine, -1, ((0, 1), 1))
            torch.testing.assert_close(got[b:b + 1, first:end], alone, rtol=1e-4, atol=1e-5)  # RoPE is relative: a document may start anywhere


def test_bags_of_one_are_the_plain_model(params, machine):
    c = config()
    p, x = params(c), random_tokens(2, 64, device=machine.device)
    off = forward(p, x, c, machine, BOS, t.phase_schedule(0.0, c))
    on = forward(p, x, dataclasses.replace(c, bag_size=4, bag_until=0.5), machine, BOS, t.phase_schedule(0.5, dataclasses.replace(c, bag_size=4, bag_until=0.5)))
    assert torch.equal(off, on)


@pytest.mark.parametrize("switch", ["value_proj", "attn_gate", "x0_mix", "unet"])
def test_switches_take_their_parameters_with_them(params, machine, switch):
    """Off: the parameters are gone, and the result is that of the full model with the part made harmless."""
    c, x = config(), random_tokens(2, 64, device=machine.device)
    off = dataclasses.replace(c, **{switch: False})
    p = params(c)
    harmless, without = {k: v.clone() for k, v in p.items()}, dict(p)
    if switch == "value_proj":
        harmless["attn"][:, 4] = 0
        without |= {"attn": p["attn"][:, :4], "gates": p["gates"][:, 1:]}
    elif switch == "attn_gate":  # a gate of one half everywhere halves the heads' outputs
        harmless["gates"][:, 1] = 0
        harmless["attn"][:, 3] *= 2
        without |= {"gates": p["gates"][:, :1]}
    elif switch == "x0_mix":
        harmless["mix"][:] = torch.tensor([1.0, 0.0])
        without.pop("mix")
    else:
        harmless["skip"][:] = 0
        without.pop("skip")
    assert {k: tuple(v.shape) for k, v in without.items()} == t.param_shapes(off, 257)
    phase = t.phase_schedule(1.0, c)
    torch.testing.assert_close(forward(without, x, off, machine, BOS, phase), forward(harmless, x, c, machine, BOS, phase), rtol=1e-4, atol=1e-5)


def test_iha_mixes_heads(params, machine):
    """The identity is the model without; a permutation of all heads alike, with the output projection's columns permuted, changes nothing;
    a mixture is that of the heads' projections."""
    c = config(n_layer=1, iha=True, attn_gate=False, value_proj=False)
    p, x = params(c), random_tokens(2, 40, device=machine.device)
    H, phase = c.n_head, t.phase_schedule(1.0, c)
    run = lambda p, c=c: forward(p, x, c, machine, BOS, phase)  # noqa: E731
    p["iha"][:] = torch.eye(H, device=machine.device)
    plain = {k: v for k, v in p.items() if k != "iha"}
    off = dataclasses.replace(c, iha=False)
    torch.testing.assert_close(run(p), run(plain, off))
    mixture = torch.randn(1, 3, H, H, device=machine.device)
    by_hand = plain["attn"].clone()
    heads = plain["attn"][0, :3].view(3, H, -1, c.n_embd)
    for part in range(3):
        for i in range(H):
            by_hand[0, part].view(H, -1, c.n_embd)[i] = sum(mixture[0, part, i, j] * heads[part, j] for j in range(H))
    torch.testing.assert_close(run(p | {"iha": mixture}), run(plain | {"attn": by_hand}, off), rtol=1e-4, atol=1e-5)


def test_multi_token_prediction(params, machine):
    """The loss is that of the next token and, weighted, of the one after, from a projection that scoring does not use."""
    c = config(mtp_weight=0.3)
    p = {k: v.requires_grad_() for k, v in params(c).items()}
    x = random_tokens(2, 64, device=machine.device)
    y = torch.randint(257, (2, 64, 1), device=machine.device)
    phase = t.phase_schedule(0.0, c)
    loss = t.train_pass(p, x[..., None], y, 128, c, machine, BOS, phase, (0,))
    h = forward(p, x, c, machine, BOS, phase)
    second = t.norm(h @ p["mtp"][0].T)
    ce = [torch.nn.functional.cross_entropy(t.head_logits(a.flatten(0, 1), p["lm_head"], c.softcap), b.flatten(), reduction="sum") / 128
          for a, b in ((h, y), (second[:, :-1], y[:, 1:]))]
    torch.testing.assert_close(loss, (ce[0] + 0.3 * ce[1]).detach(), rtol=1e-5, atol=1e-5)
    assert p["mtp"].grad.abs().sum() > 0
    without = {k: v for k, v in p.items() if k != "mtp"}
    assert torch.equal(forward(without, x, dataclasses.replace(c, mtp_weight=0.0), machine, BOS, phase), h)


def test_what_is_recalled_is_added_to_the_embedding(params, machine):
    """Against the plain model with a token of its own for each triple of ids."""
    c, plain = config(recall="2,4"), config()
    p, phase = params(c), t.phase_schedule(1.0, c)
    assert p["recall"].abs().sum() > 0
    inputs = torch.stack([random_tokens(2, 64, seed=seed) for seed in range(3)], dim=-1)
    inputs[..., 1:][torch.rand(2, 64, 2, generator=torch.Generator().manual_seed(0)) < 0.3] = t.NOTHING
    inputs = inputs.to(machine.device)
    rows = [table[ids] for table, ids in zip((p["wte"], *p["recall"]), inputs.clamp_max(257).unbind(-1))]
    is_start = inputs[..., 0].flatten() == BOS
    table, ids = sum(rows).flatten(0, 1), torch.arange(128, device=machine.device)
    expected, without = [], {name: w for name, w in p.items() if name != "recall"}
    for b in range(2):  # one document at a time, for only one id can be the BOS
        firsts = [0] + [i for i in range(1, 64) if is_start[64 * b + i]] + [64]
        expected += [forward(without | {"wte": table}, ids[None, 64 * b + first:64 * b + end], plain, machine, -1, phase) for first, end in zip(firsts, firsts[1:])]
    got = t.forward(p, inputs, c, machine, BOS, phase)
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(expected, dim=1)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, t.forward(without, inputs[..., :1], plain, machine, BOS, phase), atol=1e-2)


def test_dropout_only_in_training(params, machine):
    c, noisy, x = config(), config(dropout=0.3), random_tokens(8, 64, device=machine.device)
    p, phase = params(c), t.phase_schedule(1.0, c)
    plain = forward(p, x, c, machine, BOS, phase)
    assert torch.equal(forward(p, x, noisy, machine, BOS, phase), plain)  # scoring
    assert torch.equal(forward(p, x, c, machine, BOS, phase, training=True), plain)  # off is off
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(forward(p, x, noisy, machine, BOS, phase, training=True))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], plain)


def test_first_loss_is_uniform(machine):
    c = config()
    p = {k: v.to(machine.device) for k, v in t.init_params(c, 257).items()}
    nll = stream_nll(p, random_tokens(2, 150).numpy(), c, machine, BOS, t.phase_schedule(1.0, c))
    assert abs(t.mean_nll(nll) - math.log(257)) < 0.02


# ---- invariants of the benchmark

@pytest.mark.parametrize("recall", [{}, dict(recall="1,2", memory="1,2")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_its_future(params, machine, dtype, recall):
    """Every position of a stream of several windows, window edges included: what comes later changes nothing before."""
    c, m = config(**recall), dataclasses.replace(machine, dtype=dtype)
    p, x = params(c), random_tokens(1, 200).numpy()
    before = stream_nll(p, x, c, m, BOS, t.phase_schedule(1.0, c))
    rng = np.random.default_rng(1)
    for at in [1, 63, 64, 65, 127, 128, 129, 192, 193, 199]:
        changed = x.copy()
        changed[:, at:] = rng.integers(0, 257, changed[:, at:].shape)
        changed[:, at] = (x[:, at] + 1) % 257
        after = stream_nll(p, changed, c, m, BOS, t.phase_schedule(1.0, c))
        assert np.array_equal(after[:, :at], before[:, :at]), at
        assert after[0, at] != before[0, at]


@pytest.mark.parametrize("recall", [{}, dict(recall="1,2", memory="1,2")])
def test_probabilities_sum_to_one(params, machine, recall):
    """Rows that share a prefix and go through the whole vocabulary."""
    c = config(**recall)
    p = params(c)
    for length in (2, 40, 66):
        streams = random_tokens(1, length).repeat(257, 1)
        streams[:, -1] = torch.arange(257)
        nll = stream_nll(p, streams.numpy(), c, machine, BOS, t.phase_schedule(1.0, c))
        assert abs(np.exp(-nll[:, -1].astype(np.float64)).sum() - 1) < 1e-5


@pytest.mark.parametrize("recall", [{}, dict(recall="1,2", memory="1,2")])
def test_rows_are_scored_independently(params, machine, recall):
    """Alone, in company, and in another order."""
    c = config(**recall)
    p, x, phase = params(c), random_tokens(7, 150).numpy(), t.phase_schedule(1.0, c)
    together = stream_nll(p, x, c, machine, BOS, phase)
    assert (together[:, 0] == 0).all() and (together[:, 1:] > 0).all()
    np.testing.assert_allclose(stream_nll(p, x[::-1], c, machine, BOS, phase)[::-1], together, rtol=1e-5, atol=1e-6)
    for row in range(7):
        np.testing.assert_allclose(stream_nll(p, x[row:row + 1], c, machine, BOS, phase)[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [0, 16, 5, 1])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 50])
def test_each_token_is_scored_from_its_own_window(params, machine, stride, length):
    """A loop over tokens: each from the first of the windows, which begin every `stride` tokens and are 16 long, that holds it. Without a stride
    these are consecutive."""
    c = config(seq_len=16, window_short=8, score_stride=stride)
    p, x = params(c), random_tokens(1, length).numpy()
    nll = stream_nll(p, x, c, machine, BOS, t.phase_schedule(1.0, c))[0]
    assert nll[0] == 0
    for i in range(1, length):
        start = next(at for at in range(0, length, stride or 16) if i <= at + 16)
        h = forward(p, torch.from_numpy(x[:, start:i]).to(machine.device), c, machine, BOS, t.phase_schedule(1.0, c))
        expected = -t.head_logits(h[0, -1:], p["lm_head"], c.softcap)[0].log_softmax(-1)[x[0, i]]
        assert abs(nll[i] - expected.item()) < 1e-4


def test_flops_count_what_is_multiplied(machine, params):
    """Against PyTorch's own counter, which sees all products of a mask-free forward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    c = config(window_pattern="L", seq_len=64)
    p, x = params(c), random_tokens(1, 64, device=machine.device)
    with FlopCounterMode(display=False) as counter:
        h = forward(p, x, c, machine, BOS, t.phase_schedule(1.0, c))
        t.head_logits(h[0], p["lm_head"], c.softcap)
    counted_all_pairs = 4 * 64 * c.n_embd * c.n_layer  # the counter does not know of the mask: T instead of (T+1)/2 keys
    expected = t.flops_per_token(c, 257, t.phase_schedule(1.0, c)) - 4 * 32.5 * c.n_embd * c.n_layer
    total = counter.get_total_flops() / 64
    assert total in (pytest.approx(expected + counted_all_pairs, rel=1e-3), pytest.approx(expected, rel=1e-3))


# ---- objective

def plain_objective(h, w, targets, softcap):
    """All logits at once."""
    logits = softcap * torch.tanh((h @ w.T) / softcap)
    loss = torch.zeros((), dtype=h.dtype)
    for n in range(len(h)):
        for target in targets[n].tolist():
            if target >= 0:
                loss = loss + F.cross_entropy(logits[n:n + 1], torch.tensor([target], device=h.device))
    return loss


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("chunk", [7, 64])
def test_objective_is_cross_entropy(machine, K, chunk):
    """Loss, gradient of the hidden states, gradient of the head, for one target a token and for several, some missing."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(40, 16, generator=g, dtype=torch.float64), 3 * torch.randn(50, 16, generator=g, dtype=torch.float64)
    targets = torch.randint(-1, 50, (40, K), generator=g)
    if K > 1:
        targets[5] = targets[5, 0]  # the same target three times over
    targets[3] = -1
    c = config(loss_chunk=chunk)
    grads, losses = [], []
    for function in ("plain", "chunked"):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        if function == "plain":
            loss = plain_objective(a, b, targets, c.softcap) * 0.1
            loss.backward()
            losses.append(loss.detach())
            grads.append((a.grad, b.grad))
        else:
            loss, *both = t.objective(a, b, targets, c, machine, 0.1)
            losses.append(loss)
            grads.append(both)
    torch.testing.assert_close(losses[1].double(), losses[0], rtol=1e-5, atol=0)
    for got, expected in zip(grads[1], grads[0]):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert grads[1][0][3].abs().max() == 0


@pytest.mark.parametrize("dtype, softcap, tolerance", [(torch.float32, 50.0, 1e-5), (torch.bfloat16, 15.0, 0.01), (torch.bfloat16, 50.0, 0.01)], ids=str)
def test_objective_near_its_limits(machine, dtype, softcap, tolerance):
    """Logits from one end of the softcap to the other, and sixteen chunks whose gradients of the head add up in bf16. Against float64, from the same
    rounded inputs: what bf16 may cost is rounding, of which a gradient summed over steps would show nothing."""
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 16, generator=g).mul_(6).to(dtype) for n in (96, 50))
    targets = torch.randint(50, (96, 2), generator=g)
    a, b = (x.double().requires_grad_() for x in (h, w))
    expected = plain_objective(a, b, targets, softcap)
    assert (a @ b.T).abs().max() > 3 * softcap
    expected.backward()
    loss, *grads = t.objective(h.to(machine.device), w.float().to(machine.device), targets.to(machine.device), config(loss_chunk=6, softcap=softcap), machine, 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for got, exact in zip(grads, (a.grad, b.grad)):
        assert got.dtype == dtype and (got.cpu().double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_objective_in_memory_full_of_nan(machine, monkeypatch, dtype):
    """What lay in its buffers before, also behind the end of a row, is of no consequence: oneDNN reads a value too many where rows are odd."""
    h, w, targets = (x.to(machine.device) for x in (torch.randn(512, 64).to(dtype), torch.randn(257, 64), torch.randint(257, (512, 1))))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size: x.new_full(size, math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    assert all(x.isfinite().all() for x in t.objective(h, w, targets, config(loss_chunk=256), machine, 1.0))


def test_objective_never_holds_all_logits(machine):
    """A head for which the logits of the whole batch would take 40 times the chunk's."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor))
            return out
    h, w = torch.randn(2000, 8), torch.randn(1000, 8)
    with Watch():
        t.objective(h, w, torch.randint(1000, (2000, 1)), config(loss_chunk=50), machine, 1.0)
    assert max(largest) == 2 * 50 * 1024  # the logits and their gradient, in rows of a multiple of 64


def test_token_nll_is_the_objective(machine):
    h, w, targets = torch.randn(30, 8), torch.randn(20, 8), torch.randint(20, (30,))
    c = config(loss_chunk=7)
    torch.testing.assert_close(t.token_nll(h, w, targets, c).sum(), t.objective(h, w, targets[:, None], c, machine, 1.0)[0])


@pytest.mark.parametrize("temp", [1.0, 1.7])
def test_distillation_against_full_logits(machine, temp):
    """Loss and gradients of (1 - a) CE + a T**2 KL(teacher || model), in chunks, against autograd over whole logits."""
    c, g = config(distill_alpha=0.3, distill_temp=temp, loss_chunk=7), torch.Generator().manual_seed(0)
    h, w = torch.randn(40, 16, generator=g), torch.randn(50, 16, generator=g)
    targets = torch.randint(50, (40, 1), generator=g)
    targets[5] = -1
    teacher = torch.randn(40, 9, generator=g), torch.randn(50, 9, generator=g)  # of a size of its own
    h, w, targets, *teacher = (x.to(machine.device) for x in (h, w, targets, *teacher))
    h2, w2 = (x.clone().requires_grad_() for x in (h, w))
    loss, grad_h, grad_w = t.objective(h, w, targets, c, machine, 0.1, tuple(teacher))
    z = c.softcap * torch.tanh(h2 @ w2.T / c.softcap)
    softened = (c.softcap * torch.tanh(teacher[0] @ teacher[1].T / c.softcap) / temp).softmax(-1)
    kl = (softened * (softened.log() - (z / temp).log_softmax(-1))).sum(-1)
    keep = targets[:, 0] >= 0
    ce = torch.nn.functional.cross_entropy(z, targets[:, 0], ignore_index=-1, reduction="sum")
    expected = 0.1 * (0.7 * ce + 0.3 * temp ** 2 * kl[keep].sum())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_h, h2.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_w, w2.grad, rtol=1e-4, atol=1e-5)


def test_the_streaming_ensemble_is_the_plain_mean():
    p, total = np.random.default_rng(0).random((5, 2, 30)), None
    for n in range(5):
        total = t.mix_nll(total, -np.log(p[n]).astype(np.float32))
    np.testing.assert_allclose(total + math.log(5), -np.log(p.mean(0)), rtol=1e-5)
