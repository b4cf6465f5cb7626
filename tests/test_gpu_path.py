"""
What trains on GPUs, as far as a CPU can show it: attention through PyTorch's own varlen operator over plain
kernels, FlexAttention, and eight ranks whose collectives do what NCCL's may do.
"""

import math
import threading

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention, varlen

import harness
import train_gpt as t
from reference import (
    BOS,
    EPS,
    EXACT,
    allowed_pairs,
    assert_equal,
    config,
    make_machine,
    make_params,
    plain_attention,
    random_tokens,
    trainable,
)

pytestmark = pytest.mark.reference

CPU = torch.device("cpu")


def random_heads(B, T, n_head=3, head_dim=8):
    return [torch.randn(B, T, n_head, head_dim, requires_grad=True) for _ in range(3)]


# ---- varlen attention


def sequences(q, k, v, cu_q, cu_k, max_q):
    """The sequences of a call, [(first token, end)], after every check that PyTorch's CUDA code makes of its
    arguments. A kernel's blocks cover max_q queries of a sequence: those beyond it are never computed."""
    assert q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    assert q.size(-1) % 8 == 0 and q.size(-1) <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
    assert torch.equal(cu_q, cu_k)
    ends = cu_q.tolist()
    assert ends == sorted(ends) and 0 <= ends[0] and ends[-1] <= len(q)
    return [(a, min(b, a + max_q)) for a, b in zip(ends, ends[1:]) if b > a]


def masked_scores(q, k, scale, is_causal, left, right):
    """[H, n, n] of a sequence's queries and keys [n, H, d], forbidden ones at -inf."""
    if is_causal:
        right = 0
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    allowed = torch.ones(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        allowed &= distance <= left
    if right >= 0:
        allowed &= -distance <= right
    scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or q.size(-1) ** -0.5)
    return scores.masked_fill(~allowed, -math.inf)


def plain_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options):
    """aten::_flash_attention_forward. Memory that it does not write holds NaN, as it might on a GPU."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert all(options.get(name) is None for name in ("seqused_k", "alibi_slopes", "block_table"))
    # A window of the whole row is told as -1, which takes the causal kernel: faster than the local one.
    assert options["window_size_left"] != max_q - 1
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    lse = torch.full((q.size(1), len(q)), math.nan, dtype=q.dtype)
    windows = is_causal, options["window_size_left"], options["window_size_right"]
    for a, b in sequences(q, k, v, cu_q, cu_k, max_q):
        scores = masked_scores(q[a:b], k[a:b], options.get("scale"), *windows)
        lse[:, a:b] = scores.logsumexp(-1)
        p = (scores - lse[:, a:b, None]).exp()
        out[a:b] = torch.einsum("hij,jhd->ihd", p, v[a:b])
    nothing = q.new_empty(0)
    return out, lse, nothing, nothing, nothing


def plain_backward(
    grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, **options
):
    """aten::_flash_attention_backward: FlashAttention's formulas, from the output and the logsumexp of the
    forward pass."""
    assert dropout_p == 0.0
    scale = options.get("scale") or q.size(-1) ** -0.5
    windows = is_causal, options["window_size_left"], options["window_size_right"]
    grad_q, grad_k, grad_v = (torch.full(x.shape, math.nan, dtype=x.dtype) for x in (q, k, v))
    for a, b in sequences(q, k, v, cu_q, cu_k, max_q):
        scores = masked_scores(q[a:b], k[a:b], scale, *windows)
        p = (scores - lse[:, a:b, None]).exp()
        grad_p = torch.einsum("ihd,jhd->hij", grad_out[a:b], v[a:b])
        delta = (grad_out[a:b] * out[a:b]).sum(-1).T
        grad_scores = scale * p * (grad_p - delta[..., None])
        grad_q[a:b] = torch.einsum("hij,jhd->ihd", grad_scores, k[a:b])
        grad_k[a:b] = torch.einsum("hij,ihd->jhd", grad_scores, q[a:b])
        grad_v[a:b] = torch.einsum("hij,ihd->jhd", p, grad_out[a:b])
    return grad_q, grad_k, grad_v


@pytest.fixture
def varlen_on_a_cpu(monkeypatch):
    """PyTorch's varlen_attn and its gradient as they are, down to the two kernels, which exist for GPUs
    alone: plain ones take their place on a CPU."""
    monkeypatch.setattr(t, "varlen", varlen, raising=False)
    with torch.library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl("_flash_attention_forward", plain_forward, "CPU")
        kernels.impl("_flash_attention_backward", plain_backward, "CPU")
        yield


# Rows, their tokens, and how many documents begin in them: none beside the first; 15 and 16 sequences, for
# which cu_seqlens has one place to spare and sixteen; nearly one for each token; rows of an odd length, and
# of one token; and a row with so few documents that its tokens decide how far cu_seqlens is padded.
ROWS = [(2, 48, 0), (2, 48, 13), (2, 48, 14), (2, 48, 80), (3, 47, 5), (3, 1, 0), (1, 520, 0)]


def rows_of_documents(B, T, n_documents):
    """Tokens [B, T] of which so many begin a document, none of them first in its row."""
    tokens = torch.zeros(B, T, dtype=torch.long)
    places = [(b, i) for b in range(B) for i in range(1, T)]
    chosen = np.random.default_rng(0).permutation(len(places))[:n_documents]
    for place in chosen:
        tokens[places[place]] = BOS
    return tokens


@pytest.mark.parametrize("B,T,n_documents", ROWS)
@pytest.mark.parametrize("window", [1, 2, 16, 520])
def test_varlen_attends_to_the_same_pairs(exact, varlen_on_a_cpu, B, T, n_documents, window):
    """Output and gradients, against a softmax over all scores."""
    tokens = rows_of_documents(B, T, n_documents)
    heads = random_heads(B, T)
    window = min(window, T)
    mask = t.attention_masks(tokens == BOS, [window], make_machine(attention="varlen"))[window]
    cu_seqlens = mask[0]
    # A power of two, so that a kernel is compiled once, with empty sequences at its end.
    assert len(cu_seqlens).bit_count() == 1 and (cu_seqlens.diff() > 0).sum() == B + n_documents
    y = t.attention(*heads, mask, "varlen")
    expected = plain_attention(*heads, tokens, window)
    assert_equal(y, expected)
    grad = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, heads, grad), torch.autograd.grad(expected, heads, grad)):
        assert_equal(got, wanted)


def rounding_of_attention(q, k, v, grad, tokens, window):
    """What rounding to float32 may add to the output and to the gradients of attention, element by element:
    first-order bounds of each product, for any order of its sums. q, k, v and grad are float64."""
    T, d = q.size(1), q.size(-1)
    scale = d**-0.5
    q, k, v, grad = (x.detach().transpose(1, 2) for x in (q, k, v, grad))  # [B, H, T, d]
    allowed = torch.stack([allowed_pairs(row, window) for row in tokens])[:, None]
    p = (scale * q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1)
    # A score has d products and a scaling; an exponential is off by its exponent's error, and so is the sum
    # that it is divided by.
    score_error = (d + 1) * EPS * scale * (q.abs() @ k.abs().mT)
    p_error = 2 * score_error.masked_fill(~allowed, 0).amax(-1, keepdim=True) + (T + 4) * EPS  # relative
    out = p @ v
    out_error = (p * (p_error + T * EPS)) @ v.abs()
    v_error = (p * (p_error + T * EPS)).mT @ grad.abs()
    grad_p = grad @ v.mT
    delta = (grad * out).sum(-1, keepdim=True)
    delta_error = (grad.abs() * (out_error + d * EPS * out.abs())).sum(-1, keepdim=True)
    grad_p_error = d * EPS * (grad.abs() @ v.abs().mT)
    grad_s = scale * p * (grad_p - delta)
    grad_s_error = grad_s.abs() * (p_error + 3 * EPS) + scale * p * (grad_p_error + delta_error)
    q_error = (grad_s_error + T * EPS * grad_s.abs()) @ k.abs()
    k_error = (grad_s_error + T * EPS * grad_s.abs()).mT @ q.abs()
    return [x.transpose(1, 2) for x in (out_error, q_error, k_error, v_error)]


@pytest.mark.parametrize("window", [5, 16, 48])
@pytest.mark.parametrize("impl", ["varlen", "sdpa"])
def test_attention_in_float32(varlen_on_a_cpu, impl, window):
    """No more than the roundings of float32 away from float64: nothing on the way is in a lower precision."""
    tokens = rows_of_documents(2, 48, 5)
    heads = random_heads(2, 48)
    grad = torch.randn(2, 48, 3, 8)
    mask = t.attention_masks(tokens == BOS, [window], make_machine(attention=impl))[window]
    y = t.attention(*heads, mask, impl)
    got = [y, *torch.autograd.grad(y, heads, grad)]
    exact_heads = [x.detach().double().requires_grad_() for x in heads]
    y = plain_attention(*exact_heads, tokens, window)
    expected = [y, *torch.autograd.grad(y, exact_heads, grad.double())]
    bounds = rounding_of_attention(*exact_heads, grad.double(), tokens, window)
    for a, b, bound in zip(got, expected, bounds, strict=True):
        assert a.dtype == torch.float32
        # products of two errors come on top: less than a thousandth
        assert ((a.double() - b).abs() <= 1.001 * bound).all()


# The techniques that change what attention is asked: windows of two sizes, a loop, bags, two targets.
EVERYTHING = dict(n_layer=4, window_short=24, loop_first=1, loop_last=2, loop_times=1, mtp_weight=0.3, iha=1)


@pytest.mark.parametrize("bag_size", [1, 3])
@pytest.mark.parametrize("T", [64, 61, 24, 1])
def test_a_pass_with_varlen_attention(exact, varlen_on_a_cpu, bag_size, T):
    """Losses and the gradient of every parameter, against SDPA; rows of full and of odd length."""
    c = config(**EVERYTHING)
    phase = t.Phase(t.phase_schedule(1.0, c).layers, bag_size)
    assert len(phase.layers) == 6
    weights = {name: w.cpu() for name, w in make_params(c).items()}
    tokens = random_tokens(3, (T + 1) * bag_size).cpu()
    x = tokens[:, : T * bag_size, None]
    y = tokens[:, bag_size:].unflatten(1, (-1, bag_size))
    losses = {}
    grads = {}
    for impl in ("varlen", "sdpa"):
        p = trainable(weights)
        m = make_machine(device=CPU, attention=impl)
        losses[impl] = t.train_pass(p, x, y, y.numel(), c, m, phase, (0,))
        grads[impl] = {name: w.grad for name, w in p.items()}
    assert losses["varlen"].keys() == losses["sdpa"].keys()
    for name, loss in losses["sdpa"].items():
        torch.testing.assert_close(losses["varlen"][name], loss, **EXACT, msg=name)
    for name, grad in grads["sdpa"].items():
        torch.testing.assert_close(grads["varlen"][name], grad, **EXACT, msg=name)


@pytest.mark.parametrize("stride", [0, 24, 7])
@pytest.mark.parametrize("length", [2, 64, 65, 66, 150])
def test_scoring_with_varlen_attention(exact, varlen_on_a_cpu, length, stride):
    """Streams of any length, in windows that overlap or do not, against SDPA."""
    c = config(**EVERYTHING | dict(score_stride=stride))
    p = {name: w.cpu() for name, w in make_params(c).items()}
    streams = random_tokens(3, length).cpu().numpy()[..., None]
    nll = {}
    for impl in ("varlen", "sdpa"):
        nll[impl] = t.stream_nll(p, streams, c, make_machine(device=CPU, attention=impl))
    assert (nll["varlen"][:, 1:] > 0).all()
    np.testing.assert_allclose(nll["varlen"], nll["sdpa"], **EXACT)


# ---- which attention


@pytest.mark.parametrize(
    ("wanted", "broken", "chosen", "reason", "activated"),
    [
        ("auto", {}, "varlen", "fa3 (the best that works here)", True),
        ("auto", {"package"}, "varlen", "varlen (fa3 does not work here: ImportError: no package)", False),
        ("auto", {"fa3"}, "varlen", "varlen (fa3 does not work here: RuntimeError: no kernel)", False),
        ("auto", {"package", "varlen"}, "flex", "varlen does not work here: RuntimeError: no kernel)", False),
        ("varlen", {}, "varlen", "varlen (the best that works here)", False),
        ("fa3", {}, "varlen", "fa3 (the best that works here)", True),
    ],
)
def test_flash_attention_3_where_it_is_installed(monkeypatch, wanted, broken, chosen, reason, activated):
    """A kernel that fails its trial leaves nothing behind: the next one is tried without it."""
    active = []

    def activate(name):
        if "package" in broken:
            raise ImportError("no package")
        active.append(name)

    def trial(m, c):
        if ("fa3" if active else m.attention) in broken:
            raise RuntimeError("no kernel")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: (active or [None])[0])
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear)
    monkeypatch.setattr(t, "try_attention", trial)
    m = harness.Machine(torch.device("cuda"), torch.bfloat16)
    harness.choose_attention(m, config(), wanted)
    assert m.attention == chosen and m.reasons["attention"].endswith(reason)
    assert active == (["FA3"] if activated else [])


def test_names_of_flash_attention_3_exist_in_this_pytorch():
    assert "FA3" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None


# ---- FlexAttention, whose backward pass needs a GPU


@pytest.mark.parametrize("window", [1, 50, 256])
@pytest.mark.parametrize("T", [256, 200, 130, 1])
def test_flex_attends_to_the_same_pairs(exact, monkeypatch, T, window):
    """Rows of whole and of broken blocks of 128."""
    monkeypatch.setattr(t, "flex", flex_attention, raising=False)
    monkeypatch.setattr(t, "compiled_flex", flex_attention.flex_attention, raising=False)
    tokens = rows_of_documents(2, T, min(12, 2 * (T - 1)))
    q, k, v = (x.detach() for x in random_heads(2, T, 2, 16))
    mask = t.attention_masks(tokens == BOS, [window], make_machine(attention="flex"))[window]
    y = t.attention(q, k, v, mask, "flex")
    expected = plain_attention(q, k, v, tokens, window)
    # Uncompiled, FlexAttention keeps its scores in float32: 16 products each, of numbers near 1, some of
    # which are as large as 10, in the exponent.
    assert (y - expected).abs().max() < 16 * 10 * EPS * v.abs().max()


# ---- on a GPU


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the varlen kernel and FlexAttention's backward pass need a GPU"
)
@pytest.mark.parametrize("impl", ["varlen", "flex"])
def test_gpu_attention_equals_sdpa(impl):
    tokens = random_tokens(2, 256)
    heads = [
        torch.randn(2, 256, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    # bf16 rounds by 2**-9. An output is rounded once, and so are the probabilities that it averages values
    # of up to 4 with. A gradient passes through four roundings, and through a sum in another order.
    for window in (64, 256):
        y, grads = {}, {}
        for name in (impl, "sdpa"):
            m = make_machine(attention=name, dtype=torch.bfloat16)
            mask = t.attention_masks(tokens == BOS, [window], m)[window]
            y[name] = t.attention(*heads, mask, name)
            grads[name] = torch.autograd.grad(y[name].float().square().sum(), heads)
        torch.testing.assert_close(y[impl], y["sdpa"], atol=2 * 4 * 2**-9, rtol=4 * 2**-9)
        for a, b in zip(grads[impl], grads["sdpa"]):
            assert (a - b).float().norm() < 4 * 2 * 2**-9 * b.float().norm()


# ---- eight ranks


class Pending:
    """A collective under way: until wait(), its output holds NaN, and its input must stay as it is."""

    def __init__(self, out, result, given):
        self.out, self.result, self.given = out, result, given
        self.before = given.clone()
        out.fill_(math.nan)

    def wait(self):
        assert torch.equal(self.given, self.before), "changed while it was being sent"
        self.out.copy_(self.result)


class Ranks:
    """Ranks that are threads of this process, and the collectives between them. Like NCCL, and unlike gloo,
    they want tensors without gaps, of the very sizes, in the same order on all ranks."""

    def __init__(self, n, monkeypatch):
        self.n = n
        self.here = threading.local()
        self.barrier = threading.Barrier(n, timeout=120)
        self.given = [None] * n
        for name in ("all_reduce", "reduce_scatter_single", "all_gather_single"):
            monkeypatch.setattr(t.dist, name, getattr(self, name))

    def run(self, function):
        """function(rank) on every rank. Returns what they return."""
        results = [None] * self.n
        failures = []

        def work(rank):
            self.here.rank = rank
            torch.set_num_threads(1)  # a setting of each thread: otherwise every one starts more of its own
            try:
                results[rank] = function(rank)
            except Exception as e:
                failures.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results

    def exchange(self, call, tensor):
        """What all ranks give to a collective that all of them have come to."""
        assert tensor.is_contiguous()
        self.given[self.here.rank] = (call, tensor.shape, tensor.dtype), tensor.clone()
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        kinds = {kind for kind, _ in given}
        assert len(kinds) == 1, kinds
        return [tensor for _, tensor in given]

    def finish(self, out, result, given, async_op):
        assert out.is_contiguous() and out.shape == result.shape and out.dtype == result.dtype
        pending = Pending(out, result, given)
        if async_op:
            return pending
        pending.wait()

    def all_reduce(self, tensor, async_op=False):
        total = sum(self.exchange("all_reduce", tensor))
        tensor.copy_(total)

    def reduce_scatter_single(self, out, whole, async_op=False):
        total = sum(self.exchange("reduce_scatter", whole))
        assert len(total) % self.n == 0
        return self.finish(out, total.chunk(self.n)[self.here.rank], whole, async_op)

    def all_gather_single(self, whole, shard, async_op=False):
        return self.finish(whole, torch.cat(self.exchange("all_gather", shard)), shard, async_op)


def test_eight_ranks_with_varlen_attention(exact, varlen_on_a_cpu, monkeypatch):
    """Steps in and behind the bags on eight ranks, against one rank with SDPA. Of 20 matrices of attention
    each rank gets three, the seventh two and the last none; of most parameters several get none."""
    c = config(**EVERYTHING, device_tokens=64, bag_size=2, bag_until=0.5, train_tokens=4096)
    weights = {name: w.cpu() for name, w in make_params(c).items()}
    inputs = random_tokens(1, c.train_tokens)[0].cpu().numpy().astype(np.uint16)[:, None]
    steps = 3

    def train(m):
        p = trainable(weights)
        optimizer = t.MuonAdamW(p, c, m)
        model = t.training_plan(c, inputs, m, steps)[0]
        assert model.batches.n_bag_steps == 1
        sums = []
        for step in range(steps):
            losses = t.train_step(p, optimizer, model, step, model.batches.batch(step), m, None)
            sums.append(harness.all_reduce(m, torch.stack([*losses.values()])).clone())
        return p, sums

    expected, losses = train(make_machine(device=CPU))
    ranks = Ranks(8, monkeypatch)
    results = ranks.run(
        lambda rank: train(make_machine(device=CPU, rank=rank, world_size=8, attention="varlen"))
    )
    for p, sums in results:
        for got, wanted in zip(sums, losses, strict=True):
            assert_equal(got, wanted)
        for name, w in p.items():
            assert torch.equal(w, results[0][0][name]), name
    for name, w in expected.items():
        # Where the gradients of a weight cancel, AdamW makes a step of what rounding leaves: test_ranks.py.
        torch.testing.assert_close(results[0][0][name], w, rtol=1e-9, atol=1e-6, msg=name)
