"""The optimizer against plain references, on one rank and on several, and the schedules."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt as t
from conftest import ROOT, TINY, options


def test_orthogonalize_against_svd():
    """Singular values from 1 down to a hundredth all come out near 1, with the singular vectors kept; wide, square, tall."""
    g = torch.Generator().manual_seed(0)
    for r, c in ((24, 24), (16, 40), (40, 16)):
        u, _, vh = torch.linalg.svd(torch.randn(3, r, c, generator=g), full_matrices=False)
        s = torch.logspace(0, -2, u.size(-1))
        polar = u @ vh
        got = t.orthogonalize(5 * u * s @ vh, torch.float32)
        values = torch.linalg.svdvals(got)
        assert 0.85 < values.min() and values.max() < 1.15
        off_diagonal = u.mT @ got @ vh.mT - torch.diag_embed((u.mT @ got @ vh.mT).diagonal(dim1=-2, dim2=-1))
        assert off_diagonal.abs().max() < 1e-3  # the same singular vectors
        assert (got - polar).norm() / polar.norm() < 0.1


def exact_polar(g, dtype=None):
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


def test_muon_step_written_out(monkeypatch):
    """Three steps against the formulas of the papers, the exact polar factor in place of the iteration on both sides."""
    monkeypatch.setattr(t, "orthogonalize", exact_polar)
    g = torch.Generator().manual_seed(0)
    w, lr, wd, mom, beta2 = torch.randn(2, 12, 8, generator=g), 0.1, 0.5, 0.9, 0.8
    buf, second, expected = torch.zeros_like(w), torch.zeros(2, 12, 1), w.clone()
    m_ref, v_ref = torch.zeros_like(w), torch.zeros(2, 12, 1)
    for _ in range(3):
        grad = torch.randn(2, 12, 8, generator=g)
        t.muon_update(w, grad, buf, second, lr, wd, mom, beta2, torch.float32)
        m_ref = mom * m_ref + (1 - mom) * grad
        nesterov = mom * m_ref + (1 - mom) * grad
        o = exact_polar(nesterov / nesterov.norm(dim=-1, keepdim=True))  # MuonEq-R: rows of length one first
        v_ref = beta2 * v_ref + (1 - beta2) * o.square().mean(-1, keepdim=True)  # NorMuon: one number per neuron
        step = o / v_ref.sqrt()
        step = step * o.norm(dim=(-2, -1), keepdim=True) / step.norm(dim=(-2, -1), keepdim=True)
        decay = torch.where(step * expected > 0, expected, 0.0)  # cautious
        expected = expected - lr * (12 / 8) ** 0.5 * step - lr * wd * decay
        torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-5)


def test_cautious_decay_only_where_the_update_agrees():
    w = torch.full((1, 4, 4), 2.0)
    grad = torch.eye(4)[None] - 0.5  # pushes the diagonal down and the rest up
    args = [torch.zeros_like(w), torch.zeros(1, 4, 1), 0.1]
    free, decayed = w.clone(), w.clone()
    t.muon_update(free, grad, *[torch.clone(a) if torch.is_tensor(a) else a for a in args], 0.0, 0.9, 0.9, torch.float32)
    t.muon_update(decayed, grad, *args, 1.0, 0.9, 0.9, torch.float32)
    shrinks = free < w
    assert shrinks.any() and not shrinks.all()
    torch.testing.assert_close((free - decayed)[shrinks], torch.full_like(w, 0.1 * 2.0)[shrinks])
    assert torch.equal(free[~shrinks], decayed[~shrinks])


def test_adamw_is_torchs():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(50, generator=g)
    reference = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([reference], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.3)
    m1, m2 = torch.zeros(50), torch.zeros(50)
    for step in range(5):
        reference.grad = torch.randn(50, generator=g)
        t.adamw_update(w, reference.grad, m1, m2, 0.01, 0.3, 0.8, 0.95, step)
        optimizer.step()
    torch.testing.assert_close(w, reference.detach(), rtol=1e-5, atol=1e-6)


def test_every_parameter_learns_and_only_some_decay(machine, params):
    """With gradients of zero, a step only decays: the banks, embedding and head, not the gates and scalars."""
    c = t.Config(**(TINY | dict(weight_decay=1.0)))
    p = params(c)
    before = {k: v.clone() for k, v in p.items()}
    for name, w in p.items():
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.device)
    optimizer = t.MuonAdamW(p, c, machine)
    optimizer.step(0, 1.0, 1.0, 0.9)
    assert all(not torch.equal(p[k], before[k]) and p[k].grad is None for k in p)
    p = {k: v.clone() for k, v in before.items()}
    for w in p.values():
        w.grad = torch.zeros_like(w)
    t.MuonAdamW(p, c, machine).step(0, 1.0, 1.0, 0.9)
    assert {k for k in p if not torch.equal(p[k], before[k])} == {"wte", "lm_head"}  # Muon's decay is cautious: none without an update


# bags, loops and a chain of two, for every kind of parameter; three layers make 15 matrices: no number of ranks divides every bank
EVERYTHING = TINY | dict(device_tokens=128, members=2, distill_alpha=0.4, bag_size=2, bag_until=0.3, loop_first=1, loop_last=1, loop_times=1, loop_from=0.5,
                         mtp_weight=0.3, iha=True, recall="2,4", memory="3", ema=0.9)
EXACT = """if True:
    import os, sys
    import numpy as np, train_gpt as t
    losses, all_reduce = [], t.all_reduce
    def noted(m, tensor):
        out = all_reduce(m, tensor)
        if out.shape == (2,):  # of a step: its loss, and whether it was asked to stop
            losses.append(out[0].item())
        return out
    t.all_reduce = noted
    t.main()
    if os.environ.get("RANK", "0") == "0":
        np.save(sys.argv[-1] + "/losses.npy", losses)
"""


@pytest.fixture(scope="session")
def runs_on_ranks(tiny_data, tmp_path_factory):
    """The same run on 1, 2 and 4 gloo ranks, the loss of every step in full precision beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "exact.py").write_text(EXACT)
    for n in (1, 2, 4):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else [sys.executable]
        subprocess.run([*launcher, str(folder / "exact.py"), *options(**EVERYTHING, data=tiny_data), "--compile", "off", "--device", "cpu", "--run_dir", str(folder / str(n))],
                       cwd=ROOT, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_train_the_same_model(runs_on_ranks, n):
    """Losses of every step, every weight, and the score, which is computed by all ranks too."""
    one, many = runs_on_ranks / "1", runs_on_ranks / str(n)
    losses, same = np.load(one / "losses.npy"), np.load(many / "losses.npy")
    assert len(losses) == 2 * 39
    print(f"{n} ranks: losses differ by {np.abs(same - losses).max():.1e} at most")
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    for a, b in zip(t.saved(one, "weights"), t.saved(many, "weights")):
        p, q = t.load_tensors(a), t.load_tensors(b)
        for name in p:
            # relative: rounding can flip the sign that cautious decay looks at in single weights; a matrix that missed one update is 1e-2 off
            assert (q[name] - p[name]).norm() / p[name].norm() < 1e-3, name
    np.testing.assert_allclose(np.load(many / "val_nll.npy"), np.load(one / "val_nll.npy"), rtol=1e-5)
    a, b = (json.loads((r / "record.json").read_text()) for r in (one, many))
    assert (a["ranks"], b["ranks"]) == (1, n) and a["tokens_seen"] == b["tokens_seen"]


def test_state_goes_from_any_number_of_ranks_to_any_other():
    """state_dict of one rank, cut into the shares of three, is what three ranks hold; put together it is the same again."""
    c = t.Config(**TINY)
    make = lambda rank, world: t.MuonAdamW({k: torch.zeros(s) for k, s in t.param_shapes(c, 257).items()}, c,  # noqa: E731
                                           t.Machine(torch.device("cpu"), torch.float32, rank, world))
    one = make(0, 1)
    for state in one.state.values():
        for x in state:
            x.copy_(torch.randn(x.shape))
    full = one.state_dict()
    shares = [make(rank, 3) for rank in range(3)]
    for optimizer in shares:
        optimizer.load_state_dict(full)
    for name in full:
        for i in range(2):
            together = torch.cat([optimizer.state[name][i] for optimizer in shares])
            assert torch.equal(together[:len(full[name][i])], full[name][i]) and not together[len(full[name][i]):].any()


def test_lr_schedule():
    c = t.Config(warmup=0.1, warmdown=0.4)
    assert t.lr_schedule(0.05, c) == pytest.approx(0.5)
    assert t.lr_schedule(0.1, c) == t.lr_schedule(0.6, c) == 1.0
    assert t.lr_schedule(0.8, c) == pytest.approx(0.5)
    assert t.lr_schedule(1.0, c) == 0.0
    assert t.lr_schedule(0.0, t.Config(warmup=0.0)) == 1.0


def test_other_schedules():
    c = t.Config(momentum_start=0.8, muon_momentum=0.9, momentum_warmup=0.5, wd_points="0:1,0.5:0.2,1:2", bag_size=4, bag_until=0.25)
    assert [t.momentum_schedule(x, c) for x in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.8, 0.85, 0.9, 0.9])
    assert [t.wd_schedule(x, c) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 1.1, 2.0])
    assert [t.phase_schedule(x, c)[1] for x in (0.0, 0.24, 0.25, 1.0)] == [4, 4, 1, 1]
