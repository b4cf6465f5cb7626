"""--dry_run against PyTorch's own counter and against measured runs."""
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as t
from conftest import ROOT, TINY, options

# a stack of layers in `limited`'s proportions, looped, small enough for a minute on a CPU; 0.5 to 1 GB
STACK = dict(track="limited", data="pocket", n_layer=5, n_embd=448, n_head=7, mlp_hidden=1216, seq_len=512, window_short=128, device_tokens=2048,
             batch_tokens=4096, loss_chunk=512, loop_first=2, loop_last=3, loop_times=1, dtype="fp32", dropout=0.0)
VOCAB = 8000

MEASURE = f"""if True:
    import sys, pathlib
    sys.path.insert(0, {str(ROOT)!r})
    import torch, train_gpt as t
    def status(name):
        return 1024 * next(int(line.split()[1]) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    c = t.make_config({STACK})
    torch.set_num_threads(1)
    m, phase = t.Machine(torch.device("cpu"), torch.float32), t.phase_schedule(1.0, c)
    t.set_compiled(m, sys.argv[1])
    x = torch.randint({VOCAB} - 1, (c.device_tokens // c.seq_len, c.seq_len, 1))
    def step(p, passes):
        for _ in range(passes):
            t.train_pass(p, x, x.clone(), 1, c, m, {VOCAB} - 1, phase, (0,))
    def params():
        return {{name: w.requires_grad_() for name, w in t.init_params(c, {VOCAB}).items()}}
    step(params(), 1)  # whatever is loaded or compiled at the first use
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, p = status("VmRSS"), params()
    optimizer, average = t.MuonAdamW(p, c, m), {{name: w.detach().clone() for name, w in p.items()}}
    step(p, 2)
    optimizer.step(0, 1.0, 1.0, 0.95)
    print(status("VmHWM") - before)
"""


def predicted(compiled):
    c = t.make_config(STACK)
    m = t.Machine(torch.device("cpu"), torch.float32, attention="sdpa", block=t.block, objective_chunk=t.objective_chunk, compiled=compiled)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return t.step_memory(c, [], t.phase_schedule(1.0, c), VOCAB, m)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not tell a process's peak memory here")
@pytest.mark.parametrize("compiled, tolerance", [("off", 0.05), ("on", 0.05)])
def test_memory_is_that_of_a_measured_run(compiled, tolerance):
    kinds = predicted(compiled == "on")
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed leaves the process
    done = subprocess.run([sys.executable, "-c", MEASURE, compiled], capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    print(compiled, kinds, done.stdout)
    assert kinds["peak"] == pytest.approx(int(done.stdout), rel=tolerance)


def test_kinds_of_memory():
    eager, compiled = predicted(False), predicted(True)
    n = sum(w.numel() for w in t.init_params(t.make_config(STACK), VOCAB).values())
    assert eager["weights"] == 2 * eager["gradients"] == 8 * n and compiled["activations"] < 0.95 * eager["activations"]
    assert sum(size for kind, size in eager.items() if kind != "peak") <= eager["peak"] <= 1.2 * sum(size for kind, size in eager.items() if kind != "peak")


def test_a_student_costs_the_same_with_any_number_of_teachers():
    """Memory and FLOPs: one teacher is there at a time."""
    c = t.make_config(TINY | dict(distill_alpha=0.5))
    m = t.Machine(torch.device("cpu"), torch.float32, block=t.block, objective_chunk=t.objective_chunk)
    schedule = types.SimpleNamespace(phases=[t.phase_schedule(1.0, c)] * 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        none, one, many = (t.step_memory(c, [c] * n, schedule.phases[0], 257, m) for n in (0, 1, 30))
    weights = 4 * sum(w.numel() for w in t.init_params(c, 257).values())
    assert one == many and one["weights"] == none["weights"] + weights
    flops = [t.train_flops(c, schedule, 257, [c] * n) for n in (0, 1, 30)]
    assert flops[1] == flops[2] == pytest.approx(flops[0] * 4 / 3)


def dry_run(*argv):
    done = subprocess.run([sys.executable, "train_gpt.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_flops_are_those_of_the_record(tiny_data, finished_run):
    status, out, _ = dry_run("--dry_run", *options(**TINY, data=tiny_data))
    record = json.loads((finished_run / "record.json").read_text())
    assert status == 0 and re.search(r"^(\S+) FLOPs in all", out, re.MULTILINE)[1] == f"{record['train_flops']:.4g}"
    assert f"{record['steps']:,} steps" in out and f"{record['parameters']:,} parameters" in out


@pytest.mark.parametrize("track", [name for name in t.PRESETS if name != "pocket"])
def test_every_preset(track, tmp_path):
    """Without its data, on as many GPUs as its track allows."""
    n = 1 if "pocket" in track or track == "mini" else 64 if track == "unlimited" else 8
    status, out, err = dry_run("--track", track, "--dry_run", "--data", f"{tmp_path}/none")
    assert status == 0 and not err and f"on {n} " in out and ("a card of 80 GB holds" in out) == ("pocket" not in track), out + err


# what a step costs as layers, width, sequence, members and ranks grow

GROWN = [{}, dict(n_layer=8), dict(n_embd=256, mlp_hidden=704), dict(seq_len=128), dict(loop_first=1, loop_last=2, loop_times=2, loop_from=0.0), dict(mtp_weight=0.3),
         dict(members=2, distill_alpha=0.4), dict(bag_size=2, bag_until=0.9), dict(iha=True)]


@pytest.mark.parametrize("grown", GROWN, ids=str)
def test_flops_against_pytorchs_counter(grown):
    """A forward and a backward pass, by the formula without its attention: on a CPU the counter sees the products of weights alone (those of
    attention are checked in test_model.py)."""
    from torch.utils.flop_counter import FlopCounterMode
    c = t.make_config(TINY | dict(n_layer=4, n_embd=128, mlp_hidden=352, window_pattern="L", batch_tokens=256, device_tokens=256) | grown)
    m, phase = t.Machine(torch.device("cpu"), torch.float32, block=t.block, objective_chunk=t.objective_chunk), t.phase_schedule(0.5, c)
    p = {name: w.requires_grad_() for name, w in t.init_params(c, 1000).items()}
    teacher = (c, {name: w.detach() for name, w in p.items()}) if c.members > 1 else None
    x = torch.randint(999, (256 // c.seq_len, c.seq_len * phase[1], 1))
    with FlopCounterMode(display=False) as counter:
        t.train_pass(p, x, x[..., 0].unflatten(1, (-1, phase[1])), 1, c, m, 999, phase, (0,), teacher)
    formula = t.train_flops(c, types.SimpleNamespace(phases=[phase]), 1000, [c] * (c.members - 1))
    attention = 256 * (2 + c.members) * len(phase[0]) * 4 * (c.seq_len + 1) / 2 * c.n_embd
    assert counter.get_total_flops() == pytest.approx(formula - attention, rel=0.005)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_that_a_rank_sends(ranks, tiny_data, monkeypatch):
    """Every sum and every gathering of a step, as many bytes as a ring of so many ranks sends, against what --dry_run says."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    status, out, _ = dry_run("--dry_run", ranks, *options(**TINY, data=tiny_data))
    c, sent = t.make_config(TINY), []

    class Done:
        def wait(self):
            pass
    monkeypatch.setattr(t, "reduce_scatter", lambda own, whole, async_op: sent.append(whole.numel() * (ranks - 1) / ranks) or Done())
    monkeypatch.setattr(t, "all_gather", lambda whole, own: sent.append(whole.numel() * (ranks - 1) / ranks))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        m = t.Machine(torch.device("cpu"), torch.float32, world_size=ranks)
        p = t.init_params(c, 257)
        optimizer = t.MuonAdamW(p, c, m)
        for w in p.values():
            w.grad = torch.zeros_like(w)
        optimizer.step(0, 1.0, 1.0, 0.95)
    finally:
        torch.distributed.destroy_process_group()
    assert status == 0 and len(sent) == 2 * len(p)
    assert float(re.search(r"each sends (\S+) GB", out)[1]) == pytest.approx(4e-9 * sum(sent), rel=0.005)
    shapes = t.param_shapes(c, 257)
    assert sum(sent) >= 2 * sum(w.numel() for w in p.values()) * (ranks - 1) / ranks and set(shapes) == set(p)


@pytest.mark.parametrize("argv, named", [(["--dry_run", 7], "--dry_run 7"), (["--dry_run", -2], "--dry_run -2"), (["--dry_run", "--steps", 20], "--steps")], ids=str)
def test_what_cannot_be_divided_or_does_not_fit_is_one_line(argv, named):
    status, out, err = dry_run("--track", "tiny", *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
