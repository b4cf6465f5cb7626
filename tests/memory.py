"""
What memory a training step takes: the step itself, run on tensors without content while their bytes are
counted. It needs no memory and no GPU, and seconds for the largest preset.

    python tests/memory.py solo tiny limited two_hour unlimited mini    # beside the formula of --dry_run
"""

import dataclasses
import functools
import gc
import sys
import warnings
import weakref
from pathlib import Path

import torch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import harness
import train_gpt as t

# Buffers of [tokens of a chunk, vocabulary] that a compiled chunk_grad() allocates, in its dtype and in
# float32; with a teacher. test_dry_run.py counts them in the code that Inductor writes.
CHUNK_BUFFERS = {False: (2, 2), True: (3, 4)}


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, n_bytes):
        self.live += n_bytes
        self.peak = max(self.peak, self.live)


def compiled_block(tracker):
    """block() that keeps for its backward pass what torch.compile's partitioner decides."""
    graphs = {}

    def trace(settings, tensors):
        """The graphs hold on to the tensors that they were made with: copies, which do not count."""

        def layer(*tensors):
            return t.block(*tensors, *settings)

        function = aot_function(layer, nop, nop, partition_fn=min_cut_rematerialization_partition)
        live = tracker.live
        peak = tracker.peak
        copies = tree_map_only(
            torch.Tensor, lambda x: torch.empty_like(x, requires_grad=x.requires_grad), tensors
        )
        function(*copies)
        del copies
        gc.collect()
        tracker.live = live
        tracker.peak = peak
        return function

    def run(x, x0, skip, w, cos, sin, mask, *settings):
        tensors = x, x0, skip, w, cos, sin, mask
        shapes = [x.shape if isinstance(x, torch.Tensor) else x for x in tree_leaves(tensors)]
        kind = torch.is_grad_enabled(), *shapes, *settings  # a graph for each, as torch.compile has
        if kind not in graphs:
            graphs[kind] = trace(settings, tensors)
        return graphs[kind](*tensors)

    return run


def compiled_chunk(parts, targets, scale, c, taught):
    """Allocates what a compiled chunk_grad() does, and computes nothing."""
    h, head, gate, _ = parts
    n_low, n_float32 = CHUNK_BUFFERS[bool(taught)]
    buffers = [h.new_empty(len(h), len(head)) for _ in range(n_low)]
    buffers += [h.new_empty(len(h), len(head), dtype=torch.float32) for _ in range(n_float32)]
    del buffers
    loss = h.new_empty((), dtype=torch.float32)
    logged = {"loss": loss, "kl": loss} if taught else {"loss": loss}
    return [torch.empty_like(x) for x in (h, head, gate) if x is not None], logged


def step_memory(model, m):
    """Bytes that one rank holds at the peak of an optimizer step, {kind: bytes} with "peak" last. On a GPU,
    where windows are no masks in memory, one layer's mask stands for all here, and is taken off."""
    c = model.c
    rows = min(c.batch_tokens // c.seq_len // m.world_size, c.device_tokens // c.seq_len)
    phase = max(set(model.batches.phases), key=functools.partial(t.flops_per_token, c))
    masks = 0
    if m.attention != "sdpa":
        masks = rows * c.seq_len**2 * m.dtype.itemsize
        c = dataclasses.replace(c, window_pattern="L")
    tracker = MemoryTracker()
    kinds = {}
    chunk_grad = compiled_chunk if m.compiled else t.chunk_grad

    def watched_chunk(*args):
        before = tracker.live
        kinds.setdefault("activations", before - kinds["weights"] - kinds["optimizer"] - masks)
        peak = tracker.peak
        tracker.peak = before
        out = chunk_grad(*args)
        kinds["logits"] = max(kinds.get("logits", 0), tracker.peak - before)
        tracker.peak = max(peak, tracker.peak)
        return out

    m = dataclasses.replace(m, attention="sdpa")
    m.functions.chunk_grad = watched_chunk
    m.functions.block = compiled_block(tracker) if m.compiled else t.block
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:

        def weights_of(c):
            return {name: torch.zeros(shape) for name, shape in t.param_shapes(c).items()}

        p = weights_of(c)
        teacher = None
        if model.teachers:
            teacher = model.teachers[0].c, weights_of(model.teachers[0].c)
        kinds["weights"] = tracker.live
        optimizer = t.MuonAdamW({name: w.requires_grad_() for name, w in p.items()}, c, m)
        average = {name: optimizer.shard(name, w.detach()).clone() for name, w in p.items() if c.ema}
        kinds["optimizer"] = tracker.live - kinds["weights"]
        kinds["gradients"] = sum(w.nbytes for w in p.values())
        x = torch.zeros(rows, c.seq_len * phase.bag_size, t.n_inputs(c), dtype=torch.long)
        y = x[..., 0].unflatten(1, (-1, phase.bag_size))
        n_micro_batches = c.batch_tokens // c.seq_len // m.world_size // rows
        with t.step_weights(p, c, m) as weights:
            for _ in range(min(2, n_micro_batches)):  # the second one finds gradients there
                t.train_pass(weights, x, y, 1, c, m, phase, (0,), teacher)
            del weights
        optimizer.step(0, 1.0, 1.0, 0.95)
        del average
    return kinds | {"peak": tracker.peak - masks}


def largest_model(c, n_ranks=1, compiled=True, attention="varlen"):
    """(the last PlannedModel of a run, which has teachers if any has, and a rank's Machine)."""
    dtype = torch.float32 if c.dtype == "fp32" else torch.bfloat16
    m = harness.Machine(torch.device("cpu"), dtype, 0, n_ranks, attention, compiled)
    # As few tokens as keep every phase: how many there are costs no memory, but time to look through.
    c = dataclasses.replace(c, train_tokens=4 * c.batch_tokens)
    return harness.plan_without_data(c, m)[-1], m


def preset(track, **changes):
    """(Config, number of GPUs) of a track, without its data."""
    c = harness.make_config({"track": track} | changes)
    rules = harness.read_rules(track)
    vocab_size = rules.get("vocab_size", 50257)
    return dataclasses.replace(c, vocab_size=vocab_size, bos_id=vocab_size - 1), rules.get("max_ranks", 1)


def main():
    warnings.simplefilter("ignore", FutureWarning)
    for track in sys.argv[1:]:
        c, n_ranks = preset(track)
        with fake_ranks(n_ranks):
            model, m = largest_model(c, n_ranks)
            simulated = step_memory(model, m)
        estimated = harness.memory_estimate(model, m)
        estimated["peak"] = sum(estimated.values())
        print(f"{track} on {n_ranks}:")
        for name, kinds in (
            ("simulated", {kind: size / 1e9 for kind, size in simulated.items()}),
            ("estimated", estimated),
        ):
            print(f"  {name}: " + ", ".join(f"{kind} {kinds[kind]:.2f}" for kind in simulated))


class fake_ranks:
    """A process group of so many ranks of which only the first exists."""

    def __init__(self, n_ranks):
        self.n_ranks = n_ranks

    def __enter__(self):
        if self.n_ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            store = FakeStore()
            torch.distributed.init_process_group("fake", store=store, rank=0, world_size=self.n_ranks)

    def __exit__(self, *exception):
        if self.n_ranks > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
