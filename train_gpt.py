"""
Tokenrun: how low can validation loss go on a fixed budget of training tokens?

    python train_gpt.py                                   the pocket track, on whatever machine this is
    python train_gpt.py --n_layer 8 --dropout 0.1         every field of Config is an option of the same name
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track limited
    python train_gpt.py --resume runs/NAME                go on with a run that was killed or stopped
    python train_gpt.py --score runs/NAME --tokens data/pocket/val.bin --nll out.npy
    python train_gpt.py --sample runs/NAME --prompt "def "

A run leaves a folder: log.txt (this source, the environment, every step, the result), record.json, val_nll.npy and the
weights. Sections in order: config, machine, data, model, objective, optimizer, schedules, checkpoint, scoring, training,
main. Fork it, change anything; the only promise to keep is the command line of --score (records/README.md).
"""
import time

START = time.time()  # the track's clock: before the imports, which take seconds

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex, varlen

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file or option and the remedy."""


class Stopped(Exception):
    """The run ends before its time, its state on disk as far as that is good. `status` is the process's exit status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


# ----------------------------------------------------------------------------------------------------------------------
# config

@dataclass(frozen=True)
class Config:
    """A recipe. The defaults are the pocket track's; PRESETS lists how the other tracks differ."""
    track: str = "pocket"
    data: str = "pocket"           # a folder of data/ beside this script, or a path with a slash in it
    train_tokens: int = 1_000_000  # the budget: the loader shows no token beyond the first so many
    seed: int = 0
    # model
    n_layer: int = 6
    n_embd: int = 192
    n_head: int = 3
    mlp_hidden: int = 512          # width of the SwiGLU
    seq_len: int = 512             # tokens of context, in training and in scoring
    window_short: int = 128        # tokens that a short-window layer sees, the token itself included
    window_pattern: str = "SSSL"   # short and long windows, repeated over the layers; the last layer is always long
    softcap: float = 15.0          # logits are softcap * tanh(logits / softcap): keeps one token from costing too much
    value_proj: bool = True        # every layer adds a gated projection of the embedding x0 to its values (2410.17897)
    unet: bool = True              # layer i's output is added to the input of layer n_layer-1-i
    x0_mix: bool = True            # every layer starts from a * x + b * x0, both learned
    attn_gate: bool = True         # each head's output times a sigmoid of the layer's input: a head can rest
    loop_first: int = 0            # looped layers: loop_first..loop_last run loop_times more
    loop_last: int = 0
    loop_times: int = 0
    loop_from: float = 0.5         # ... from this fraction of training on
    # regularization
    dropout: float = 0.0           # of what each attention and each MLP adds to the residual stream
    layer_drop: float = 0.0        # stochastic depth: chance that a sequence skips the last layer, less for earlier ones
    # training
    epochs: float = 8.0            # passes over train_tokens
    batch_tokens: int = 8192       # tokens per optimizer step, over all ranks
    device_tokens: int = 8192      # tokens per forward pass of one rank; smaller saves memory, costs speed
    loss_chunk: int = 2048         # tokens whose logits exist at the same time
    muon_lr: float = 0.02          # the attention and MLP matrices
    muon_momentum: float = 0.95
    momentum_start: float = 0.85   # momentum rises from here to muon_momentum ...
    momentum_warmup: float = 0.1   # ... over this fraction of training
    muon_beta2: float = 0.95       # per-neuron second moment of the orthogonalized update
    embed_lr: float = 0.1          # AdamW: token embedding
    head_lr: float = 0.005         # AdamW: output head
    scalar_lr: float = 0.02        # AdamW: gates, residual and skip scalars
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    weight_decay: float = 0.1      # decoupled, times the learning rate; on all but gates and scalars
    wd_points: str = "0:1"         # its course: fraction of training : multiple of weight_decay, linear in between
    warmup: float = 0.01           # fraction of training until the learning rates reach their height
    warmdown: float = 0.6          # last fraction of training, in which they fall to final_lr ...
    warmdown_power: float = 1.0    # ... along (what is left of it) to this power
    final_lr: float = 0.0          # a multiple, like all lr schedules here
    window_grow: float = 0.0       # long windows are as short as the short ones for this fraction of training
    # housekeeping
    probes: int = 8                # looks at validation during training, on its first probe_tokens
    probe_tokens: int = 40_000
    save_every: int = 100          # steps between checkpoints
    cpu_threads: int = 4           # at most; pocket's rules allow four cores
    dtype: str = "auto"            # bf16, fp32, or auto: bf16 where the processor multiplies it in hardware


FINEWEB = dict(
    data="fineweb", train_tokens=100_000_000, seq_len=2048, window_short=1024, batch_tokens=524_288, device_tokens=16_384,
    loss_chunk=4096, embed_lr=0.15, head_lr=0.001, dropout=0.1, warmup=0.0, probes=12, probe_tokens=1_048_576, save_every=500)

PRESETS = {  # shapes and recipes of the FineWeb tracks: the published Slowrun records of 2026-07, in this script's terms
    "pocket": {},
    "pocket_unlimited": dict(track="pocket_unlimited"),
    "mini": dict(track="mini", data="mini", train_tokens=10_000_000, n_layer=12, n_embd=512, n_head=4, mlp_hidden=1408,
                 seq_len=1024, window_short=512, batch_tokens=65_536, device_tokens=65_536, loss_chunk=8192, dropout=0.1,
                 weight_decay=0.8, epochs=10, probe_tokens=262_144, save_every=500),
    "tiny": FINEWEB | dict(track="tiny", n_layer=16, n_embd=1024, n_head=8, mlp_hidden=2816, epochs=15, muon_lr=0.04,
                           weight_decay=0.8, wd_points="0:1,0.125:1,0.5:0.125,1:1.5625", device_tokens=65_536),
    "limited": FINEWEB | dict(track="limited", n_layer=30, n_embd=1792, n_head=14, mlp_hidden=4864, epochs=11, muon_lr=0.01,
                              weight_decay=1.3, loop_first=15, loop_last=20, loop_times=1, loop_from=0.64),
    "two_hour": FINEWEB | dict(track="two_hour", n_layer=30, n_embd=1792, n_head=14, mlp_hidden=4864, epochs=18,
                               muon_lr=0.01, weight_decay=1.3, loop_first=15, loop_last=24, loop_times=2, loop_from=0.5),
    "unlimited": FINEWEB | dict(track="unlimited", n_layer=30, n_embd=2048, n_head=16, mlp_hidden=5632, epochs=18,
                                muon_lr=0.01, weight_decay=1.3, loop_first=15, loop_last=24, loop_times=4, loop_from=0.5),
}


def check_config(c, world_size):
    """Refuse what cannot be trained, before anything is loaded. Raises UserError naming the option and the remedy."""
    rows = c.batch_tokens // max(c.seq_len, 1)
    at_least_one = ("train_tokens", "n_layer", "n_embd", "n_head", "mlp_hidden", "seq_len", "window_short", "batch_tokens",
                    "device_tokens", "loss_chunk", "save_every", "cpu_threads")
    for name in at_least_one:
        if getattr(c, name) < 1:
            raise UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if f.type in (int, float) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{f.name} {value}: must be a finite number, 0 or more")
    for name in ("dropout", "layer_drop", "warmup", "warmdown", "window_grow", "momentum_warmup", "loop_from", "muon_momentum",
                 "momentum_start", "muon_beta2", "adam_beta1", "adam_beta2"):
        if getattr(c, name) > 1 or (name == "dropout" and c.dropout == 1):
            raise UserError(f"--{name} {getattr(c, name)}: is a fraction, choose one from 0 to 1")
    rules = [
        (c.n_embd % c.n_head == 0, f"--n_embd {c.n_embd}: must be divisible by --n_head {c.n_head}"),
        (c.n_embd // c.n_head % 4 == 0, f"--n_head {c.n_head}: gives heads of {c.n_embd / c.n_head:g} channels, which half-rotated "
                                        "RoPE needs to be a multiple of 4"),
        (c.batch_tokens % c.seq_len == 0, f"--batch_tokens {c.batch_tokens}: must be a multiple of --seq_len {c.seq_len}"),
        (rows % world_size == 0, f"--batch_tokens {c.batch_tokens}: its {rows} sequences cannot be divided among {world_size} ranks"),
        (c.device_tokens >= c.seq_len, f"--device_tokens {c.device_tokens}: must hold one sequence of --seq_len {c.seq_len}"),
        (c.window_pattern and not set(c.window_pattern) - set("SL"), f"--window_pattern {c.window_pattern}: write it in S and L"),
        (c.softcap > 0, f"--softcap {c.softcap}: must be above 0"),
        (c.warmup + c.warmdown <= 1, f"--warmup {c.warmup} and --warmdown {c.warmdown}: together more than all of training"),
        (c.epochs > 0, f"--epochs {c.epochs}: must be above 0"),
        (c.loop_times == 0 or 0 <= c.loop_first <= c.loop_last < c.n_layer,
         f"--loop_first {c.loop_first} --loop_last {c.loop_last}: not a range of the model's layers 0 to {c.n_layer - 1}"),
        (c.dtype in ("auto", "bf16", "fp32"), f"--dtype {c.dtype}: choose auto, bf16 or fp32"),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)
    parse_points(c.wd_points)


# ----------------------------------------------------------------------------------------------------------------------
# machine

@dataclass
class Machine:
    """What this process runs on, and the functions that this decides."""
    device: torch.device
    dtype: torch.dtype     # of activations and of the matrices while they are multiplied; parameters stay float32
    attention: str         # varlen | flex | sdpa
    rank: int = 0
    world_size: int = 1
    compiled: bool = False
    notes: tuple = ()      # why it is this dtype, attention and compiler: lines for the log
    block: object = None   # block() and objective_chunk(), compiled or as they stand
    objective_chunk: object = None


def cpu_has_fast_bf16():
    """AMX tiles. Measured with this script: AVX512-BF16 without them gains little, emulation without either loses much."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", torch.cpu._is_amx_tile_supported()))


def pick_attention(device, dtype, wanted):
    """The first of varlen flash attention, FlexAttention and SDPA that works here, tried forward and backward.
    Returns (name, reason)."""
    if device.type == "cpu":
        if wanted in ("auto", "sdpa"):
            return "sdpa", "the processor has no other with a backward pass"
        raise UserError(f"--attention {wanted}: needs a GPU; use --attention sdpa")
    reasons = []
    for name in ("varlen", "flex", "sdpa") if wanted == "auto" else (wanted,):
        try:
            q = torch.randn(2, 128, 2, 64, device=device, dtype=dtype, requires_grad=True)
            masks = attention_masks(torch.zeros(2, 128, dtype=torch.long, device=device), 1, [64], name)
            attention(q, q, q, masks[64], name).sum().backward()
            return name, "; ".join(reasons) or "works here"
        except Exception as e:  # whatever a missing or refusing kernel raises: the reason goes to the log
            reasons.append(f"{name} does not work: {type(e).__name__}: {str(e).splitlines()[0][:100]}")
    raise UserError(f"--attention {wanted}: {'; '.join(reasons)}; use --attention auto")


def pick_compiler(device, wanted):
    """(compile or not, reason). On a CPU, torch.compile needs a C++ compiler; on a GPU, Triton."""
    if wanted == "off":
        return False, "switched off"
    if device.type == "cpu":
        found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        missing = "no C++ compiler (g++ or clang++) on this machine"
    else:
        found, missing = torch.utils._triton.has_triton(), "no Triton for this GPU"
    if not found and wanted == "on":
        raise UserError(f"--compile on: {missing}; use --compile auto")
    return bool(found), "compiler found" if found else missing


def setup_machine(c, device="auto", attention_name="auto", compile_mode="auto"):
    """Find the device, join the other ranks where torchrun started several, choose dtype, attention and compiler."""
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, min(c.cpu_threads, cores) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        dtype, why = ("bf16", "the GPU has it") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32", "no bf16 here")
    else:
        dtype, why = ("bf16", "the processor has AMX") if cpu_has_fast_bf16() else ("fp32", "the processor has no AMX")
    if c.dtype != "auto":
        dtype, why = c.dtype, "as the options say"
    dtype, notes = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], [f"dtype {dtype}: {why}"]
    attention_name, why = pick_attention(device, dtype, attention_name)
    notes.append(f"attention {attention_name}: {why}")
    compiled, why = pick_compiler(device, compile_mode)
    m = Machine(device, dtype, attention_name, rank, world_size, notes=tuple(notes))
    set_compiled(m, compiled, why)
    return m


def set_compiled(m, compiled, why):
    """Point the machine at the compiled or the plain block() and objective_chunk(). One layer is compiled, not the whole
    model: all layers share it, and so does every list of layers that a phase of training runs."""
    m.compiled = compiled
    m.notes = tuple(n for n in m.notes if not n.startswith("compiled")) + (f"compiled {'yes' if compiled else 'no'}: {why}",)
    m.block = torch.compile(block, dynamic=False) if compiled else block
    m.objective_chunk = torch.compile(objective_chunk, dynamic=False) if compiled else objective_chunk


def all_reduce(m, tensor):
    """Sum over the ranks, in place."""
    if m.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


# ----------------------------------------------------------------------------------------------------------------------
# data

HEADER_INTS, MAGIC = 256, 20240520  # the shard format of llm.c and modded-nanogpt; data/README.md


def data_folder(c):
    return Path(c.data) if os.sep in c.data else HERE / "data" / c.data


def read_meta(c, m=None):
    """meta.json of the run's data; the pocket shards are prepared on the spot where they are missing."""
    folder = data_folder(c)
    path = folder / "meta.json"
    if not path.exists() and c.data == "pocket":
        if m is None or m.rank == 0:
            from data import prepare
            try:
                prepare.prepare_pocket()
            except prepare.DataError as e:
                raise UserError(str(e))
        if m is not None and m.world_size > 1:
            dist.barrier()
    try:
        meta = json.loads(path.read_text())
        for key, kind in (("tokenizer", str), ("vocab_size", int), ("bos_id", int), ("tokens", dict), ("text_bytes", dict), ("sha256", dict)):
            if not isinstance(meta[key], kind):
                raise ValueError(key)
        if not 0 <= meta["bos_id"] < meta["vocab_size"] <= 65536:
            raise ValueError("bos_id")
    except FileNotFoundError:
        raise UserError(f"{path}: no data there; prepare it with python data/prepare.py, or name another folder with --data")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a description of token shards ({e}); prepare the data again with python data/prepare.py")
    return meta


def read_shard(path, vocab_size, sha256=None):
    """Token ids of a shard, uint16 [n], memory-mapped. Raises UserError where the file is not what it says it is."""
    path = Path(path)
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != 1:
        raise UserError(f"{path}: not a token shard (header of 256 int32 that begins {MAGIC}, 1); see data/README.md")
    n = int(header[2])
    if n < 2 or size != 4 * HEADER_INTS + 2 * n:
        raise UserError(f"{path}: {size:,} bytes, but its header says {n:,} tokens, which take {4 * HEADER_INTS + 2 * n:,}: "
                        "a broken copy, prepare the data again")
    if sha256 is not None:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                raise UserError(f"{path}: its sha256 is not the one in meta.json: changed since it was prepared, prepare the data again")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(n,))
    check_ids(tokens, vocab_size, path)
    return tokens


def check_ids(tokens, vocab_size, path):
    largest = max((int(tokens.flat[i:i + (1 << 24)].max()) for i in range(0, tokens.size, 1 << 24)), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: holds token {largest}, but the vocabulary has only {vocab_size}: made with another tokenizer?")


class Loader:
    """Training batches as a function of the step alone: nothing to save, any position can be resumed.

    An epoch is the budget's documents in an order drawn from (seed, epoch), laid end to end and cut every seq_len tokens
    into rows, which are then shuffled. Where a document that fits exactly into the rest of a row is still to come, it is
    taken next, so that the following row starts at a BOS. Every token of the budget but the epoch's first is a target
    exactly once per epoch; the last, shorter row is filled up with targets of -1, which the loss does not count."""

    def __init__(self, tokens, bos_id, c, rank=0, world_size=1):
        if len(tokens) < c.train_tokens:
            raise UserError(f"--train_tokens {c.train_tokens}: the training shard holds only {len(tokens)}; lower it")
        self.tokens = tokens[:c.train_tokens]
        starts = np.flatnonzero(self.tokens == bos_id)
        if len(starts) == 0 or starts[0] != 0:
            starts = np.concatenate([[0], starts])
        self.starts, self.lengths = starts, np.diff(np.append(starts, len(self.tokens)))
        self.T, self.seed, self.bos_id = c.seq_len, c.seed, bos_id
        self.rows_per_epoch = -(-(len(self.tokens) - 1) // self.T)  # ceil: the first token of an epoch is no target
        self.batch_rows = c.batch_tokens // self.T
        share = self.batch_rows // world_size
        self.share = range(rank * share, (rank + 1) * share)
        self.steps = max(1, int(c.epochs * self.rows_per_epoch) // self.batch_rows)
        self.epoch = None

    def document_order(self, rng):
        """Shuffled documents, with exact fits pulled forward."""
        order, placed, filled, todo_of_length = [], np.zeros(len(self.starts), bool), 0, {}
        shuffled = rng.permutation(len(self.starts))
        for d in shuffled:
            todo_of_length.setdefault(int(self.lengths[d]), []).append(d)
        for d in shuffled:
            while not placed[d]:
                rest = -filled % self.T
                fitting = todo_of_length.get(rest)
                while fitting and placed[fitting[-1]]:
                    fitting.pop()
                take = fitting.pop() if fitting else d
                placed[take] = True
                order.append(take)
                filled += int(self.lengths[take])
        return np.array(order)

    def start_epoch(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch, self.order = epoch, self.document_order(rng)
        self.ends = np.cumsum(self.lengths[self.order])
        self.rows = rng.permutation(self.rows_per_epoch)

    def row(self, i):
        """Tokens [i*T, i*T + T] of the epoch's stream, at most T+1."""
        at, stop, pieces = i * self.T, min(i * self.T + self.T + 1, len(self.tokens)), []
        d = int(np.searchsorted(self.ends, at, side="right"))
        while at < stop:
            document = self.order[d]
            offset = at - (self.ends[d] - self.lengths[document])
            n = min(stop - at, self.lengths[document] - offset)
            first = self.starts[document] + offset
            pieces.append(self.tokens[first:first + n])
            at, d = at + n, d + 1
        return np.concatenate(pieces)

    def batch(self, step):
        """This rank's inputs and targets, int64 [rows, T] each, and the number of targets in the batch of all ranks."""
        x = np.full((len(self.share), self.T), self.bos_id, dtype=np.int64)
        y = np.full((len(self.share), self.T), -1, dtype=np.int64)
        n_targets = 0
        for j in range(self.batch_rows):
            epoch, k = divmod(step * self.batch_rows + j, self.rows_per_epoch)
            if epoch != self.epoch:
                self.start_epoch(epoch)
            i = int(self.rows[k])
            n_targets += min(self.T, len(self.tokens) - 1 - i * self.T)
            if j in self.share:
                row, at = self.row(i), j - self.share.start
                x[at, :len(row) - 1], y[at, :len(row) - 1] = row[:-1], row[1:]
        return torch.from_numpy(x), torch.from_numpy(y), n_targets


# ----------------------------------------------------------------------------------------------------------------------
# model

GATE_CHANNELS = 32  # gates read only this many channels of the layer's input (Slowrun, modded-nanogpt)


def param_shapes(c, vocab_size):
    """Name -> shape of every parameter. Matrices are stacked over the layers, each as [out, in]."""
    L, D, H, hidden, gate = c.n_layer, c.n_embd, c.n_head, c.mlp_hidden, min(GATE_CHANNELS, c.n_embd)
    shapes = {"wte": (vocab_size, D), "lm_head": (vocab_size, D),
              "attn": (L, 4 + c.value_proj, D, D),  # q, k, v, o, and the value projection of x0
              "mlp_in": (L, 2, hidden, D),          # gate, up
              "mlp_out": (L, D, hidden)}
    if c.value_proj:
        shapes["value_gate"] = (L, H, gate)
    if c.attn_gate:
        shapes["attn_gate"] = (L, H, gate)
    if c.x0_mix:
        shapes["mix"] = (L, 2)
    if c.unet and L > 1:
        shapes["skip"] = (L // 2,)
    return shapes


def init_params(c, vocab_size, seed):
    """Float32 parameters, a dict of leaf tensors on the CPU. Output projections start at zero, so every layer starts as
    the identity; the head starts near zero, so the first loss is ln(vocab_size)."""
    g = torch.Generator().manual_seed(seed)
    p = {}
    for name, shape in param_shapes(c, vocab_size).items():
        if name == "wte":
            p[name] = torch.randn(shape, generator=g)
        elif name == "lm_head":
            p[name] = torch.randn(shape, generator=g) * 0.001
        elif name in ("attn", "mlp_in"):
            p[name] = (torch.rand(shape, generator=g) * 2 - 1) * (3 / shape[-1]) ** 0.5  # variance 1 / fan_in
        else:
            p[name] = torch.zeros(shape)
    p["attn"][:, 3] = 0
    if c.x0_mix:
        p["mix"][:] = torch.tensor([1.1, 0.1])  # as nanochat starts them
    if "skip" in p:
        p["skip"][:] = 1
    return p


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rope_tables(T, head_dim, device, dtype, base=10_000):
    """cos and sin, [T, 1, head_dim/2]. Half of the frequencies are zero: half of a head's channels carry no position."""
    pairs = head_dim // 4
    freqs = torch.cat([base ** -(torch.arange(pairs, device=device) / pairs), torch.zeros(head_dim // 2 - pairs, device=device)])
    angles = torch.outer(torch.arange(T, device=device, dtype=torch.float32), freqs)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def attention_masks(tokens, bos_id, windows, impl):
    """What attention() needs for each window size: token i sees token j if j <= i, i - j < window, and no document begins
    after j up to i. tokens [B, T] -> {window: mask}; all implementations describe the same set of pairs."""
    B, T = tokens.shape
    if impl == "varlen":  # rows and documents are sequences of one long batch
        starts = tokens == bos_id
        starts[:, 0] = True
        firsts = starts.flatten().nonzero()[:, 0].int()
        room = 1 << max(6, (len(firsts)).bit_length())  # powers of two, so that few shapes are compiled; the rest is empty
        cu_seqlens = F.pad(firsts, (0, room - len(firsts)), value=B * T)
        return {w: (cu_seqlens, w) for w in windows}
    document = (tokens == bos_id).cumsum(1)
    if impl == "flex":
        def pairs(w):
            return lambda b, h, i, j: (j <= i) & (i - j < w) & (document[b, i] == document[b, j])
        return {w: flex.create_block_mask(pairs(w), B, None, T, T, device=tokens.device) for w in windows}
    distance = torch.arange(T, device=tokens.device)[:, None] - torch.arange(T, device=tokens.device)
    same = (document[:, :, None] == document[:, None, :])[:, None]  # [B, 1, T, T]
    return {w: same & (distance >= 0) & (distance < w) for w in windows}


compiled_flex = torch.compile(flex.flex_attention)  # without a compiler it would write out every score


def attention(q, k, v, mask, impl):
    """Softmax attention, scaled by head_dim ** -0.5, over the pairs that `mask` (of attention_masks) allows.
    q, k, v [B, T, H, head_dim] -> [B, T, H, head_dim]."""
    if impl == "varlen":
        cu_seqlens, window = mask
        T, flat = q.size(1), (-1, *q.shape[2:])
        y = varlen.varlen_attn(q.reshape(flat), k.reshape(flat), v.reshape(flat), cu_seqlens, cu_seqlens, T, T,
                               window_size=(window - 1, 0))
        return y.view(q.shape)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if impl == "flex":
        return compiled_flex(q, k, v, block_mask=mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def block(x, x0, w, cos, sin, mask, impl, n_head, keep, dropout):
    """One layer. x, x0 [B, T, D]; w: this layer's slice of every bank; keep: None, or [B, 1, 1], what stochastic depth
    multiplies each sequence's update by."""
    B, T, D = x.shape
    if "mix" in w:
        x = w["mix"][0] * x + w["mix"][1] * x0
    h = norm(x)
    q, k, v = F.linear(h, w["attn"][:3].reshape(3 * D, D)).view(B, T, 3, n_head, D // n_head).unbind(2)
    if "value_gate" in w:
        gate = 2 * torch.sigmoid(F.linear(h[..., :w["value_gate"].size(-1)], w["value_gate"]))  # [B, T, H], 1 at the start
        v = v + gate[..., None] * F.linear(x0, w["attn"][4]).view(v.shape)
    y = attention(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, mask, impl)
    if "attn_gate" in w:
        y = y * torch.sigmoid(F.linear(h[..., :w["attn_gate"].size(-1)], w["attn_gate"]))[..., None]
    y = F.dropout(F.linear(y.reshape(B, T, D), w["attn"][3]), dropout, training=dropout > 0)
    x = x + (y if keep is None else y * keep)
    gate, up = F.linear(norm(x), w["mlp_in"].flatten(0, 1)).chunk(2, dim=-1)
    y = F.dropout(F.linear(F.silu(gate) * up, w["mlp_out"]), dropout, training=dropout > 0)
    return x + (y if keep is None else y * keep)


def layer_window(c, i, long_window):
    short = c.window_pattern[i % len(c.window_pattern)] == "S" and i < c.n_layer - 1
    return c.window_short if short else long_window


def forward(p, tokens, c, m, bos_id, phase, drop=None):
    """Hidden states [B, T, D] of tokens [B, T], normalized, ready for the head.

    phase: the layers to run, in order, and the long window (see schedules). drop: None to score; in training a
    torch.Generator on the CPU that decides which sequences skip which layers (dropout draws from torch's own)."""
    layers, long_window = phase
    B, T = tokens.shape
    cos, sin = rope_tables(T, c.n_embd // c.n_head, m.device, m.dtype)
    windows = [min(layer_window(c, i, long_window), T) for i in layers]
    masks = attention_masks(tokens, bos_id, sorted(set(windows)), m.attention)
    # every bank is cast and taken apart once per pass, not once per use
    banks = {name: p[name].to(m.dtype).unbind(0) for name in p if name not in ("wte", "lm_head", "skip")}
    dropout = c.dropout if drop is not None else 0.0
    run_block = m.block if drop is not None else block  # scoring comes in all shapes: not worth compiling
    x = x0 = norm(F.embedding(tokens, p["wte"]).to(m.dtype))
    skips = {}
    for i, window in zip(layers, windows):
        if "skip" in p and c.n_layer - 1 - i in skips:
            x = x + p["skip"][i - c.n_layer // 2 - c.n_layer % 2] * skips[c.n_layer - 1 - i]
        keep = None
        if c.layer_drop and drop is not None:
            chance = c.layer_drop * i / max(1, c.n_layer - 1)
            keep = ((torch.rand(B, 1, 1, generator=drop) >= chance) / max(1 - chance, 1e-6)).to(m.device, m.dtype)
        x = run_block(x, x0, {name: bank[i] for name, bank in banks.items()}, cos, sin, masks[window], m.attention,
                      c.n_head, keep, dropout)
        if i < c.n_layer // 2:
            skips[i] = x
    return norm(x)


def flops_per_token(c, vocab_size, phase):
    """FLOPs of a forward pass per token: two per weight that is multiplied, and the attention over the average window."""
    layers, long_window = phase
    weights = sum(math.prod(shape[1:]) for name, shape in param_shapes(c, vocab_size).items()
                  if name in ("attn", "mlp_in", "mlp_out", "attn_gate", "value_gate"))
    windows = [min(layer_window(c, i, long_window), c.seq_len) for i in layers]
    seen = [w - w * (w - 1) / 2 / c.seq_len for w in windows]  # tokens that the average token attends to
    return 2 * vocab_size * c.n_embd + sum(2 * weights + 4 * n * c.n_embd for n in seen)


# ----------------------------------------------------------------------------------------------------------------------
# objective

def head_logits(h, w, softcap):
    """Float32 logits [n, V] of hidden states [n, D] under the head [V, D]."""
    return softcap * torch.tanh(F.linear(h, w).float() / softcap)


def objective_chunk(h, w, targets, softcap):
    """Cross-entropy of one chunk of tokens, and its gradient with respect to the logits before the softcap.

    h [n, D], w [V, D], targets [n, K]: each token's K targets count alike; -1 counts nothing.
    Returns the sum of the losses in nats (float32) and the gradient, [n, V] in h's dtype."""
    logits = head_logits(h, w, softcap)
    counted = targets >= 0
    index = targets.clamp_min(0)
    lse = logits.logsumexp(-1, keepdim=True)
    loss = ((lse - logits.gather(1, index)) * counted).sum()
    grad = torch.exp(logits - lse) * counted.sum(1, keepdim=True)
    grad = grad.scatter_add(1, index, -counted.to(grad.dtype))
    grad = grad * (1 - (logits / softcap).square())
    return loss, grad.to(h.dtype)


class ChunkedObjective(torch.autograd.Function):
    """The logits of a chunk and their gradient are made in the forward pass and dropped; what stays is the gradient of h and
    of w. Three matrix products, as many as the plain way needs, and never more than [chunk, V] in memory."""

    @staticmethod
    def forward(ctx, h, w, targets, softcap, scale, chunk, objective_chunk):
        grad_h, grad_w = torch.empty_like(h), torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        cast = w.to(h.dtype)
        loss = torch.zeros((), device=h.device)
        for i in range(0, len(h), chunk):
            part = h[i:i + chunk]
            part_loss, grad = objective_chunk(part, cast, targets[i:i + chunk], softcap)
            loss += part_loss
            torch.mm(grad, cast, out=grad_h[i:i + chunk])
            grad_w += grad.T @ part
        ctx.save_for_backward(grad_h.mul_(scale), grad_w.mul_(scale))
        return loss * scale

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, grad_w * grad, None, None, None, None, None


def objective(h, w, targets, c, m, scale):
    """The training loss: scale * sum over tokens and their targets of -log p(target), a scalar with gradients.

    h [N, D] from forward(), w [V, D] the head in float32, targets [N, K] (K targets of each token, -1: none)."""
    return ChunkedObjective.apply(h, w, targets, c.softcap, scale, c.loss_chunk, m.objective_chunk)


def token_nll(h, w, targets, c):
    """-log p(target) of every token in nats, float32 [N]: the scoring side of objective(). h [N, D], targets [N]."""
    w, nll = w.to(h.dtype), []
    for part, target in zip(h.split(c.loss_chunk), targets.split(c.loss_chunk)):
        logits = head_logits(part, w, c.softcap)
        nll.append(logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0])
    return torch.cat(nll)


# ----------------------------------------------------------------------------------------------------------------------
# optimizer

MUON_BANKS = ("attn", "mlp_in", "mlp_out")
NO_DECAY = ("value_gate", "attn_gate", "mix", "skip")

# Polar Express (arXiv 2505.16932): the best odd quintic of each step for singular values in [1e-3, 1]; safety factor 1.02
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(g, dtype):
    """U V^T of g = U S V^T, nearly, for every matrix of [n, r, c]: singular values come out within some percent of 1."""
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return (x.mT if g.size(-2) > g.size(-1) else x).to(g.dtype)


def muon_update(w, grad, buf, second, lr, wd, momentum, beta2, dtype):
    """One Muon step on matrices w [n, out, in], in place. buf: momentum, like w. second: [n, out, 1], the running mean
    square of each neuron's update. Row-normalized before (MuonEq-R, arXiv 2603.28254), per-neuron second moment after
    (NorMuon, 2510.05491), weight decay only where it agrees with the update (cautious, 2510.12402)."""
    buf.lerp_(grad, 1 - momentum)
    g = grad.lerp(buf, momentum)  # Nesterov
    g = orthogonalize(g / g.norm(dim=-1, keepdim=True).clamp_min(1e-10), dtype)
    size = g.norm(dim=(-2, -1), keepdim=True)
    second.lerp_(g.square().mean(-1, keepdim=True), 1 - beta2)
    g = g * second.clamp_min(1e-10).rsqrt()
    g = g * (size / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))  # the second moment turns, it does not lengthen
    scale = lr * max(1.0, w.size(-2) / w.size(-1)) ** 0.5
    w.sub_(scale * g + lr * wd * w * (g * w > 0))


def adamw_update(w, grad, m1, m2, lr, wd, beta1, beta2, step, eps=1e-10):
    """One AdamW step (arXiv 1711.05101), in place. step counts from 0."""
    m1.lerp_(grad, 1 - beta1)
    m2.lerp_(grad.square(), 1 - beta2)
    update = (m1 / (1 - beta1 ** (step + 1))) / ((m2 / (1 - beta2 ** (step + 1))).sqrt() + eps)
    w.mul_(1 - lr * wd).sub_(lr * update)


class MuonAdamW:
    """Muon for the banks of matrices, AdamW for the rest, each rank updating its share of every parameter.

    A parameter is seen as rows [n, ...]: single matrices for Muon, single numbers for AdamW. Rank r owns rows
    [r * per, (r + 1) * per) of it with per = ceil(n / world_size), and keeps optimizer state for these alone. A step sums the
    gradients onto their owners, updates there, and sends the result to everyone; one rank owns all, nothing is sent."""

    def __init__(self, p, c, m):
        self.p, self.c, self.m, self.state = p, c, m, {}
        for name, w in p.items():
            rows = self.rows(name, w)
            per = -(-len(rows) // m.world_size)
            mine = (per, *rows.shape[1:])
            second = (per, rows.size(1), 1) if name in MUON_BANKS else mine
            self.state[name] = (torch.zeros(mine, device=w.device), torch.zeros(second, device=w.device))

    @staticmethod
    def rows(name, w):
        return w.view(-1, *w.shape[-2:]) if name in MUON_BANKS else w.view(-1)

    def padded(self, rows, per):
        return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, per * self.m.world_size - len(rows)))

    @torch.no_grad()
    def step(self, step, lr, wd, momentum):
        """lr and wd: multiples of the config's (see schedules). Gradients are in p[name].grad and are dropped."""
        c, world, pending = self.c, self.m.world_size, []
        for name, w in self.p.items():  # all sums are under way before the first update needs one
            grad, (first, _) = self.rows(name, w.grad), self.state[name]
            work = None
            if world > 1:
                own = torch.empty_like(first)
                work = reduce_scatter(own, self.padded(grad, len(first)), async_op=True)
                grad = own
            pending.append((name, w, grad, work))
        gathers = []
        for name, w, grad, work in pending:
            if work is not None:
                work.wait()
            rows, (first, second), lo = self.rows(name, w), self.state[name], self.m.rank * len(self.state[name][0])
            own = rows[lo:lo + len(first)]
            n = len(own)  # the last rank may own fewer rows than the others
            decay = 0.0 if name in NO_DECAY else c.weight_decay * wd
            if name in MUON_BANKS:
                muon_update(own, grad[:n], first[:n], second[:n], c.muon_lr * lr, decay, momentum, c.muon_beta2, self.m.dtype)
            else:
                base = c.embed_lr if name == "wte" else c.head_lr if name == "lm_head" else c.scalar_lr
                adamw_update(own, grad[:n], first[:n], second[:n], base * lr, decay, c.adam_beta1, c.adam_beta2, step)
            if world > 1:
                gathered = torch.empty(len(first) * world, *first.shape[1:], device=w.device)
                padded = F.pad(own, (0, 0) * (own.dim() - 1) + (0, len(first) - n))
                gathers.append((rows, gathered, all_gather(gathered, padded, async_op=True)))
            w.grad = None
        for rows, gathered, work in gathers:
            work.wait()
            rows.copy_(gathered[:len(rows)])

    @torch.no_grad()
    def state_dict(self):
        """Every rank's state put together, on the CPU, in the shape that one rank would have: resumes on any number."""
        full = {}
        for name, w in self.p.items():
            n = len(self.rows(name, w))
            parts = []
            for own in self.state[name]:
                whole = own
                if self.m.world_size > 1:
                    whole = torch.empty(len(own) * self.m.world_size, *own.shape[1:], device=own.device)
                    all_gather(whole, own)
                parts.append(whole[:n].cpu())
            full[name] = parts
        return full

    @torch.no_grad()
    def load_state_dict(self, full):
        for name, parts in full.items():
            for own, whole in zip(self.state[name], parts):
                lo = self.m.rank * len(own)
                mine = whole[lo:lo + len(own)]
                own[:len(mine)].copy_(mine)


# torch 2.13 renamed these two
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# ----------------------------------------------------------------------------------------------------------------------
# schedules: pure functions of the fraction of training that is done, in [0, 1)

def parse_points(text):
    """'0:1,0.5:0.1' -> [(0.0, 1.0), (0.5, 0.1)]."""
    try:
        points = [tuple(float(v) for v in point.split(":")) for point in text.split(",")]
        if any(len(point) != 2 or not all(map(math.isfinite, point)) for point in points) or points != sorted(points):
            raise ValueError
    except ValueError:
        raise UserError(f"--wd_points {text}: write fraction:multiple pairs in rising order, such as 0:1,0.5:0.1,1:1.5")
    return points


def lr_schedule(done, c):
    """Warmup, hold, warmdown: the multiple of every learning rate. `done` is taken at the middle of a step, so that
    neither the first nor the last step is wasted on a rate of zero."""
    if done < c.warmup:
        return done / c.warmup
    if done > 1 - c.warmdown:
        return c.final_lr + (1 - c.final_lr) * ((1 - done) / c.warmdown) ** c.warmdown_power
    return 1.0


def momentum_schedule(done, c):
    warm = min(1.0, done / c.momentum_warmup) if c.momentum_warmup else 1.0
    return c.momentum_start + (c.muon_momentum - c.momentum_start) * warm


def wd_schedule(done, c):
    at, values = zip(*parse_points(c.wd_points))
    return float(np.interp(done, at, values))


def phase_schedule(done, c):
    """(layers, long window): which layers run, in order, and how far the long-window layers see."""
    layers = list(range(c.n_layer))
    if c.loop_times and done >= c.loop_from:
        loop = layers[c.loop_first:c.loop_last + 1]
        layers[c.loop_last + 1:c.loop_last + 1] = loop * c.loop_times
    return tuple(layers), c.window_short if done < c.window_grow else c.seq_len


# ----------------------------------------------------------------------------------------------------------------------
# checkpoint

def write_file(path, data):
    """Write bytes so that `path` holds all of them or is as it was, whatever happens."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk, too
        os.fsync(folder)
        os.close(folder)
    finally:
        tmp.unlink(missing_ok=True)


def save_tensors(run, name, state, keep=1):
    """Write `state` as run/NAME.DIGEST.pt, the digest being of its content, and delete all but the `keep` newest of this
    kind (what stands before the last '-' of the name)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    path = run / f"{name}.{hashlib.sha256(data).hexdigest()[:16]}.pt"
    write_file(path, data)
    for old in saved(run, name.rsplit("-", 1)[0])[:-keep]:
        old.unlink()
    return path


def saved(run, kind):
    """Files of a kind, oldest first."""
    return sorted(run.glob(f"{kind}-*.*.pt"))


def load_tensors(path):
    """What save_tensors wrote, or None where the file is damaged."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != path.name.split(".")[-2]:
        return None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_params(run, c, vocab_size, m):
    """The final weights of a run, on the machine's device, checked against the shapes that its config asks for."""
    files = saved(run, "weights")
    if not files:
        raise UserError(f"{run}: holds no final weights; finish the run with --resume {run}")
    p = load_tensors(files[-1])
    if p is None:
        raise UserError(f"{files[-1]}: damaged (its content does not match the digest in its name); train the run again")
    if {name: tuple(w.shape) for name, w in p.items()} != param_shapes(c, vocab_size):
        raise UserError(f"{files[-1]}: its tensors are not those of {run / 'config.json'}")
    return {name: w.to(m.device, torch.float32) for name, w in p.items()}


# ----------------------------------------------------------------------------------------------------------------------
# scoring

@torch.no_grad()
def stream_nll(p, streams, c, m, bos_id, phase, stop=None):
    """Negative log-likelihood in nats of every token, float32 [n_streams, length] on every rank.

    streams: ids [n_streams, length], rows independent of each other. A row is scored in consecutive windows of seq_len
    without overlap: each token is predicted once, from the tokens before it in its window and the one before that; the
    first token of a row has no context and gets 0. `stop`: called between batches, to let a signal through."""
    n, length = streams.shape
    out = torch.zeros(n, length, device=m.device)
    full, rest = divmod(length - 1, c.seq_len)
    windows = [(row, i * c.seq_len, c.seq_len) for row in range(n) for i in range(full)]
    tails = [(row, full * c.seq_len, rest) for row in range(n) if rest]
    for group in (windows, tails):
        group = group[m.rank::m.world_size]
        rows = max(1, c.device_tokens // (group[0][2] if group else 1))
        for at in range(0, len(group), rows):
            if stop:
                stop()
            part = group[at:at + rows]
            ids = np.stack([streams[row, i:i + T + 1] for row, i, T in part]).astype(np.int64)
            ids = torch.from_numpy(ids).to(m.device)
            h = forward(p, ids[:, :-1], c, m, bos_id, phase)
            nll = token_nll(h.flatten(0, 1), p["lm_head"], ids[:, 1:].flatten(), c).view(len(part), -1)
            for (row, i, T), values in zip(part, nll):
                out[row, i + 1:i + 1 + T] = values
    return all_reduce(m, out).cpu().numpy()


def score_command(run, tokens_path, out_path, m_options):
    """--score: the contract that a referee relies on."""
    if not tokens_path or not out_path:
        raise UserError("--score: needs --tokens FILE and --nll OUT.npy")
    c, meta = read_config(run)
    if str(tokens_path).endswith(".npy"):
        try:
            streams = np.load(tokens_path, allow_pickle=False)
        except (OSError, ValueError) as e:
            raise UserError(f"--tokens {tokens_path}: {getattr(e, 'strerror', None) or 'not a .npy array of numbers'}")
        if streams.dtype != np.uint16 or streams.ndim != 2 or streams.shape[0] < 1 or streams.shape[1] < 1:
            raise UserError(f"--tokens {tokens_path}: {streams.dtype} {list(streams.shape)}, not uint16 [n_streams, length]")
        check_ids(streams, meta["vocab_size"], tokens_path)
    else:
        streams = read_shard(tokens_path, meta["vocab_size"])[None]
    if not str(out_path).endswith(".npy") or not Path(out_path).parent.is_dir():
        raise UserError(f"--nll {out_path}: must end in .npy and lie in a folder that exists")
    m = setup_machine(c, **m_options)
    p = load_params(run, c, meta["vocab_size"], m)
    nll = stream_nll(p, streams, c, m, meta["bos_id"], phase_schedule(1.0, c))
    if m.rank == 0:
        write_npy(Path(out_path), nll if str(tokens_path).endswith(".npy") else nll[0])
        n = nll.size - len(nll)
        print(f"{out_path}: {n:,} tokens scored, {nll.sum(dtype=np.float64) / max(n, 1):.6f} nats per token")


def write_npy(path, array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_file(path, buffer.getbuffer())


@torch.no_grad()
def sample(p, c, m, meta, prompt, n_tokens, seed, temperature=0.8):
    """Text that the model writes after `prompt`. The whole context is computed anew for each token: slow, and simple."""
    from data import prepare
    encoding = prepare.get_encoding(meta["tokenizer"])
    g = torch.Generator().manual_seed(seed)
    ids = [meta["bos_id"]] + encoding.encode_ordinary(prompt)
    for _ in range(n_tokens):
        h = forward(p, torch.tensor([ids[-c.seq_len:]], device=m.device), c, m, meta["bos_id"], phase_schedule(1.0, c))
        logits = head_logits(h[0, -1:], p["lm_head"].to(h.dtype), c.softcap)[0] / temperature
        ids.append(int(torch.multinomial(logits.cpu().softmax(-1), 1, generator=g)))
        if ids[-1] == meta["bos_id"]:
            break
    return encoding.decode([i for i in ids if i != meta["bos_id"]])


def sample_command(run, prompt, n_tokens, m_options):
    c, meta = read_config(run)
    m = setup_machine(c, **m_options)
    from data import prepare
    try:
        print(sample(load_params(run, c, meta["vocab_size"], m), c, m, meta, prompt, n_tokens, c.seed))
    except prepare.DataError as e:
        raise UserError(str(e))


# ----------------------------------------------------------------------------------------------------------------------
# training

class Log:
    """log.txt of the run folder, on rank 0. Its length is part of a checkpoint: what was written after the checkpoint is
    cut off when the run goes on, so that the finished log reads as one run."""

    def __init__(self, run, m, length=0):
        self.file = None
        if m.rank == 0:
            self.file = open(run / "log.txt", "r+b" if length else "wb")
            self.file.truncate(length)
            self.file.seek(length)
        self.shown = 0.0

    def __call__(self, line, show=True):
        if self.file:
            self.file.write(line.encode() + b"\n")
            self.file.flush()
            if show:
                print(line, flush=True)

    def step(self, line, last):
        """A step's line: always into the file, on the terminal every two seconds."""
        show = last or time.time() - self.shown > 2
        self.shown = time.time() if show else self.shown
        self(line, show)

    def sync(self):
        """Put on disk what was written so far. Returns its length in bytes."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def read_config(run):
    """(Config, meta of its data) of a run folder."""
    path = run / "config.json"
    try:
        stored = json.loads(path.read_text())
        c, meta = Config(**stored["config"]), stored["data"]
        for f in dataclasses.fields(c):
            if type(getattr(c, f.name)) is not f.type:
                raise ValueError(f.name)
        check_config(c, 1)
    except FileNotFoundError:
        raise UserError(f"{run}: no run folder (it has no config.json)")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not the configuration of a run of this script ({e})")
    return c, meta


SOURCE = Path(__file__).read_bytes()  # read at the start, so that the log shows what runs and not a later edit


def source_sha256():
    return hashlib.sha256(SOURCE).hexdigest()


def log_header(log, c, m, meta, run, total):
    """Everything needed to run this again: the source, the environment, the configuration."""
    log(f"==== source {Path(__file__).name} bytes={len(SOURCE)} sha256={source_sha256()}", show=False)
    log(SOURCE.decode(), show=False)
    log("==== end of source", show=False)
    log("config " + json.dumps(dataclasses.asdict(c)), show=False)
    log("data " + json.dumps(meta), show=False)
    n_params = sum(math.prod(s) for s in param_shapes(c, meta["vocab_size"]).values())
    log(f"run {run}: track {c.track}, {n_params:,} parameters, {total} steps of {c.batch_tokens:,} tokens from {c.train_tokens:,}, seed {c.seed}")
    for line in environment(m):
        log(line)


def hardware(m):
    if m.device.type == "cuda":
        return f"{m.world_size} x {torch.cuda.get_device_name(m.device)}"
    return f"{cpu_name()}, {os.cpu_count()} cores"


def environment(m):
    """Lines that say what the run runs on, and why so."""
    return [f"packages: python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
            f"hardware: {hardware(m)}, {platform.system()} {platform.machine()}; {m.world_size} rank(s) of {torch.get_num_threads()} thread(s)",
            *m.notes]


def cpu_name():
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or "unknown processor"


def mixed_seed(*parts):
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def train_step(p, optimizer, loader, step, total, c, m, bos_id):
    """One optimizer step. Returns this rank's part of the batch's mean loss, and the learning-rate multiple."""
    done = (step + 0.5) / total
    x, y, n_targets = loader.batch(step)
    loss = torch.zeros((), device=m.device)
    for i, part in enumerate(micro_batches(len(x), c)):
        loss += train_pass(p, x[part], y[part], n_targets, c, m, bos_id, phase_schedule(done, c), (c.seed, step, m.rank, i))
    lr = lr_schedule(done, c)
    optimizer.step(step, lr, wd_schedule(done, c), momentum_schedule(done, c))
    return loss, lr


def micro_batches(rows, c):
    """Slices of a rank's rows, each small enough for one pass."""
    size = c.device_tokens // c.seq_len
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def train_pass(p, x, y, n_targets, c, m, bos_id, phase, seed):
    """Forward and backward of one micro-batch; gradients add up in p[name].grad. Returns its part of the mean loss."""
    torch.manual_seed(mixed_seed(*seed))  # what is dropped depends on the step alone, so a resumed run repeats it
    drop = torch.Generator().manual_seed(mixed_seed(*seed))
    x, y = x.to(m.device, non_blocking=True), y.to(m.device, non_blocking=True)
    h = forward(p, x, c, m, bos_id, phase, drop)
    loss = objective(h.flatten(0, 1), p["lm_head"], y.flatten()[:, None], c, m, 1 / n_targets)
    loss.backward()
    return loss.detach()


def compile_all(p, loader, total, c, m, bos_id):
    """Compile every phase that training will go through, on made-up tokens and before the first batch. Where the compiler
    does not work, go on without it and say so. Returns the seconds it took."""
    began = time.time()
    if m.compiled:
        x = torch.randint(len(p["wte"]), (c.device_tokens // c.seq_len, c.seq_len), generator=torch.Generator().manual_seed(0))
        try:
            for phase in sorted({phase_schedule((step + 0.5) / total, c) for step in range(total)}):
                for rows in sorted({s.stop - s.start for s in micro_batches(len(loader.share), c)}):
                    train_pass(p, x[:rows], x[:rows], 1, c, m, bos_id, phase, (0,))
        except Exception as e:  # torch._dynamo raises whatever the compiler ran into
            set_compiled(m, False, f"the compiler failed, {type(e).__name__}: {str(e).splitlines()[0][:120]}")
        for w in p.values():
            w.grad = None
    return time.time() - began


@dataclass
class Progress:
    """What a run knows about itself besides its weights; it is part of every checkpoint."""
    step: int = 0
    seconds: float = 0.0          # on the track's clock, over all parts of the run
    compile_seconds: float = 0.0  # beside it
    log_bytes: int = 0


def train(c, run, m, meta, stop, steps):
    """Train a run from its last checkpoint, or from the start. `stop` lists the signals that came in.
    Returns (parameters, Progress, total steps, log)."""
    folder, bos_id = data_folder(c), meta["bos_id"]
    train_tokens, val_tokens = (read_shard(folder / f, meta["vocab_size"], meta["sha256"][f]) for f in ("train.bin", "val.bin"))
    loader = Loader(train_tokens, bos_id, c, m.rank, m.world_size)
    total = min(loader.steps, steps or loader.steps)
    p = {name: w.to(m.device).requires_grad_() for name, w in init_params(c, meta["vocab_size"], c.seed).items()}
    optimizer = MuonAdamW(p, c, m)
    progress = load_state(run, p, optimizer, m)
    log = Log(run, m, progress.log_bytes)
    if progress.log_bytes:
        log(f"resumed at step {progress.step}/{total}")
        for line in environment(m):
            log(line)
    else:
        log_header(log, c, m, meta, run, total)
    compile_seconds = compile_all(p, loader, total, c, m, bos_id)
    log(next(note for note in m.notes if note.startswith("compiled")) + f" ({compile_seconds:.1f} s, which the clock leaves out)")
    earlier, progress.compile_seconds = progress.seconds, progress.compile_seconds + compile_seconds

    probe_at = {round(total * (i + 1) / c.probes) for i in range(c.probes - 1)}
    first, began = progress.step, time.time()
    for step in range(first, total):
        loss, lr = train_step(p, optimizer, loader, step, total, c, m, bos_id)
        loss, stopping = all_reduce(m, torch.stack([loss, torch.tensor(float(bool(stop)), device=m.device)])).tolist()
        if not math.isfinite(loss):
            raise Stopped(f"step {step + 1}: the loss is {loss}; {last_good(run)}", 1)
        progress.step, progress.seconds = step + 1, earlier + time.time() - START - compile_seconds
        speed = (step + 1 - first) * c.batch_tokens / (time.time() - began)
        log.step(f"step {step + 1}/{total} epoch {(step + 1) * loader.batch_rows / loader.rows_per_epoch:.3f} loss {loss:.4f} lr {lr:.4f} "
                 f"tok/s {speed:.0f} time {progress.seconds:.1f}s left {(total - step - 1) * c.batch_tokens / speed:.0f}s", step + 1 == total)
        if step + 1 in probe_at:
            nll = stream_nll(p, val_tokens[None, :c.probe_tokens], c, m, bos_id, phase_schedule((step + 0.5) / total, c))
            log(f"probe {step + 1}/{total} val_loss {mean_nll(nll):.4f} on the first {nll.size:,} tokens of validation")
        if (step + 1) % c.save_every == 0 or step + 1 == total or stopping:
            save_state(run, p, optimizer, progress, log, m)
        if stopping:
            raise Stopped(f"stopped at step {step + 1}/{total} and saved; go on with: python {Path(__file__).name} --resume {run}", 130)
    return p, progress, total, log


def save_state(run, p, optimizer, progress, log, m):
    """Everything that training needs to go on as if it had never stopped."""
    finite = torch.stack([w.isfinite().all() for w in p.values()]).all()
    if not finite:  # the same on every rank
        raise Stopped(f"step {progress.step}: the weights are no longer finite; {last_good(run)}", 1)
    optimizer_state = optimizer.state_dict()  # every rank takes part in this
    if m.rank == 0:
        progress.log_bytes = log.sync()
        save_tensors(run, f"state-{progress.step:07d}", {"params": {name: w.detach().cpu() for name, w in p.items()},
                     "optimizer": optimizer_state, "source": source_sha256(), **dataclasses.asdict(progress)}, keep=2)


def load_state(run, p, optimizer, m):
    """Put the newest checkpoint that is whole into p and the optimizer. Returns its Progress, a fresh one if there is none."""
    for path in reversed(saved(run, "state")):
        state = load_tensors(path)
        if state is None:
            print(f"{path}: damaged, going back to the checkpoint before it", flush=True)
            continue
        if state["source"] != source_sha256():
            raise UserError(f"--resume {run}: {Path(__file__).name} has changed since this run began; restore the source that its "
                            "log.txt holds, or start a new run")
        with torch.no_grad():
            for name, w in p.items():
                w.copy_(state["params"][name])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**{f.name: state[f.name] for f in dataclasses.fields(Progress)})
    return Progress()


def last_good(run):
    files = saved(run, "state")
    return f"the last good checkpoint is {files[-1]}" if files else "no checkpoint was written yet"


def finish(p, progress, total, log, c, run, m, meta, steps, stop):
    """Final weights, score, record. Everything after the clock has stopped."""
    if m.rank == 0:
        save_tensors(run, "weights-0", {name: w.detach().cpu() for name, w in p.items()})

    def check_stop():
        if stop:
            raise Stopped(f"stopped while scoring, the weights are saved; go on with: python {Path(__file__).name} --resume {run}", 130)
    val_tokens = read_shard(data_folder(c) / "val.bin", meta["vocab_size"])
    nll = stream_nll(p, val_tokens[None], c, m, meta["bos_id"], phase_schedule(1.0, c), check_stop)[0]
    if m.rank > 0:
        return
    loss, bpb = mean_nll(nll), nll.sum(dtype=np.float64) / math.log(2) / meta["text_bytes"]["val"]
    sums = np.add.reduceat(nll.astype(np.float64), np.arange(0, len(nll), 1000))
    write_npy(run / "val_nll.npy", sums)
    layers = phase_schedule(1.0, c)[0]
    trained_flops = sum(3 * c.batch_tokens * flops_per_token(c, meta["vocab_size"], phase_schedule((step + 0.5) / total, c)) for step in range(total))
    record = {
        "track": c.track, "trial": steps is not None, "seed": c.seed, "val_loss": loss, "val_bpb": bpb, "val_tokens": len(nll) - 1,
        "train_seconds": progress.seconds, "compile_seconds": progress.compile_seconds, "steps": total, "epochs": c.epochs,
        "train_tokens": c.train_tokens, "tokens_seen": total * c.batch_tokens, "parameters": sum(w.numel() for w in p.values()), "members": 1,
        "train_flops": trained_flops, "score_flops_per_token": flops_per_token(c, meta["vocab_size"], phase_schedule(1.0, c)),
        "source_sha256": source_sha256(), "data_sha256": meta["sha256"], "hardware": hardware(m), "ranks": m.world_size,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    peak = torch.cuda.max_memory_allocated(m.device) if m.device.type == "cuda" else peak_rss()
    log(f"layers run at the end: {' '.join(map(str, layers))}", show=False)
    log(f"training took {progress.seconds:.1f} s and {progress.compile_seconds:.1f} s of compilation, {record['tokens_seen']:,} tokens seen, "
        f"{trained_flops:.3g} FLOPs; peak memory {peak / 2 ** 20:.0f} MiB")
    log(f"val_loss {loss:.6f} nats per token, {bpb:.6f} bits per byte, {record['val_tokens']:,} tokens scored")
    write_file(run / "record.json", json.dumps(record, indent=1).encode() + b"\n")
    for path in saved(run, "state"):
        path.unlink()
    try:
        log("---- a sample, from nothing\n" + sample(p, c, m, meta, "", 300, c.seed) + "\n----")
    except Exception as e:  # a tokenizer that cannot be had must not spoil a finished run
        log(f"no sample: {e}")
    log(f"the run is in {run}")


def mean_nll(nll):
    """Nats per scored token; the first token of each stream is not one."""
    return float(nll.sum(dtype=np.float64) / (nll.size - (len(nll) if nll.ndim == 2 else 1)))


def peak_rss():
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_command(c, run, m_options, steps, resume):
    """A new run, or with `resume` the rest of one."""
    if resume:
        if (run / "record.json").exists():
            print(f"{run}: finished, {json.loads((run / 'record.json').read_text())['val_loss']:.6f} nats per token; nothing to resume")
            return
        c, meta, steps = read_config(run)
        m = setup_machine(c, **m_options)
    else:
        m = setup_machine(c, **m_options)
        c = dataclasses.replace(c, dtype="bf16" if m.dtype == torch.bfloat16 else "fp32")  # a resumed run must not choose anew
        meta = read_meta(c, m)
        run = run or Path("runs") / f"{c.track}_{time.strftime('%Y%m%d_%H%M%S')}_s{c.seed}"
        if m.world_size > 1:  # one name for all ranks
            names = [str(run)]
            dist.broadcast_object_list(names, src=0, device=m.device)
            run = Path(names[0])
    stop = []

    def note_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note_signal)
    if m.rank == 0 and not resume:
        run.mkdir(parents=True, exist_ok=True)
        write_file(run / "config.json", json.dumps({"config": dataclasses.asdict(c), "steps": steps, "data": meta}, indent=1).encode())
    if m.world_size > 1:
        dist.barrier()
    p, progress, total, log = train(c, run, m, meta, stop, steps)
    finish(p, progress, total, log, c, run, m, meta, steps, stop)


# ----------------------------------------------------------------------------------------------------------------------
# main

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the options")


def parse_args(argv):
    """(Config, namespace of the other options). Only options that were given override the track's preset."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="folder of the run (default: runs/TRACK_TIME_SEED)")
    parser.add_argument("--steps", type=int, metavar="N", help="squeeze the run into N steps: a trial, never a record")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run")
    parser.add_argument("--score", type=Path, metavar="RUN", help="score the tokens of --tokens, write --nll")
    parser.add_argument("--tokens", metavar="FILE", help="a shard, or .npy uint16 [n_streams, length] of independent streams")
    parser.add_argument("--nll", metavar="OUT.npy", help="nats per token, in the shape of --tokens")
    parser.add_argument("--sample", type=Path, metavar="RUN", help="let a run's model write")
    parser.add_argument("--prompt", default="", metavar="TEXT")
    parser.add_argument("--length", type=int, default=500, metavar="N", help="tokens to write")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--attention", default="auto", choices=["auto", "varlen", "flex", "sdpa"])
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    recipe = parser.add_argument_group("recipe (the fields of Config, with the pocket track's defaults)")
    for f in dataclasses.fields(Config):
        recipe.add_argument(f"--{f.name}", type=flag if f.type is bool else f.type, default=argparse.SUPPRESS,
                            metavar={bool: "0|1", int: "N", float: "X", str: "TEXT"}[f.type], help=str(f.default))
    args = parser.parse_args(argv)
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}, args


def flag(text):
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text}: choose 0 or 1")
    return text == "1"


def make_config(given, world_size):
    """The track's preset with the given options on top."""
    track = given.get("track", "pocket")
    if track not in PRESETS:
        raise UserError(f"--track {track}: choose one of {', '.join(PRESETS)}")
    values = PRESETS[track] | given
    c = Config(**{f.name: f.type(values[f.name]) for f in dataclasses.fields(Config) if f.name in values})
    check_config(c, world_size)
    return c


def main(argv=None):
    try:
        given, args = parse_args(argv)
        run = args.resume or args.score or args.sample
        if run and (given or args.run_dir or args.steps or sum(map(bool, (args.resume, args.score, args.sample))) > 1):
            raise UserError("--resume, --score and --sample: one at a time, and the run's own configuration holds; give no other recipe")
        if args.steps is not None and args.steps < 1:
            raise UserError(f"--steps {args.steps}: must be at least 1")
        if args.run_dir and (args.run_dir / "config.json").exists():
            raise UserError(f"--run_dir {args.run_dir}: already holds a run; go on with --resume {args.run_dir}, or name another folder")
        c = None if run else make_config(given, int(os.environ.get("WORLD_SIZE", 1)))
        m_options = dict(device=args.device, attention_name=args.attention, compile_mode=args.compile)
        if args.score:
            score_command(run, args.tokens, args.nll, m_options)
        elif args.sample:
            sample_command(run, args.prompt, args.length, m_options)
        else:
            train_command(c, run or args.run_dir, m_options, args.steps, resume=bool(args.resume))
    except UserError as e:
        leave(f"{Path(__file__).name}: {e}", 2)
    except Stopped as e:
        leave(f"{Path(__file__).name}: {e}", e.status)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS):
            raise
        leave(f"{Path(__file__).name}: cannot write {e.filename or 'a file of the run'}: {e.strerror}; what was saved before is intact: "
              "make room and go on with --resume", 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(message, status):
    if int(os.environ.get("RANK", 0)) == 0 or status == 1:
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
