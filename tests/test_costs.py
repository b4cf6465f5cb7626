"""What a step costs on a GPU, as far as a machine without one can tell: the kernels that Inductor writes for
an H100 and the bytes that they move, those of the operations that are not compiled, and FLOPs. A change that
adds a kernel, or a pass over memory, changes a number here.

The kernels are written, never compiled, so neither a GPU nor Triton is needed. That no graph is broken and
none compiled again in whatever phase or batch, test_run.py checks
(test_compiled_before_the_clock_and_never_again)."""

import contextlib
import copy
import functools
import re
import types
from unittest import mock

import pytest
import torch
import torch._dynamo.device_interface
import torch._functorch.aot_autograd
import torch._inductor.codecache
import torch._inductor.compile_fx
import torch._inductor.scheduler
import torch.utils._triton
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import harness
import memory
import train_gpt as t
from reference import config, make_machine, make_params, random_tokens, run_main, trainable

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")]

# ---- what Inductor writes for a GPU that is not there

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
)
CUDA = torch.device("cuda", 0)


def code_only(written):
    """Stands for GraphLowering.compile_to_module: it adds (code, bytes read and written) to a list, and
    compiles nothing."""

    def compile_to_module(graph):
        code, _ = graph.codegen()
        n_bytes, _, _ = graph.count_bytes()
        written.append((code.value, n_bytes))
        module = types.ModuleType("written")
        module.__file__ = "written"
        module.call = print  # never called
        module.runner = None
        return module

    return compile_to_module


@contextlib.contextmanager
def pretended_gpu(written):
    """Inductor takes this machine for one with an H100 and Triton. The graphs come from a CPU and are changed
    to CUDA's: a PyTorch without CUDA can hold such tensors without content, but cannot differentiate them."""
    cuda = torch._dynamo.device_interface.CudaInterface
    system = {"device": {"name": H100.name}, "version": {}, "hash": ""}

    def properties(device=None):
        return H100

    def first(*args):
        return 0

    # What Inductor asks for, and does not get here.
    replaced = [
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", first),
        (cuda, "get_device_properties", staticmethod(properties)),
        (cuda, "current_device", staticmethod(first)),
        (cuda, "is_available", staticmethod(lambda: True)),
        (cuda.Worker, "get_device_properties", staticmethod(properties)),
        (cuda.Worker, "current_device", staticmethod(first)),
        (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
        (torch._inductor.scheduler, "has_triton", lambda: True),
        (torch._inductor.compile_fx, "_check_triton_bf16_support", lambda graph: None),
        (torch._inductor.codecache.CacheBase, "get_system", staticmethod(lambda: system)),
        # Shapes are known already; to compute them again, operations would need the device.
        (torch._inductor.compile_fx, "fake_tensor_prop", lambda gm, inputs, *args: detect_fake_mode(inputs)),
        (FakeTensor, "copy_", lambda self, other: torch.ops.aten.copy_.default(self, other)),
        (GraphLowering, "compile_to_module", code_only(written)),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value, create=name == "copy_"))
        yield


def write_for_gpu(written, gm, inputs, **kwargs):
    """Stands for Inductor's compile_fx_inner: has the code of a graph written, and runs the graph as it
    is."""
    as_it_was = copy.deepcopy(gm)
    mode = detect_fake_mode(inputs)

    def on_gpu(x):
        if isinstance(x, torch.device):
            return CUDA
        if isinstance(x, torch.Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
        return x

    with mode:
        inputs = tree_map(on_gpu, list(inputs))
        for node in gm.graph.nodes:
            node.args = torch.fx.node.map_aggregate(node.args, on_gpu)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, on_gpu)
            if "val" in node.meta:
                node.meta["val"] = tree_map(on_gpu, node.meta["val"])
    gm.recompile()
    with pretended_gpu(written):
        torch._inductor.compile_fx.compile_fx_inner(gm, inputs, **kwargs)
    return torch._functorch.aot_autograd.make_boxed_func(as_it_was.forward)


def compile_for_gpu(function, written):
    inner = functools.partial(write_for_gpu, written)
    backend = functools.partial(torch._inductor.compile_fx.compile_fx, inner_compile=inner)
    return torch.compile(function, backend=backend, dynamic=False)


@pytest.fixture
def written(monkeypatch):
    """The code of every graph that is compiled in this test, and the bytes that it moves."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"looks into PyTorch 2.13's compiler; this is {torch.__version__}")
    monkeypatch.setattr(t, "varlen", varlen, raising=False)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield []
    torch._dynamo.reset()


def costs(code, n_bytes):
    """(Triton kernels, products of matrices and other kernels, MB read and written)."""
    n_triton = len(re.findall(r"^ .*\.run\(", code, re.MULTILINE))
    n_other = len(re.findall(r"= torch\.ops\.torch_attn|extern_kernels\.\w+\(", code))
    return n_triton, n_other, round(n_bytes / 1e6)


def half(*shape, **kwargs):
    return torch.empty(shape, dtype=torch.bfloat16, **kwargs)


# (kernels by Triton, other kernels, MB read and written) forward and backward. The other kernels are matrix
# products and one of attention. A skip is a tensor more to read, and another gradient to write.
LAYER = {False: [(7, 7, 541), (12, 13, 865)], True: [(7, 7, 548), (13, 13, 880)]}


@pytest.mark.parametrize("has_skip", LAYER)
def test_kernels_of_a_layer(written, has_skip):
    """A layer of `limited` with a short window, on one row of tokens: 7.3 MB of hidden states in bf16."""
    c, _ = memory.preset("limited", n_layer=2, loop_times=0)
    m = harness.Machine(torch.device("cpu"), torch.bfloat16)
    T = c.seq_len
    with FakeTensorMode():
        p = {name: torch.empty(shape, requires_grad=True) for name, shape in t.param_shapes(c).items()}
        with t.step_weights(p, c, m) as weights:
            stacked = [name for name, entry in t.param_table(c).items() if entry.n_stack and name in weights]
            w = {name: weights[name].unbind(0)[0] for name in stacked}
            x = half(1, T, c.n_embd, requires_grad=True)
            x0 = half(1, T, c.n_embd, requires_grad=True)
            cos, sin = t.rope_tables(T, c.n_embd // c.n_head, m.device, m.dtype)
            mask = torch.empty(65, dtype=torch.int32), c.window_short
            skip = None
            if has_skip:
                skip = half(1, T, c.n_embd, requires_grad=True)
                w["skip"] = weights["skip"][0]
            layer = compile_for_gpu(t.block, written)
            layer(x, x0, skip, w, cos, sin, mask, c, "varlen", c.dropout).sum().backward()
    assert [costs(*part) for part in written] == LAYER[has_skip]


# Of 1.65 GB that a chunk's logits take in float32, and half of that in bf16.
CHUNK = {"alone": (3, 3, 5937), "with a teacher": (3, 4, 7367)}


@pytest.mark.parametrize("kind", CHUNK)
def test_kernels_of_a_chunk_of_the_objective(written, kind):
    """A chunk of `limited`. No kernel adds into a tensor of logits: the gradient of a gather() would."""
    c, _ = memory.preset("limited", distill_alpha=0.4)
    n, D = c.loss_chunk, c.n_embd
    with FakeTensorMode():
        head = half(-(-c.vocab_size // 8) * 8, D)
        taught = t.LogitParts(half(n, D), head) if kind == "with a teacher" else None
        targets = torch.empty(n, 1, dtype=torch.long)
        parts = t.LogitParts(half(n, D), head)
        compile_for_gpu(t.chunk_grad, written)(parts, targets, torch.empty(()), c, taught)
    [(code, n_bytes)] = written
    assert "atomic_add(" not in code
    assert costs(code, n_bytes) == CHUNK[kind]


# ---- bytes of what is not compiled


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write, as if each went to memory."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        if not is_view:
            moved = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.total += sum(x.nbytes for x in moved)
        return out


def passes(function, w):
    """How often function() reads or writes as many bytes as w has."""
    with BytesMoved() as moved:
        function()
    return moved.total / w.nbytes


def test_passes_of_muon_over_a_bank():
    """On square matrices in float32, with products in bf16, whose passes count half. Besides, some numbers
    for each row, and for each matrix."""
    w, grad, buffer = torch.randn(3, 4, 64, 64)
    second = torch.zeros(4, 64, 1)
    settings = 0.1, 0.1, 0.9, 0.9, torch.bfloat16
    assert passes(lambda: t.muon_update(w, grad, buffer, second, *settings), w) == pytest.approx(73, abs=0.4)


# (kernels by Triton, other kernels, times that as many bytes as the weights have are read or written). Plain
# PyTorch moves 60 times as many for matrices of this shape.
MUON = (13, 15, 24)


def test_kernels_of_muon(written, monkeypatch):
    """Compiled, on a rank's share of a bank of `limited`."""
    c, n_ranks = memory.preset("limited")
    n = -(-c.n_layer * 2 // n_ranks)
    compiled = compile_for_gpu(t.muon_update, written)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled)
    with FakeTensorMode():
        w, grad, buffer = torch.empty(3, n, c.mlp_hidden, c.n_embd)
        second = torch.empty(n, c.mlp_hidden, 1)
        t.compiled_muon_update()(w, grad, buffer, second, 0.1, 0.1, 0.9, 0.9, torch.bfloat16)
    [(code, n_bytes)] = written
    assert (*costs(code, n_bytes)[:2], round(n_bytes / w.nbytes)) == MUON


def test_passes_of_adamw():
    w, grad, m1, m2 = torch.randn(4, 64, 64).abs()
    settings = 0.1, 0.1, 0.9, 0.9, 0
    assert passes(lambda: t.adamw_update(w, grad, m1, m2, *settings), w) == 26


class Casts(TorchDispatchMode):
    """Collects the shapes of float32 tensors that are cast to bf16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            if out.dtype == torch.bfloat16:
                self.shapes.append(tuple(out.shape))
        return out


def test_weights_are_cast_once_for_two_passes():
    c = config()
    m = make_machine(dtype=torch.bfloat16)
    p = trainable(make_params(c))
    x = random_tokens(4, 64)[..., None]
    with Casts() as casts, t.step_weights(p, c, m) as weights:
        for part in x.split(2):
            t.train_pass(weights, part, part, x.numel(), c, m, t.phase_schedule(1.0, c), (0,))
    banks = [tuple(p[name].shape) for name, entry in t.param_table(c).items() if entry.n_stack]
    assert sorted(shape for shape in casts.shapes if shape in banks) == sorted(banks)


# ---- FLOPs and bytes of the presets, written out


def number(pattern, text):
    return float(re.search(pattern, text, re.MULTILINE)[1].replace(",", ""))


@pytest.mark.parametrize("track", ["mini", "solo", "tiny", "limited", "two_hour", "unlimited"])
def test_a_preset_written_out(track):
    """What --dry_run says of it against a formula that takes nothing from the script but the recipe."""
    status, out, _ = run_main("--track", track, "--dry_run")
    assert status == 0
    c, n_ranks = memory.preset(track)
    L, D, T, V, H = c.n_layer, c.n_embd, c.seq_len, c.vocab_size, c.n_head
    # q, k, v, o and the values' projection of x0; three matrices of the MLP; two gates of 32 channels
    layer = 5 * D * D + 3 * D * c.mlp_hidden + 2 * 32 * H
    # What a token attends to: all before it in the row, or in the window.
    whole = (T + 1) / 2
    short = c.window_short - c.window_short * (c.window_short - 1) / (2 * T)
    seen = [whole if i % 4 == 3 or i == L - 1 else short for i in range(L)]
    loop = range(c.loop_first, c.loop_last + 1) if c.loop_times else range(0)
    plain = 2 * (L * layer + V * D) + 4 * D * sum(seen)
    looped = plain + c.loop_times * (2 * len(loop) * layer + 4 * D * sum(seen[i] for i in loop))
    second_target = 2 * D * (D + V)
    rows = -(-(c.train_tokens - 1) // T)
    steps = int(c.epochs * rows) // (c.batch_tokens // T)
    n_looped = sum((step + 0.5) / steps >= c.loop_from for step in range(steps)) if c.loop_times else 0
    per_token = 3 * (steps * (plain + second_target) + n_looped * (looped - plain))
    total = c.members * c.batch_tokens * per_token
    # Each member but the first has a teacher, which runs all its layers, with its loops.
    total += (c.members - 1) * c.batch_tokens * steps * looped
    assert number(r"^(\S+) FLOPs in all", out) == pytest.approx(total, rel=1e-3)
    # matrices, gates, mixing and residual scalars of a layer; embedding, head, skips, the second target
    n = L * (layer + 3 * H * H + 2) + 2 * V * D + L // 2 + D * D
    assert number(r"^([\d,]+) parameters", out) == n
    # Gradients to their owners, weights back, four bytes each.
    assert number(r"each sends (\S+) GB", out) == pytest.approx(8e-9 * n * (n_ranks - 1) / n_ranks, rel=5e-3)
