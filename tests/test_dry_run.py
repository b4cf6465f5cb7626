"""--dry_run against a simulated step, against PyTorch's own counters and against measured processes."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import harness
import memory
import train_gpt as t
from reference import config, environment, make_machine, run_main, trainable
from runs import PLAIN, ROOT, TINY, options, run_script

pytestmark = pytest.mark.reference

FLOPS_IN_ALL = re.compile(r"^(\S+) FLOPs in all", re.MULTILINE)


def dry_run(*argv):
    return run_main(*argv)


# ---- memory


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("track", ["solo", "tiny", "limited", "two_hour", "unlimited", "mini"])
def test_formula_is_that_of_a_simulated_step(track):
    """Within 10%, of the presets' widths and batches, compiled, on the track's number of GPUs. Five or six
    layers are enough: what one takes is the same in all of them. (`python tests/memory.py TRACK` has all.)"""
    c, n_ranks = memory.preset(track)
    share = c.n_layer // 5
    fewer = {name: getattr(c, name) // share for name in ("n_layer", "loop_first", "loop_last")}
    c = dataclasses.replace(c, **fewer)
    with memory.fake_ranks(n_ranks):
        model, m = memory.largest_model(c, n_ranks)
        simulated = memory.step_memory(model, m)
    estimated = harness.memory_estimate(model, m)
    print({kind: size / 1e9 for kind, size in simulated.items()}, estimated)
    assert sum(estimated.values()) * 1e9 == pytest.approx(simulated["peak"], rel=0.1)
    assert estimated["weights"] * 1e9 == simulated["weights"]
    assert estimated["activations"] * 1e9 == pytest.approx(simulated["activations"], rel=0.1)
    assert estimated["logits"] * 1e9 == pytest.approx(simulated["logits"], rel=0.1)
    # Little on many ranks, but more than its share: a rank has whole matrices, and so perhaps one more.
    assert estimated["optimizer"] * 1e9 <= simulated["optimizer"]


@pytest.mark.parametrize("with_teacher", [False, True], ids=["alone", "with a teacher"])
def test_buffers_of_a_compiled_chunk(with_teacher):
    """No more of the vocabulary's width than the simulation and the formula count, in the code that Inductor
    writes. It may write fewer: what it fuses depends on the machine."""
    from torch._inductor.utils import run_and_get_code

    m = make_machine(device=torch.device("cpu"))
    harness.set_compiled(m, "auto")
    if not m.compiled:
        pytest.skip(f"nothing to count: {m.reasons['compiled']}")
    c = config(vocab_size=1003, distill_alpha=0.5)
    h = torch.randn(24, 16, dtype=torch.bfloat16)
    head = t.padded_head(torch.randn(1003, 16), torch.bfloat16)
    parts = t.LogitParts(h, head)
    taught = parts if with_teacher else None
    targets = torch.zeros(24, 1, dtype=torch.long)
    _, (code,) = run_and_get_code(m.functions.chunk_grad, parts, targets, torch.tensor(1.0), c, taught)
    buffers = re.findall(r"empty_strided_cpu\(\(24, 100[38]\), \(\d+, 1\), torch\.(\w+)\)", code)
    reused = len(re.findall(r"(buf\d+) = (?!\1)buf\d+; del buf\d+  # reuse", code))
    n_low, n_float32 = memory.CHUNK_BUFFERS[with_teacher]
    assert 0 < buffers.count("bfloat16") <= n_low, code
    assert 0 < buffers.count("float32") <= n_float32 + reused, code


# A stack of layers in `limited`'s proportions, looped, small enough for seconds on a CPU; 0.2 to 0.4 GB.
STACK = dict(
    track="limited",
    data="pocket",
    train_tokens=100_000,
    vocab_size=8000,
    bos_id=7999,
    n_layer=3,
    n_embd=320,
    n_head=5,
    mlp_hidden=868,
    seq_len=256,
    window_pattern="L",
    device_tokens=1024,
    batch_tokens=2048,
    loss_chunk=256,
    loop_first=1,
    loop_last=1,
    loop_times=1,
    loop_from=0.0,
    dtype="fp32",
)

MEASURE = f"""if True:
    import sys, pathlib
    import torch
    import harness
    import train_gpt as t
    import memory

    def status(name):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    c = harness.make_config({STACK})
    torch.set_num_threads(1)
    model, m = memory.largest_model(c)
    m.attention = "sdpa"
    harness.set_compiled(m, sys.argv[1])
    phase = model.batches.phases[-1]
    x = torch.randint(7999, (c.device_tokens // c.seq_len, c.seq_len, 1))

    def step(p, passes):
        with t.step_weights(p, c, m) as weights:
            for _ in range(passes):
                t.train_pass(weights, x, x.clone(), 1, c, m, phase, (0,))

    def params():
        return {{name: w.requires_grad_() for name, w in t.init_params(c).items()}}

    step(params(), 1)  # whatever is loaded or compiled at the first use
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    p = params()
    optimizer = t.MuonAdamW(p, c, m)
    average = {{name: optimizer.shard(name, w.detach()).clone() for name, w in p.items()}}
    step(p, 2)
    optimizer.step(0, 1.0, 1.0, 0.95)
    print(status("VmHWM") - before)
"""


def simulated(compiled, **changes):
    c = harness.make_config(STACK | changes)
    model, m = memory.largest_model(c, compiled=compiled, attention="sdpa")
    return memory.step_memory(model, m)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the kernel does not tell a process's peak memory here",
)
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_simulation_is_that_of_a_measured_process(compiled):
    """Within 10%: an allocator's pages, and what a library takes for the time of a call, nobody counts."""
    # What is freed leaves the process.
    malloc = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    env = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", **malloc)
    argv = [sys.executable, "-c", MEASURE, compiled]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    kinds = simulated(compiled == "on")
    print(compiled, kinds, done.stdout)
    assert kinds["peak"] == pytest.approx(int(done.stdout), rel=0.1)


def test_kinds_of_memory():
    eager = simulated(False)
    compiled = simulated(True)
    n = t.n_params(harness.make_config(STACK))
    assert eager["weights"] == eager["gradients"] == 4 * n
    assert eager["optimizer"] > 8 * n  # an average and a moment of each, and a second one of some
    assert compiled["activations"] < 0.95 * eager["activations"]
    for kinds in (eager, compiled):
        together = sum(size for kind, size in kinds.items() if kind != "peak")
        assert 0.95 * together < kinds["peak"] < 1.2 * together


def test_a_student_costs_the_same_with_any_number_of_teachers():
    """Memory and FLOPs: one teacher is there at a time."""
    c = config(distill_alpha=0.5, ema=0.9)
    results = []
    for n_teachers in (0, 1, 30):
        model, m = memory.largest_model(c, compiled=False, attention="sdpa")
        model.teachers = [model] * n_teachers
        results.append((memory.step_memory(model, m), harness.memory_estimate(model, m), model.train_flops))
    none, one, many = results
    assert one == many
    assert one[0]["weights"] == none[0]["weights"] + 4 * t.n_params(c)
    assert one[1]["weights"] == pytest.approx(none[1]["weights"] + 4e-9 * t.n_params(c))
    assert one[2] == pytest.approx(none[2] * 4 / 3)


# ---- what it prints


def test_flops_are_those_of_the_record(tiny_data, finished_run):
    status, out, _ = dry_run("--dry_run", *options(**TINY, data=tiny_data))
    record = json.loads((finished_run / "record.json").read_text())
    assert status == 0 and FLOPS_IN_ALL.search(out)[1] == f"{record['train_flops']:.4g}"
    assert f"{record['steps']:,} steps" in out and f"{record['parameters']:,} parameters" in out


@pytest.mark.parametrize("track", t.PRESETS)
def test_every_preset(track, tmp_path):
    """Without its data, on as many GPUs as its track allows."""
    status, out, err = dry_run("--track", track, "--dry_run", "--data", f"{tmp_path}/none")
    rules = harness.read_rules(track)
    n = rules.get("max_ranks", 1)
    assert status == 0 and not err
    assert f"on {n} process(es)" in out
    for what in ("fits in the track's", "fits in 80 GB"):
        assert (f"\n{what}" in out) == ("max_ranks" in rules), out


@pytest.mark.parametrize("track", ["solo", "limited"])
def test_the_least_utilization(track):
    """At it, start, steps, evaluations and checkpoints take the track's time; solo has 5% to spare at 40%."""
    status, out, _ = dry_run("--track", track, "--dry_run")
    assert status == 0
    least = float(re.search(r"^fits .* for which (\S+)% would be enough$", out, re.MULTILINE)[1]) / 100
    c, n_ranks = memory.preset(track)
    m = make_machine(dtype=torch.bfloat16, world_size=n_ranks)
    plan = t.training_plan(c, torch.zeros(1, 1, dtype=torch.int16).expand(c.train_tokens, 1).numpy(), m)
    seconds = harness.STARTUP_SECONDS + harness.seconds_left(
        plan, 0, 1 / (n_ranks * harness.GPU_FLOPS * least), m
    )
    assert seconds == pytest.approx(harness.read_rules(track)["max_seconds"], rel=0.002)
    assert track != "solo" or least < 0.38


BAD = [
    (["--dry_run", 7], "--dry_run 7"),
    (["--dry_run", -2], "--dry_run -2"),
    (["--dry_run", "--steps", 20], "--steps"),
]


@pytest.mark.parametrize("argv, named", BAD, ids=str)
def test_what_cannot_be_divided_or_does_not_fit_is_one_line(argv, named):
    status, out, err = dry_run("--track", "tiny", *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err


def test_a_new_option_needs_no_other_line(tmp_path):
    """A contestant's fields, of which nothing else in the script knows: an integer that may be 0, a number
    above 1, a negative one."""
    source = (ROOT / "train_gpt.py").read_text()
    fields = "    n_shared: int = 0\n    z_scale: float = 2.0\n    shift: float = -1.0\n"
    changed = source.replace("    seed: int = 0\n", f"    seed: int = 0\n{fields}", 1)
    assert changed != source
    script = tmp_path / "train_gpt.py"
    script.write_text(changed)
    shutil.copy(ROOT / "harness.py", tmp_path)
    options = ["--n_shared", "0", "--z_scale", "2.0", "--shift", "-3", "--dry_run"]
    argv = [sys.executable, script, *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0 and FLOPS_IN_ALL.search(done.stdout), done.stderr
    argv = [sys.executable, script, "--n_shared", "few", "--dry_run"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--n_shared" in done.stderr


# Other names for an optimizer and its rate, and options that a script may do without.
OTHER_NAMES = {
    '"muon", "muon_lr"': '"lion", "matrix_lr"',
    '== "muon"': '== "lion"',
    "muon_lr": "matrix_lr",
    "c.attn_gate": "True",
    "    attn_gate: bool": "    # attn_gate: bool",
    "c.dropout": "0.0",
    "    dropout: float": "    # dropout: float",
    ", dropout=0.1": "",
}


def test_a_script_with_other_names(tiny_data, tmp_path):
    """The harness knows names of this script's optimizers and techniques only where it estimates, and does
    without them there."""
    source = (ROOT / "train_gpt.py").read_text()
    for old, new in OTHER_NAMES.items():
        assert old in source
        source = source.replace(old, new)
    script = tmp_path / "train_gpt.py"
    script.write_text(source)
    shutil.copy(ROOT / "harness.py", tmp_path)
    recipe = options(**TINY | dict(matrix_lr=0.02), data=tiny_data)
    gone = ("--muon_lr", "--attn_gate", "--dropout")
    words = [word for pair in zip(recipe[::2], recipe[1::2]) if pair[0] not in gone for word in pair]
    run = tmp_path / "run"
    assert run_script([*words, "--run_dir", run, "--steps", 7, *PLAIN], script) == 0
    assert run_script(["--dry_run"], script) == 0
    assert "\nstep 7/7 " in (run / "log.txt").read_text() and (run / "record.json").exists()


# ---- FLOPs and bytes, as layers, width, sequence, members and ranks grow

GROWN = {
    "as it is": {},
    "deep": dict(n_layer=8),
    "wide": dict(n_embd=256, mlp_hidden=704),
    "long": dict(seq_len=128),
    "looped": dict(loop_first=1, loop_last=2, loop_times=2, loop_from=0.0),
    "two targets": dict(mtp_weight=0.3),
    "chain": dict(members=2, distill_alpha=0.4),
    "bags": dict(bag_size=2, bag_until=0.9),
    "iha": dict(iha=True),
}


@pytest.mark.parametrize("grown", GROWN.values(), ids=GROWN)
def test_flops_against_pytorchs_counter(grown):
    """A forward and a backward pass, by the formula without its attention: on a CPU the counter sees the
    products of weights alone (those of attention are checked in test_model.py). It also sees what the
    script leaves out, being less than half a percent: the mixing of heads, and rows that only fill the
    vocabulary up."""
    shape = dict(
        n_layer=4, n_embd=128, mlp_hidden=352, window_pattern="L", batch_tokens=256, device_tokens=256
    )
    c = config(vocab_size=1000, bos_id=999, **(shape | grown))
    cpu = torch.device("cpu")
    m = make_machine(device=cpu)
    model, _ = memory.largest_model(c)
    phase = t.phase_schedule(0.5, c)
    p = trainable(t.init_params(c))
    teacher = (c, {name: w.detach() for name, w in p.items()}) if model.teachers else None
    x = torch.randint(999, (256 // c.seq_len, c.seq_len * phase.bag_size, 1))
    y = x[..., 0].unflatten(1, (-1, phase.bag_size))
    with FlopCounterMode(display=False) as counter:
        t.train_pass(p, x, y, 1, c, m, phase, (0,), teacher)
    formula = model.phase_flops(phase)
    n_forwards = 3 + len(model.teachers)
    attention = 256 * n_forwards * len(phase.layers) * 4 * (c.seq_len + 1) / 2 * c.n_embd
    assert counter.get_total_flops() == pytest.approx(formula - attention, rel=0.005)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_that_a_rank_sends(ranks, tiny_data, monkeypatch):
    """Every sum and every gathering of a step, as many bytes as a ring of so many ranks sends, against what
    --dry_run says."""
    status, out, _ = dry_run("--dry_run", ranks, *options(**TINY | dict(n_layer=8), data=tiny_data))
    assert status == 0
    c = config(n_layer=8)  # eight ranks divide every bank
    sent = []

    class Done:
        def wait(self):
            pass

    def reduce_scatter(shard, whole, async_op):
        sent.append(whole.numel() * (ranks - 1) / ranks)
        return Done()

    def all_gather(whole, shard, async_op):
        sent.append(whole.numel() * (ranks - 1) / ranks)
        return Done()

    monkeypatch.setattr(t.dist, "reduce_scatter_single", reduce_scatter)
    monkeypatch.setattr(t.dist, "all_gather_single", all_gather)
    m = harness.Machine(torch.device("cpu"), torch.float32, world_size=ranks)
    p = t.init_params(c)
    optimizer = t.MuonAdamW(p, c, m)
    for w in p.values():
        w.grad = torch.zeros_like(w)
    optimizer.step(0, 1.0, 1.0, 0.95)
    assert len(sent) == 2 * len(p)
    n = sum(math.prod(shape) for shape in t.param_shapes(c).values())
    assert sum(sent) >= 2 * n * (ranks - 1) / ranks
    # three digits are printed, and shards of the small parameters are rounded up to whole rows
    assert float(re.search(r"each sends (\S+) GB", out)[1]) == pytest.approx(4e-9 * sum(sent), rel=0.01)
