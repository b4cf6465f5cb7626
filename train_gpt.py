"""
Tokenrun: how low can validation loss go on a fixed budget of training tokens?

    python train_gpt.py                                   a small recipe on a laptop's CPU, in minutes
    python train_gpt.py --n_layer 8 --dropout 0.1         every field of Config is an option
    python train_gpt.py --track pocket                    the recipe of the track's standing record
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track limited
    python train_gpt.py --resume runs/NAME                continue a run that was stopped or killed
    python train_gpt.py --score runs/NAME --tokens data/pocket/val.bin --nll out.npy
    python train_gpt.py --sample runs/NAME --prompt "def "

A run writes a folder: log.txt (this source, the environment, every step, the result), metrics.jsonl (every
step), record.json, val_nll.npy and the weights. Change anything you like except the command line: a referee
calls it.

The first half is the recipe, what records change: config, schedules, model, objective, optimizer, batches,
training, scoring. To change the model, see param_table and block; the loss: loss_function; the optimizer:
muon_update and adamw_update. A step is train_model > train_step > train_pass > forward and objective, then
optimizer.step. The second half is the harness: machine, files, checkpoints, log, command line. Everywhere, c
is the Config, m the Machine, and p the weights, a dict of tensors by name.
"""

import time

START = time.monotonic()  # The track's clock starts before the imports, which take seconds.

import os
import sys

if os.name == "nt":
    print("train_gpt.py needs Linux or macOS; on Windows, run it in WSL (wsl --install)", file=sys.stderr)
    sys.exit(2)

# An OpenMP thread that waits for the others spins for a while before it sleeps. The default spins so long
# that a busy neighbor on the same cores slows training to a fraction of its fair share. Read when torch is
# imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# On a GPU, memory comes in segments that can grow: phases of other shapes leave fewer unused fragments.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import platform
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

if torch.cuda.is_available():  # Neither trains on a CPU, and they take seconds to import.
    from torch.nn.attention import flex_attention as flex
    from torch.nn.attention import varlen

    compiled_flex = torch.compile(flex.flex_attention)  # Uncompiled, it would write out every score.

HERE = Path(__file__).resolve().parent
SCRIPT = Path(__file__).name
SOURCE = Path(__file__).read_bytes()  # Read now, so that the log shows what runs and not a later edit.
SOURCE_SHA256 = hashlib.sha256(SOURCE).hexdigest()
LOG_HEAD = "==== source "
SOURCE_END = "\n==== end of source"


class UserError(Exception):
    """Ends the process with this one-line message. Status 2: the user can fix it; 1: the run broke; 130:
    stopped."""

    def __init__(self, message, status=2):
        # It may quote an untrusted file, so it is cut short and loses its control characters.
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:1000]))
        self.status = status


def require(condition, message):
    if not condition:
        raise UserError(message)


# ============================================================================================================
# Part one: the recipe, which is what records change
# ============================================================================================================


# ---- config ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """A recipe. The defaults are a plain model; PRESETS has the tracks' recipes. The comment after a field
    is its text in --help."""

    track: str = "pocket"
    data: str = "pocket"  # a folder of data/ beside this script, or a path with a slash in it
    train_tokens: int = 1_000_000  # the budget: only this many tokens of the training shard are read
    vocab_size: int = 0  # of the data's tokenizer; 0: what the data's meta.json says
    bos_id: int = 0  # the token that begins each document; 0: what the data's meta.json says
    seed: int = 0
    # model
    n_layer: int = 4
    n_embd: int = 192
    n_head: int = 2
    mlp_hidden: int = 512  # width of the SwiGLU
    seq_len: int = 1024  # tokens of context, in training and in scoring
    window_short: int = 128  # tokens that a short-window layer sees, the token itself included
    window_pattern: str = "SSSL"  # short and long, repeated over the layers; the last layer is always long
    softcap: float = 15.0  # logits are softcap * tanh(logits / softcap)
    value_proj: bool = True  # layers add a gated projection of the embedding x0 to their values (2410.17897)
    unet: bool = True  # layer i's output is added to the input of layer n_layer-1-i
    attn_gate: bool = True  # each head's output times a sigmoid of the layer's input
    iha: bool = False  # learned matrices mix the heads' queries, keys and values (2602.21371)
    # Look-ups: for each length n, the model also gets the token that followed the last occurrence of the
    # same n-gram.
    recall: str = ""  # lengths to look up in the token's own document, such as 4,8,16
    memory: str = ""  # lengths to look up in the other training documents
    grow_memory: bool = False  # in scoring, what they lack is looked up earlier in the stream
    # Looped layers: loop_first..loop_last run loop_times more, from the fraction loop_from of training on.
    loop_first: int = 0
    loop_last: int = 0
    loop_times: int = 0
    loop_from: float = 0.5
    # learning more from the same tokens
    epochs: float = 3.2  # passes over train_tokens, if no step had bags; their steps read bag_size as many
    dropout: float = 0.0  # of what each attention and each MLP adds to the residual stream
    bag_size: int = 1  # token superposition (2605.06546): bags of tokens in, the next bag's tokens out
    bag_until: float = 0.0  # fraction of training at which bags end
    mtp_weight: float = 0.0  # weight of the loss on the token after the next (2404.19737)
    ema: float = 0.0  # final weights are an exponential moving average with this decay per step
    members: int = 1  # models trained in turn, each with its own seed; their mean probability is scored
    chains: int = 1  # the members form this many chains; in one, each learns from the one before it
    distill_alpha: float = 0.0  # in a chain, the share of the loss that is KL to the member before
    distill_temp: float = 1.0  # temperature of both distributions in that KL (1503.02531)
    student: str = ""  # name=value,... of a last model, distilled from all members and scored alone
    teacher_switch_every: int = 25  # steps that a student learns from one member before it turns to the next
    # optimization
    batch_tokens: int = 4096  # tokens, or bags, per optimizer step, over all ranks
    device_tokens: int = 8192  # tokens per forward pass of one rank; fewer save memory and cost speed
    loss_chunk: int = 1024  # tokens whose logits exist at the same time
    muon_lr: float = 0.04  # for matrices
    muon_momentum: float = 0.95
    momentum_start: float = 0.85  # momentum rises from here to muon_momentum
    momentum_warmup: float = 0.1  # fraction of training over which it rises
    muon_beta2: float = 0.95  # decay of the per-neuron second moment
    embed_lr: float = 0.03  # AdamW, for embeddings
    head_lr: float = 0.005  # AdamW, for the output head
    scalar_lr: float = 0.02  # AdamW, for gates, mixing matrices and scalars
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    weight_decay: float = 0.1  # decoupled, times the learning rate
    wd_points: str = "0:1"  # its schedule: fraction of training : multiple of weight_decay, linear in between
    warmup: float = 0.01  # fraction of training over which the learning rates rise
    warmdown: float = 0.6  # last fraction of training, over which they fall to zero
    # scoring, evaluation, housekeeping
    ngrams: str = ""  # lengths of contexts whose counts make an n-gram model, scored with the members
    ngram_weight: float = 0.25  # its share in the mean probability
    score_stride: int = 0  # tokens between the starts of scoring windows, which may overlap; 0: seq_len
    evals: int = 8  # evaluations per model, the final score included
    eval_windows: int = 40  # windows of seq_len tokens in an evaluation, spread over the validation stream
    save_every: int = 100  # steps between checkpoints
    cpu_threads: int = 4  # at most this many on a CPU, over all ranks of a machine
    dtype: str = "auto"  # bf16, fp32, or auto: bf16 where the hardware has instructions for it


LOOK_UP = dict(recall="1,2,3,4,5,6,8,12,16,24,32", memory="3,4,5,6,8,12,16,24")
TWO_TARGETS = dict(mtp_weight=0.3, iha=True)

# What runs without --track: a small recipe for a first look on any machine.
SMALL = LOOK_UP | TWO_TARGETS | dict(n_layer=3, n_embd=96, mlp_hidden=256, weight_decay=0.25)

POCKET = LOOK_UP | TWO_TARGETS | dict(ema=0.99, weight_decay=0.25, score_stride=256)
PROSE = (
    POCKET
    | dict(data="prose", epochs=5.7, evals=4, score_stride=0)
    | dict(grow_memory=True, ngrams="1,2,3,4,5,6,8,11,15,20,28")
)

FINEWEB = (
    TWO_TARGETS
    | dict(data="fineweb", train_tokens=100_000_000, seq_len=2048, window_short=1024, ema=0.995, dropout=0.1)
    | dict(batch_tokens=524_288, device_tokens=16_384, loss_chunk=4096)
    | dict(warmup=0.0, evals=12, eval_windows=512, save_every=500)
)
SHALLOW = (
    FINEWEB
    | dict(n_layer=16, n_embd=1024, n_head=8, mlp_hidden=2816, device_tokens=65_536)
    | dict(muon_lr=0.032, embed_lr=0.12, head_lr=0.0008, ema=0.99)
    | dict(weight_decay=0.8, wd_points="0:1,0.125:1,0.5:0.125,1:1.5625")
)
DEEP = (
    FINEWEB
    | dict(n_layer=30, n_embd=1792, n_head=14, mlp_hidden=4864)
    | dict(muon_lr=0.01, embed_lr=0.0375, head_lr=0.0005, scalar_lr=0.025, warmdown=0.2, softcap=10.0)
    | dict(weight_decay=1.3, loop_first=15, loop_last=20)
)

# The recipe of each track's standing record, where there is one. The FineWeb presets and mini's have not run
# on a GPU yet. The former follow Slowrun's published scripts; records/transfer.md says where they differ.
PRESETS = {
    "pocket": POCKET
    | dict(epochs=6.9, evals=4, grow_memory=True)
    | dict(ngrams="1,2,3,4,5,6,8,11,15,20,28,40", ngram_weight=0.2),
    "pocket_unlimited": POCKET | dict(epochs=6.0, members=3, distill_alpha=0.4),
    "prose": PROSE,
    "prose_unlimited": PROSE | dict(ngrams="", members=2, distill_alpha=0.4),
    "mini": TWO_TARGETS
    | dict(data="mini", train_tokens=10_000_000, window_short=512, ema=0.995, dropout=0.1)
    | dict(n_layer=12, n_embd=768, n_head=6, mlp_hidden=2112)
    | dict(batch_tokens=65_536, device_tokens=65_536, loss_chunk=8192)
    | dict(epochs=10, weight_decay=0.8, eval_windows=256, save_every=500),
    "solo": SHALLOW | dict(epochs=12),
    "tiny": SHALLOW | dict(epochs=12.5),
    "limited": DEEP | dict(epochs=11, loop_times=1, loop_from=0.64),
    "two_hour": DEEP | dict(epochs=21, loop_times=2, loop_from=0.59, device_tokens=8192),
    "unlimited": DEEP
    | dict(n_embd=2048, n_head=16, mlp_hidden=5632, device_tokens=4096)
    | dict(epochs=18, loop_last=24, loop_times=4, members=8, distill_alpha=0.4),
}


def model_configs(c):
    """The configs of the models that a run trains, in order: its members, which differ in seed, then its
    student, if it has one."""
    members = [dataclasses.replace(c, seed=c.seed + 1000 * k, student="") for k in range(c.members)]
    if not c.student:
        return members
    changes = dict(change.partition("=")[::2] for change in c.student.split(","))
    of_the_run = "track data train_tokens vocab_size bos_id seed members chains student recall memory softcap"
    names = Config.__dataclass_fields__.keys() - of_the_run.split()
    for name in changes:
        hint = did_you_mean(name, names, "write name=value pairs of recipe options")
        require(
            name in names,
            f"--student {c.student}: {name!r} is not an option that a student can change; {hint}",
        )
    # A student begins where its teachers ended: past the bags, with all loops.
    values = {"bag_until": 0.0, "loop_from": 0.0} | {
        name: parse_value(name, changes[name]) for name in changes
    }
    return [*members, dataclasses.replace(members[0], seed=c.seed + 1000 * c.members, **values)]


NO_TOKEN = 65535  # where a look-up finds nothing; no token has this id


def lengths(text):
    """The n-gram lengths of c.recall or c.memory."""
    return [int(n) for n in text.split(",") if n]


def n_lookups(c):
    """How many tokens the model reads beside each."""
    return len(lengths(c.recall)) + len(lengths(c.memory))


# ---- schedules: pure functions of the fraction of training that is done, in [0, 1] -------------------------


class Phase(NamedTuple):
    """What a step runs: the layers, in order, and the number of tokens that one position stands for."""

    layers: tuple
    bag_size: int


def lr_schedule(done, c):
    """Warmup, hold, warmdown: the multiple of every learning rate."""
    if done < c.warmup:
        return done / c.warmup
    return min(1.0, (1 - done) / max(c.warmdown, 1e-9))


def momentum_schedule(done, c):
    risen = min(1.0, done / max(c.momentum_warmup, 1e-9))
    return c.momentum_start + (c.muon_momentum - c.momentum_start) * risen


def parse_wd_points(c):
    return [tuple(map(float, point.split(":"))) for point in c.wd_points.split(",")]


def wd_schedule(done, c):
    fractions, multiples = zip(*parse_wd_points(c), strict=True)
    return float(np.interp(done, fractions, multiples))


def phase_schedule(done, c):
    layers = list(range(c.n_layer))
    if c.loop_times and done >= c.loop_from:
        loop = layers[c.loop_first : c.loop_last + 1]
        layers[c.loop_last + 1 : c.loop_last + 1] = loop * c.loop_times
    return Phase(tuple(layers), c.bag_size if done < c.bag_until else 1)


# ---- model -------------------------------------------------------------------------------------------------


class Param(NamedTuple):
    """A line of the parameter table: what the optimizer, checkpoints and FLOPs need to know of a
    parameter."""

    shape: tuple  # of a single layer's, if there is one for each; matrices are [out, in]
    init: Callable  # of (stacked shape, generator): the first values, float32 on the CPU
    optimizer: str  # muon: matrices in the last two dimensions; adamw: anything
    lr: str  # the field of Config that holds its learning rate
    decay: bool  # weight decay applies
    n_stack: int  # 0: the model has one; else stored as [n_stack, *shape], and layer i uses i % n_stack
    multiplied: bool  # every position is multiplied by it once (per layer that runs): counted in FLOPs
    used: bool  # by this config


def constant(value):
    return lambda shape, g: torch.empty(shape).copy_(torch.as_tensor(value, dtype=torch.float32))


def identity(shape, g):
    return torch.empty(shape).copy_(torch.eye(shape[-1]))


def normal(std):
    return lambda shape, g: torch.empty(shape).normal_(0, std, generator=g)


def uniform(bound):
    return lambda shape, g: torch.empty(shape).uniform_(-bound, bound, generator=g)


def attention_init(bound):
    """For the attention bank: the output projection starts at zero, so that a fresh layer is the identity."""

    def init(shape, g):
        w = uniform(bound)(shape, g)
        w[:, 3] = 0  # [layer, o, out, in]
        return w

    return init


GATE_CHANNELS = 32  # gates read only this many channels of the layer's input (Slowrun, modded-nanogpt)


def param_table(c):
    """Name -> Param of every parameter, in the order in which their first values are drawn from the seed.
    Starts are nanochat's and Slowrun's: layers as the identity, the first loss ln(vocab_size)."""
    L = c.n_layer
    V = c.vocab_size
    D = c.n_embd
    H = c.n_head
    bound = (3 / D) ** 0.5  # a uniform distribution of variance 1 / fan_in
    n_square = 4 + c.value_proj
    n_gates = c.value_proj + c.attn_gate
    n_in = min(GATE_CHANNELS, D)
    has_skips = c.unet and L > 1
    n_lookup = n_lookups(c)
    has_lookups = n_lookup > 0
    has_mtp = c.mtp_weight > 0
    # Which optimizer, which learning rate, whether weight decay applies.
    MATRIX = ("muon", "muon_lr", True)
    EMBED = ("adamw", "embed_lr", True)
    HEAD = ("adamw", "head_lr", True)
    SCALAR = ("adamw", "scalar_lr", False)
    # fmt: off
    #                    shape                init                       kind  n_stack multiplied used
    table = {
        "wte":     Param((V, D),                normal(1.0),              *EMBED,  0, False, True),
        "lm_head": Param((V, D),                normal(0.001),            *HEAD,   0, True,  True),
        # q, k, v, o and, with value_proj, the projection of x0 into the values
        "attn":    Param((n_square, D, D),      attention_init(bound),    *MATRIX, L, True,  True),
        "mlp_in":  Param((2, c.mlp_hidden, D),  uniform(bound),           *MATRIX, L, True,  True),
        "mlp_out": Param((D, c.mlp_hidden),     constant(0.0),            *MATRIX, L, True,  True),
        "mix":     Param((2,),                  constant([1.1, 0.1]),     *SCALAR, L, False, True),
        # with both, the first gates the values, the last the attention's output
        "gates":   Param((n_gates, H, n_in),    constant(0.0),            *SCALAR, L, True,  n_gates > 0),
        "skip":    Param((L // 2,),             constant(1.0),            *SCALAR, 0, False, has_skips),
        # a table for each look-up; its last row stands for NO_TOKEN
        "lookup":  Param((n_lookup, V + 1, D),  constant(0.0),            *EMBED,  0, False, has_lookups),
        "iha":     Param((3, H, H),             identity,                 *SCALAR, L, False, c.iha),
        # not multiplied in scoring: PlannedModel.phase_flops counts it for training
        "mtp":     Param((1, D, D),             uniform(bound),           *MATRIX, 0, False, has_mtp),
    }
    # fmt: on
    return {name: entry for name, entry in table.items() if entry.used}


def param_shapes(c):
    """Name -> shape of every parameter, those of all layers stacked."""
    return {name: (e.n_stack, *e.shape) if e.n_stack else e.shape for name, e in param_table(c).items()}


def n_params(c):
    return sum(math.prod(shape) for shape in param_shapes(c).values())


def init_params(c, device="cpu"):
    """Float32 parameters, drawn from c.seed on the CPU."""
    g = torch.Generator().manual_seed(c.seed)
    shapes = param_shapes(c)
    return {name: entry.init(shapes[name], g).to(device) for name, entry in param_table(c).items()}


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rope_tables(T, head_dim, device, dtype, base=10_000):
    """cos and sin, [T, 1, head_dim/2]. Half of the frequencies are zero: no position in half of a head."""
    pairs = head_dim // 4
    freqs = base ** -(torch.arange(pairs, device=device) / pairs)
    freqs = F.pad(freqs, (0, head_dim // 2 - pairs))
    angles = torch.outer(torch.arange(T, device=device, dtype=torch.float32), freqs)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def to_device(x, m):
    """A tensor of the CPU on this process's device. The process does not wait for what a GPU has yet to do,
    as it would to copy from memory that is not pinned."""
    if m.device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(m.device, non_blocking=True)


def attention_masks(starts, windows, m):
    """Masks for attention(), by window size. The three implementations (varlen and flex on a GPU, sdpa
    anywhere) allow the same pairs: token i sees token j if j <= i, i - j < window, and no document begins
    after j up to i. starts [B, T]: where one begins; on the CPU, so that nothing waits for the device."""
    B, T = starts.shape
    if m.attention == "varlen":  # rows and documents are sequences of one long batch
        starts = starts.clone()
        starts[:, 0] = True
        firsts = starts.flatten().nonzero()[:, 0].int()
        # Padded to a power of two with empty sequences, so that the kernel nearly always sees one shape.
        # There is always one: it also ends the last document.
        room = 1 << max(B * T // 256, len(firsts)).bit_length()
        cu_seqlens = to_device(F.pad(firsts, (0, room - len(firsts)), value=B * T), m)
        return {window: (cu_seqlens, window) for window in windows}
    starts = to_device(starts, m)
    # Documents count from 1: with_block_before pads with zeros, which match none.
    document = starts.cumsum(1, dtype=torch.int32) + 1
    if m.attention == "flex":

        def allowed(window):
            return lambda b, h, i, j: (j <= i) & (i - j < window) & (document[b, i] == document[b, j])

        return {w: flex.create_block_mask(allowed(w), B, None, T, T, device=m.device) for w in windows}
    masks = {}
    for window in windows:
        # A short window goes in blocks: queries [B, blocks, window], keys [B, blocks, 2 * window].
        if 2 * window <= T and T % window == 0:
            document_q = document.unflatten(1, (-1, window))
            document_k = with_block_before(document, window)
        else:
            document_q = document_k = document[:, None]
        n_q = document_q.size(2)
        n_k = document_k.size(2)
        i = torch.arange(n_k - n_q, n_k, device=m.device)[:, None]
        j = torch.arange(n_k, device=m.device)
        forbidden = (j > i) | (i - j >= window) | (document_q[..., None] != document_k[:, :, None])
        # Added to the scores: SDPA would turn a mask of booleans into this again in every layer.
        mask = torch.zeros(forbidden.shape, dtype=m.dtype, device=m.device)
        mask.masked_fill_(forbidden, -math.inf)
        masks[window] = mask.flatten(0, 1)[:, None]  # [B * blocks, 1, n_q, n_k]
    return masks


def with_block_before(x, size):
    """[B, T, ...] -> [B, T/size, 2*size, ...]: each block after its predecessor, the first after zeros."""
    blocks = x.unflatten(1, (-1, size))
    before = torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], dim=1)
    return torch.cat([before, blocks], dim=2)


def attention(q, k, v, mask, impl):
    """Softmax attention, scaled by head_dim ** -0.5, over the pairs that `mask` (of attention_masks) allows.
    q, k, v [B, T, H, head_dim] -> [B, T, H, head_dim]."""
    if impl == "varlen":
        cu_seqlens, window = mask
        T = q.size(1)
        flat = [x.flatten(0, 1) for x in (q, k, v)]  # [B * T, H, head_dim] each
        before = window - 1 if window < T else -1  # -1 chooses the causal kernel, faster than the local one
        y = varlen.varlen_attn(*flat, cu_seqlens, cu_seqlens, T, T, window_size=(before, 0))
        return y.view(q.shape)
    if impl == "flex":
        y = compiled_flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
        return y.transpose(1, 2)
    block_size = mask.size(-2)
    in_blocks = block_size < mask.size(-1)
    if in_blocks:  # a short window: each block of queries has its own keys and those of the block before
        k = with_block_before(k, block_size).flatten(0, 1)
        v = with_block_before(v, block_size).flatten(0, 1)
    q_blocks = q.reshape(-1, block_size, *q.shape[2:]).transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if in_blocks:  # step by step: SDPA is slow on problems this small
        y = torch.softmax((q_blocks * q.size(-1) ** -0.5) @ k.mT + mask, dim=-1) @ v
    else:
        y = F.scaled_dot_product_attention(q_blocks, k, v, attn_mask=mask)
    return y.transpose(1, 2).reshape(q.shape)


def mix_heads(w_qkv, iha):
    """The projections of the heads, [3, D, D], mixed by iha [3, H, H]: weights are mixed, not activations."""
    heads = w_qkv.unflatten(1, (iha.size(-1), -1))
    return torch.einsum("pij,pjdc->pidc", iha, heads).reshape(w_qkv.shape)


def block(x, x0, skip, w, cos, sin, mask, c, impl, dropout):
    """One layer. x, x0 [B, T, D]; skip: the output of the layer that mirrors this one, or None; w: this
    layer's slice of every per-layer parameter."""
    B, T, D = x.shape
    H = c.n_head
    if skip is not None:
        x = x + w["skip"] * skip
    x = w["mix"][0] * x + w["mix"][1] * x0
    # attention
    h = norm(x)
    w_qkv = w["attn"][:3]
    if "iha" in w:
        w_qkv = mix_heads(w_qkv, w["iha"])
    qkv = F.linear(h, w_qkv.flatten(0, 1)).view(B, T, 3, H, D // H)
    q, k, v = qkv.unbind(2)  # [B, T, H, D/H] each
    if "gates" in w:
        gates = torch.sigmoid(F.linear(h[..., : w["gates"].size(-1)], w["gates"].flatten(0, 1)))
        gates = gates.view(B, T, -1, H, 1)
    if c.value_proj:
        v = v + 2 * gates[:, :, 0] * F.linear(x0, w["attn"][4]).view(v.shape)  # the gate starts at 2 * 1/2
    y = attention(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, mask, impl)
    if c.attn_gate:
        y = y * gates[:, :, -1]
    y = F.linear(y.reshape(B, T, D), w["attn"][3])
    x = x + F.dropout(y, dropout, training=dropout > 0)
    # SwiGLU
    gate, up = F.linear(norm(x), w["mlp_in"].flatten(0, 1)).chunk(2, dim=-1)
    y = F.linear(F.silu(gate) * up, w["mlp_out"])
    return x + F.dropout(y, dropout, training=dropout > 0)


def layer_window(c, i):
    short = c.window_pattern[i % len(c.window_pattern)] == "S" and i < c.n_layer - 1
    return c.window_short if short else c.seq_len


def document_starts(inputs, c, bag_size):
    """Whether a document begins in each position, a token or a bag: [B, T] of inputs [B, T * bag_size, 1 +
    n_lookups(c)]."""
    return (inputs[..., 0] == c.bos_id).unflatten(1, (-1, bag_size)).any(2)


def embed(p, inputs, c, bag_size):
    """Vectors [B, T, D] of inputs [B, T * bag_size, 1 + n_lookups(c)]."""
    x = F.embedding(inputs[..., 0], p["wte"])
    for k in range(n_lookups(c)):
        table = p["lookup"][k]  # NO_TOKEN, far beyond its end, becomes its last row
        x = x + F.embedding(inputs[..., 1 + k].clamp_max(len(table) - 1), table)
    if bag_size == 1:
        return x
    # A bag is the mean over those of its tokens that belong to its last document.
    document = (inputs[..., 0] == c.bos_id).unflatten(1, (-1, bag_size)).cumsum(2)
    in_last = (document == document[:, :, -1:])[..., None]
    return (x.unflatten(1, (-1, bag_size)) * in_last).sum(2) / in_last.sum(2)


def forward(p, inputs, c, m, phase, dropout=0.0, run_block=block):
    """Hidden states [B, T, D], normalized, ready for the head, of inputs [B, T * phase.bag_size, 1 +
    n_lookups(c)] (see Lookup) on the CPU. run_block: block() or its compiled form; scoring comes in many
    shapes, not worth compiling."""
    x = embed(p, to_device(inputs, m), c, phase.bag_size)
    T = x.size(1)
    cos, sin = rope_tables(T, c.n_embd // c.n_head, m.device, m.dtype)
    windows = [min(layer_window(c, i), T) for i in phase.layers]
    masks = attention_masks(document_starts(inputs, c, phase.bag_size), sorted(set(windows)), m)
    # Stacked parameters are cast and taken apart once per pass, not once per use. step_weights() leaves
    # out iha.
    stacked = [name for name, entry in param_table(c).items() if entry.n_stack and name in p]
    banks = {name: p[name].to(m.dtype).unbind(0) for name in stacked}
    x = x0 = norm(x.to(m.dtype))
    skips = {}
    for i, window in zip(phase.layers, windows, strict=True):
        mirror = c.n_layer - 1 - i
        skip = skips.get(mirror)
        w = {name: bank[i % len(bank)] for name, bank in banks.items()}
        if skip is not None:
            w["skip"] = p["skip"][mirror]
        x = run_block(x, x0, skip, w, cos, sin, masks[window], c, m.attention, dropout)
        if c.unet and i < c.n_layer // 2:
            skips[i] = x
    return norm(x)


def flops_per_token(c, phase):
    """FLOPs of a forward pass per position: two per weight that is multiplied, and the attention over the
    average window."""
    weights = 0
    for entry in param_table(c).values():
        if entry.multiplied:
            weights += math.prod(entry.shape) * (len(phase.layers) if entry.n_stack else 1)
    windows = [min(layer_window(c, i), c.seq_len) for i in phase.layers]
    seen = [w - w * (w - 1) / 2 / c.seq_len for w in windows]  # tokens that the average token attends to
    return 2 * weights + 4 * c.n_embd * sum(seen)


# ---- objective ---------------------------------------------------------------------------------------------


def low_precision_head(w, dtype):
    """The head [V, D] in the dtype of the matrix products. A row of 50,257 logits in bf16 does not begin at a
    multiple of 16 bytes, as a GPU's fast kernels need, so V is rounded up to a multiple of 8."""
    return F.pad(w.to(dtype), (0, 0, 0, -len(w) % 8))


def head_logits(h, head, c):
    """Float32 logits [..., V] within +-c.softcap, of hidden states h [..., D] under a head, which may be a
    low_precision_head() with rows beyond V."""
    logits = F.linear(h, head)[..., : c.vocab_size].float()
    return c.softcap * torch.tanh(logits / c.softcap)


def loss_function(logits, targets, c, teacher_logits=None):
    """(the loss to minimize, what to log of it by name), sums over a chunk of n tokens, in nats. Plain
    PyTorch: a new term is a line here, and every entry of the dict is logged at every step; "loss" stays the
    plain cross-entropy. Leave out the rows with targets[:, 0] < 0. The further target (mtp_weight) goes
    through this function, too. A term that needs hidden states or weights goes into train_pass.

    logits: [n, V] float32. targets: [n, K], the K tokens of the next bag, weighted equally; -1 is ignored.
    teacher_logits: [n, V] of the model to learn from. With it the loss is (1 - alpha) * CE + alpha
    * temp**2 * KL(teacher || model), both at temperature temp (1503.02531)."""
    log_p = logits.log_softmax(-1)
    # The gradient of gather() would be a [n, V] tensor of zeros, filled, added to and read again; that of
    # nll_loss() is fused with the rest.
    ce = sum(F.nll_loss(log_p, target, ignore_index=-1, reduction="sum") for target in targets.unbind(1))
    if teacher_logits is None:
        return ce, {"loss": ce}
    alpha, temp = c.distill_alpha, c.distill_temp
    log_q = (logits / temp).log_softmax(-1)
    log_teacher = (teacher_logits / temp).log_softmax(-1)
    kl = ((log_teacher.exp() * (log_teacher - log_q)).sum(-1) * (targets[:, 0] >= 0)).sum()
    return (1 - alpha) * ce + alpha * temp**2 * kl, {"loss": ce, "kl": kl}


def chunk_grad(h, head, targets, scale, c, teacher_h=None, teacher_head=None):
    """((gradient of h, gradient of head), logged sums) of scale * loss_function for a chunk of hidden
    states h [n, D] under a low_precision_head()."""

    def scaled_loss(h, head):
        teacher_logits = None
        if teacher_h is not None:
            teacher_logits = head_logits(teacher_h, teacher_head, c)
        loss, logged = loss_function(head_logits(h, head, c), targets, c, teacher_logits)
        return scale * loss, logged

    return torch.func.grad(scaled_loss, argnums=(0, 1), has_aux=True)(h, head)


def objective(h, head, targets, scale, c, m, teacher_out=None):
    """(gradient of h, float32 gradient of head, logged sums) of scale * loss, chunk by chunk: never all
    logits at once. h [N, D] from forward(); head from low_precision_head(); targets [N, K]; scale: a tensor,
    for torch.compile would recompile for every new number; teacher_out: a teacher's (h, head)."""
    grad_h = torch.empty_like(h)
    grad_head = torch.zeros_like(head, dtype=torch.float32)
    logged = {}
    for i in range(0, len(h), c.loss_chunk):
        chunk = slice(i, i + c.loss_chunk)
        teacher_chunk = (teacher_out[0][chunk], teacher_out[1]) if teacher_out else ()
        grads, sums = m.chunk_grad(h[chunk], head, targets[chunk], scale, c, *teacher_chunk)
        grad_h[chunk] = grads[0]
        grad_head += grads[1]
        logged = {name: logged.get(name, 0.0) + value for name, value in sums.items()}
    return grad_h, grad_head, logged


# ---- optimizer ---------------------------------------------------------------------------------------------

# Polar Express (2505.16932): the best odd quintic of each step for singular values in [1e-3, 1]; safety
# factor 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g, dtype):
    """U V^T of g = U S V^T, nearly, for every matrix of [n, out, in]: singular values come out close to 1."""
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)).to(dtype)
    for c1, c3, c5 in POLAR_EXPRESS:  # c1 x + c3 (x x^T) x + c5 (x x^T)^2 x
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=c3, alpha=c5), x, beta=c1)
    return (x.mT if tall else x).to(g.dtype)


def muon_update(w, grad, momentum_buffer, second_moment, lr, wd, momentum, beta2, dtype):
    """One Muon step on matrices w [n, out, in], in place. momentum_buffer: like w. second_moment: [n, out,
    1], the running mean square of each neuron's update. Row-normalized before (MuonEq-R, 2603.28254),
    per-neuron second moment after (NorMuon, 2510.05491), weight decay only where it agrees with the update
    (cautious, 2510.12402)."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = grad.lerp(momentum_buffer, momentum)  # Nesterov
    g = orthogonalize(g / g.norm(dim=-1, keepdim=True).clamp_min(1e-10), dtype)
    size = g.norm(dim=(-2, -1), keepdim=True)
    second_moment.lerp_(g.square().mean(-1, keepdim=True), 1 - beta2)
    g = g * second_moment.clamp_min(1e-10).rsqrt()
    # The second moment changes the update's direction; its norm is restored.
    g = g * (size / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    scale = lr * max(1.0, w.size(-2) / w.size(-1)) ** 0.5
    w.sub_(scale * g + lr * wd * w * (g * w > 0))


def adamw_update(w, grad, first, second, lr, wd, beta1, beta2, step, eps=1e-10):
    """One AdamW step (1711.05101), in place. step counts from 0."""
    first.lerp_(grad, 1 - beta1)
    second.lerp_(grad.square(), 1 - beta2)
    first_unbiased = first / (1 - beta1 ** (step + 1))
    second_unbiased = second / (1 - beta2 ** (step + 1))
    w.mul_(1 - lr * wd).sub_(lr * first_unbiased / (second_unbiased.sqrt() + eps))


class MuonAdamW:
    """Muon for matrices, AdamW for the rest, as the parameter table says. A parameter is split into items:
    whole matrices [n, out, in] for Muon, single numbers [n] for AdamW. Each rank owns a shard of ceil(n /
    world_size) consecutive items and keeps optimizer state for these alone. A step sums the gradients onto
    their owners, updates there, and sends the result to everyone; a single rank owns everything and sends
    nothing."""

    def __init__(self, p, c, m):
        self.p = p
        self.c = c
        self.m = m
        self.table = param_table(c)
        self.state = {}  # name -> (momentum, second moment) of this rank's shard
        for name, w in p.items():
            items = self.items(name, w)
            shard_shape = (-(-len(items) // m.world_size), *items.shape[1:])
            per_neuron = (*shard_shape[:2], 1) if self.table[name].optimizer == "muon" else shard_shape
            self.state[name] = (
                torch.zeros(shard_shape, device=w.device),
                torch.zeros(per_neuron, device=w.device),
            )

    def items(self, name, w):
        return w.view(-1, *w.shape[-2:]) if self.table[name].optimizer == "muon" else w.view(-1)

    def shard(self, name, w):
        """This rank's items of a parameter, or of a tensor of its shape."""
        size = len(self.state[name][0])
        return self.items(name, w)[self.m.rank * size :][:size]

    def gather(self, name, shard):
        """(all items of a parameter, of which each rank has its shard; pending communication)."""
        size = len(self.state[name][0])
        padded = shard.new_empty(size * self.m.world_size, *shard.shape[1:])
        pending = dist.all_gather_single(padded, pad_items(shard, size), async_op=True)
        return padded[: len(self.items(name, self.p[name]))], pending

    @torch.no_grad()
    def whole(self, shards):
        """{name: tensor of the parameter's shape} of which each rank has its shard."""
        if self.m.world_size == 1:
            return {name: shard.view(self.p[name].shape) for name, shard in shards.items()}
        whole = {}
        for name, shard in shards.items():
            items, pending = self.gather(name, shard)
            pending.wait()
            whole[name] = items.view(self.p[name].shape)
        return whole

    @torch.no_grad()
    def step(self, step, lr, wd, momentum):
        """lr and wd: multiples of the config's (see schedules). Drops the gradients, p[name].grad."""
        summed = {}  # name -> (gradient of this rank's shard, pending communication)
        for name, w in self.p.items():  # every sum is under way before the first update needs one
            # A parameter that this phase does not use has no gradient; its momentum decays.
            grad = self.items(name, torch.zeros_like(w) if w.grad is None else w.grad)
            w.grad = None
            pending = None
            if self.m.world_size > 1:
                shard_size = len(self.state[name][0])
                whole = pad_items(grad, shard_size * self.m.world_size)
                grad = whole.new_empty(shard_size, *whole.shape[1:])
                pending = dist.reduce_scatter_single(grad, whole, async_op=True)
            summed[name] = grad, pending
        updated = []  # (items, their new values, pending communication): on the way during later updates
        for name, w in self.p.items():
            grad, pending = summed.pop(name)
            if pending:
                pending.wait()
            self.update(name, w, grad, step, lr, wd, momentum)
            if pending:
                updated.append((self.items(name, w), *self.gather(name, self.shard(name, w))))
        for items, whole, pending in updated:
            pending.wait()
            items.copy_(whole)

    def update(self, name, w, grad, step, lr, wd, momentum):
        """Update this rank's shard of one parameter."""
        c = self.c
        entry = self.table[name]
        first, second = self.state[name]
        shard = self.shard(name, w)
        n = len(shard)
        lr = lr * getattr(c, entry.lr)
        decay = wd * c.weight_decay if entry.decay else 0.0
        if entry.optimizer == "muon":
            moments = first[:n], second[:n]
            settings = lr, decay, momentum, c.muon_beta2, self.m.dtype
            self.m.muon_update(shard, grad[:n], *moments, *settings)
        else:
            adamw_update(shard, grad[:n], first[:n], second[:n], lr, decay, c.adam_beta1, c.adam_beta2, step)

    @torch.no_grad()
    def state_dict(self, ema=None):
        """{name: {kind: items}} of this rank's shard of the weights, both moments and, if there is one, the
        weights' average: a copy in the memory of the CPU, which later steps do not change. ema: {name: this
        rank's shard}."""
        copies = {}
        for name, w in self.p.items():
            first, second = self.state[name]
            shard = self.shard(name, w)
            kinds = {"w": shard, "first": first[: len(shard)], "second": second[: len(shard)]}
            if ema:
                kinds["ema"] = ema[name]
            copies[name] = {kind: items.to("cpu", copy=True) for kind, items in kinds.items()}
        return copies

    @torch.no_grad()
    def load_state_dict(self, shards, ema=None):
        """Take over what state_dict() returned on the ranks of a run, in their order, however many they were:
        all of the weights, and this rank's shard of the rest."""
        for name, w in self.p.items():
            first, second = self.state[name]
            start = self.m.rank * len(first)
            kinds = {"w": (self.items(name, w), 0), "first": (first, start), "second": (second, start)}
            if ema:
                kinds["ema"] = (ema[name], start)
            for kind, (target, begin) in kinds.items():
                at = -begin  # where the next part's items belong in the target
                for part in (shard[name][kind] for shard in shards):
                    taken = part[max(0, -at) : max(0, len(target) - at)]
                    target[max(0, at) :][: len(taken)].copy_(taken)
                    at += len(part)
                if at != len(self.items(name, w)) - begin:
                    raise ValueError(f"{name} is of another size")


def pad_items(x, n):
    return torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])


# ---- batches, and the look-ups that stand beside each token ------------------------------------------------


class Streams:
    """Independent streams of ids [n_streams, length], laid end to end, and what look-ups need of them."""

    def __init__(self, streams, bos_id):
        self.tokens = streams.reshape(-1)
        self.length = streams.shape[1]
        starts = self.tokens == bos_id
        starts[:: self.length] = True
        place = np.arange(len(self.tokens))
        self.stream = (place // self.length).astype(np.uint64)  # each token's stream
        self.document = np.cumsum(starts, dtype=np.uint64)  # each token's document
        begins = np.maximum.accumulate(np.where(starts, place, 0))
        self.offset = place - begins  # each token's position in its document
        # Random codes of the tokens, times powers of an odd number, modulo 2**64. The hash of every n-gram
        # is then a difference of one running sum, shifted to a common power.
        base = 0x9E3779B97F4A7C15
        codes = np.random.default_rng(0).integers(0, 2**64, NO_TOKEN + 1, dtype=np.uint64)
        self.power = np.cumprod(np.full(len(place), base, dtype=np.uint64))
        inverse_power = np.cumprod(np.full(len(place), pow(base, -1, 2**64), dtype=np.uint64))
        self.running_sum = np.cumsum(codes[self.tokens] * inverse_power)

    def ngrams(self, n):
        """A hash, uint64, of the n-gram that ends at each token i: the sum of code[j] * base**(i - j) over
        its n tokens j. Equal n-grams have equal hashes anywhere."""
        before = np.zeros_like(self.running_sum)
        before[n:] = self.running_sum[:-n]
        return (self.running_sum - before) * self.power

    def contexts(self, n):
        """(the places of all tokens that have n tokens before them in their stream, a hash of these n, a hash
        of these n and the token)."""
        place = np.arange(len(self.tokens))
        places = place[place % self.length >= n]
        return places, self.ngrams(n)[places - 1], self.ngrams(n + 1)[places]

    def earlier_documents(self, n):
        """For each token, the place of the last occurrence, in an earlier document of its stream, of the
        n-gram that ends there; -1: nowhere."""
        ngram = self.ngrams(n) + self.stream * GROUP_CODE
        order = np.argsort(ngram, kind="stable")
        ngram = ngram[order]
        before = run_starts(ngram, self.document[order]) - 1
        whole = self.offset[order] >= n - 1  # no n-gram reaches back into another document
        found = (before >= 0) & (ngram[before] == ngram) & whole & whole[before]
        last = np.full(len(order), -1)
        last[order[found]] = order[before[found]]
        return last


# Times the number of a stream or document, added to hashes, which then agree only within it.
GROUP_CODE = np.uint64(0xD6E8FEB86659FD93)


def run_starts(ngram, document):
    """For n-grams in sorted order, where each one's run of equal n-grams in one document begins."""
    begins = np.append(True, (ngram[1:] != ngram[:-1]) | (document[1:] != document[:-1]))
    return np.maximum.accumulate(np.where(begins, np.arange(len(ngram)), 0))


class Lookup:
    """Makes the model's inputs: each token, and beside it, for each length n of c.recall, the token that
    followed the last occurrence in the same document of the n tokens that end here; for each of c.memory the
    same from the training documents. Training tokens skip matches in their own document: unseen text has none
    in memory, and a model that had seen them would trust memory too much. In scoring, c.grow_memory adds the
    documents that the stream has finished, for n-grams that training lacks. NO_TOKEN where there is no
    occurrence. Hard-wired induction (2401.12973) and retrieval (2112.04426): exact, without attention, as far
    back as the document goes, and never ahead."""

    def __init__(self, train_tokens, c):
        """train_tokens: [n] of the budget; in scoring, c.memory and c.ngrams need them."""
        self.train_tokens = train_tokens
        self.c = c
        self.index = []  # for each length of c.memory: the n-grams of the training tokens in sorted order
        if not c.memory:
            return
        streams = Streams(train_tokens[None], c.bos_id)
        for n in lengths(c.memory):
            # Nothing follows the last token. N-grams across a document's boundary are indexed, too, but hold
            # a BOS inside, which no query does.
            ngram = streams.ngrams(n)[:-1]
            order = np.argsort(ngram, kind="stable")
            ngram = ngram[order]
            document = streams.document[order]
            self.index.append((order, ngram, document, run_starts(ngram, document)))

    def training_inputs(self):
        """Inputs for the training tokens, as one stream: uint16 [n, 1 + n_lookups(c)]."""
        return self.inputs(self.train_tokens[None], in_training=True)[0]

    def inputs(self, ids, in_training=False):
        """Inputs for streams of ids [n_streams, length]: uint16 [n_streams, length, 1 + n_lookups(c)]."""
        c = self.c
        if n_lookups(c) == 0:
            return ids[..., None]
        streams = Streams(ids, c.bos_id)
        columns = np.full((1 + n_lookups(c), ids.size), NO_TOKEN, dtype=np.uint16)
        columns[0] = streams.tokens
        recall = lengths(c.recall)
        for column, n in zip(columns[1:], recall, strict=False):
            ngram = streams.ngrams(n) + streams.document * GROUP_CODE
            order = np.argsort(ngram, kind="stable")
            here = order[1:]
            before = order[:-1]
            found = (ngram[here] == ngram[before]) & (streams.offset[before] >= n - 1)
            column[here[found]] = streams.tokens[before[found] + 1]
        memory = zip(columns[1 + len(recall) :], lengths(c.memory), self.index, strict=True)
        for column, n, (order, known, document, run_start) in memory:
            ngram = streams.ngrams(n)
            by_value = np.argsort(ngram)  # sorted queries are several times as fast
            match = np.empty(ids.size, np.int64)
            match[by_value] = np.searchsorted(known, ngram[by_value], side="right") - 1
            if in_training:
                # The last match is in this very document: take the entry before the document's run, which may
                # be of another n-gram and is then no match.
                own = document[match] == streams.document
                match = np.where(own, run_start[match] - 1, match)
            found = (match >= 0) & (known[match] == ngram) & (streams.offset >= n - 1)
            column[found] = self.train_tokens[order[match[found]] + 1]
            if c.grow_memory and not in_training:
                last = streams.earlier_documents(n)
                grown = (last >= 0) & ~found
                column[grown] = streams.tokens[last[grown] + 1]
        return columns.T.reshape(*ids.shape, -1)


DISCOUNT = 0.8  # of a count of one, so much goes to what a context was not followed by


def sums_before(groups, *values):
    """For each place, the sums of these values at earlier places of its group."""
    order = np.argsort(groups, kind="stable")
    groups = groups[order]
    begins = run_starts(groups, groups)
    all_sums = []
    for value in values:
        value = value[order].astype(np.int64)
        before = np.cumsum(value) - value
        sums = np.empty(len(order), np.int64)
        sums[order] = before - before[begins]
        all_sums.append(sums)
    return all_sums


def counts_before(context, ngram, counted, known=False):
    """(how often the context of each place was there before, with how many kinds of tokens, how often its
    n-gram was; whether the n-gram is new). Only occurrences that are `counted` count. known: n-grams that are
    not new, because something else has them."""
    occurrences, hits = sums_before(ngram, np.ones(len(ngram)), counted)
    is_new = (occurrences == 0) & np.logical_not(known)
    counts, n_kinds = sums_before(context, counted, is_new)
    return counts, n_kinds, hits, is_new


class NgramModel:
    """Counts of what followed a context, as a model of their own: Kneser and Ney's (1995) with one discount,
    interpolated from the shortest length of c.ngrams to the longest. Each length comes twice: with the counts
    of the training tokens and the stream so far, and with those of the token's document alone. A shorter
    context counts a token only where the next longer one had not been followed by it before."""

    def __init__(self, train_tokens, c):
        self.c = c
        self.lengths = sorted(lengths(c.ngrams))
        streams = Streams(train_tokens[None], c.bos_id)
        counted = np.ones(len(train_tokens), bool)
        self.index = {}  # length -> contexts and n-grams, each in sorted order with sums
        for n in reversed(self.lengths):
            places, context, ngram = streams.contexts(n)
            is_new = sums_before(ngram, np.ones(len(places)))[0] == 0
            contexts, of_context = np.unique(context, return_inverse=True)
            ngrams, of_ngram = np.unique(ngram, return_inverse=True)
            counts = np.bincount(of_context, counted[places], len(contexts))
            n_kinds = np.bincount(of_context, is_new, len(contexts))
            hits = np.bincount(of_ngram, counted[places], len(ngrams))
            self.index[n] = contexts, counts, n_kinds, ngrams, hits
            counted = np.ones(len(train_tokens), bool)
            counted[places] = is_new

    def probabilities(self, ids):
        """Of every token of independent streams of ids [n_streams, length], in the same shape."""
        streams = Streams(ids, self.c.bos_id)
        in_stream = np.ones(ids.size, bool)  # what counts there at the length at hand
        in_document = np.ones(ids.size, bool)
        levels = []
        for n in reversed(self.lengths):
            places, context, ngram = streams.contexts(n)
            # The document is that of the context: a BOS ends it, and is one of its tokens here.
            document = streams.document[places - 1] * GROUP_CODE
            *counts, is_new = counts_before(context + document, ngram + document, in_document[places])
            levels.append((places, *counts))
            in_document = np.ones(ids.size, bool)
            in_document[places] = is_new

            contexts, train_counts, train_kinds, ngrams, train_hits = self.index[n]
            at, known_context = find(contexts, context)
            at_ngram, known_ngram = find(ngrams, ngram)
            stream = streams.stream[places] * GROUP_CODE
            counts, n_kinds, hits, is_new = counts_before(
                context + stream, ngram + stream, in_stream[places], known_ngram
            )
            counts = counts + known_context * train_counts[at]
            n_kinds = n_kinds + known_context * train_kinds[at]
            levels.append((places, counts, n_kinds, hits + known_ngram * train_hits[at_ngram]))
            in_stream = np.ones(ids.size, bool)
            in_stream[places] = is_new
        p = np.full(ids.size, 1 / self.c.vocab_size)
        for places, counts, n_kinds, hits in reversed(levels):
            seen = counts > 0
            rest = DISCOUNT * n_kinds[seen] * p[places[seen]]
            p[places[seen]] = (np.maximum(hits[seen] - DISCOUNT, 0) + rest) / counts[seen]
        return p.reshape(ids.shape)


def find(known, query):
    """(where the sorted `known` has each element of a query, or any place; whether it has it)."""
    at = np.searchsorted(known, query).clip(max=len(known) - 1)
    return at, known[at] == query


class Loader:
    """Training batches as a function of the step alone: nothing to save, any position can be resumed.

    An epoch is the budget's documents in an order drawn from (seed, epoch), laid end to end and cut every
    seq_len tokens into rows, which are then shuffled. A document that would end with its row is taken
    early, so that the next row starts at a BOS. Every token but the epoch's first is a target exactly once;
    the last row is filled up with targets of -1, which do not count. With bags of s tokens a row holds s *
    seq_len tokens, and each bag's targets are the s tokens of the next bag. inputs: [n, 1 + n_lookups(c)]
    of Lookup; the first c.train_tokens are used."""

    def __init__(self, inputs, c, rank=0, world_size=1, bag_size=1):
        self.inputs = inputs[: c.train_tokens]
        self.n = len(self.inputs)
        self.c = c
        self.bag_size = bag_size
        self.row_tokens = c.seq_len * bag_size
        self.starts = np.union1d([0], np.flatnonzero(self.inputs[:, 0] == c.bos_id))
        self.lengths = np.diff(np.append(self.starts, self.n))
        # Rounded up. The first token (or bag) of an epoch is no target.
        self.rows_per_epoch = max(1, -(-(self.n - bag_size) // self.row_tokens))
        self.batch_rows = c.batch_tokens // c.seq_len
        self.shard = range(rank * self.batch_rows // world_size, (rank + 1) * self.batch_rows // world_size)
        self.steps = max(1, int(c.epochs * self.rows_per_epoch) // self.batch_rows)
        self.epoch = None

    def start_epoch(self, epoch):
        rng = np.random.default_rng((self.c.seed, epoch))
        shuffled = rng.permutation(len(self.starts))
        by_length = {}
        for d in shuffled:
            by_length.setdefault(self.lengths[d], []).append(d)
        order = []
        placed = set()
        filled = 0
        # Documents in shuffled order; but wherever one that is left would end exactly with the row, it comes
        # first.
        for d in shuffled:
            while d not in placed:
                fitting = by_length.get(-filled % self.row_tokens)
                while fitting and fitting[-1] in placed:
                    fitting.pop()
                chosen = fitting.pop() if fitting else d
                order.append(chosen)
                placed.add(chosen)
                filled += self.lengths[chosen]
        self.epoch = epoch
        self.ends = np.cumsum(self.lengths[order])
        # From a place in the epoch's stream to the same token's place in inputs.
        self.shift = self.starts[order] + self.lengths[order] - self.ends
        self.rows = rng.permutation(self.rows_per_epoch)

    def row(self, i):
        """Row i of the epoch's stream and the next token (or bag), as far as there are any."""
        at = i * self.row_tokens
        stop = min(at + self.row_tokens + self.bag_size, self.n)
        first, last = np.searchsorted(self.ends, (at, stop - 1), side="right")
        cuts = [at, *self.ends[first:last], stop]
        shifts = self.shift[first : last + 1]
        pieces = zip(cuts[:-1], cuts[1:], shifts, strict=True)
        return np.concatenate([self.inputs[a + shift : b + shift] for a, b, shift in pieces])

    def batch(self, step):
        """This rank's inputs, int64 [rows, row_tokens, 1 + n_lookups(c)], its targets [rows, seq_len,
        bag_size], and the number of targets in the batch of all ranks."""
        n = self.row_tokens
        bag_size = self.bag_size
        x = np.full((len(self.shard), n, self.inputs.shape[1]), self.c.bos_id, dtype=np.int64)
        y = np.full((len(self.shard), n), -1, dtype=np.int64)
        n_targets = 0
        for j in range(self.batch_rows):
            epoch, k = divmod(step * self.batch_rows + j, self.rows_per_epoch)
            if epoch != self.epoch:
                self.start_epoch(epoch)
            i = int(self.rows[k])
            n_targets += max(0, min(n, self.n - bag_size - i * n))
            if j in self.shard:
                row = self.row(i)
                at = j - self.shard.start
                x[at, : len(row[:n])] = row[:n]
                y[at, : len(row[bag_size:])] = row[bag_size:, 0]
        return torch.from_numpy(x), torch.from_numpy(y).unflatten(1, (-1, bag_size)), n_targets


class Batches:
    """What one model trains on at each step: bags first, if it has any, then single tokens."""

    def __init__(self, inputs, c, m, steps=None):
        self.plain = Loader(inputs, c, m.rank, m.world_size)
        self.steps = min(self.plain.steps, steps or self.plain.steps)
        countable = self.steps < 10**7
        require(countable, f"--epochs {c.epochs}: {self.steps:,} steps, but checkpoints count to 10,000,000")
        self.phases = [phase_schedule(self.done(step), c) for step in range(self.steps)]
        self.n_bag_steps = sum(phase.bag_size > 1 for phase in self.phases)
        self.next_step = None
        self.next_batch = None
        self.bags = self.plain  # so that epochs_done() works without bags, too
        if self.n_bag_steps:
            self.bags = Loader(inputs, c, m.rank, m.world_size, c.bag_size)

    def done(self, step):
        """The fraction of training that is done in the middle of a step: neither the first nor the last step
        is wasted on a rate of zero."""
        return (step + 0.5) / self.steps

    def batch(self, step):
        """Same as Loader.batch."""
        if step == self.next_step:
            return self.next_batch
        if step < self.n_bag_steps:
            x, y, n_targets = self.bags.batch(step)
        else:
            x, y, n_targets = self.plain.batch(step - self.n_bag_steps)
        return x, y, n_targets

    def prepare(self, step):
        """Make the batch of a step ahead, while a GPU is at work on the one before."""
        self.next_batch = self.batch(step)
        self.next_step = step

    def epochs_done(self, step):
        """Passes over the budget in the first `step` steps."""
        in_bags = min(step, self.n_bag_steps)
        in_singles = step - in_bags
        rows = self.plain.batch_rows
        return in_bags * rows / self.bags.rows_per_epoch + in_singles * rows / self.plain.rows_per_epoch

    def tokens_seen(self):
        return sum(self.plain.batch_rows * self.plain.row_tokens * phase.bag_size for phase in self.phases)


# ---- training: the models of a run, one after the other ----------------------------------------------------


@dataclasses.dataclass
class PlannedModel:
    """One entry of a run's training plan. Not a network: weights are dicts of tensors."""

    number: int
    c: Config
    batches: Batches
    teachers: list  # the PlannedModels that it learns from
    name: str  # in the log, with a trailing space; empty where a run has only one

    def phase_flops(self, phase):
        """FLOPs of a step. A backward pass costs two forward passes, a teacher one. One teacher is used at a
        time."""
        c = self.c
        forward_flops = flops_per_token(c, phase)
        if c.mtp_weight:
            forward_flops += 2 * c.n_embd * (c.n_embd + c.vocab_size)
        teacher_flops = 0
        if self.teachers and phase.bag_size == 1:
            c_teacher = self.teachers[0].c
            teacher_flops = flops_per_token(c_teacher, phase_schedule(1.0, c_teacher))
        return c.batch_tokens * (3 * forward_flops + teacher_flops)

    @functools.cached_property
    def step_flops(self):
        """FLOPs of every step of its training."""
        of_phase = {phase: self.phase_flops(phase) for phase in set(self.batches.phases)}
        return [of_phase[phase] for phase in self.batches.phases]

    @property
    def train_flops(self):
        return sum(self.step_flops)


def training_plan(c, inputs, m, steps=None):
    """The PlannedModels of a run, in order. inputs: from Lookup.training_inputs. steps: at most so many
    for each model (--steps)."""
    plan = []
    for k, c_model in enumerate(model_configs(c)):
        if k == c.members:  # the student
            teachers = list(plan)
        elif c.distill_alpha > 0 and k % (c.members // c.chains) > 0:  # not the first of its chain
            teachers = plan[-1:]
        else:
            teachers = []
        name = f"member {k + 1} " if c.members > 1 or c.student else ""
        plan.append(PlannedModel(k, c_model, Batches(inputs, c_model, m, steps), teachers, name))
    return plan


@contextlib.contextmanager
def step_weights(p, c, m):
    """What the passes of one optimizer step get as p: its stacked weights are in the dtype of the matrix
    products already, with IHA applied. That is done once and not in every pass. A hook adds up their
    gradients in float32, and p[name].grad gets them after the last pass, those of the mixing matrices too."""

    def mixed_attention():
        layers = zip(p["attn"], p["iha"], strict=True)
        qkv = torch.stack([mix_heads(w[:3], iha) for w, iha in layers])
        return torch.cat([qkv, p["attn"][:, 3:]], dim=1)

    grads = {}

    def add_up(name, w):
        if name in grads:
            grads[name] += w.grad
        else:
            grads[name] = w.grad.float()
        w.grad = None

    weights = dict(p)
    if c.iha:
        del weights["iha"]
        with torch.no_grad():
            weights["attn"] = mixed_attention()
    for name, entry in param_table(c).items():
        if entry.n_stack and name in weights:
            weights[name] = weights[name].detach().to(m.dtype).requires_grad_()
            weights[name].register_post_accumulate_grad_hook(functools.partial(add_up, name))
    yield weights
    if c.iha:
        mixed_attention().backward(grads.pop("attn"))  # mixed again: until now that would have taken memory
    for name, grad in grads.items():
        p[name].grad = grad


def train_pass(p, x, y, n_targets, c, m, phase, seed, teacher=None):
    """Forward and backward of one micro-batch. p: from step_weights, which adds up the gradients. x, y: from
    Loader.batch. n_targets: of the whole batch, over which the losses are averaged. teacher: (Config,
    weights). Returns the logged losses.

    A new term of hidden states or weights: append it to `roots` and its gradient to `grads`, divided by
    n_targets, for gradients are summed over passes and ranks; what is logged is divided below."""
    # Dropout depends only on the seed, the step, the rank and the micro-batch, so a resumed run repeats it.
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    y = to_device(y, m)
    teacher_out = None
    if teacher and phase.bag_size == 1:  # the teacher predicts single tokens, so it sits out the bags
        c_teacher, p_teacher = teacher
        with torch.no_grad():
            h = forward(p_teacher, x, c_teacher, m, phase_schedule(1.0, c_teacher), run_block=m.block)
        teacher_out = h.flatten(0, 1), low_precision_head(p_teacher["lm_head"], m.dtype)
    h = forward(p, x, c, m, phase, c.dropout, m.block).flatten(0, 1)
    # The backward pass has two parts: objective() goes back through the loss and the head, whose gradient is
    # added by hand below; from h on, autograd takes over.
    head = low_precision_head(p["lm_head"].detach(), m.dtype)
    scale = torch.full((), 1 / n_targets, device=m.device)
    grad_h, grad_head, logged = objective(h.detach(), head, y.flatten(0, 1), scale, c, m, teacher_out)
    roots = [h]
    grads = [grad_h]
    if phase.bag_size > 1:
        logged["bag_loss"] = logged.pop("loss")
    if c.mtp_weight:  # plain cross-entropy, with or without a teacher, on top of the loss
        after_next = F.pad(y[:, 1:], (0, 0, 0, 1), value=-1).flatten(0, 1)
        h_mtp = norm(F.linear(h, p["mtp"][0].to(h.dtype)))
        grad_mtp, grad, sums = objective(h_mtp.detach(), head, after_next, c.mtp_weight * scale, c, m)
        roots.append(h_mtp)
        grads.append(grad_mtp)
        grad_head += grad
        logged["mtp"] = sums["loss"]
    torch.autograd.backward(roots, grads)
    grad_head = grad_head[: c.vocab_size]
    p["lm_head"].grad = grad_head if p["lm_head"].grad is None else p["lm_head"].grad + grad_head
    return {name: value / n_targets for name, value in logged.items()}


def first_weights(run, model):
    """What a model's training begins with: for a student of its teachers' shape the last teacher's weights (a
    warm start), otherwise the seed's."""
    shapes = param_shapes(model.c)
    if model.number == run.c.members:
        teacher = model.teachers[-1]
        if shapes.items() <= param_shapes(teacher.c).items():
            run.log(f"model {model.number + 1} starts from the weights of model {teacher.number + 1}")
            p = load_weights(run.folder, teacher.number, teacher.c, run.m)
            return {name: p[name] for name in shapes}
    return init_params(model.c, run.m.device)


def load_teacher(run, model, step):
    """(Config, weights) of the model to learn from. A student takes turns with its teachers: that costs what
    one teacher costs, and on average its gradient is that of their mean probability."""
    turn = step // model.c.teacher_switch_every
    teacher = model.teachers[turn % len(model.teachers)]
    return teacher.c, load_weights(run.folder, teacher.number, teacher.c, run.m)


def train_step(p, optimizer, model, step, m, teacher):
    """One optimizer step. Returns this rank's part of the logged losses, tensors by name."""
    c = model.c
    done = model.batches.done(step)
    x, y, n_targets = model.batches.batch(step)
    rows = c.device_tokens // c.seq_len
    phase = model.batches.phases[step]
    losses = {}
    with step_weights(p, c, m) as weights:
        for i, (x_part, y_part) in enumerate(zip(x.split(rows), y.split(rows), strict=True)):
            seed = (c.seed, step, m.rank, i)
            part = train_pass(weights, x_part, y_part, n_targets, c, m, phase, seed, teacher)
            losses = {name: losses.get(name, 0.0) + value for name, value in part.items()}
    optimizer.step(step, lr_schedule(done, c), wd_schedule(done, c), momentum_schedule(done, c))
    return losses


def train_model(run, model, shards, saver):
    """Train one model of a run, from the shards of a checkpoint or from the start. Returns its final
    weights."""
    c = model.c
    m = run.m
    n_steps = model.batches.steps
    first_step = run.progress["step"]
    if shards:
        p = {name: torch.empty(shape, device=m.device) for name, shape in param_shapes(c).items()}
    else:
        p = first_weights(run, model)
    for w in p.values():
        w.requires_grad_()
    optimizer = MuonAdamW(p, c, m)
    ema = None
    if c.ema:
        ema = {name: optimizer.shard(name, w.detach()).clone() for name, w in p.items()}
    if shards:
        load_shards(run.folder, shards, optimizer, ema)
    monitor = Monitor(run, model, saver)
    teacher = None
    for step in range(first_step, n_steps):
        turn_begins = step % c.teacher_switch_every == 0 and len(model.teachers) > 1
        if model.teachers and (step == first_step or turn_begins):
            teacher = None  # its memory is free before the next one comes
            teacher = load_teacher(run, model, step)
        losses = train_step(p, optimizer, model, step, m, teacher)
        if ema:
            decay = min(c.ema, (step + 1) / (step + 10))  # shorter at first: the initial weights fade
            for name, average in ema.items():
                average.lerp_(optimizer.shard(name, p[name].detach()), 1 - decay)
        if step + 1 < n_steps:
            model.batches.prepare(step + 1)
        monitor.after_step(step, losses, optimizer, ema)
    saver.wait()
    return optimizer.whole(ema) if ema else p


# ---- scoring -----------------------------------------------------------------------------------------------


def scoring_windows(length, c):
    """Windows that together score tokens 1 .. length-1 of a stream once each: [(start, T, new)]. A window
    reads the T tokens from `start` on and predicts the one after each; only tokens from `new` on count,
    because the window before has scored the others. Without score_stride no two windows overlap."""
    stride = c.score_stride or c.seq_len
    windows = []
    start = 0
    new = 1
    while new < length:
        T = min(c.seq_len, length - 1 - start)
        windows.append((start, T, new))
        new = start + T + 1
        start += stride
    return windows


@torch.no_grad()
def stream_nll(p, inputs, c, m):
    """Negative log-likelihood in nats of every token of independent streams, float32 [n_streams, length] on
    every rank. inputs: from Lookup, [n_streams, length, 1 + n_lookups(c)]. The first token of a stream has no
    context and gets 0."""
    n_streams, length, _ = inputs.shape
    phase = phase_schedule(1.0, c)
    out = torch.zeros(n_streams, length, device=m.device)
    # Each window is (stream, start, T, new).
    windows = [(row, *window) for row in range(n_streams) for window in scoring_windows(length, c)]
    windows.sort(key=lambda window: -window[2])  # those of one length are scored together
    for T, group in itertools.groupby(windows, key=lambda window: window[2]):
        shard = list(group)[m.rank :: m.world_size]
        n_rows = max(1, c.device_tokens // T)
        firsts = range(0, len(shard), n_rows)
        for i in tqdm(firsts, "scoring", unit="batch", delay=3, leave=False, disable=None):
            part = shard[i : i + n_rows]
            ids = np.stack([inputs[row, start : start + T + 1] for row, start, _, _ in part])
            ids = torch.from_numpy(ids.astype(np.int64))
            h = forward(p, ids[:, :-1], c, m, phase).flatten(0, 1)
            nll = token_nll(h, p["lm_head"], to_device(ids[:, 1:, 0], m).flatten(), c).view(len(part), T)
            for (row, start, _, new), values in zip(part, nll, strict=True):
                out[row, new : start + T + 1] = values[new - start - 1 :]
    return all_reduce(m, out).cpu().numpy()


def token_nll(h, lm_head, targets, c):
    """-log p(target) of every token in nats, float32 [N], chunk by chunk. h [N, D], targets [N]."""
    head = low_precision_head(lm_head, h.dtype)
    parts = []
    for part, target in zip(h.split(c.loss_chunk), targets.split(c.loss_chunk), strict=True):
        parts.append(F.cross_entropy(head_logits(part, head, c), target, reduction="none"))
    return torch.cat(parts)


def scored_models(c):
    """[(number of the weights, config)] of the models whose averaged probabilities are a run's: all
    members, or the student alone."""
    numbered = list(enumerate(model_configs(c)))
    return numbered[-1:] if c.student else numbered


def add_model(total, nll):
    """total: -log of the sum of the probabilities of the models so far (np.inf: of none). Returns it with one
    model added. For the mean over n models, add log(n)."""
    return -np.logaddexp(-total, -nll.astype(np.float64))


def run_nll(folder, inputs, lookup, c, m, show=None):
    """NLL of every token under the mean probability of a run's models, float64 [n_streams, length]. inputs:
    from lookup. One model is in memory at a time."""
    total = np.inf
    scored = scored_models(c)
    for n, (number, c_model) in enumerate(scored, start=1):
        nll = stream_nll(load_weights(folder, number, c_model, m), inputs, c_model, m)
        require(np.isfinite(nll).all(), f"{folder}: model {number + 1} predicts NaN; train it again")
        total = add_model(total, nll)
        if show and len(scored) > 1:
            together = f"the members so far together: {mean_nll(total + math.log(n)):.6f} nats per token"
            show(f"member {number + 1} alone: {mean_nll(nll):.6f}; {together}")
    total = total + math.log(len(scored))
    if c.ngrams:
        if show:
            show(f"without n-grams: {mean_nll(total):.6f} nats per token")
        p = NgramModel(lookup.train_tokens, c).probabilities(inputs[..., 0])
        total = -np.log((1 - c.ngram_weight) * np.exp(-total) + c.ngram_weight * p)
    total = np.maximum(0, total)  # a mean probability is at most 1, up to rounding
    total[:, 0] = 0
    return total


def mean_nll(nll):
    """Nats per scored token of [n_streams, length]: the first of each stream is not scored."""
    return float(nll[:, 1:].sum(dtype=np.float64) / max(1, nll[:, 1:].size))


# ============================================================================================================
# Part two: the harness, which trains and scores any recipe
# ============================================================================================================


# ---- machine -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Machine:
    """What this process runs on, and what follows from it."""

    device: torch.device
    dtype: torch.dtype  # of activations, and of matrices while they are multiplied; parameters stay float32
    rank: int = 0
    world_size: int = 1
    attention: str = "sdpa"
    compiled: bool = False
    # What training runs, plain or as set_compiled() compiled it. Scoring runs block().
    block: object = block
    chunk_grad: object = chunk_grad
    muon_update: object = muon_update
    reasons: dict = dataclasses.field(default_factory=dict)  # of each choice, for the log

    @property
    def is_main(self):
        return self.rank == 0


class Launch(NamedTuple):
    """This process's place among all, and among those on this machine, as torchrun tells it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def launched():
    names = [name.upper() for name in Launch._fields]
    told = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    remedy = "start several processes with torchrun; for one process, unset these"
    try:
        place = Launch(*(int(os.environ.get(name, n)) for name, n in zip(names, Launch(), strict=True)))
    except ValueError:
        raise UserError(f"{' '.join(told)}: not numbers; {remedy}") from None
    fits = 0 <= place.local_rank < place.local_world_size <= place.world_size
    fits = fits and place.local_rank <= place.rank < place.world_size
    require(fits, f"{' '.join(told)}: do not fit together; {remedy}")
    found = place.world_size == 1 or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    require(found, f"{' '.join(told)}: ranks meet by RANK, MASTER_ADDR and MASTER_PORT; {remedy}")
    return place


def check_compiler_cache():
    """If TORCHINDUCTOR_CACHE_DIR is not writable, use a temporary folder instead. PyTorch makes it with the
    first backward pass, compiled or not, and would fail there."""
    path = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not path:
        return
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        do_without(f"TORCHINDUCTOR_CACHE_DIR {path}: cannot be written, so a temporary folder is used", e)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")


def setup_machine(c, args):
    """Find the device, join the other ranks if there are several, choose dtype and attention."""
    check_compiler_cache()
    rank, world_size, local_rank, local_world_size = launched()
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if cuda:
        n_gpus = torch.cuda.device_count()
        require(
            local_world_size <= n_gpus,
            f"--device cuda: torch sees {n_gpus} GPU(s) for {local_world_size} process(es); "
            "start fewer, or use --device cpu",
        )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device = torch.device("cpu")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, min(c.cpu_threads, cores) // local_world_size))
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    if world_size > 1:
        # While the first rank writes to a slow disk, the others wait.
        patience = datetime.timedelta(minutes=30)
        device_id = device if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, device_id=device_id)
    use_bf16 = has_bf16 if c.dtype == "auto" else c.dtype == "bf16"
    m = Machine(device, torch.bfloat16 if use_bf16 else torch.float32, rank, world_size)
    name = "bf16" if use_bf16 else "fp32"
    m.reasons["dtype"] = f"{name} (the processor {'has' if has_bf16 else 'lacks'} bf16)"
    choose_attention(m, c, args.attention)
    return m


def choose_attention(m, c, wanted):
    """The first that works here, forward and backward: varlen attention with the kernels of FlashAttention 3
    (a package of its own, for Hopper) or with PyTorch's, FlexAttention, SDPA."""
    available = ("fa3", "varlen", "flex", "sdpa") if m.device.type == "cuda" else ("sdpa",)
    require(wanted in ("auto", *available), f"--attention {wanted}: needs a GPU; use --attention sdpa")
    failures = []
    for name in available if wanted == "auto" else (wanted,):
        m.attention = "varlen" if name == "fa3" else name
        try:
            if name == "fa3":
                torch.nn.attention.activate_flash_attention_impl("FA3")
            try_attention(m, c)
        except Exception as e:  # whatever a missing or refusing kernel raises: the reason goes to the log
            failures.append(f"{name} does not work here: {first_line(e)}")
            if torch.nn.attention.current_flash_attention_impl():
                torch.nn.attention.restore_flash_attention_impl()
            continue
        m.reasons["attention"] = f"{name} ({'; '.join(failures) or 'the best that works here'})"
        return
    raise UserError(f"--attention {wanted}: {'; '.join(failures)}")


def try_attention(m, c):
    """Raises where m.attention does not work."""
    shape = (2, 128, c.n_head, c.n_embd // c.n_head)
    q = torch.randn(shape, device=m.device, dtype=m.dtype, requires_grad=True)
    starts = torch.zeros(2, 128, dtype=torch.bool)
    masks = attention_masks(starts, [64], m)
    attention(q, q, q, masks[64], m.attention).sum().backward()


# On a CPU, compiling takes about a minute, and steps are then 1.1 to 1.5 times as fast: a training run of a
# few minutes finishes sooner without it.
COMPILE_FROM_FLOPS = 2e13


def set_compiled(m, wanted, train_flops=math.inf, failure=None):
    """Use the compiled or the plain functions. torch.compile needs Triton on a GPU, a C++ compiler on a CPU.
    One layer is compiled, not the whole model: all layers share the code, in whatever order a phase runs
    them."""
    if m.device.type == "cuda":
        name = "Triton"
        found = torch.utils._triton.has_triton()
        pays = True
    else:
        name = "a C++ compiler"
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
        pays = train_flops >= COMPILE_FROM_FLOPS
    require(found or wanted != "on", f"--compile on: needs {name}; install it, or use --compile auto")
    m.compiled = found and failure is None and (wanted == "on" or (wanted == "auto" and pays))
    reason = failure or f"{name} {'found' if found else 'not found'}, --compile {wanted}"
    if wanted == "auto" and not pays:
        reason = f"training is short, {train_flops:.3g} FLOPs; --compile on compiles anyway"
    m.reasons["compiled"] = f"{'yes' if m.compiled else 'no'} ({reason})"
    m.block = block
    m.chunk_grad = chunk_grad
    m.muon_update = muon_update
    if m.compiled:
        # Windows, phases and last micro-batches each bring new shapes.
        torch._dynamo.config.recompile_limit = 64
        m.block = torch.compile(block, dynamic=False)
        m.chunk_grad = torch.compile(chunk_grad, dynamic=False)
        if m.device.type == "cuda":
            m.muon_update = compiled_muon_update()


def compiled_muon_update():
    """muon_update() in fewer passes over memory, which a GPU spends most of it on. On a CPU it is the matrix
    products that take the time."""
    compiled = torch.compile(muon_update, dynamic=False)

    def update(w, grad, momentum_buffer, second_moment, lr, wd, momentum, beta2, dtype):
        # Tensors, for torch.compile would recompile for every new number.
        changing = [torch.full((), x, device=w.device) for x in (lr, wd, momentum)]
        compiled(w, grad, momentum_buffer, second_moment, *changing, beta2, dtype)

    return update


def all_reduce(m, tensor):
    """Sum over the ranks, in place."""
    if m.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(m, value):
    """The values of all ranks, any Python objects."""
    values = [value]
    if m.world_size > 1:
        values = [None] * m.world_size
        dist.all_gather_object(values, value)
    return values


def barrier(m):
    if m.world_size > 1:
        dist.barrier()


def hardware(m):
    if m.device.type == "cuda":
        return f"{m.world_size} x {torch.cuda.get_device_name(m.device)}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def seconds_waited():
    """Seconds that this process's threads waited for a processor; 0 where the system keeps no count."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            waited += int(path.read_text().split()[1])
    return waited / 1e9


# ---- files that others made --------------------------------------------------------------------------------

HEADER_INTS = 256
MAGIC = 20240520  # the shard format of llm.c and modded-nanogpt; data/README.md
MAX_TOKEN_BYTES = 2**30  # of a file of tokens: five times the largest that a track has
MAX_JSON_BYTES = 2**20


def data_folder(c):
    return Path(c.data) if os.sep in c.data else HERE / "data" / c.data


def from_prepare(function, *args):
    """What a function of data/prepare.py returns. Runs whose data is there do not need that file."""
    from data import prepare

    try:
        return getattr(prepare, function)(*args)
    except prepare.DataError as e:
        raise UserError(str(e)) from None


def read_file(path, limit, parse):
    """parse(the bytes of a file), which raises anything where they are not as they should be. Every file that
    somebody else may have made is read here: UserError where it is a pipe or a device, which might never end,
    where it has more than `limit` bytes, and where parse() raises."""
    try:
        require(path.is_file(), "no such file, or not a plain one; check the path")
        size = path.stat().st_size
        require(size <= limit, f"{size:,} bytes, more than the {limit:,} that such a file may have")
        return parse(path.read_bytes())
    except UserError as e:
        problem = str(e)
    except OSError as e:
        problem = e.strerror
    except Exception as e:
        if is_out_of_memory(e):
            raise
        problem = f"damaged, or of another version of this script ({first_line(e)})"
    raise UserError(f"{path}: {problem}")


def read_json(path, check):
    """check(what the file holds), which raises where that is not as it should be."""
    return read_file(path, MAX_JSON_BYTES, lambda data: check(json.loads(data)))


def check_meta(meta):
    """meta, if it describes token shards; else KeyError, TypeError or UserError."""
    texts = [meta["tokenizer"], meta["sha256"]["train.bin"], meta["sha256"]["val.bin"]]
    numbers = bos_id, vocab_size, text_bytes = meta["bos_id"], meta["vocab_size"], meta["text_bytes"]["val"]
    typed = {type(text) for text in texts} == {str} and {type(number) for number in numbers} == {int}
    in_range = typed and 0 <= bos_id < vocab_size <= NO_TOKEN and 0 < text_bytes < 2**40
    require(
        in_range,
        "bos_id, vocab_size or text_bytes is not a whole number in its range, or a name or sha256 is no text",
    )
    return meta


def find_data(c, m):
    """The folder of the run's data. The pocket shards are prepared on the spot where they are missing."""
    folder = data_folder(c)
    if c.data == "pocket" and m.is_main and not (folder / "meta.json").exists():
        from_prepare("prepare_pocket")
    barrier(m)
    known = {preset.get("data") for preset in PRESETS.values()}
    command = f"python data/prepare.py {c.data if c.data in known else '--help'}"
    remedy = f"prepare it with {command}, or say with --data where it is"
    require(folder.is_dir(), f"{folder}: no data there; {remedy}")
    return folder


def with_vocabulary(c, meta):
    """The config with the vocabulary of its data."""
    for name in ("vocab_size", "bos_id"):
        value = getattr(c, name)
        require(
            value in (0, meta[name]), f"--{name} {value}: the data has {meta[name]}; leave the option out"
        )
    return dataclasses.replace(c, vocab_size=meta["vocab_size"], bos_id=meta["bos_id"])


def read_shard(path, vocab_size, sha256=None):
    """Token ids of a shard, uint16 [n], after every check of the file. It is read once: what a run trains on
    is what was checked, whatever happens to the file meanwhile."""

    def parse(data):
        header = np.frombuffer(data[: 4 * HEADER_INTS], dtype="<i4")
        is_shard = len(header) == HEADER_INTS and header[0] == MAGIC and header[1] == 1
        require(is_shard, "not a token shard; data/README.md has the format")
        n = int(header[2])
        expected = 4 * HEADER_INTS + 2 * n
        fits = n > 1 and len(data) == expected
        found = f"{len(data):,} bytes, its header's {n:,} tokens take {expected:,}"
        require(fits, f"{found}; prepare the data again")
        unchanged = sha256 in (None, hashlib.sha256(data).hexdigest())
        require(unchanged, "changed, its sha256 is not meta.json's; prepare the data again")
        return check_ids(np.frombuffer(data, dtype="<u2", offset=4 * HEADER_INTS), vocab_size)

    return read_file(path, MAX_TOKEN_BYTES, parse)


def read_streams(path, vocab_size):
    """Token ids of independent streams, uint16 [n_streams, length], in a .npy file."""

    def parse(data):
        # Read by hand: numpy would first allocate whatever the header claims.
        f = io.BytesIO(data)
        require(np.lib.format.read_magic(f) == (1, 0), "not a .npy file of version 1.0")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(f)
        fits = dtype == np.uint16 and len(shape) == 2 and 0 < 2 * math.prod(shape) == len(data) - f.tell()
        require(fits, f"{dtype} {list(shape)} or cut short, not uint16 [n_streams, length]")
        streams = np.frombuffer(data, dtype="<u2", offset=f.tell())
        return check_ids(streams.reshape(shape, order="F" if is_fortran else "C"), vocab_size)

    return read_file(path, MAX_TOKEN_BYTES, parse)


def check_ids(tokens, vocab_size):
    highest = int(tokens.max())
    known = highest < vocab_size
    require(known, f"holds token {highest}, but the vocabulary has only {vocab_size}: another tokenizer's?")
    return tokens


# ---- checkpoint --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """If the disk is full or not writable, end the run with a line that says what was saved."""
    try:
        yield
    except OSError as e:
        remedy = "fix that, and start again"
        if saved(path.parent, INDEX_FILE):
            remedy = f"what was saved is intact: fix that, and go on with --resume {path.parent}"
        raise UserError(f"{path}: cannot be written ({e.strerror or e}); {remedy}", status=1) from None


def sync(file):
    """Put on disk what was written so far, where the file system can be told to."""
    try:
        os.fsync(file)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        do_without("this file system cannot sync: a power cut may take what was saved last", e)


def file_sha256(path):
    """The first 16 hexadecimal digits of a file's sha256, as the names of checkpoints have them."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def write_file(path, write, suffix=None):
    """Have write(file) fill a file, atomically: after a crash, `path` has the old content or the new. With a
    suffix, the name goes on with the digest of its bytes and with that. Returns the path."""
    tmp = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                sync(f.fileno())
            if suffix:
                path = path.with_name(f"{path.name}.{file_sha256(tmp)}.{suffix}")
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        sync(folder)  # the rename must reach the disk, too
        os.close(folder)
    return path


def write_json(path, content, suffix=None):
    data = json.dumps(content, indent=1).encode() + b"\n"
    return write_file(path, lambda f: f.write(data), suffix)


def write_npy(path, array):
    write_file(path, lambda f: np.save(f, array, allow_pickle=False))


def leftovers(folder):
    """Half-written files of a run that was killed. Other files of such names are somebody's own."""
    return [path for path in folder.glob("*.tmp") if re.fullmatch(TEMPORARY_FILE, path.name)]


def is_free(folder):
    """Whether a new run may have a folder: there is none, it is empty, or a run began in it that ended before
    its first checkpoint."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    held = {path.name: path for path in set(folder.iterdir()) - set(leftovers(folder))}
    stages = ("", "log.txt", "config.json log.txt", "config.json log.txt metrics.jsonl")
    if " ".join(sorted(held)) not in stages or not all(path.is_file() for path in held.values()):
        return False
    head = b""
    if "log.txt" in held:
        with open(held["log.txt"], "rb") as f:
            head = f.read(len(LOG_HEAD))
    try:
        if "config.json" in held:
            read_run(folder)
    except UserError:
        return False
    return LOG_HEAD.encode().startswith(head)


def write_tensors(path, content):
    def write(f):
        try:
            torch.save(content, f)
        except RuntimeError as e:  # torch's own, in front of what it came from: a full disk
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise

    return write_file(path, write, "pt")


def load_tensors(path):
    """What write_tensors() wrote, mapped into memory: of a large file, only what is used is read. Unpickles
    tensors and numbers alone. None where it holds something else."""
    with contextlib.suppress(Exception):  # somebody may have made it up: torch then raises anything
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def is_whole(path):
    """Whether a file is there and has the digest that its name states."""
    return path.is_file() and file_sha256(path) == path.name.split(".")[-2]


def json_sha256(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recipe_sha256(c):
    """Of what a model's weights depend on. A run may grow, join others, and move to another machine."""
    changing = ("members", "chains", "student", *PLACE_OPTIONS)
    values = dataclasses.asdict(c).items()
    return json_sha256({name: value for name, value in values if name not in changing})


# A checkpoint is an index, state-NUMBER.DIGEST.json, and the files that it names, one of each rank,
# state-NUMBER.RANKofRANKS.DIGEST.pt. NUMBER is model * 10**7 + step; that of weights is the model's. A digest
# is the beginning of the sha256 of a file's bytes.
INDEX_FILE = r"state-\d{7,}\.[0-9a-f]{16}\.json"
SHARD_FILE = r"state-\d{7,}\.\d+of\d+\.[0-9a-f]{16}\.pt"
WEIGHTS_FILE = r"weights-\d{7,}\.[0-9a-f]{16}\.pt"
TENSORS_FILE = f"{SHARD_FILE}|{WEIGHTS_FILE}"
TEMPORARY_FILE = r"((state|weights)-\d{7,}(\.\d+of\d+)?|config\.json|record\.json|val_nll\.npy)\.tmp"


def number_of(path):
    return int(path.name.split(".")[0].split("-")[1])


def saved(folder, form):
    """The files of a run whose names are of a form, oldest first."""
    paths = [path for path in folder.glob("*-*") if re.fullmatch(form, path.name)]
    return sorted(paths, key=lambda path: (number_of(path), path.name))


def read_index(path):
    """The content of a checkpoint's index, or None where it is damaged."""

    def check(index):
        for name, start in new_state(Config())["progress"].items():
            number = index["progress"][name]
            require(type(number) is type(start) and 0 <= number < 10**12, f"{name} {number}")
        named = [*index["shards"], *index["weights"]]
        well_formed = all(re.fullmatch(TENSORS_FILE, name) for name in named)
        require(well_formed and {"source", "recipe"} <= index.keys(), "not the index of a checkpoint")
        return index

    with contextlib.suppress(UserError):
        return read_json(path, check) if is_whole(path) else None


def remove_states(folder, kept, newest=math.inf):
    """Remove the files of checkpoints, complete or not, up to a number, but for the indexes `kept` and what
    they name."""
    names = {path.name for path in kept}
    for path in kept:
        index = read_index(path)
        names.update(index["shards"] if index else [])
    for path in saved(folder, f"{INDEX_FILE}|{SHARD_FILE}"):
        if path.name not in names and number_of(path) <= newest:
            path.unlink()


class Saver:
    """Saves a run while it trains on. Each rank copies its shard in memory, which a thread of its own then
    writes. When all ranks have written theirs, the first writes the index, which makes the checkpoint valid,
    and removes all but the two newest."""

    def __init__(self, run, thread):
        self.run = run
        self.thread = thread
        self.state = None  # of the save at hand: what its index will say
        self.shard = None  # the future of this rank's file, until commit()
        self.index = None  # the future of the index, on the first rank

    @property
    def has_written(self):
        return self.shard is not None and self.shard.done()

    def save(self, optimizer=None, ema=None):
        """Begin to save everything that training needs to resume with bit-identical results. Between two
        models that is run.progress alone. All ranks take part."""
        self.wait()
        run = self.run
        if run.m.is_main:
            run.progress["log_bytes"] = run.log.file.tell()
        weights = [
            path for path in saved(run.folder, WEIGHTS_FILE) if number_of(path) < run.progress["model"]
        ]
        self.state = new_state(run.c) | {"progress": dict(run.progress), "weights": [w.name for w in weights]}
        if optimizer:
            path = self.path(f".{run.m.rank}of{run.m.world_size}")
            self.shard = self.thread.submit(write_tensors, path, optimizer.state_dict(ema))
        elif run.m.is_main:
            self.index = self.thread.submit(self.write_index)

    def path(self, rank=""):
        progress = self.state["progress"]
        return self.run.folder / f"state-{progress['model'] * 10**7 + progress['step']:07d}{rank}"

    def commit(self):
        """Complete a save when every rank has written its shard, or has failed to."""
        m = self.run.m
        outcome = self.shard.exception()
        if outcome is None:
            outcome = self.shard.result().name
        self.shard = None
        outcomes = all_gather(m, outcome)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        self.state["shards"] = outcomes
        if m.is_main:
            self.index = self.thread.submit(self.write_index)

    def write_index(self):
        self.run.log.sync()
        path = write_json(self.path(), self.state, "json")
        before = [other for other in saved(path.parent, INDEX_FILE) if number_of(other) < number_of(path)]
        remove_states(path.parent, [path, *before[-1:]], number_of(path))

    def wait(self):
        """Wait until every save that was begun is on disk."""
        if self.shard:
            concurrent.futures.wait([self.shard])
            self.commit()
        if self.index:
            self.index.result()


def save_weights(folder, model, p):
    """Write the final weights of a model in place of others of its number."""
    content = {"recipe": recipe_sha256(dataclasses.replace(model.c, seed=0))}
    content["params"] = {name: w.detach().cpu() for name, w in p.items()}
    path = write_tensors(folder / f"weights-{model.number:07d}", content)
    for other in saved(folder, WEIGHTS_FILE):
        if number_of(other) == model.number and other != path:
            other.unlink()


def new_state(c):
    """What the index of a checkpoint says, before a run's first step."""
    progress = {"model": 0, "step": 0, "seconds": 0.0, "compile_seconds": 0.0, "log_bytes": 0}
    progress |= {"ranks": 0, "threads": 0}
    made_by = {"source": SOURCE_SHA256, "recipe": recipe_sha256(c)}
    return made_by | {"progress": progress, "shards": [], "weights": []}


def load_state(folder, c, m, force):
    """The index of the newest checkpoint that is whole, or what precedes the first. Every file is hashed by
    one rank, and all ranks agree. What kills left behind is removed."""
    found = [None]
    if m.is_main:
        found = [[(path, read_index(path)) for path in reversed(saved(folder, INDEX_FILE))]]
    if m.world_size > 1:
        dist.broadcast_object_list(found, src=0, device=m.device)
    state = None
    kept = []
    for i, (path, index) in enumerate(found[0]):
        files = [folder / name for name in index["shards"]] if index else [path]
        damaged = [file for file in files[m.rank :: m.world_size] if not is_whole(file)]
        for file in damaged:
            print(f"{file}: damaged or gone, going back to the checkpoint before it", file=sys.stderr)
        if all_reduce(m, torch.tensor(len(damaged), device=m.device)) == 0 and index:
            state = index
            kept = [path for path, _ in found[0][i : i + 2]]
            break
    if state:
        same = force or state["source"] == SOURCE_SHA256
        remedy = "restore the source that its log.txt holds, or add --force to go on as a trial"
        require(same, f"--resume {folder}: {SCRIPT} has changed since this run began; {remedy}")
        same = state["recipe"] == recipe_sha256(c)
        require(same, f"{folder}/config.json: is not the one that {path.name} belongs to; restore it")
        for name in state["weights"]:
            require((folder / name).exists(), f"{folder / name}: is gone; restore it, or begin a new run")
    else:
        # Killed before its first checkpoint, a run begins again. One that has come further must not.
        traces = [*found[0], *saved(folder, WEIGHTS_FILE), *folder.glob("record.json")]
        remedy = "restore a state-*.json and what it names, or begin a new run"
        require(not traces, f"--resume {folder}: has no checkpoint that is whole; {remedy}")
        state = new_state(c)
    if m.is_main:
        remove_states(folder, kept)
        for path in leftovers(folder):
            path.unlink()
    return state


def load_shards(folder, names, optimizer, ema):
    """Load the weights, moments and average that the files of a checkpoint hold."""
    try:
        optimizer.load_state_dict([load_tensors(folder / name) for name in names], ema)
    except Exception as e:  # under the right names, somebody may have put anything
        if is_out_of_memory(e):
            raise
        raise UserError(f"{folder}/{names[0]}: is not what config.json describes ({first_line(e)})") from None


# Where a run's data lies, and what its machine has memory for. They change what it computes by rounding, and
# by the numbers that dropout draws.
PLACE_OPTIONS = ("data", "device_tokens", "loss_chunk")
# Chosen at the start, kept on resume.
RUNTIME_CHOICES = dict(device="auto cpu cuda", attention="auto fa3 varlen flex sdpa", compile="auto on off")
RUNTIME_OPTIONS = ("steps", *RUNTIME_CHOICES)


def read_run(folder):
    """(Config, meta of its data, its runtime options and whether it is a trial) of a run folder."""

    def check(stored):
        if stored.pop("sha256") != json_sha256(stored):
            raise ValueError("its content does not match its sha256")
        options = {name: stored[name] for name in (*RUNTIME_OPTIONS, "trial")}
        steps = options["steps"]
        known = all(options[name] in choices.split() for name, choices in RUNTIME_CHOICES.items())
        typed = type(options["trial"]) is bool and (steps is None or (type(steps) is int and steps > 0))
        require(known and typed, "a run cannot have these options")
        return make_config(stored["config"]), check_meta(stored["data"]), options

    return read_json(folder / "config.json", check)


def load_weights(folder, number, c, m):
    """The weights of a run's model `number`, checked against its config. The first rank alone hashes them:
    where they are damaged, no other can go on."""
    paths = [path for path in saved(folder, WEIGHTS_FILE) if number_of(path) == number]
    remedy = f"finish the run with --resume {folder}"
    require(paths, f"{folder}: lacks the weights of model {number + 1}; {remedy}")
    names = " and ".join(path.name for path in paths)
    require(len(paths) == 1, f"{folder}: has {names}; remove the files that are not this run's")
    stored = load_tensors(paths[0]) if not m.is_main or is_whole(paths[0]) else None
    try:
        p = stored["params"]
        fits = stored["recipe"] == recipe_sha256(dataclasses.replace(c, seed=0))
        fits = fits and {name: tuple(w.shape) for name, w in p.items()} == param_shapes(c)
    except Exception:  # as in load_shards()
        fits = False
    message = f"{paths[0]}: damaged, or not of the recipe in config.json, or of an older version of {SCRIPT}"
    require(fits, f"{message}; train the run again")
    return {name: w.to(m.device, torch.float32, copy=True) for name, w in p.items()}


# ---- run ---------------------------------------------------------------------------------------------------


class Log:
    """log.txt and the terminal, on rank 0. The file is locked: two processes would spoil each other's run."""

    def __init__(self, folder, m):
        self.path = folder / "log.txt"
        self.file = None
        self.locked = False
        self.last_shown = -math.inf
        self.n_told = 0  # of MISSING
        if not m.is_main:
            return
        require(not self.path.is_symlink(), f"{self.path}: is a link, and what it leads to is not the run's")
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locked = True
        except BlockingIOError:
            remedy = "wait for it, stop it, or choose another --run_dir"
            raise UserError(f"{folder}: another process is at work on it; {remedy}") from None
        except OSError as e:  # some network file systems have no locks
            do_without("this file system has no locks: start no second process on this run", e)

    def __call__(self, line, show=True, pause=0.0):
        """pause: show the line only if nothing was shown for so many seconds."""
        if not self.file:
            return
        with writing(self.path):
            self.file.write(line.encode() + b"\n")
            self.file.flush()
        if show and time.monotonic() - self.last_shown >= pause:
            self.last_shown = time.monotonic()
            print(line, flush=True)
        while self.n_told < len(MISSING):
            self.n_told += 1
            self(MISSING[self.n_told - 1])

    def cut(self, length):
        """Drop what was logged after the checkpoint from which a run is resumed: the log reads as one."""
        if self.file:
            size = self.path.stat().st_size
            remedy = "restore what the run has logged, or begin a new run"
            require(size >= length, f"{self.path}: lacks its end, {size:,} bytes of {length:,}; {remedy}")
            with writing(self.path):
                self.file.truncate(length)

    def sync(self):
        """Put on disk what was written so far."""
        with writing(self.path):
            sync(self.file.fileno())

    def close(self):
        if self.file:
            self.file.close()


class Metrics:
    """metrics.jsonl, on rank 0: what the log says of each step, as a line of JSON for other people's
    dashboards. Every line has the same keys. A loss that the step does not have is null, and so is val_loss,
    unless an evaluation followed the step."""

    keys = "model step steps epoch loss bag_loss mtp kl lr tokens_per_second seconds val_loss".split()

    def __init__(self, folder, m, progress):
        """Drops the steps behind the checkpoint from which a run is resumed, and a line that a kill has cut
        short."""
        self.file = None
        if not m.is_main:
            return
        self.path = folder / "metrics.jsonl"
        with writing(self.path):
            self.file = open(self.path, "a+b")
        self.file.seek(0)
        last = [progress["model"] + 1, progress["step"]]
        kept = 0
        with contextlib.suppress(ValueError, KeyError, TypeError):
            for line in self.file:
                entry = json.loads(line)
                if [entry["model"], entry["step"]] > last or not line.endswith(b"\n"):
                    break
                kept += len(line)
        self.file.truncate(kept)

    def __call__(self, **values):
        if self.file:
            with writing(self.path):
                self.file.write(json.dumps(dict.fromkeys(self.keys) | values).encode() + b"\n")
                self.file.flush()


@dataclasses.dataclass
class Run:
    """What a run is, and how far it has come."""

    folder: Path
    c: Config
    m: Machine
    meta: dict  # of its data
    trial: bool  # cut short by --steps or resumed with another script: never a record
    plan: list
    lookup: Lookup
    val_inputs: np.ndarray  # of the whole validation stream, [1, length, 1 + n_lookups(c)]
    eval_inputs: np.ndarray  # of the windows that are evaluated during training
    log: Log
    metrics: Metrics
    fit_seconds: float  # spent in --fit, not counted on the clock
    # The model and step that come next; seconds on the track's clock and of compilation beside it; the
    # length of the log; the most ranks and threads that any part of the run had.
    progress: dict
    clock_start: float = 0.0  # where the clock would have begun, had the run never been interrupted
    stop_requested: list = dataclasses.field(default_factory=list)  # times of the signals that asked for it
    training_over: bool = False
    finished: bool = False  # its record is written

    def seconds(self):
        return time.monotonic() - self.clock_start

    @property
    def eval_name(self):
        n, length, _ = self.eval_inputs.shape
        return f"{n} windows of {length - 1:,} tokens spread over validation"


def begin_log(run):
    """The head of a run's log, or that of its next part."""
    c = run.c
    m = run.m
    log = run.log
    log.cut(run.progress["log_bytes"])
    if run.progress["log_bytes"]:
        log(f"resumed at step {run.progress['step']} of model {run.progress['model'] + 1}")
    else:
        header = f"{LOG_HEAD}{SCRIPT} bytes={len(SOURCE)} sha256={SOURCE_SHA256}"
        log(f"{header}\n{SOURCE.decode()}{SOURCE_END}", show=False)
        log(f"config {json.dumps(dataclasses.asdict(c))}\ndata {json.dumps(run.meta)}", show=False)
        size = f"{len(run.plan)} model(s), the first of {n_params(c):,} parameters"
        length = f"{run.plan[0].batches.steps} steps of {c.batch_tokens:,} tokens"
        epochs = f"{c.epochs:g} epochs of {c.train_tokens:,}, seed {c.seed}"
        log(f"run {run.folder}: track {c.track}, {size}, {length}, {epochs}")
    log(f"packages: python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    log(f"hardware: {hardware(m)}; {m.world_size} rank(s) of {torch.get_num_threads()} thread(s)")
    log(f"dtype: {m.reasons['dtype']}\nattention: {m.reasons['attention']}")
    if "fit" in m.reasons:
        log(f"fit: {m.reasons['fit']}")


def train(run, shards, saver):
    """Train the models of a run, the first from the shards of a checkpoint if there are any."""
    m = run.m
    progress = run.progress
    progress["ranks"] = max(m.world_size, progress["ranks"])
    progress["threads"] = max(torch.get_num_threads(), progress["threads"])
    begin_log(run)
    compile_seconds = run.fit_seconds + compile_all(run.plan[progress["model"] :], m)
    run.log(f"compiled: {m.reasons['compiled']}; {compile_seconds:.1f} s, which the clock leaves out")
    progress["compile_seconds"] += compile_seconds
    # So that run.seconds() goes on from progress["seconds"], without the compilation.
    run.clock_start = START + compile_seconds - progress["seconds"]
    ask_referee(run, "--flops", f"{sum(model.train_flops for model in run.plan)}")
    total = np.inf
    for model in run.plan:
        is_new = model.number >= progress["model"]
        if is_new:
            p = train_model(run, model, shards, saver)
            shards = []  # they were of this model; the next one starts afresh
            if m.is_main:
                save_weights(run.folder, model, p)
            del p  # the next model needs the memory
            progress |= {"model": model.number + 1, "step": 0, "seconds": run.seconds()}
        barrier(m)  # all ranks read what the first has written
        # When a run is resumed, the models that it has trained already are only scored again, for the mean.
        if len(run.plan) > 1:
            nll = stream_nll(load_weights(run.folder, model.number, model.c, m), run.eval_inputs, model.c, m)
            if model.number < run.c.members:
                total = add_model(total, nll)
            if is_new:
                n = min(model.number + 1, run.c.members)
                together = mean_nll(total) + math.log(n)
                so_far = f"val_loss {mean_nll(nll):.4f}, the members so far together {together:.4f}"
                run.log(f"member {model.number + 1} done: {so_far}, on {run.eval_name}")
        if is_new:
            saver.save()
    saver.wait()


class Monitor:
    """What happens between the steps of a model: log, metrics, evaluations, checkpoints, and the end of a run
    that diverges or that was asked to stop."""

    def __init__(self, run, model, saver):
        self.run = run
        self.model = model
        self.saver = saver
        self.first_step = run.progress["step"]
        self.flops_done = 0
        self.flops_left = sum(model.step_flops[self.first_step :])
        self.flops_left += sum(later.train_flops for later in run.plan[model.number + 1 :])
        self.began = time.monotonic()
        n_steps = model.batches.steps
        self.eval_after = {round(n_steps * (i + 1) / model.c.evals) for i in range(model.c.evals - 1)}
        # What steps have computed and nobody has read. A GPU is one step ahead of what is read, so that it
        # has work while this process logs.
        self.unread = collections.deque()
        self.steps_ahead = 1 if run.m.device.type == "cuda" else 0
        self.last_losses = ""

    def after_step(self, step, losses, optimizer, ema):
        """losses: this rank's parts, tensors by name. ema: {name: this rank's shard}, or None."""
        run = self.run
        c = self.model.c
        m = run.m
        is_last = step + 1 == self.model.batches.steps
        saving = (step + 1) % c.save_every == 0 and not is_last  # the final weights are written at once
        flags = [float(bool(run.stop_requested)), float(self.saver.has_written)]
        sums = all_reduce(m, torch.cat([torch.stack([*losses.values()]), to_device(torch.tensor(flags), m)]))
        sums = sums.to("cpu", non_blocking=True)
        copied = None
        if m.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self.unread.append((step, list(losses), sums, copied))
        val_loss = None
        if step + 1 in self.eval_after:
            weights = optimizer.whole(ema) if ema else optimizer.p
            val_loss = mean_nll(stream_nll(weights, run.eval_inputs, c, m))
            del weights  # training needs the memory
        read_all = is_last or saving or val_loss is not None
        stop = self.read(0 if read_all else self.steps_ahead, val_loss)
        if stop:
            self.read(0)
        run.progress |= {"step": step + 1, "seconds": run.seconds()}
        if is_last or saving or stop:
            self.require_finite(all(w.isfinite().all() for w in optimizer.p.values()))
        if saving or stop:
            self.saver.save(optimizer, ema)
        if stop:
            self.saver.wait()
            raise stopped(run, f"stopped at {self.where(step)} and saved")

    def where(self, step):
        return f"{self.model.name}step {step + 1}/{self.model.batches.steps}"

    def require_finite(self, is_finite):
        if not is_finite:
            self.saver.wait()
            last = (saved(self.run.folder, INDEX_FILE) or ["none, this came before the first"])[-1]
            message = f"{self.last_losses}: the loss or a weight is not finite; last good checkpoint: {last}"
            raise UserError(message, status=1)

    def read(self, steps_ahead, val_loss=None):
        """Read the oldest steps until only the last steps_ahead are unread. Returns whether the run was asked
        to stop. val_loss: of an evaluation after the last step. All that is decided here is decided by sums
        over the ranks, and so is the same on all of them."""
        stop = False
        while len(self.unread) > steps_ahead:
            step, names, sums, copied = self.unread.popleft()
            if copied:
                copied.synchronize()
            *values, stop_flags, n_written = sums.tolist()
            stop = stop or stop_flags > 0
            # A step that was ahead may tell of a save that is committed already.
            if n_written == self.run.m.world_size and self.saver.shard:
                self.saver.commit()
            self.report(step, dict(zip(names, values, strict=True)), None if self.unread else val_loss)
        return stop

    def report(self, step, losses, val_loss):
        """Log a step and the evaluation after it, if there was one. losses: sums over the ranks."""
        run = self.run
        model = self.model
        c = model.c
        n_steps = model.batches.steps
        where = self.where(step)
        terms = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self.last_losses = f"{where}: {terms}"
        self.require_finite(all(map(math.isfinite, losses.values())))
        self.flops_done += model.step_flops[step]
        self.flops_left -= model.step_flops[step]
        seconds = time.monotonic() - self.began
        seconds_per_flop = seconds / self.flops_done
        lr = lr_schedule(model.batches.done(step), c) * c.muon_lr
        speed = (step + 1 - self.first_step) * c.batch_tokens / seconds
        left = self.flops_left * seconds_per_flop  # of the whole run's training, at the speed so far
        so_far = run.seconds()
        epoch = model.batches.epochs_done(step + 1)
        times = f"tok/s {speed:.0f} time {so_far:.1f}s left {left:.0f}s"
        line = f"{where} epoch {epoch:.3f} {terms} lr {lr:.5f} {times}"
        run.log(line, pause=0.0 if step + 1 == n_steps else 2.0)
        if step + 1 == self.first_step + 100:  # now the speed is known: will the run end in the track's time?
            to_the_end = seconds_left(run.plan[model.number :], step + 1, seconds_per_flop, run.m)
            ask_referee(run, "--seconds", f"{run.seconds() + to_the_end:.0f}")
        if val_loss is not None:
            run.log(f"{model.name}eval {step + 1}/{n_steps} val_loss {val_loss:.4f} on {run.eval_name}")
        place = {"model": model.number + 1, "step": step + 1, "steps": n_steps, "epoch": epoch}
        rates = {"lr": lr, "tokens_per_second": speed, "seconds": so_far}
        run.metrics(**place, **losses, **rates, val_loss=val_loss)


def evaluation_inputs(inputs, c):
    """c.eval_windows windows of seq_len tokens, spread evenly over a stream's inputs [length, 1 +
    n_lookups(c)]: [n, seq_len + 1, ...]. Scored as streams of their own, they get what consecutive windows of
    the whole stream get."""
    T = min(c.seq_len, len(inputs) - 1)
    starts = np.arange(0, len(inputs) - T, T)
    chosen = np.linspace(0, len(starts) - 1, min(c.eval_windows, len(starts))).round().astype(int)
    return np.stack([inputs[start : start + T + 1] for start in starts[chosen]])


def ask_referee(run, *options):
    """Log what the track's rules make of the run so far. records/leaderboard.py decides that."""
    desk = HERE / "records" / "leaderboard.py"
    if run.m.is_main and desk.exists():
        command = [sys.executable, str(desk), "judge", str(run.folder), *options]
        answer = subprocess.run(command, capture_output=True, text=True)
        for line in (answer.stdout + answer.stderr).splitlines():
            run.log(f"referee: {line}")


def finish(run):
    """After the clock: score the final weights, write the record."""
    c = run.c
    m = run.m
    log = run.log
    progress = run.progress
    nll = run_nll(run.folder, run.val_inputs, run.lookup, c, m, log)
    if not m.is_main:
        return
    # Sums over blocks of 1,000 tokens, which leaderboard.py compares between runs.
    write_npy(run.folder / "val_nll.npy", np.add.reduceat(nll[0], np.arange(0, nll.size, 1000)))
    scored = [c_model for _, c_model in scored_models(c)]
    score_flops = 0
    for c_model in scored:
        passes_per_token = c_model.seq_len / (c_model.score_stride or c_model.seq_len)
        score_flops += flops_per_token(c_model, phase_schedule(1.0, c_model)) * passes_per_token
    record = {
        "track": c.track,
        "trial": run.trial,
        "seed": c.seed,
        "members": len(run.plan),  # all that were trained, a student included; --resume compares this
        "scored": len(scored),
        "val_loss": mean_nll(nll),
        "val_bpb": nll.sum() / math.log(2) / run.meta["text_bytes"]["val"],
        "val_tokens": nll.size - 1,
        "train_seconds": progress["seconds"],
        "compile_seconds": progress["compile_seconds"],
        "steps": sum(model.batches.steps for model in run.plan),
        "train_tokens": c.train_tokens,
        "tokens_seen": sum(model.batches.tokens_seen() for model in run.plan),
        "parameters": sum(map(n_params, scored)),
        "train_flops": sum(model.train_flops for model in run.plan),
        "score_flops_per_token": score_flops,
        "source_sha256": SOURCE_SHA256,
        "data_sha256": run.meta["sha256"],
        "hardware": hardware(m),
        "ranks": progress["ranks"],
        "threads": progress["threads"],
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if m.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(m.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    log(
        f"trained for {record['train_seconds']:.1f} s, {record['tokens_seen']:,} tokens seen, "
        f"{record['train_flops']:.4g} FLOPs, peak memory {peak / 2**20:.0f} MiB"
    )
    log(f"threads waited {seconds_waited():.1f} s for a processor; much of that means a busy machine")
    try:
        encoding = from_prepare("get_encoding", run.meta["tokenizer"])
        prompt = [c.bos_id, *run.val_inputs[0, 1:200, 0].tolist()]
        written = sample(run.folder, c, m, run.lookup, prompt, 300)
        log(f"---- the beginning of the validation text\n{printable(encoding.decode(prompt[1:]))}")
        log(f"---- what the model writes after it\n{printable(encoding.decode(written))}\n----")
    except Exception as e:  # a tokenizer that fails must not spoil a finished run
        log(f"no sample: {first_line(e)}")
    log(
        f"val_loss {record['val_loss']:.6f} nats per token, {record['val_bpb']:.6f} bits per byte, "
        f"{record['val_tokens']:,} tokens scored"
    )
    # The last checkpoint is kept: it has no weights, just run.progress.
    remove_states(run.folder, saved(run.folder, INDEX_FILE)[-1:])
    for path in leftovers(run.folder):
        path.unlink()
    log.sync()
    write_json(run.folder / "record.json", record)
    run.finished = True
    log(f"the run is in {run.folder}")
    ask_referee(run)
    log.sync()


# ---- before a run: compilation, and what --fit does --------------------------------------------------------


def distinct_models(models):
    """Those that differ in more than the seed."""
    kinds = {(dataclasses.replace(model.c, seed=0), bool(model.teachers)): model for model in models}
    return list(kinds.values())


def compile_all(models, m):
    """Compile every phase of training on made-up tokens, or go on uncompiled. Returns the seconds."""
    # The first barrier keeps a late rank out of the time; the last one includes the slowest compiler.
    barrier(m)
    began = time.monotonic()
    if m.compiled and models:
        if m.is_main:
            print("compiling, which takes a minute or two the first time ...", flush=True)
        failure = None
        try:
            for model in distinct_models(models):
                compile_model(model, m)
        except (RuntimeError, OSError, MemoryError) as e:
            failure = compile_failure(e)
        # What one rank cannot do, none does.
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(all_gather(m, failure)) if text]
        out_of_memory = [text for text in failures if "out of memory" in text]
        if out_of_memory:
            raise UserError(f"compiling on {out_of_memory[0]}", status=1)
        if failures:
            set_compiled(m, "auto", failure=failures[0])
    barrier(m)
    return time.monotonic() - began


def compile_failure(e):
    """What went wrong while compiling. Without enough memory the plain functions would fail, too: they need
    more. torch._dynamo raises whatever a compiler said as a RuntimeError, with the cause behind it."""
    causes = [e]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    for cause in causes:
        if is_out_of_memory(cause):
            return explain(cause)[0]
    for cause in causes:
        if isinstance(cause, OSError):
            where = cause.filename or "TORCHINDUCTOR_CACHE_DIR"
            return f"the compiler cannot write or run {where}, {cause.strerror or cause}"
    # Below its own first line, PyTorch quotes what the C++ compiler printed.
    quoted = re.search(r"^.*\berror: .*$", str(e), re.MULTILINE)
    its_own = f": {quoted[0].strip()[:300]}" if quoted else ""
    return f"the compiler failed, {first_line(e)}{its_own}"


def plan_without_data(c, m, steps=None):
    """The training plan for one made-up document as long as the budget, which takes no memory."""
    return training_plan(c, np.broadcast_to(np.uint16(0), (c.train_tokens, 1 + n_lookups(c))), m, steps)


def made_up_weights(model, m):
    """A model's weights as they are drawn, and its teacher, (Config, weights), or None."""
    p = {name: w.to(m.device).requires_grad_() for name, w in init_params(model.c).items()}
    teacher = None
    if model.teachers:
        c_teacher = model.teachers[0].c
        teacher = c_teacher, {name: w.to(m.device) for name, w in init_params(c_teacher).items()}
    return p, teacher


def compile_model(model, m):
    """A training pass for every phase and every size of micro-batch, and an update of every parameter."""
    c = model.c
    p, teacher = made_up_weights(model, m)
    rows = torch.arange(len(model.batches.plain.shard)).split(c.device_tokens // c.seq_len)
    for phase in sorted(set(model.batches.phases)):
        for n_rows in {len(part) for part in rows}:
            x = torch.zeros(n_rows, c.seq_len * phase.bag_size, 1 + n_lookups(c), dtype=torch.long)
            y = x[..., 0].contiguous().unflatten(1, (-1, phase.bag_size))
            with step_weights(p, c, m) as weights:
                train_pass(weights, x, y, 1, c, m, phase, (0,), teacher)
    optimizer = MuonAdamW(p, c, m)
    with torch.no_grad():
        for name, w in p.items():
            optimizer.update(name, w, torch.zeros_like(optimizer.state[name][0]), 0, 1.0, 1.0, 0.9)


def seconds_left(plan, step, seconds_per_flop, m):
    """Seconds that the models of a plan take from a step of the first one on, with all that is done beside
    the steps: evaluations, counted in FLOPs, and checkpoints, estimated from their size."""
    seconds = 0.0
    for model in plan:
        c = model.c
        n_steps = model.batches.steps
        n_evals = c.evals * (1 - step / n_steps)
        eval_flops = c.eval_windows * c.seq_len * flops_per_token(c, phase_schedule(1.0, c))
        seconds += (sum(model.step_flops[step:]) + n_evals * eval_flops) * seconds_per_flop
        n_saves = (n_steps - 1) // c.save_every - step // c.save_every
        seconds += n_saves * shard_size(model, m) * COPY_SECONDS_PER_GB
        seconds += 4e-9 * n_params(c) * SAVE_SECONDS_PER_GB  # the final weights, by the first rank
        step = 0
    return seconds


# Of the track's seconds, what --fit fills: a few steps on made-up tokens tell a speed roughly.
FIT_SHARE = 0.97
FIT_STEPS = 3  # that are timed in each phase


def measure_speed(plan, m):
    """Seconds per FLOP in the slowest phase of a plan whose tokens are made up."""
    return max(slowest_phase(model, m) for model in distinct_models(plan))


def slowest_phase(model, m):
    """Seconds per FLOP in the slowest phase of a model."""
    slowest = 0.0
    p, teacher = made_up_weights(model, m)
    optimizer = MuonAdamW(p, model.c, m)
    for phase in sorted(set(model.batches.phases)):
        step = model.batches.phases.index(phase)
        for i in range(1 + FIT_STEPS):
            losses = train_step(p, optimizer, model, step, m, teacher)
            sum(losses.values()).item()  # waits for the device
            if i == 0:  # the first one warms up
                began = time.monotonic()
        slowest = max(slowest, (time.monotonic() - began) / FIT_STEPS / model.step_flops[step])
    return slowest


def shortened(c, m, cap, startup, seconds_per_flop):
    """(the config, with fewer epochs if a run of it would not fit in FIT_SHARE of a track's seconds; the
    seconds that the run then takes)"""
    while True:
        seconds = startup + seconds_left(plan_without_data(c, m), 0, seconds_per_flop, m)
        if seconds <= FIT_SHARE * cap:
            return c, seconds
        epochs = math.floor(1000 * c.epochs * FIT_SHARE * cap / seconds) / 1000
        require(epochs > 0, f"--fit: no number of epochs fits in the {cap:,} s of {c.track}; lower --n_layer")
        c = dataclasses.replace(c, epochs=epochs)


def fit(c, m):
    """--fit: (the config, with fewer epochs if they would not fit in the track's seconds; the seconds that it
    took to find out, which the clock leaves out)."""
    cap = read_rules(c.track).get("max_seconds")
    require(cap, f"--fit: track {c.track} has no limit in seconds; leave the option out")
    barrier(m)
    began = time.monotonic()
    plan = plan_without_data(c, m)
    compile_all(plan, m)
    measured = torch.tensor([measure_speed(plan, m), began - START], dtype=torch.float64, device=m.device)
    seconds_per_flop, startup = (all_reduce(m, measured) / m.world_size).tolist()
    given = c.epochs
    c, seconds = shortened(c, m, cap, startup, seconds_per_flop)
    speed = f"{1 / seconds_per_flop:.3g} FLOP/s, measured on made-up tokens"
    m.reasons["fit"] = f"{c.epochs:g} of {given:g} epochs, {seconds:,.0f} s of {cap:,} at {speed}"
    return c, time.monotonic() - began


# ---- dry run -----------------------------------------------------------------------------------------------

GPU_FLOPS = 989e12  # an H100, dense bf16
GPU_GB = 80
RESERVE_GB = 6  # for the driver's context, NCCL's buffers, attention's workspace and fragments, assumed
UTILIZATION = 0.4  # assumed
STARTUP_SECONDS = 30  # to import PyTorch, read the data and draw the weights, assumed
SAVE_SECONDS_PER_GB = 3.1  # to serialize, hash and write, measured on a slow core
COPY_SECONDS_PER_GB = 0.5  # from a GPU to the memory of the host, assumed


def read_rules(track):
    """The track's rules and its dataset's from records/tracks.json; {} where there are none."""
    path = HERE / "records" / "tracks.json"
    tracks = json.loads(path.read_text()) if path.exists() else {"tracks": {}, "datasets": {}}
    rules = tracks["tracks"].get(track, {})
    return tracks["datasets"].get(rules.get("dataset"), {}) | rules


def memory_estimate(model, m):
    """GB that one rank holds at the peak of a compiled step, {kind: GB}. A formula, not a measurement:
    tests/test_dry_run.py holds it to 10% of a simulated step."""
    c = model.c
    low = m.dtype.itemsize
    table = param_table(c)
    sizes_of = {name: math.prod(shape) for name, shape in param_shapes(c).items()}
    n = n_params(c)
    n_weights = n + (n_params(model.teachers[0].c) if model.teachers else 0)
    kept = {"muon": 1, "adamw": 2}  # moments, and below the average of the weights
    n_kept = sum((kept[table[name].optimizer] + (c.ema > 0)) * size for name, size in sizes_of.items())
    rows = min(c.batch_tokens // c.seq_len // m.world_size, c.device_tokens // c.seq_len)
    tokens = rows * c.seq_len
    n_layers = max(len(phase.layers) for phase in model.batches.phases)
    # What torch.compile keeps of a layer for its backward pass, in numbers per token.
    per_layer = (10 + 2 * c.value_proj + c.attn_gate + (c.dropout > 0)) * c.n_embd + 3 * c.mlp_hidden
    # The head's copy in low precision, a teacher's, and the gradient of the micro-batch at hand.
    heads = (low * (2 if model.teachers else 1) + 4) * sizes_of["lm_head"]
    # Buffers that a compiled chunk_grad() holds: so many in low precision, and so many in float32.
    per_logit = 3 * low + 4 * 4 if model.teachers else 2 * low + 2 * 4
    sizes = {
        "weights": 4 * n_weights,
        "optimizer": 4 * n_kept / m.world_size,
        "gradients": 4 * n,
        "activations": low * (tokens * (n_layers * per_layer + 5 * c.n_embd) + n) + heads,
        "logits": min(tokens, c.loss_chunk) * c.vocab_size * per_logit,
    }
    return {kind: size / 1e9 for kind, size in sizes.items()}


def shard_size(model, m):
    """GB that each rank copies and writes in a checkpoint."""
    return 4e-9 * n_params(model.c) / m.world_size + memory_estimate(model, m)["optimizer"]


def with_expected_vocabulary(c):
    """The config with the vocabulary of its data, or, where that is not prepared, of its track."""
    path = data_folder(c) / "meta.json"
    vocab_size = read_rules(c.track).get("vocab_size", 50257)
    meta = {"vocab_size": vocab_size, "bos_id": vocab_size - 1}
    return with_vocabulary(c, read_json(path, check_meta) if path.exists() else meta)


def dry_run(c, n_ranks):
    """--dry_run: what a run would take on that many GPUs. Needs neither them nor the data."""
    rules = read_rules(c.track)
    rows = c.batch_tokens // c.seq_len
    n_ranks = n_ranks or min(rules.get("max_ranks", 1), rows)
    require(
        n_ranks > 0 and rows % n_ranks == 0,
        f"--dry_run {n_ranks}: {rows} sequences cannot be divided evenly among that many",
    )
    c = with_expected_vocabulary(c)
    m = Machine(torch.device("cpu"), torch.float32 if c.dtype == "fp32" else torch.bfloat16, 0, n_ranks)
    plan = plan_without_data(c, m)
    peak = 0.0
    print(f"{c.track}: {len(plan)} model(s) on {n_ranks} process(es)")
    for model in distinct_models(plan):
        n = n_params(model.c)
        phases = model.batches.phases
        steps = f"{len(phases):,} steps of {c.batch_tokens:,} tokens"
        print(f"{n:,} parameters, {len(model.teachers)} teacher(s), {steps}")
        for phase in dict.fromkeys(phases):
            flops = flops_per_token(model.c, phase)
            what = f"{phases.count(phase):,} steps of {len(phase.layers)} layers and bags of {phase.bag_size}"
            print(f"  {what}: {flops:.4g} FLOPs forward per position")
        memory = memory_estimate(model, m)
        together = sum(memory.values())
        peak = max(peak, together)
        sizes = ", ".join(f"{kind} {size:.2f}" for kind, size in memory.items())
        print(f"  memory of each, estimated: {together:.2f} GB")
        print(f"    {sizes}")
        print(f"  each sends {8e-9 * n * (n_ranks - 1) / n_ranks:.3g} GB in a step")
        shard = shard_size(model, m)
        n_saves = (len(phases) - 1) // model.c.save_every
        copying = n_saves * shard * COPY_SECONDS_PER_GB
        writing_seconds = shard * SAVE_SECONDS_PER_GB
        print(
            f"  {n_saves} checkpoints of {shard * n_ranks:.1f} GB: each process copies {shard:.2f} GB of it,"
        )
        print(f"    {copying:.1f} s in all, and writes that while it trains, {writing_seconds:.0f} s a time")
        final = 4e-9 * n
        print(f"  final weights of {final:.1f} GB, written by the first: {final * SAVE_SECONDS_PER_GB:.0f} s")
    flops = sum(model.train_flops for model in plan)
    print(f"{flops:.4g} FLOPs in all")
    if "max_ranks" in rules:  # a track for GPUs
        beside = STARTUP_SECONDS + seconds_left(plan, 0, 0.0, m)
        at_full_speed = STARTUP_SECONDS + seconds_left(plan, 0, 1 / (n_ranks * GPU_FLOPS), m) - beside
        seconds = beside + at_full_speed / UTILIZATION
        cap = rules.get("max_seconds", math.inf)
        print(f"{seconds:,.0f} s at {UTILIZATION:.0%} of an H100's {GPU_FLOPS / 1e12:.0f} TFLOP/s,")
        print(f"  {STARTUP_SECONDS} s of start, evaluations and checkpoints included")
        least = at_full_speed / max(1.0, cap - beside)
        fits = "fits" if seconds <= cap else "does NOT fit"
        print(f"{fits} in the track's {cap:,} s, for which {least:.1%} would be enough")
        fits = "fits" if peak <= GPU_GB - RESERVE_GB else "does NOT fit"
        print(f"{fits} in {GPU_GB} GB, {RESERVE_GB} of them left to the driver, NCCL and fragments")


# ---- the terminal, and what ends a run ---------------------------------------------------------------------


def printable(text):
    """Control characters as escapes: they would act on the terminal, and spoil a log for its readers."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def did_you_mean(name, names, otherwise):
    """A hint at the one of the names that a mistyped one is close to."""
    close = difflib.get_close_matches(name[:2] + name[2:].replace("-", "_"), names, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def first_line(e):
    lines = str(e).splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:120]}"


def is_out_of_memory(e):
    """Of a GPU, of PyTorch on a CPU (a plain RuntimeError), of numpy, or of the system."""
    if isinstance(e, OSError):
        return e.errno == errno.ENOMEM
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def explain(e):
    """(one line, exit status) of what ends a process, or None where it is a fault of this script."""
    if isinstance(e, UserError):
        return str(e), e.status
    if isinstance(e, KeyboardInterrupt):
        return str(e) or "interrupted", 130
    if is_out_of_memory(e):
        size = re.search(r"allocate ([\d.,]+ \w+)", str(e))
        what = f"out of memory, {size[1]} more could not be allocated" if size else "out of memory"
        remedy = "lower --device_tokens or --loss_chunk, or else the model; --dry_run says what a run takes"
        return f"{what}: {remedy}", 1
    if isinstance(e, OSError):  # while reading: write_file and Log say themselves what they cannot write
        return f"cannot read {e.filename or 'a file'}: {e.strerror or e}", 1
    if dist.is_initialized() and (isinstance(e, dist.DistError) or "gloo" in str(e)):
        return f"lost the connection to another rank ({first_line(e)}); --resume the last checkpoint", 1
    return None


MISSING = []  # what this machine turned out not to offer, and the run does without: Log tells each once


def do_without(what, e):
    note = f"{what} ({e.strerror or e}); the run goes on"
    if note not in MISSING:
        MISSING.append(note)


class Terminal:
    """sys.stdout or sys.stderr of a run that may outlive its terminal: what cannot be shown is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed before the start
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # samples hold any character

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError as e:
            self.give_up(e)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as e:
            self.give_up(e)

    def give_up(self, e):
        # Python tries once more at its end, and would then end with an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        do_without(f"nothing more is shown on {self.stream.name}", e)


# ---- commands ----------------------------------------------------------------------------------------------


def in_place(c, given):
    """The config of a run with those of PLACE_OPTIONS that were given for this machine."""
    c = dataclasses.replace(c, **{name: given[name] for name in PLACE_OPTIONS if name in given})
    check_config(c)
    return c


def load_run(folder, given, args):
    """(Config, Machine, meta, Lookup) of a run folder that is to be scored."""
    c, meta, _ = read_run(folder)
    c = in_place(c, given)
    m = setup_machine(c, args)
    train_tokens = None
    if c.memory or c.ngrams:
        path = find_data(c, m) / "train.bin"
        train_tokens = read_shard(path, c.vocab_size, meta["sha256"]["train.bin"])[: c.train_tokens]
    return c, m, meta, Lookup(train_tokens, c)


def sample_command(given, args):
    """--sample RUN --prompt TEXT: the prompt, and what the run's models write after it."""
    c, m, meta, lookup = load_run(args.sample, given, args)
    encoding = from_prepare("get_encoding", meta["tokenizer"])
    prompt = [c.bos_id, *encoding.encode_ordinary(args.prompt or "")]
    written = sample(args.sample, c, m, lookup, prompt, args.length or 500)
    if m.is_main:
        print(printable(encoding.decode([i for i in prompt + written if i != c.bos_id])))


@torch.no_grad()
def sample(folder, c, m, lookup, prompt, n_tokens, temperature=0.8, top_p=0.95):
    """Token ids that the run's models write after the ids `prompt`, which begin with a BOS. The most likely
    tokens that together have a share of top_p are drawn from. The context is computed again for each: slow,
    but simple.

    What c.recall would find is hidden from the model. Once it repeats itself, every length of n-gram agrees
    on how to go on, which in real text is right nearly always: it would never leave the loop."""
    scored = [(c_model, load_weights(folder, number, c_model, m)) for number, c_model in scored_models(c)]
    g = torch.Generator().manual_seed(c.seed)
    ids = list(prompt)
    for _ in range(n_tokens):
        inputs = lookup.inputs(np.array([ids], dtype=np.uint16))
        inputs[..., 1 : 1 + len(lengths(c.recall))] = NO_TOKEN
        mean = 0
        for c_model, p in scored:
            x = torch.from_numpy(inputs[:, -c_model.seq_len :].astype(np.int64))
            h = forward(p, x, c_model, m, phase_schedule(1.0, c_model))
            logits = head_logits(h[0, -1], p["lm_head"].to(h.dtype), c_model)
            mean = mean + logits.softmax(-1).cpu() / len(scored)
        probs, order = (mean.log() / temperature).softmax(-1).sort(descending=True)
        probs[probs.cumsum(0) - probs >= top_p] = 0
        ids.append(int(order[torch.multinomial(probs, 1, generator=g)]))
        if ids[-1] == c.bos_id:
            break
    return ids[len(prompt) :]


def score_command(given, args):
    """--score RUN --tokens FILE --nll OUT.npy: the contract that a referee relies on."""
    require(
        args.tokens and args.nll and args.nll.suffix == ".npy" and args.nll.parent.is_dir(),
        f"--score: needs --tokens FILE and --nll OUT.npy in a folder that exists, "
        f"not --tokens {args.tokens} --nll {args.nll}",
    )
    free = not os.path.lexists(args.nll)
    require(free, f"--nll {args.nll}: exists already; name a new file, or delete it")
    c, m, _, lookup = load_run(args.score, given, args)
    is_shard = args.tokens.suffix != ".npy"
    if is_shard:
        streams = read_shard(args.tokens, c.vocab_size)[None]
    else:
        streams = read_streams(args.tokens, c.vocab_size)
    nll = run_nll(args.score, lookup.inputs(streams), lookup, c, m).astype(np.float32)
    if m.is_main:
        write_npy(args.nll, nll[0] if is_shard else nll)
        print(f"{args.nll}: {nll[:, 1:].size:,} tokens scored, {mean_nll(nll):.6f} nats per token")


def train_command(given, args):
    """A new run, or the rest of one."""
    if args.resume:
        folder = args.resume
        c, meta, options = continued(given, args)
        m = setup_machine(c, args)
    else:
        c = make_config(given)
        m = setup_machine(c, args)
        meta = read_json(find_data(c, m) / "meta.json", check_meta)
        # Fixed now: a resumed run must not choose again.
        c = dataclasses.replace(
            with_vocabulary(c, meta), dtype="bf16" if m.dtype == torch.bfloat16 else "fp32"
        )
        options = {name: getattr(args, name) for name in RUNTIME_OPTIONS} | {"trial": args.steps is not None}
        names = [str(args.run_dir or f"runs/{c.track}_{time.strftime('%Y%m%d_%H%M%S')}_s{c.seed}")]
        if m.world_size > 1:  # the clocks of the ranks may differ
            dist.broadcast_object_list(names, src=0, device=m.device)
        folder = Path(names[0])
    check_machine(c, m, args)
    rows = c.batch_tokens // c.seq_len
    fits = rows % m.world_size == 0
    require(
        fits, f"--batch_tokens {c.batch_tokens}: {rows} sequences do not divide among {m.world_size} ranks"
    )
    data = find_data(c, m)
    train_tokens = read_shard(data / "train.bin", c.vocab_size, meta["sha256"]["train.bin"])
    val_tokens = read_shard(data / "val.bin", c.vocab_size, meta["sha256"]["val.bin"])
    enough = len(train_tokens) >= c.train_tokens
    require(enough, f"--train_tokens {c.train_tokens}: train.bin has only {len(train_tokens)}; lower it")
    lookup = Lookup(train_tokens[: c.train_tokens], c)
    inputs = lookup.training_inputs()
    plan = training_plan(c, inputs, m, options["steps"])
    set_compiled(m, args.compile, sum(model.train_flops for model in plan))
    fit_seconds = 0.0
    if args.fit:
        c, fit_seconds = fit(c, m)
        plan = training_plan(c, inputs, m)
    val_inputs = lookup.inputs(val_tokens[None])
    log = Log(folder, m)  # from here on the folder is this process's alone
    state = load_state(folder, c, m, args.force) if args.resume else new_state(c)
    options["trial"] = options["trial"] or state["source"] != SOURCE_SHA256
    if m.is_main:
        # Without a lock, a run that has not saved yet may still be under way.
        free = args.resume or (is_free(folder) and (log.locked or not (folder / "config.json").exists()))
        require(free, f"{folder}: another run has just taken this name; choose one with --run_dir")
        stored = options | {"config": dataclasses.asdict(c), "data": meta}
        write_json(folder / "config.json", stored | {"sha256": json_sha256(stored)})
    eval_inputs = evaluation_inputs(val_inputs[0], c)
    trial = options["trial"]
    progress = state["progress"]
    metrics = Metrics(folder, m, progress)
    parts = (plan, lookup, val_inputs, eval_inputs, log, metrics, fit_seconds, progress)
    run = Run(folder, c, m, meta, trial, *parts)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal was closed
    signal.signal(signal.SIGTERM, functools.partial(note_signal, run))
    signal.signal(signal.SIGINT, functools.partial(note_signal, run))
    with contextlib.closing(log), concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            train(run, state["shards"], Saver(run, thread))
            run.training_over = True
            # A signal since the last step stops the run here, on all ranks.
            if any(all_gather(m, bool(run.stop_requested))):
                raise stopped(run)
            finish(run)
            barrier(m)  # where a rank fails, torchrun stops all: none leaves before the record is written
        except (Exception, KeyboardInterrupt) as e:
            explained = explain(e)
            if explained:
                log(explained[0], show=False)
            raise


def check_machine(c, m, args):
    """Refuse to train a track for GPUs, unasked, on what takes weeks or runs out of memory."""
    if "max_ranks" not in read_rules(c.track):
        return
    if m.device.type == "cpu" and args.device != "cpu":
        reason = "none is there"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as e:  # a driver that is too old, or a PyTorch without CUDA
            reason = first_line(e)
        message = f"--track {c.track}: needs a GPU, and torch can use none ({reason}); fix that"
        raise UserError(f"{message}, or add --device cpu to train on the CPU all the same")
    fits = m.device.type == "cpu" or m.attention != "sdpa" or args.attention == "sdpa"
    require(
        fits,
        f"--track {c.track}: only {m.reasons['attention']} is left, which takes more memory than a GPU has; "
        "update PyTorch and the driver, or add --attention sdpa to try it all the same",
    )


def continued(given, args):
    """(Config, meta, runtime options) of a run to resume, perhaps with more members or a student. Options in
    args that were left open become the run's."""
    folder = args.resume
    c, meta, options = read_run(folder)
    c = in_place(c, given)
    for name in RUNTIME_OPTIONS:
        if getattr(args, name) in (None, "auto"):
            setattr(args, name, options[name])
    members = given.get("members", c.members)
    student = given.get("student", c.student)
    may_grow = c.chains == 1 and not c.student
    require(members >= c.members, f"--members {members}: the run has {c.members} already")
    require(
        members == c.members or may_grow, f"--members {members}: a run with chains or a student cannot grow"
    )
    require(student == c.student or not c.student, f"--student {student}: the run has its student already")
    c = dataclasses.replace(c, members=members, student=student)
    check_config(c)
    record = folder / "record.json"
    n_finished = read_json(record, lambda content: content["members"]) if record.exists() else 0
    remedy = "see record.json; a larger --members or a --student adds to it"
    require(n_finished != len(model_configs(c)), f"--resume {folder}: this run is finished, {remedy}")
    return c, meta, options


def note_signal(run, number, frame):
    """Asked once, a run stops after its step. Asked again later, or after training, it stops at once. Within
    ten seconds it counts as once: torchrun passes on a Ctrl-C that the terminal has sent already."""
    run.stop_requested.append(time.monotonic())
    if run.training_over or run.stop_requested[-1] > run.stop_requested[0] + 10:
        raise stopped(run)


def stopped(run, where="stopped"):
    """What ends a run that was asked to stop: nothing takes a KeyboardInterrupt for an error of its own."""
    if run.finished:
        return KeyboardInterrupt(f"{where}; the run is finished, see {run.folder}/record.json")
    return KeyboardInterrupt(f"{where}; go on with: python {SCRIPT} --resume {run.folder}")


# ---- options -----------------------------------------------------------------------------------------------

# Lowest and highest value of each number. Sizes end far beyond any use, so that no slip and no made-up
# config.json asks for an absurd amount of memory. BELOW_1: a dropout of 1 would leave nothing, and a phase
# that begins at 1 would never come.
BELOW_1 = math.nextafter(1.0, 0.0)
RANGES = (
    ("n_layer n_head bag_size members chains", 1, 1000),
    ("loop_first loop_last loop_times evals", 0, 1000),
    ("n_embd window_short", 1, 2**16),
    ("mlp_hidden seq_len loss_chunk", 1, 2**20),
    ("batch_tokens device_tokens train_tokens eval_windows", 1, 2**29),
    ("teacher_switch_every save_every cpu_threads", 1, 2**31),
    ("seed score_stride", 0, 2**31),
    ("vocab_size bos_id", 0, 2**16 - 1),
    ("muon_lr embed_lr head_lr scalar_lr weight_decay mtp_weight", 0, 1e6),
    ("warmup warmdown momentum_start momentum_warmup muon_momentum muon_beta2 distill_alpha", 0, 1),
    ("dropout loop_from bag_until ema adam_beta1 adam_beta2 ngram_weight", 0, BELOW_1),
    ("softcap epochs distill_temp", 1e-6, 1e6),
)


def check_config(c):
    """Refuse what cannot be trained, before anything is loaded. A new field needs no line here."""
    for names, low, high in RANGES:
        for name in names.split():
            value = getattr(c, name)
            require(low <= value <= high, f"--{name} {value}: must be from {low} to {high:.10g}")

    def given(*names):
        return " ".join(f"--{name} {getattr(c, name)}" for name in names)

    loop_exists = c.loop_times == 0 or c.loop_first <= c.loop_last < c.n_layer
    number = r"(\d+\.?\d*|\.\d+)"
    well_formed_points = re.fullmatch(f"{number}:{number}(,{number}:{number})*", c.wd_points)
    require(c.n_embd % (4 * c.n_head) == 0, f"{given('n_embd', 'n_head')}: heads need 4, 8, 12 ... channels")
    require(c.batch_tokens % c.seq_len == 0, f"{given('batch_tokens', 'seq_len')}: choose a multiple")
    require(c.device_tokens >= c.seq_len, f"{given('device_tokens', 'seq_len')}: must hold one sequence")
    require(c.score_stride <= c.seq_len, f"{given('score_stride', 'seq_len')}: would leave tokens out")
    require(c.train_tokens > c.bag_size, f"{given('train_tokens', 'bag_size')}: must be more than one bag")
    require(re.fullmatch("[SL]+", c.window_pattern), f"{given('window_pattern')}: write it in S and L")
    require(c.warmup + c.warmdown <= 1, f"{given('warmup', 'warmdown')}: together more than all of training")
    require(c.members % c.chains == 0, f"{given('members', 'chains')}: choose a multiple")
    require(loop_exists, f"{given('loop_first', 'loop_last')}: not a range of layers 0 to {c.n_layer - 1}")
    require(c.dtype in ("auto", "bf16", "fp32"), f"{given('dtype')}: choose auto, bf16 or fp32")
    for name in ("recall", "memory", "ngrams"):
        well_formed = re.fullmatch(r"([1-9]\d{0,3}(,[1-9]\d{0,3}){0,99})?", getattr(c, name))
        require(well_formed, f"{given(name)}: write up to 100 lengths with commas between, such as 4,8,16")
    fit = max([0, *lengths(c.ngrams)]) < c.train_tokens
    require(fit, f"{given('ngrams', 'train_tokens')}: choose lengths below the number of tokens")
    fractions = [fraction for fraction, _ in parse_wd_points(c)] if well_formed_points else []
    rising = well_formed_points and fractions == sorted(fractions)
    require(rising, f"{given('wd_points')}: write rising fraction:multiple pairs, such as 0:1,0.5:0.1,1:1.5")
    if c.student:
        student = model_configs(c)[-1]
        require(student.distill_alpha > 0, f"{given('student')}: it learns nothing; add distill_alpha=0.5")
        check_config(student)


KINDS = {bool: "0 or 1", int: "a whole number", float: "a number", str: "one line of text"}
BOOLS = {"0": False, "1": True, "false": False, "true": True}


def parse_value(name, value):
    """A value of the Config field `name`: of the field's type, or a string that holds one."""
    kind = Config.__dataclass_fields__[name].type
    fits = type(value) in (kind, str) or (kind is float and type(value) is int)
    with contextlib.suppress(ValueError, OverflowError, KeyError):
        if fits and str(value).isprintable():
            return BOOLS[str(value).lower()] if kind is bool else kind(value)
    raise UserError(f"--{name} {value}: must be {KINDS[kind]}")


def make_config(given):
    """The track's preset with the given values on top; without a track, the small recipe."""
    track = given.get("track", "pocket")
    require(track in PRESETS, f"--track {track}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS[track] if "track" in given else SMALL
    values = preset | {"track": track} | given
    c = Config(**{name: parse_value(name, value) for name, value in values.items()})
    check_config(c)
    return c


def parse_path(name, value):
    require(value, f"--{name}: is empty; name a file or folder")  # Path("") is the current folder
    return Path(value)


def parse_args(argv):
    """(the recipe's options that were given, all others)"""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def refuse(message):
        _, _, words = message.partition("unrecognized arguments: ")
        options = re.findall(r"--\w+", parser.format_usage())
        hint = did_you_mean(re.split("[= ]", words)[0], options, "--help lists the options")
        raise UserError(f"{message}; {hint}")

    parser.error = refuse
    paths = (
        ("resume", "RUN", "continue a run that was stopped or killed"),
        ("score", "RUN", "score --tokens with a run's models, write --nll"),
        ("sample", "RUN", "have a run's models continue --prompt"),
        ("tokens", "FILE", "a shard, or a .npy of uint16 [n_streams, length] of independent streams"),
        ("nll", "OUT.npy", "nats per token, in the shape of --tokens"),
        ("run_dir", "DIR", "folder of a new run [runs/TRACK_TIME_SEED]"),
    )
    for name, metavar, text in paths:
        parse = functools.partial(parse_path, name)
        parser.add_argument(f"--{name}", type=parse, metavar=metavar, help=text)
    gpus = "say what a run would take on that many GPUs (default: the track's number), and train nothing"
    parser.add_argument("--dry_run", type=int, nargs="?", const=0, metavar="GPUS", help=gpus)
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--length", type=int, metavar="N", help="tokens that --sample writes at most [500]")
    parser.add_argument("--steps", type=int, metavar="N", help="squeeze a new run into N steps, as a trial")
    shorten = "fewer epochs than the recipe's, if they would not end in the track's time on this machine"
    parser.add_argument("--fit", action="store_true", help=shorten)
    parser.add_argument("--force", action="store_true", help="--resume with an edited script, as a trial")
    for name, choices in RUNTIME_CHOICES.items():
        parser.add_argument(f"--{name}", default="auto", choices=choices.split())
    recipe = parser.add_argument_group("recipe: the fields of Config [value without --track]")
    # The comment behind a field of Config is its help.
    comments = dict(re.findall(r"^    (\w+): \w+ = [^#\n]*# (.*)$", SOURCE.decode(), re.MULTILINE))
    metavars = {int: "N", float: "X", str: "TEXT", bool: "0|1"}
    for field in dataclasses.fields(Config):
        parse = functools.partial(parse_value, field.name)
        text = f"{comments.get(field.name, '')} [{SMALL.get(field.name, field.default)}]".replace("%", "%%")
        option = recipe.add_argument(f"--{field.name}", type=parse, default=argparse.SUPPRESS, help=text)
        option.metavar = metavars[field.type]
    for before, word in itertools.pairwise(["", *argv]):
        # A name with a newline in it would forge lines of the log.
        fits = word.isprintable() or before == "--prompt" or word.startswith("--prompt=")
        require(fits, f"{word!a}: has characters that cannot be printed; leave them out")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in Config.__dataclass_fields__}
    exists = args.run_dir and (args.run_dir / "config.json").exists()
    if exists and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        # torchrun starts the same command again after a rank was lost.
        check_same_run(given, args)
        given = {}
        args.resume = args.run_dir
        args.run_dir = None
        args.steps = None
        args.fit = False
    if args.run_dir:
        remedy = "name a new folder, or --resume the run that it holds"
        require(is_free(args.run_dir), f"--run_dir {args.run_dir}: is not empty; {remedy}")
    check_combination(given, args)
    return given, args


def check_same_run(given, args):
    """The run that is to go on is the one that this command began, not one that had the name before it."""
    stored, _, _ = read_run(args.run_dir)
    found = ["vocab_size", "bos_id", "dtype"]  # what the data and the machine decided
    if args.fit:
        found.append("epochs")
    for name, value in dataclasses.asdict(make_config(given)).items():
        same = name in found or value == getattr(stored, name)
        require(same, f"--run_dir {args.run_dir}: holds a run of another --{name}; name a new folder")


def check_combination(given, args):
    """Refuse options that do not go together."""
    commands = [name for name in ("resume", "score", "sample", "dry_run") if getattr(args, name) is not None]
    require(len(commands) < 2, f"--{' --'.join(commands)}: choose one")
    command = commands[0] if commands else "train"
    fitting = Config.__dataclass_fields__
    if command == "resume":
        fitting = ("members", "student", *PLACE_OPTIONS)
    elif command in ("score", "sample"):
        fitting = PLACE_OPTIONS
    for name in given:
        require(name in fitting, f"--{name}: is for a new run, leave it out")
    owners = dict(tokens="score", nll="score", prompt="sample", length="sample", force="resume")
    for name, owner in (owners | dict(run_dir="train", steps="train", fit="train")).items():
        fits = getattr(args, name) in (None, False) or command == owner
        require(fits, f"--{name}: goes with {'a new run' if owner == 'train' else f'--{owner} RUN'}")
    require(not (args.fit and args.steps), "--fit: leave out --steps, which shortens a run, too")
    for name in ("steps", "length"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} {value}: must be 1 or more")


# ---- main --------------------------------------------------------------------------------------------------


def main():
    with contextlib.redirect_stdout(Terminal(sys.stdout)), contextlib.redirect_stderr(Terminal(sys.stderr)):
        run_command(sys.argv[1:])


def run_command(argv):
    is_first_local = True
    try:
        is_first_local = launched().local_rank == 0
        given, args = parse_args(argv)
        if args.score:
            score_command(given, args)
        elif args.sample:
            sample_command(given, args)
        elif args.dry_run is not None:
            dry_run(make_config(given), args.dry_run)
        else:
            train_command(given, args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as e:
        explained = explain(e)
        if explained is None:
            raise
        message, status = explained
        # All ranks see a user's error, so one per machine prints it; a rank prints its own failures.
        if is_first_local or not isinstance(e, (UserError, KeyboardInterrupt)):
            print(f"{SCRIPT}: {message}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
