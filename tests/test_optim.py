"""The optimizer against plain references, and the schedules."""

import copy
import functools
import itertools
from unittest import mock

import pytest
import torch
import torch._dynamo.testing

import harness
import train_gpt as t
from reference import EXACT, config, make_machine, make_params

pytestmark = pytest.mark.reference


def polar_express(x):
    """What becomes of a singular value."""
    x = x / 1.02
    for a, b, c in t.POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    return x


def test_polar_express_comes_near_one():
    """Of every singular value from a thousandth on. Five steps leave what the paper's minimax polynomials
    leave, with the safety factor, and none beyond 1.02 makes them diverge."""
    values = polar_express(torch.logspace(0, -3, 1000, dtype=torch.float64))
    assert 0.7 < values.min() and values.max() < 1.3
    assert values[values > 0.01].sub(1).abs().mean() < 0.1


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)], ids=["square", "wide", "tall"])
def test_orthogonalize_against_svd(exact, shape):
    """Singular vectors stay, singular values go through the polynomials. Matrices on their own scale."""
    g = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape, generator=g), full_matrices=False)
    s = torch.logspace(0, -2, u.size(-1))
    s = s / s.norm()
    got = t.orthogonalize(5 * u * s @ vh, torch.float64)
    # 1e-7 is added to the norm, here 5, against a division by zero: 2e-8 of each value, and a value near zero
    # comes out a thousand times as large.
    torch.testing.assert_close(got, u * polar_express(s) @ vh, rtol=0, atol=1000 * 2e-8)
    assert torch.linalg.svdvals(got).sub(1).abs().max() < 0.3


def test_orthogonalize_of_nothing_is_nothing():
    assert not t.orthogonalize(torch.zeros(2, 4, 6), torch.float32).any()


def exact_polar(g, dtype=None):
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


def test_muon_step_written_out(exact, monkeypatch):
    """Three steps against the formulas of the papers, the exact polar factor in place of the iteration on
    both sides."""
    monkeypatch.setattr(t, "orthogonalize", exact_polar)
    g = torch.Generator().manual_seed(0)
    lr, wd, momentum, beta2 = 0.1, 0.5, 0.9, 0.8
    w = torch.randn(2, 12, 8, generator=g)
    buffer = torch.zeros_like(w)
    second = torch.zeros(2, 12, 1)
    expected = w.clone()
    m_ref = torch.zeros_like(w)
    v_ref = torch.zeros(2, 12, 1)
    for _ in range(3):
        grad = torch.randn(2, 12, 8, generator=g)
        t.muon_update(w, grad, buffer, second, lr, wd, momentum, beta2, torch.float64)
        m_ref = momentum * m_ref + (1 - momentum) * grad
        nesterov = momentum * m_ref + (1 - momentum) * grad
        o = exact_polar(nesterov / nesterov.norm(dim=-1, keepdim=True))  # MuonEq-R: rows of length one first
        v_ref = beta2 * v_ref + (1 - beta2) * o.square().mean(
            -1, keepdim=True
        )  # NorMuon: one number per neuron
        step = o / v_ref.sqrt()
        step = step * o.norm(dim=(-2, -1), keepdim=True) / step.norm(dim=(-2, -1), keepdim=True)
        decay = torch.where(step * expected > 0, expected, 0.0)  # cautious
        expected = expected - lr * (12 / 8) ** 0.5 * step - lr * wd * decay
        torch.testing.assert_close(w, expected, **EXACT)


def test_compiled_muon_equals_the_plain_one(exact):
    """At three rates, which one compilation serves. A GPU runs this; here the processor does."""
    found = harness.Machine(torch.device("cpu"), torch.float64)
    harness.set_compiled(found, "auto")
    if not found.compiled:
        pytest.skip(f"nothing to compare: {found.reasons['compiled']}")
    torch._dynamo.reset()
    compiled = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=compiled)):
        update = t.compiled_muon_update()
    g = torch.Generator().manual_seed(0)
    plain = [torch.randn(2, 12, 8, generator=g), torch.zeros(2, 12, 8), torch.zeros(2, 12, 1)]
    other = [x.clone() for x in plain]
    frames = []
    for lr, wd, momentum in ((0.1, 0.5, 0.9), (0.05, 0.2, 0.95), (0.0, 0.0, 0.8)):
        grad = torch.randn(2, 12, 8, generator=g)
        for function, (w, *moments) in ((t.muon_update, plain), (update, other)):
            function(w, grad, *moments, lr, wd, momentum, 0.8, torch.float64)
        for a, b in zip(other, plain, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        frames.append(compiled.frame_count)
    assert 0 < frames[0] == frames[-1], frames


def test_cautious_decay_only_where_the_update_agrees(exact):
    w = torch.full((1, 4, 4), 2.0)
    grad = torch.eye(4)[None] - 0.5  # pushes the diagonal down and the rest up
    results = []
    for wd in (0.0, 1.0):
        result = w.clone()
        buffers = torch.zeros_like(w), torch.zeros(1, 4, 1)
        t.muon_update(result, grad, *buffers, 0.1, wd, 0.9, 0.9, torch.float64)
        results.append(result)
    free, decayed = results
    shrinks = free < w
    assert shrinks.any() and not shrinks.all()
    torch.testing.assert_close((free - decayed)[shrinks], torch.full_like(w, 0.1 * 2.0)[shrinks], **EXACT)
    assert torch.equal(free[~shrinks], decayed[~shrinks])


def test_adamw_is_torchs(exact):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(50, generator=g)
    reference = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([reference], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.3)
    m1 = torch.zeros(50)
    m2 = torch.zeros(50)
    for step in range(5):
        reference.grad = torch.randn(50, generator=g)
        t.adamw_update(w, reference.grad, m1, m2, 0.01, 0.3, 0.8, 0.95, step)
        optimizer.step()
        torch.testing.assert_close(w, reference.detach(), **EXACT)


EVERY_PARAMETER = dict(mtp_weight=0.3, iha=True, recall="2,4", memory="3")


def test_every_parameter_learns_and_only_some_decay():
    """With gradients of zero, a step only decays: the embeddings and the head. Muon's decay is cautious, so
    there is none without an update, and gates and scalars have none."""
    c = config(weight_decay=1.0, **EVERY_PARAMETER)
    m = make_machine()
    changed = []
    for size in (1.0, 0.0):
        p = make_params(c)
        before = {name: w.clone() for name, w in p.items()}
        for w in p.values():
            w.grad = size * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.device)
        t.MuonAdamW(p, c, m).step(0, 1.0, 1.0, 0.9)
        assert all(w.grad is None for w in p.values())
        changed.append({name for name in p if not torch.equal(p[name], before[name])})
    assert changed == [set(t.param_table(c)), {"wte", "lm_head", "lookup"}]


def test_learning_rates_are_the_tables(exact):
    """Each parameter's step is proportional to the option that its line names, and to no other."""
    c = config(weight_decay=0.0, **EVERY_PARAMETER)
    m = make_machine()
    rates = ("muon_lr", "embed_lr", "head_lr", "scalar_lr")

    def steps(**changes):
        c = config(weight_decay=0.0, **EVERY_PARAMETER, **changes)
        p = make_params(c)
        before = {name: w.clone() for name, w in p.items()}
        for w in p.values():
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.device)
        t.MuonAdamW(p, c, m).step(0, 1.0, 1.0, 0.9)
        return {name: p[name] - before[name] for name in p}

    plain = steps()
    for rate in rates:
        for name, step in steps(**{rate: 3 * getattr(c, rate)}).items():
            factor = 3 if t.param_table(c)[name].lr == rate else 1
            torch.testing.assert_close(step, factor * plain[name], **EXACT, msg=f"{rate} {name}")


def test_state_goes_from_any_number_of_ranks_to_any_other():
    """Weights, moments and average of one rank, of three and of two: each holds all of the weights and its
    shard of the rest, and put together it is the same again."""
    c = config(**EVERY_PARAMETER)

    def zeros():
        return {name: torch.zeros(shape) for name, shape in t.param_shapes(c).items()}

    def ranks_of(world_size):
        for rank in range(world_size):
            m = harness.Machine(torch.device("cpu"), torch.float32, rank, world_size)
            optimizer = t.MuonAdamW(zeros(), c, m)
            for name, moments in optimizer.state.items():  # a contestant's optimizer may keep more
                moments.append(torch.zeros(optimizer.shard_size[name], 2))
            yield optimizer, {name: optimizer.shard(name, w).clone() for name, w in zeros().items()}

    [(one, ema)] = ranks_of(1)
    for x in [*one.p.values(), *ema.values(), *itertools.chain(*one.state.values())]:
        x.copy_(torch.randn(x.shape))
    shards = [harness.shard_state(one, ema)]
    expected = copy.deepcopy(shards[0])
    for x in [*one.p.values(), *ema.values(), *itertools.chain(*one.state.values())]:
        x.zero_()  # a later step does not change what was saved
    for world_size in (3, 2, 4, 1):
        ranks = list(ranks_of(world_size))
        for optimizer, ema in ranks:
            harness.restore_state(optimizer, shards, ema)
        shards = [harness.shard_state(optimizer, ema) for optimizer, ema in ranks]
        for name, kinds in expected.items():
            for kind, items in kinds.items():
                assert torch.equal(torch.cat([shard[name][kind] for shard in shards]), items)
            for i, kind in enumerate(("state0", "state1", "state2")):
                together = torch.cat([optimizer.state[name][i] for optimizer, _ in ranks])
                assert len(together) < len(kinds[kind]) + world_size
            assert torch.equal(torch.cat([ema[name] for _, ema in ranks]), kinds["ema"])
            for optimizer, _ in ranks:
                assert torch.equal(optimizer.p[name].flatten(), kinds["w"].flatten())


def test_matrices_are_seen_one_by_one():
    """Muon orthogonalizes each matrix of a bank on its own, not the bank."""
    c = config(**EVERY_PARAMETER)
    p = make_params(c)
    optimizer = t.MuonAdamW(p, c, make_machine())
    assert optimizer.items("attn", p["attn"]).shape == (3 * 5, 32, 32)
    assert optimizer.items("mlp_in", p["mlp_in"]).shape == (3 * 2, 48, 32)
    assert optimizer.items("mtp", p["mtp"]).shape == (1, 32, 32)
    assert optimizer.items("wte", p["wte"]).shape == (257 * 32,)


# ---- schedules


def test_lr_schedule():
    c = config(warmup=0.1, warmdown=0.4)
    assert t.lr_schedule(0.05, c) == pytest.approx(0.5)
    assert t.lr_schedule(0.1, c) == t.lr_schedule(0.6, c) == 1.0
    assert t.lr_schedule(0.8, c) == pytest.approx(0.5)
    assert t.lr_schedule(1.0, c) == 0.0
    assert t.lr_schedule(0.0, config(warmup=0.0)) == 1.0
    assert t.lr_schedule(0.99, config(warmdown=0.0)) == 1.0


def test_other_schedules():
    c = config(
        momentum_start=0.8,
        muon_momentum=0.9,
        momentum_warmup=0.5,
        wd_points="0:1,0.5:0.2,1:2",
        bag_size=4,
        bag_until=0.25,
    )
    momenta = [t.momentum_schedule(done, c) for done in (0.0, 0.25, 0.5, 0.9)]
    decays = [t.wd_schedule(done, c) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert momenta == pytest.approx([0.8, 0.85, 0.9, 0.9])
    assert decays == pytest.approx([1.0, 0.6, 0.2, 1.1, 2.0])
    assert [t.phase_schedule(done, c).bag_size for done in (0.0, 0.24, 0.25, 1.0)] == [4, 4, 1, 1]
