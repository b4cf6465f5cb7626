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
step), record.json, val_nll.npy and the weights.

This file is what records change: config, schedules, model, objective, optimizer, look-ups, n-grams, batches,
training, scoring. To change the model, see param_table and block; the loss: loss_function; the optimizer:
muon_update and adamw_update. A step is train_model > train_step > train_pass > forward and objective, then
optimizer.step. harness.py runs it, and its docstring lists what it calls here. Everywhere, c is the Config, m
the harness's Machine, run its Run (folder, log, progress), and p the weights, a dict of tensors by name.
"""

import harness  # isort: skip  # first, because it starts the track's clock and sets up OpenMP for torch

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import re
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from harness import Monitor, all_reduce, load_shards, load_weights, require, to_device

if torch.cuda.is_available():  # Neither trains on a CPU, and they take seconds to import.
    from torch.nn.attention import flex_attention as flex
    from torch.nn.attention import varlen

    compiled_flex = torch.compile(flex.flex_attention)  # Uncompiled, it would write out every score.


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
    unet: bool = True  # layer i's output, times a learned scalar, is added to the input of layer n_layer-1-i
    attn_gate: bool = True  # each head's output times a sigmoid of the layer's input
    iha: bool = False  # learned matrices mix the heads' queries, keys and values (2602.21371)
    # Look-ups: for each length n, the model also gets the token that followed the last occurrence of the
    # same n-gram.
    recall: str = ""  # lengths to look up in the token's own document, such as 4,8,16
    memory: str = ""  # lengths to look up in the other training documents
    ngrams: str = ""  # context lengths of an n-gram count model whose log-probabilities join the logits
    loop_first: int = 0  # looped layers: the first of a range that runs several times in a row
    loop_last: int = 0  # the last of that range, included
    loop_times: int = 0  # how many times more it runs
    loop_from: float = 0.5  # fraction of training at which that begins
    # learning more from the same tokens
    epochs: float = 3.2  # passes over train_tokens; a step with bags counts as one without, but reads more
    dropout: float = 0.0  # of what each attention and each MLP adds to the residual stream
    bag_size: int = 1  # token superposition (2605.06546): bags of tokens in, the next bag's tokens out
    bag_until: float = 0.0  # fraction of training at which bags end
    mtp_weight: float = 0.0  # weight of the loss on the token after the next (2404.19737)
    ema: float = 0.0  # final weights are an exponential moving average with this decay per step
    members: int = 1  # models trained in turn, each with its own seed; their mean probability is scored
    chains: int = 1  # the members form this many chains; in one, each learns from the one before it
    distill_alpha: float = 0.0  # share of the loss that is KL to the teacher, the member before in its chain
    distill_temp: float = 1.0  # temperature of both distributions in that KL (1503.02531)
    student: str = ""  # name=value,... of a last model, distilled from all members and scored alone
    teacher_switch_every: int = 25  # steps that a student learns from one member before it turns to the next
    # optimization
    batch_tokens: int = 4096  # tokens, or bags, per optimizer step, over all ranks
    device_tokens: int = 8192  # the same per forward pass of one rank; fewer save memory and cost speed
    loss_chunk: int = 1024  # tokens whose logits are in memory at the same time
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
    score_stride: int = 0  # tokens between the starts of scoring windows, which may overlap; 0: seq_len
    online_lr: float = 0.0  # rate at which scoring learns a correction from the stream so far; 0: none
    evals: int = 8  # evaluations per model, the final score included
    eval_windows: int = 40  # windows of seq_len tokens in an evaluation, spread over the validation stream
    save_every: int = 100  # steps between checkpoints
    cpu_threads: int = 4  # at most this many on a CPU, over all ranks of a machine
    dtype: str = "auto"  # bf16, fp32, or auto: bf16 where the hardware has instructions for it


LOOK_UP = dict(recall="1,2,3,4,5,6,8,12,16,24,32", memory="3,4,5,6,8,12,16,24")
MTP_IHA = dict(mtp_weight=0.3, iha=True)

# The harness starts from SMALL without --track, and from PRESETS[track] with it; options override both.
# SMALL: a small recipe on the pocket track's data, for a first look on any machine.
SMALL = LOOK_UP | MTP_IHA | dict(n_layer=3, n_embd=96, mlp_hidden=256, weight_decay=0.25)

POCKET = (
    LOOK_UP
    | MTP_IHA
    | dict(ema=0.99, weight_decay=0.25, epochs=6.9, evals=4, score_stride=256)
    | dict(ngrams="1,2,3,4,5,6,8,11,15,20,28,40", online_lr=0.02)
)
PROSE = POCKET | dict(
    data="prose", epochs=5.7, score_stride=0, ngrams="1,2,3,4,5,6,8,11,15,20,28", online_lr=0.01
)

FINEWEB = (
    MTP_IHA
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

# The recipe of each track's standing record, where there is one. The records of pocket_unlimited, prose and
# prose_unlimited were calibrated on the stream; their presets have online_lr instead, which gains more. The
# FineWeb presets and mini's have not run on a GPU yet. The former follow Slowrun's published scripts;
# records/transfer.md says where they differ.
PRESETS = {
    "pocket": POCKET,
    "pocket_unlimited": POCKET | dict(n_embd=256, mlp_hidden=688, weight_decay=0.4, members=3),
    "prose": PROSE,
    "prose_unlimited": PROSE | dict(members=2, distill_alpha=0.4),
    "mini": MTP_IHA
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
    of_the_run = (
        "track data train_tokens vocab_size bos_id seed members chains student recall memory ngrams softcap "
        "online_lr"
    )
    names = Config.__dataclass_fields__.keys() - of_the_run.split()
    # A student begins where its teachers ended: past the bags, with its loops on from the first step.
    changes = {"bag_until": 0.0, "loop_from": 0.0} | harness.parse_changes("student", c.student, names)
    return [*members, dataclasses.replace(members[0], seed=c.seed + 1000 * c.members, **changes)]


NO_TOKEN = 65535  # where a look-up finds nothing; no token has this id
UNITS_PER_NAT = 4096  # inputs are whole numbers, so n-grams' -log p is in units of 1 / 4096 nats there


def lengths(text):
    """The lengths in c.recall and c.memory, or those of contexts in c.ngrams."""
    return [int(n) for n in text.split(",") if n]


def n_lookups(c):
    """How many looked-up tokens go with each input token."""
    return len(lengths(c.recall)) + len(lengths(c.memory))


def n_inputs(c):
    """How many numbers are each token's input: itself, its look-ups, and with c.ngrams the -log p of
    every token that may come next (NgramModel.nll)."""
    return 1 + n_lookups(c) + (c.vocab_size if c.ngrams else 0)


def check_recipe(c):
    """Refuse what cannot be trained, before anything is loaded. A new field needs no line here; the harness
    has checked the range of the numbers that it knows."""

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
    for name in ("recall", "memory", "ngrams"):
        well_formed = re.fullmatch(r"([1-9]\d{0,3}(,[1-9]\d{0,3}){0,99})?", getattr(c, name))
        require(well_formed, f"{given(name)}: write up to 100 lengths with commas between, such as 4,8,16")
        different = len(set(lengths(getattr(c, name)))) == len(lengths(getattr(c, name)))
        require(different, f"{given(name)}: choose different lengths")
    fit = max([0, *lengths(c.ngrams)]) < c.train_tokens
    require(fit, f"{given('ngrams', 'train_tokens')}: choose lengths below the number of tokens")
    require(0 <= c.online_lr <= 1, f"{given('online_lr')}: must be from 0 to 1")
    for name in ("ngrams", "online_lr"):
        small = not getattr(c, name) or c.vocab_size <= 1024
        require(small, f"{given(name)}: for bytes; {c.vocab_size:,} numbers with each token are too many")
    fractions = [fraction for fraction, _ in parse_wd_points(c)] if well_formed_points else []
    rising = well_formed_points and fractions == sorted(fractions)
    require(rising, f"{given('wd_points')}: write rising fraction:multiple pairs, such as 0:1,0.5:0.1,1:1.5")
    if c.student:
        student = model_configs(c)[-1]
        require(student.distill_alpha > 0, f"{given('student')}: it learns nothing; add distill_alpha=0.5")
        harness.check_config(student)


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

    shape: tuple  # of one layer's, where each layer has its own; matrices are [out, in]
    init: Callable  # of (stacked shape, generator): the first values, float32 on the CPU
    optimizer: str  # muon: matrices in the last two dimensions; adamw: anything
    lr: str  # the field of Config that holds its learning rate
    decay: bool  # whether weight decay applies
    n_stack: int  # 0: not per layer; else [n_stack, *shape]: layer i uses i % n_stack, and may share it
    multiplied: bool  # in a matrix product at every position, once per layer that runs: counted in FLOPs
    used: bool  # by this config


def constant(value):
    return lambda shape, g: torch.empty(shape).copy_(torch.as_tensor(value, dtype=torch.float32))


def normal(std):
    return lambda shape, g: torch.empty(shape).normal_(0, std, generator=g)


def uniform(bound):
    return lambda shape, g: torch.empty(shape).uniform_(-bound, bound, generator=g)


def attention_init(bound):
    """For the attention bank: the output projection starts at zero, so a fresh layer only rescales x0."""

    def init(shape, g):
        w = uniform(bound)(shape, g)
        w[:, 3] = 0  # [layer, o, out, in]
        return w

    return init


def param_table(c):
    """Name -> Param of every parameter, in the order in which their first values are drawn from the seed.
    First values follow nanochat and Slowrun: layers rescale x0, and the head gives logits near zero."""
    L = c.n_layer
    V = c.vocab_size
    D = c.n_embd
    H = c.n_head
    bound = (3 / D) ** 0.5  # a uniform distribution of variance 1 / fan_in
    n_square = 4 + c.value_proj
    n_gates = c.value_proj + c.attn_gate
    n_in = min(32, D)  # channels of its input that a gate reads (Slowrun, modded-nanogpt)
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
    #                    shape                init             optimizer, lr, decay  n_stack multiplied used
    table = {
        "wte":     Param((V, D),                normal(1.0),              *EMBED,  0, False, True),
        "lm_head": Param((V, D),                normal(0.001),            *HEAD,   0, True,  True),
        # q, k, v, o and, with value_proj, the projection of x0 into the values
        "attn":    Param((n_square, D, D),      attention_init(bound),    *MATRIX, L, True,  True),
        "mlp_in":  Param((2, c.mlp_hidden, D),  uniform(bound),           *MATRIX, L, True,  True),
        "mlp_out": Param((D, c.mlp_hidden),     constant(0.0),            *MATRIX, L, True,  True),
        "mix":     Param((2,),                  constant([1.1, 0.1]),     *SCALAR, L, False, True),
        # [0] gates the values (value_proj), [-1] the attention's output (attn_gate)
        "gates":   Param((n_gates, H, n_in),    constant(0.0),            *SCALAR, L, True,  n_gates > 0),
        "skip":    Param((L // 2,),             constant(1.0),            *SCALAR, 0, False, has_skips),
        # a table for each look-up; its last row stands for NO_TOKEN
        "lookup":  Param((n_lookup, V + 1, D),  constant(0.0),            *EMBED,  0, False, has_lookups),
        "iha":     Param((3, H, H),             constant(torch.eye(H)),   *SCALAR, L, False, c.iha),
        # how much of the n-gram model's log-probabilities is added to the logits
        "ngram_gate": Param((1, D),             constant(0.0),            *HEAD,   0, True,  bool(c.ngrams)),
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


def attention_masks(starts, windows, m):
    """Masks for attention(), by window size. The three implementations (varlen and flex on a GPU, sdpa
    anywhere) allow the same pairs: token i sees token j if j <= i, i - j < window, and no document begins in
    (j, i]. starts [B, T], bool: where a document begins; on the CPU, so that nothing waits for the device."""
    B, T = starts.shape
    if m.attention == "varlen":
        cu_seqlens = to_device(sequence_bounds(starts), m)
        return {window: (cu_seqlens, window) for window in windows}
    document = to_device(starts, m).cumsum(1, dtype=torch.int32) + 1  # from 1 on: 0 is no document
    if m.attention == "flex":

        def allowed(window):
            return lambda b, h, i, j: (j <= i) & (i - j < window) & (document[b, i] == document[b, j])

        return {w: flex.create_block_mask(allowed(w), B, None, T, T, device=m.device) for w in windows}
    return {window: sdpa_mask(document, window, m) for window in windows}


def sequence_bounds(starts):
    """For varlen, where rows and documents are sequences of one long batch: int32 offsets of each sequence,
    then the total length."""
    starts = starts.clone()
    starts[:, 0] = True
    firsts = starts.flatten().nonzero()[:, 0].int()
    # Padded with empty sequences to a power of two, so that the kernel nearly always sees one shape. There is
    # always at least one entry of padding: it ends the last document.
    room = 1 << max(starts.numel() // 256, len(firsts)).bit_length()
    return F.pad(firsts, (0, room - len(firsts)), value=starts.numel())


def sdpa_mask(document, window, m):
    """For sdpa, what is added to the scores, 0 or -inf: [B * blocks, 1, queries, keys]. document [B, T]: each
    token's document, from 1 on. A window that divides a row at least twice goes in T / window blocks: a block
    of queries sees the keys of its own block and of the one before. Otherwise the row is the only block."""
    T = document.size(1)
    if 2 * window <= T and T % window == 0:
        document_q = document.unflatten(1, (-1, window))  # [B, blocks, window]
        document_k = with_block_before(document, window)  # [B, blocks, 2 * window], first 0: no document
    else:
        document_q = document_k = document[:, None]  # [B, 1, T]
    n_q = document_q.size(2)
    n_k = document_k.size(2)
    i = torch.arange(n_k - n_q, n_k, device=m.device)[:, None]
    j = torch.arange(n_k, device=m.device)
    forbidden = (j > i) | (i - j >= window) | (document_q[..., None] != document_k[:, :, None])
    # SDPA would turn a mask of booleans into this again in every layer.
    mask = torch.zeros(forbidden.shape, dtype=m.dtype, device=m.device)
    mask.masked_fill_(forbidden, -math.inf)
    return mask.flatten(0, 1)[:, None]


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


def try_attention(m, c):
    """Raises where m.attention does not work on this machine; the harness then tries the next one."""
    shape = (2, 128, c.n_head, c.n_embd // c.n_head)
    q = torch.randn(shape, device=m.device, dtype=m.dtype, requires_grad=True)
    starts = torch.zeros(2, 128, dtype=torch.bool)
    masks = attention_masks(starts, [64], m)
    attention(q, q, q, masks[64], m.attention).sum().backward()


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
    """Whether a document begins in each position, a token or a bag: [B, T] of inputs [B, T * bag_size,
    n_inputs(c)]."""
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
    """Hidden states [B, T, D], normalized, ready for the head, of inputs [B, T * phase.bag_size,
    n_inputs(c)] (see Lookup) on the CPU. run_block: block() or its compiled form; scoring comes in many
    shapes, not worth compiling."""
    x = embed(p, to_device(inputs[..., : 1 + n_lookups(c)], m), c, phase.bag_size)
    T = x.size(1)
    cos, sin = rope_tables(T, c.n_embd // c.n_head, m.device, m.dtype)
    windows = [min(layer_window(c, i), T) for i in phase.layers]
    masks = attention_masks(document_starts(inputs, c, phase.bag_size), sorted(set(windows)), m)
    # Stacked parameters are cast and taken apart once per pass, not once per use. In training,
    # step_weights() has applied iha already and left it out.
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
        if c.unet and i < c.n_layer // 2:  # looped layers write it, or add it, each time
            skips[i] = x
    return norm(x)


def flops_per_token(c, phase):
    """FLOPs of a forward pass per position: two per weight that is multiplied, and the attention over the
    average window, as if no document began in it."""
    weights = 0
    for entry in param_table(c).values():
        if entry.multiplied:
            weights += math.prod(entry.shape) * (len(phase.layers) if entry.n_stack else 1)
    windows = [min(layer_window(c, i), c.seq_len) for i in phase.layers]
    seen = [w - w * (w - 1) / 2 / c.seq_len for w in windows]  # tokens that the average token attends to
    return 2 * weights + 4 * c.n_embd * sum(seen)


# ---- objective ---------------------------------------------------------------------------------------------


def padded_head(w, dtype):
    """The head [V, D] in the dtype of the matrix products. A row of 50,257 logits in bf16 does not begin at a
    multiple of 16 bytes, as a GPU's fast kernels need, so V is rounded up to a multiple of 8."""
    return F.pad(w.to(dtype), (0, 0, 0, -len(w) % 8))


def head_logits(h, head, c):
    """Float32 logits [..., V] within +-c.softcap, of hidden states h [..., D] under a head, which may be a
    padded_head() with rows beyond V."""
    logits = F.linear(h, head)[..., : c.vocab_size].float()
    return c.softcap * torch.tanh(logits / c.softcap)


class LogitParts(NamedTuple):
    """What the logits of N tokens are made from; or the gradients of these parts."""

    h: torch.Tensor  # [N, D], hidden states
    head: torch.Tensor  # a padded_head()
    # With c.ngrams:
    gate: torch.Tensor | None = None  # [N, 1] float32, how much the n-gram model counts
    ngram_nll: torch.Tensor | None = None  # [N, V], its -log p in units of 1 / UNITS_PER_NAT nats

    def chunk(self, rows):
        gate, ngram_nll = (None if x is None else x[rows] for x in (self.gate, self.ngram_nll))
        return LogitParts(self.h[rows], self.head, gate, ngram_nll)

    def detach(self):
        return LogitParts(*(None if x is None else x.detach() for x in self))


def logit_parts(p, h, inputs, c, m, bag_size=1):
    """The LogitParts of hidden states h [N, D] of inputs [B, T * bag_size, n_inputs(c)]."""
    head = padded_head(p["lm_head"], h.dtype)
    if not c.ngrams:
        return LogitParts(h, head)
    # The gate begins at 0.25, about the n-grams' best share in a mean of probabilities, and is learned.
    gate = 0.25 + F.linear(h, p["ngram_gate"].to(h.dtype)).float()
    of_last = inputs[:, bag_size - 1 :: bag_size, -c.vocab_size :]  # [B, T, V], of each bag's last token
    return LogitParts(h, head, gate, to_device(of_last, m).flatten(0, 1))


def make_logits(parts, c):
    """Float32 logits [N, V]: the network's, plus the gate times the n-gram model's log p (2210.14431)."""
    logits = head_logits(parts.h, parts.head, c)
    if parts.gate is None:
        return logits
    return logits - parts.gate * (parts.ngram_nll.float() / UNITS_PER_NAT)


def loss_function(logits, targets, c, teacher_logits=None):
    """(the loss to minimize, what to log of it by name), sums over a chunk of n tokens, in nats. Plain
    PyTorch: a new term is a line here, and every entry of the dict is logged at every step; "loss" stays the
    plain cross-entropy. A new term must skip the rows with targets[:, 0] < 0. The further target (mtp_weight)
    goes through this function, too. A term that needs hidden states or weights goes into train_pass.

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


def chunk_grad(parts, targets, scale, c, teacher_parts=None):
    """(the gradients of h, head and, where there is one, gate; logged sums) of scale * loss_function for a
    chunk of LogitParts. The logged sums are not scaled."""

    def scaled_loss(h, head, gate):
        # What make_logits reads from c, a teacher shares with its student (of_the_run in model_configs).
        teacher_logits = None if teacher_parts is None else make_logits(teacher_parts, c)
        logits = make_logits(LogitParts(h, head, gate, parts.ngram_nll), c)
        loss, logged = loss_function(logits, targets, c, teacher_logits)
        return scale * loss, logged

    argnums = (0, 1) if parts.gate is None else (0, 1, 2)
    return torch.func.grad(scaled_loss, argnums, has_aux=True)(parts.h, parts.head, parts.gate)


def objective(parts, targets, scale, c, m, teacher_parts=None):
    """(the gradients of LogitParts, the head's in float32; logged sums) of scale * loss_function, chunk by
    chunk: no loss is returned, so that all logits are never there at once. targets [N, K]; scale: a tensor,
    because torch.compile recompiles for each new Python number; teacher_parts: those of the model to learn
    from."""
    grad_h = torch.empty_like(parts.h)
    grad_head = torch.zeros_like(parts.head, dtype=torch.float32)
    grad_gates = []  # of each chunk; none without c.ngrams
    logged = {}
    for i in range(0, len(targets), c.loss_chunk):
        rows = slice(i, i + c.loss_chunk)
        teacher_chunk = None if teacher_parts is None else teacher_parts.chunk(rows)
        grads, sums = m.functions.chunk_grad(parts.chunk(rows), targets[rows], scale, c, teacher_chunk)
        grad_h[rows] = grads[0]
        grad_head += grads[1]
        grad_gates.extend(grads[2:])
        logged = {name: logged.get(name, 0.0) + value for name, value in sums.items()}
    return LogitParts(grad_h, grad_head, torch.cat(grad_gates) if grad_gates else None), logged


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
    nothing. Collectives have PyTorch 2.13's names: all_gather_single was all_gather_into_tensor."""

    def __init__(self, p, c, m):
        self.p = p
        self.c = c
        self.m = m
        self.table = param_table(c)
        self.shard_size = {}  # name -> number of a rank's items, the last rank's padding included
        self.state = {}  # name -> (momentum, second moment): tensors with an entry for each of them
        for name, w in p.items():
            items = self.items(name, w)
            shard_shape = (-(-len(items) // m.world_size), *items.shape[1:])
            per_neuron = (*shard_shape[:2], 1) if self.table[name].optimizer == "muon" else shard_shape
            self.shard_size[name] = shard_shape[0]
            self.state[name] = [torch.zeros(s, device=w.device) for s in (shard_shape, per_neuron)]

    def items(self, name, w):
        return w.view(-1, *w.shape[-2:]) if self.table[name].optimizer == "muon" else w.view(-1)

    def shard(self, name, w):
        """This rank's items of a parameter, or of a tensor of its shape."""
        size = self.shard_size[name]
        return self.items(name, w)[self.m.rank * size :][:size]

    def gather(self, name, shard):
        """(all items of a parameter, of which each rank has its shard; pending communication)."""
        size = self.shard_size[name]
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
        """lr and wd: multiples of the config's (see schedules). Frees the gradients, p[name].grad."""
        summed = {}  # name -> (gradient of this rank's shard, pending communication)
        for name, w in self.p.items():  # every sum is under way before the first update needs one
            # A parameter that this phase does not use has no gradient: it counts as zero.
            grad = self.items(name, torch.zeros_like(w) if w.grad is None else w.grad)
            w.grad = None
            pending = None
            if self.m.world_size > 1:
                shard_size = self.shard_size[name]
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
            self.m.functions.muon_update(shard, grad[:n], *moments, *settings)
        else:
            adamw_update(shard, grad[:n], first[:n], second[:n], lr, decay, c.adam_beta1, c.adam_beta2, step)


def pad_items(x, n):
    return torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])


def functions(m):
    """m.functions: what training runs, plain or compiled. Scoring runs block() as it is. One layer is
    compiled, not the whole model: all layers share the code, in whatever order a phase runs them."""
    chosen = types.SimpleNamespace(block=block, chunk_grad=chunk_grad, muon_update=muon_update)
    if m.compiled:
        chosen.block = torch.compile(block, dynamic=False)
        chosen.chunk_grad = torch.compile(chunk_grad, dynamic=False)
    if m.compiled and m.device.type == "cuda":  # on a CPU it is the matrix products that take Muon's time
        chosen.muon_update = compiled_muon_update()
    return chosen


def compiled_muon_update():
    compiled = torch.compile(muon_update, dynamic=False)

    def update(w, grad, momentum_buffer, second_moment, lr, wd, momentum, *rest):
        # Tensors, for torch.compile would recompile for every new number.
        changing = [torch.full((), x, device=w.device) for x in (lr, wd, momentum)]
        compiled(w, grad, momentum_buffer, second_moment, *changing, *rest)

    return update


# ---- look-ups: what followed the same n-gram before --------------------------------------------------------


class GroupIndex:
    """Groups places that have equal values. In `order` the places of a group are side by side, and in their
    own order: the values 7 5 7 7 5 give order 1 4 0 2 3, slot 2 0 3 4 1, start 2 0 2 2 0, end 5 2 5 5 2."""

    def __init__(self, values):
        n = len(values)
        self.order = np.argsort(values, kind="stable")
        self.slot = np.empty(n, np.int64)  # each place's index in order
        self.slot[self.order] = np.arange(n)
        values = values[self.order]
        starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[:n])
        ends = np.append(starts, n)[1:]
        self.start = np.repeat(starts, ends - starts)[self.slot]  # the first slot of each place's group
        self.end = np.repeat(ends, ends - starts)[self.slot]  # one past its last slot

    def is_first(self):
        """Whether each place is the first of its group."""
        return self.slot == self.start

    def sums_before(self, values):
        """For each place, the sum of these values over the places before it in its group."""
        sums = np.append(0, np.cumsum(values[self.order], dtype=np.int64))
        return sums[self.slot] - sums[self.start]

    def neighbors(self):
        """(places that are not the last of their group, the next place of each's group)."""
        earlier = np.flatnonzero(self.slot + 1 < self.end)
        return earlier, self.order[self.slot[earlier] + 1]


# A stream's or document's number times this is added to hashes, which then match only within it.
GROUP_CODE = np.uint64(0xD6E8FEB86659FD93)


class Streams:
    """Independent streams of ids [n_streams, length], laid end to end, and what look-ups need of them. Each
    may hold many documents. A place is an index into all of it."""

    def __init__(self, streams, bos_id):
        self.tokens = streams.reshape(-1)
        self.length = streams.shape[1]
        place = np.arange(len(self.tokens))
        is_start = (self.tokens == bos_id) | (place % self.length == 0)
        self.stream = (place // self.length).astype(np.uint64)  # each token's stream
        self.document = np.cumsum(is_start, dtype=np.uint64)  # each token's document
        self.offset = place - np.maximum.accumulate(np.where(is_start, place, 0))  # its position in that
        random = np.random.default_rng(0)
        self.codes = random.integers(0, 2**64, 2**16, dtype=np.uint64)[self.tokens]  # by token id

    def ngrams(self, n):
        """A hash, uint64, of the n tokens that end at each place; of fewer, at the first n - 1 places. It
        ignores the boundaries of documents and streams: callers leave out what crosses one."""
        hashes = np.zeros_like(self.codes)
        for back in reversed(range(min(n, len(hashes)))):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes[back:] += self.codes[: len(hashes) - back]
        return hashes


class MemoryIndex:
    """Where each n-gram of one length is in the training tokens, sorted by n-gram and then by place."""

    def __init__(self, streams, n):
        # Nothing follows the last token. N-grams across a document's boundary are indexed, too, but such a
        # one, "a b BOS c", has its BOS in the middle, and no n-gram within a document has: none asks for it.
        ngrams = streams.ngrams(n)[:-1]
        self.places = np.argsort(ngrams, kind="stable")
        self.ngrams = ngrams[self.places]
        self.document = streams.document[self.places]
        # For each entry, the index where its run of equal n-grams in one document starts.
        same = (self.ngrams[1:] == self.ngrams[:-1]) & (self.document[1:] == self.document[:-1])
        is_start = np.append(True, ~same)
        self.run_start = np.maximum.accumulate(np.where(is_start, np.arange(len(is_start)), 0))

    def last_places(self, ngrams, own_document=None):
        """The place where each n-gram occurs last; -1: nowhere. own_document: for queries from the indexed
        tokens themselves, the document of each, in which it does not look."""
        by_value = np.argsort(ngrams)  # sorted queries are several times as fast
        at = np.empty(len(ngrams), np.int64)
        # -1, below all, reads the last entry here, and is no match in the end.
        at[by_value] = np.searchsorted(self.ngrams, ngrams[by_value], side="right") - 1
        if own_document is not None:
            # Equal n-grams are in order of place, so each document's are a run, and the entry before the run
            # is in another document. If it is of another n-gram, it is no match.
            at = np.where(self.document[at] == own_document, self.run_start[at] - 1, at)
        return np.where((at >= 0) & (self.ngrams[at] == ngrams), self.places[at], -1)


class Lookup:
    """Makes the model's inputs, for each token:

    - the token itself;
    - for each length n of c.recall, the token that followed the last occurrence in the same document of the
      n tokens that end here: hard-wired induction (2401.12973), as far back as the document goes;
    - for each length of c.memory, the same from the last training document that has them (retrieval,
      2112.04426). A training token skips its own document: a new text is never in memory, and a model that
      had seen itself there would trust memory too much;
    - with c.ngrams, what an NgramModel predicts next.

    NO_TOKEN stands where there is no occurrence. Nothing looks ahead in its own document, and hashes of 64
    bits stand for n-grams."""

    def __init__(self, train_tokens, c):
        """train_tokens: [n] of the budget; in scoring, c.memory and c.ngrams need them."""
        self.train_tokens = train_tokens
        self.c = c
        if c.memory:
            streams = Streams(train_tokens[None], c.bos_id)
            self.memory = {n: MemoryIndex(streams, n) for n in lengths(c.memory)}
        if c.ngrams:
            self.ngram_model = NgramModel(train_tokens, c)

    def training_inputs(self):
        """Inputs for the training tokens, as one stream: uint16 [n, n_inputs(c)]."""
        inputs = self.looked_up(self.train_tokens[None], in_training=True)[0]
        if not self.c.ngrams:
            return inputs
        return np.append(inputs, training_ngram_nll(self.train_tokens, self.c), axis=1)

    def inputs(self, ids, hide_own=False):
        """Inputs for streams of ids [n_streams, length]: uint16 [n_streams, length, n_inputs(c)]. hide_own:
        as if no n-gram of a stream had occurred in it before."""
        inputs = self.looked_up(ids)
        if hide_own:
            inputs[..., 1 : 1 + len(lengths(self.c.recall))] = NO_TOKEN
        if not self.c.ngrams:
            return inputs
        return np.append(inputs, self.ngram_model.nll(ids, hide_own), axis=2)

    def looked_up(self, ids, in_training=False):
        """Each token and its look-ups: uint16 [n_streams, length, 1 + n_lookups(c)]."""
        c = self.c
        if n_lookups(c) == 0:
            return ids[..., None]
        streams = Streams(ids, c.bos_id)
        recalled = []
        for n in lengths(c.recall):
            column = np.full(ids.size, NO_TOKEN, np.uint16)
            earlier, later = GroupIndex(streams.ngrams(n) + streams.document * GROUP_CODE).neighbors()
            fits = streams.offset[earlier] >= n - 1  # all n tokens are in the document
            column[later[fits]] = streams.tokens[earlier[fits] + 1]
            recalled.append(column)
        remembered = []
        for n in lengths(c.memory):
            column = np.full(ids.size, NO_TOKEN, np.uint16)
            last = self.memory[n].last_places(streams.ngrams(n), streams.document if in_training else None)
            found = (last >= 0) & (streams.offset >= n - 1)
            column[found] = self.train_tokens[last[found] + 1]
            remembered.append(column)
        return np.stack([streams.tokens, *recalled, *remembered], axis=-1).reshape(*ids.shape, -1)


# ---- n-grams: a model of counts, which is added to the logits ----------------------------------------------


DISCOUNT = 0.8  # tuned on prose and pocket
FOLDS = 10  # every tenth training document is predicted by the counts of the others


class NgramModel:
    """Predicts the next token from counts alone (Kneser and Ney, 1995), interpolated from the shortest
    context of c.ngrams to the longest:

        p(token) = (max(hits - DISCOUNT, 0) + DISCOUNT * n_kinds * p_before(token)) / total

    hits is how often the token followed these n tokens, total the sum over all tokens, n_kinds how many
    different ones there were. What the discount takes off goes to p_before, the prediction before this one in
    the chain: uniform -> 1 (stream) -> 1 (document) -> 2 (stream) -> 2 (document) -> ... For each length come
    first the counts of the training tokens and the stream so far, then those of the document so far.

    The longest context counts every occurrence. A shorter one counts a token only where the next longer
    context of its kind had not met it: after that, the longer one handles it.

    The network gets log p as part of its logits (2210.14431), in training, too. So it learns only what the
    counts lack, and where to trust them."""

    def __init__(self, train_tokens, c):
        self.c = c
        streams = Streams(train_tokens[None], c.bos_id)
        self.training = {}  # for each length, the counts of the training tokens
        for level in self.levels(streams, streams.stream):
            self.training[level.n] = NgramCounts(level.keys, level.counted)

    def nll(self, ids, hide_own=False):
        """-log p in units of 1 / UNITS_PER_NAT nats, uint16 [n_streams, length, V], of every token that may
        follow each token of independent streams of ids [n_streams, length]. hide_own: by the training counts
        alone."""
        V = self.c.vocab_size
        # Below, the token at a place is predicted from those before it. So there is one more place at the end
        # of each stream, from which nothing is predicted.
        streams = Streams(np.pad(ids, ((0, 0), (0, 1))), self.c.bos_id)
        stream = streams.stream
        # A place is predicted from the token before it, and in that token's document, also where it is a BOS.
        # A stream's first place, where that is wrong, has no context and is in no level.
        document = np.roll(streams.document, 1)
        if hide_own:  # each place is a stream of its own, which has met no context before
            stream = document = np.arange(len(stream), dtype=np.uint64)
        p = np.full((len(stream), V), 1 / V, np.float32)
        in_streams = self.levels(streams, stream, self.training)
        for in_stream, in_document in zip(in_streams, self.levels(streams, document), strict=True):
            interpolate(p, in_stream)
            interpolate(p, in_document)
        nll = np.log(np.maximum(p, 1e-6, out=p), out=p)  # in place: it may take gigabytes
        nll *= -UNITS_PER_NAT
        return np.rint(nll, out=nll).astype(np.uint16).reshape(len(ids), -1, V)[:, 1:]

    def levels(self, streams, group, training=None):
        """An NgramLevel for each length of context, the shortest first. group: the number of the stream or
        document that each place belongs to. training: NgramCounts by length, if these count, too."""
        found = []
        # Which places count at a length. The longest comes first, and all do; then those do that the next
        # longer one finds new, or has no context for.
        counted = np.ones(len(streams.tokens), bool)
        for n in sorted(lengths(self.c.ngrams), reverse=True):
            places = np.flatnonzero(np.arange(len(streams.tokens)) % streams.length >= n)
            hashes = streams.ngrams(n)[places - 1]
            tokens = streams.tokens[places].astype(np.uint64)
            keys = ngram_keys(hashes, tokens)
            own_keys = ngram_keys(hashes + group[places] * GROUP_CODE, tokens)
            by_key = GroupIndex(own_keys)
            counts = training[n] if training else NgramCounts()
            _, in_training = find(counts.keys, keys)
            is_new = by_key.is_first() & ~in_training
            flags = in_training, is_new, counted[places]
            found.append(NgramLevel(n, places, keys, context_of(own_keys), by_key, counts, *flags))
            counted = np.ones(len(streams.tokens), bool)
            counted[places] = is_new
        return found[::-1]


def ngram_keys(hashes, tokens):
    """A number for each context and the token behind it: 48 bits of the context's hash, 16 of the token. In
    sorted order the keys of a context are side by side."""
    return hashes >> 16 << 16 | tokens


def context_of(keys):
    return keys >> 16


def token_of(keys):
    return (keys & 0xFFFF).astype(np.int64)


class NgramCounts:
    """How often each token follows each context of one length in the training tokens."""

    def __init__(self, keys=(), counted=()):
        """keys: of every place. counted: whether it counts."""
        keys = np.append(np.array(keys, np.uint64), np.uint64(2**64 - 1))  # a sentinel: never empty
        # For each key:
        self.keys, of_key = np.unique(keys, return_inverse=True)
        self.tokens = token_of(self.keys)
        self.hits = np.bincount(of_key, np.append(counted, 0))
        # For each context:
        self.contexts, self.starts = np.unique(context_of(self.keys), return_index=True)  # its first key
        self.n_kinds = np.diff(self.starts, append=len(self.keys))  # the number of its keys
        self.totals = np.add.reduceat(self.hits, self.starts)


class NgramLevel(NamedTuple):
    """One length n of context, at every place with at least n tokens before it in its stream: parallel arrays
    of the token that is predicted there from its context, and of whether it counts afterwards. "Group" is the
    stream, or the document."""

    n: int
    places: np.ndarray
    keys: np.ndarray  # of the context and the token at the place
    own_contexts: np.ndarray  # of the context, a different number in each group
    by_key: GroupIndex  # of places that have equal keys in one group
    training: NgramCounts
    in_training: np.ndarray  # whether training has the key
    is_new: np.ndarray  # neither training nor the group has had the key before
    counted: np.ndarray  # whether the next longer context's key is new; all, where there is none


def interpolate(p, level):
    """Turns p [n_places, V], in place, from p_before into the level's prediction."""
    places = level.places
    training = level.training
    by_context = GroupIndex(level.own_contexts)
    row, is_known = find(training.contexts, context_of(level.keys))
    n_training = is_known * training.n_kinds[row]
    n_kinds = n_training + by_context.sums_before(level.is_new)
    total = is_known * training.totals[row] + by_context.sums_before(level.counted)
    # First the share of p_before.
    seen = total > 0
    p[places[seen]] *= (DISCOUNT * n_kinds[seen] / total[seen])[:, None]
    # Then, of every token that followed in training, hits - DISCOUNT. No hits are below 1: a key's first
    # occurrence is new to the longer contexts, too, and hence counted.
    for i, key in ranges(training.starts[row], n_training):
        p[places[i], training.tokens[key]] += (training.hits[key] - DISCOUNT) / total[i]
    # Then, for place j, the hits of every token that the group had in this context before. hits[i] is a key's
    # count up to place i and with it, so its last place before j holds all of it. Where training has the
    # token, the discount was already subtracted.
    tokens = token_of(level.keys)
    hits = level.by_key.sums_before(level.counted) + level.counted - DISCOUNT * ~level.in_training
    for i, j in last_occurrences(by_context, level.by_key):
        p[places[j], tokens[i]] += hits[i] / total[j]


def last_occurrences(by_context, by_key):
    """Yields pairs (i, j): for each place j, and each key that its context had before j, the last place i of
    that key before j."""
    # In by_context.order, this holds from the slot behind i on, up to the key's next place and with it.
    start = by_context.slot + 1
    end = by_context.end.copy()
    earlier, later = by_key.neighbors()
    end[earlier] = by_context.slot[later] + 1
    for i, slot in ranges(start, end - start):
        yield i, by_context.order[slot]


def find(array, values):
    """(the index of each of some values in a sorted array, an arbitrary one where it lacks it; whether it has
    it)."""
    at = np.searchsorted(array, values).clip(max=len(array) - 1)
    return at, array[at] == values


def ranges(starts, sizes, at_once=1 << 22):
    """Yields (i, number) of all numbers in ranges that begin at starts[i] and have sizes[i] numbers: of
    starts 5 9 and sizes 2 1, i is 0 0 1 and number 5 6 9. In pieces of about at_once, to save memory."""
    ends = np.cumsum(sizes)
    pieces = np.searchsorted(ends, np.arange(0, sizes.sum(), at_once), side="right")
    for first, last in itertools.pairwise([*pieces, len(starts)]):
        size = sizes[first:last]
        i = np.repeat(np.arange(first, last), size)
        before = np.repeat(np.cumsum(size) - size, size)
        yield i, starts[i] + np.arange(len(i)) - before


def training_ngram_nll(train_tokens, c):
    """NgramModel.nll of the training tokens, uint16 [n, V]. A token must not be predicted from counts that
    include it, so every tenth document is predicted by a model of the others (cross-fitting)."""
    fold = np.cumsum(train_tokens == c.bos_id) % FOLDS
    nll = np.empty((len(train_tokens), c.vocab_size), np.uint16)
    folds = np.unique(fold)
    for k in tqdm(folds, "counting n-grams", unit="part", delay=3, leave=False, disable=None):
        model = NgramModel(train_tokens[fold != k], c)
        nll[fold == k] = model.nll(train_tokens[fold == k][None])[0]
    return nll


# ---- batches -----------------------------------------------------------------------------------------------


class Loader:
    """Training batches as a function of the step alone: nothing to save, any position can be resumed.

    An epoch is the training documents in an order drawn from (seed, epoch), laid end to end and cut every
    seq_len tokens into rows, which are then shuffled. A document that exactly fills the rest of a row is
    taken early, so that the next row starts at a BOS. Every token but the epoch's first (or first bag) is a
    target exactly once; the last row is filled up with targets of -1, which do not count. With bags of s
    tokens a row holds s * seq_len tokens, and each bag's targets are the s tokens of the next bag. inputs:
    [n, n_inputs(c)] of Lookup; the first c.train_tokens are used."""

    def __init__(self, inputs, c, rank=0, world_size=1, bag_size=1):
        self.inputs = inputs[: c.train_tokens]
        self.n_tokens = len(self.inputs)
        self.c = c
        self.bag_size = bag_size
        self.row_tokens = c.seq_len * bag_size
        self.starts = np.union1d([0], np.flatnonzero(self.inputs[:, 0] == c.bos_id))
        self.lengths = np.diff(np.append(self.starts, self.n_tokens))
        # Rounded up. The first token (or bag) of an epoch is no target.
        self.rows_per_epoch = max(1, -(-(self.n_tokens - bag_size) // self.row_tokens))
        self.batch_rows = c.batch_tokens // c.seq_len
        # The rows of a batch that are this rank's.
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
        # Documents in shuffled order, except that a remaining one that exactly fills the row goes first.
        for d in shuffled:
            while d not in placed:  # at most twice: for one that fills the row, then for d
                room_left = -filled % self.row_tokens  # 0 at a row's beginning, and no document has length 0
                fitting = by_length.get(room_left)
                while fitting and fitting[-1] in placed:
                    fitting.pop()
                chosen = fitting.pop() if fitting else d
                order.append(chosen)
                placed.add(chosen)
                filled += self.lengths[chosen]
        self.epoch = epoch
        self.ends = np.cumsum(self.lengths[order])
        # What to add to a place in the epoch's stream to get the same token's place in inputs, by document.
        self.shift = self.starts[order] - (self.ends - self.lengths[order])
        self.rows = rng.permutation(self.rows_per_epoch)

    def row(self, i):
        """Row i of the epoch's stream and the next token (or bag), as far as there are any."""
        at = i * self.row_tokens
        stop = min(at + self.row_tokens + self.bag_size, self.n_tokens)
        first, last = np.searchsorted(self.ends, (at, stop - 1), side="right")
        cuts = [at, *self.ends[first:last], stop]
        shifts = self.shift[first : last + 1]
        pieces = zip(cuts[:-1], cuts[1:], shifts, strict=True)
        return np.concatenate([self.inputs[a + shift : b + shift] for a, b, shift in pieces])

    def batch(self, step):
        """This rank's inputs, int64 [rows, row_tokens, n_inputs(c)], its targets [rows, seq_len,
        bag_size], and the number of targets in the batch of all ranks."""
        bag_size = self.bag_size
        # Where an epoch ends within a row, anything will do for the rest: it has no targets.
        x = np.full((len(self.shard), self.row_tokens, self.inputs.shape[1]), self.c.bos_id, dtype=np.int64)
        y = np.full((len(self.shard), self.row_tokens), -1, dtype=np.int64)
        n_targets = 0
        for j in range(self.batch_rows):  # other ranks' rows, too: for n_targets
            epoch, k = divmod(step * self.batch_rows + j, self.rows_per_epoch)
            if epoch != self.epoch:
                self.start_epoch(epoch)
            i = int(self.rows[k])
            n_targets += max(0, min(self.row_tokens, self.n_tokens - bag_size - i * self.row_tokens))
            if j in self.shard:
                row = self.row(i)
                at = j - self.shard.start
                x[at, : min(len(row), self.row_tokens)] = row[: self.row_tokens]
                y[at, : len(row[bag_size:])] = row[bag_size:, 0]
        return torch.from_numpy(x), torch.from_numpy(y).unflatten(1, (-1, bag_size)), n_targets


class Batches:
    """What one model trains on at each step: bags first, if it has any, then single tokens."""

    def __init__(self, inputs, c, m, steps=None):
        self.plain = Loader(inputs, c, m.rank, m.world_size)
        self.steps = min(self.plain.steps, steps or self.plain.steps)
        self.phases = [phase_schedule(self.done(step), c) for step in range(self.steps)]
        self.n_bag_steps = sum(phase.bag_size > 1 for phase in self.phases)
        self.bags = self.plain  # so that epochs_done() works without bags, too
        if self.n_bag_steps:
            self.bags = Loader(inputs, c, m.rank, m.world_size, c.bag_size)

    def done(self, step):
        """The fraction of training that is done in the middle of a step: neither the first nor the last step
        is wasted on a rate of zero."""
        return (step + 0.5) / self.steps

    def batch(self, step):
        """Same as Loader.batch."""
        if step < self.n_bag_steps:
            return self.bags.batch(step)
        return self.plain.batch(step - self.n_bag_steps)

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
    """The weights of one optimizer step's passes, in place of p. What all passes would repeat is done once:

    - before the first pass, stacked weights are cast to the dtype of the matrix products, and IHA is applied;
    - behind each pass, a hook adds up the gradients of these copies in float32;
    - after the last one, p[name].grad gets the sums. IHA is computed again, with a graph, through which
      p["attn"] and p["iha"] get theirs.

    The others are p's own tensors: autograd fills their .grad."""

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
    if c.iha:  # with a graph this time; kept from the beginning on, it would take memory in every pass
        mixed_attention().backward(grads.pop("attn"))
    for name, grad in grads.items():
        p[name].grad = grad


def train_pass(p, x, y, n_targets, c, m, phase, seed, teacher=None):
    """Forward and backward of one micro-batch. p: from step_weights, which adds up the gradients. x, y: from
    Loader.batch. n_targets: of the whole batch, over which the losses are averaged. teacher: (Config,
    weights). Returns the logged losses.

    A new term of hidden states or weights: append it to `roots` and its gradient to `grads`. These add up
    over passes and ranks: divide a sum over tokens by n_targets; multiply a term of weights by this
    pass's share of the targets, (y >= 0).sum() / n_targets. With c.iha, p["attn"] is mixed already."""
    # Dropout depends only on the seed, the step, the rank and the micro-batch, so a resumed run repeats it.
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    y = to_device(y, m)
    teacher_parts = None
    if teacher and phase.bag_size == 1:  # the teacher predicts single tokens, so it sits out the bags
        c_teacher, p_teacher = teacher
        with torch.no_grad():
            final_phase = phase_schedule(1.0, c_teacher)
            h = forward(p_teacher, x, c_teacher, m, final_phase, run_block=m.functions.block)
            teacher_parts = logit_parts(p_teacher, h.flatten(0, 1), x, c_teacher, m)
    h = forward(p, x, c, m, phase, c.dropout, m.functions.block).flatten(0, 1)
    # The backward pass has two parts. objective() goes back through the loss and the head, chunk by chunk, to
    # the gradients of h, head and gate. From h and gate on, autograd takes over, in one call for all roots;
    # the head's gradient is added by hand.
    parts = logit_parts(p, h, x, c, m, phase.bag_size)
    scale = torch.full((), 1 / n_targets, device=m.device)
    grad, logged = objective(parts.detach(), y.flatten(0, 1), scale, c, m, teacher_parts)
    grad_head = grad.head
    roots = [h]
    grads = [grad.h]
    if c.ngrams:
        roots.append(parts.gate)
        grads.append(grad.gate)
    if phase.bag_size > 1:
        logged["bag_loss"] = logged.pop("loss")
    if c.mtp_weight:  # plain cross-entropy, with or without a teacher, on top of the loss
        after_next = F.pad(y[:, 1:], (0, 0, 0, 1), value=-1).flatten(0, 1)
        h_mtp = norm(F.linear(h, p["mtp"][0].to(h.dtype)))
        further = LogitParts(h_mtp.detach(), parts.head.detach())  # n-grams predict only the next token
        grad, sums = objective(further, after_next, c.mtp_weight * scale, c, m)
        roots.append(h_mtp)
        grads.append(grad.h)
        grad_head += grad.head
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


def train_step(p, optimizer, model, step, batch, m, teacher):
    """One optimizer step on a batch, of model.batches. Returns this rank's part of the logged losses, tensors
    by name."""
    c = model.c
    done = model.batches.done(step)
    x, y, n_targets = batch
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
    """Train one model of a run, and return its final weights. shards: of a checkpoint, which load_shards()
    puts into p, optimizer and ema; empty at the start. The Monitor evaluates, logs and saves."""
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
        load_shards(run.folder, shards, optimizer, ema)  # fills p, too, which the optimizer has
    monitor = Monitor(run, model, saver)
    teacher = None
    batch = model.batches.batch(first_step)
    for step in range(first_step, n_steps):
        turn_begins = step % c.teacher_switch_every == 0 and len(model.teachers) > 1
        if model.teachers and (step == first_step or turn_begins):
            teacher = None  # its memory is free before the next one comes
            teacher = load_teacher(run, model, step)
        losses = train_step(p, optimizer, model, step, batch, m, teacher)
        if ema:
            decay = min(c.ema, (step + 1) / (step + 10))  # shorter at first: the initial weights fade
            for name, average in ema.items():
                average.lerp_(optimizer.shard(name, p[name].detach()), 1 - decay)
        if step + 1 < n_steps:
            batch = model.batches.batch(step + 1)  # while a GPU is still at work on this step
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
def stream_nll(p, inputs, c, m, of_all=False):
    """Negative log-likelihood in nats of every token of independent streams, float32 [n_streams, length] on
    every rank; of_all: of every token that might come there, [n_streams, length, V]. inputs: from Lookup,
    [n_streams, length, n_inputs(c)]. The first token of a stream has no context and gets 0."""
    n_streams, length, _ = inputs.shape
    phase = phase_schedule(1.0, c)
    out = torch.zeros(n_streams, length, c.vocab_size if of_all else 1, device=m.device)
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
            x = ids[:, :-1]
            h = forward(p, x, c, m, phase).flatten(0, 1)
            parts = logit_parts(p, h, x, c, m)
            targets = None if of_all else to_device(ids[:, 1:, 0], m).flatten()
            nll = token_nll(parts, targets, c).view(len(part), T, -1)
            for k, (row, start, _, new) in enumerate(part):
                out[row, new : start + T + 1] = nll[k, new - start - 1 :]
    out = all_reduce(m, out).cpu().numpy()
    return out if of_all else out[:, :, 0]


def token_nll(parts, targets, c):
    """-log p(target) in nats of N tokens, float32 [N], chunk by chunk. parts: LogitParts; targets: [N], or
    None for all V tokens: [N, V]."""
    chunks = []
    for i in range(0, len(parts.h), c.loss_chunk):
        rows = slice(i, i + c.loss_chunk)
        logits = make_logits(parts.chunk(rows), c)
        if targets is None:
            chunks.append(-logits.log_softmax(-1))
        else:
            chunks.append(F.cross_entropy(logits, targets[rows], reduction="none"))
    return torch.cat(chunks)


def scored_models(c):
    """[(number of the weights, config)] of the models whose averaged probabilities are a run's: all
    members, or the student alone."""
    numbered = list(enumerate(model_configs(c)))
    return numbered[-1:] if c.student else numbered


def add_model(total, nll):
    """total: -log of the sum of the probabilities of the models so far (np.inf: of none). Returns it with one
    model added. For the mean over n models, add log(n)."""
    return -np.logaddexp(-total, -nll)


def run_nll(folder, inputs, c, m, show=None):
    """NLL of every token under the mean probability of a run's models, with c.online_lr corrected by
    online_nll(), float64 [n_streams, length]. inputs: from Lookup. One model is in memory at a time."""

    def of_tokens(nll):  # one number for each token, from one for every token that might come there
        return np.take_along_axis(nll, inputs[:, :, :1].astype(np.int64), -1)[:, :, 0] if c.online_lr else nll

    total = np.inf
    models = scored_models(c)
    for n, (number, c_model) in enumerate(models, start=1):
        p = load_weights(folder, number, c_model, m)
        nll = stream_nll(p, inputs, c_model, m, of_all=c.online_lr > 0)
        require(np.isfinite(nll).all(), f"{folder}: model {number + 1} predicts NaN; train it again")
        total = add_model(total, nll)
        if show and len(models) > 1:
            together = mean_nll(of_tokens(total) + math.log(n))
            together = f"the members so far together: {together:.6f} nats per token"
            show(f"member {number + 1} alone: {mean_nll(of_tokens(nll)):.6f}; {together}")
    total += math.log(len(models))
    if show and c.online_lr:
        show(f"without learning from the stream: {mean_nll(of_tokens(total)):.6f} nats per token")
    total = online_nll(total, inputs, c) if c.online_lr else total.astype(np.float64)
    total = np.maximum(0, total)  # a mean probability is at most 1, up to rounding
    total[:, 0] = 0
    return total


MAX_CONTEXT = 3  # tokens of context that a bias in online_nll() has at most
WEIGHT_LR = 0.025  # the rate of a and b, as a multiple of c.online_lr; their gradients are sums over V


def online_nll(nll, inputs, c):
    """NLL in nats of the tokens of independent streams under a prediction that learns from each token once it
    is scored, float64 [n_streams, length]. nll: -log p of every token that might come there, [n_streams,
    length, V]. inputs: from Lookup. A context's bias takes 8 V bytes until its document ends.

    The logits are a * log p + b * log p of the n-grams + the biases of the last 0, 1, 2 and 3 tokens. a,
    which begins at 1, and b are learned over the stream, the biases [V] over a document. After each token,
    all take a step of gradient descent: dynamic evaluation (1709.07432) of the output alone."""
    out = np.zeros(nll.shape[:2])
    for stream, tokens in enumerate(inputs[:, :, 0]):
        weights = np.array([1.0, 0.0])
        document = 0  # where it begins
        biases = collections.defaultdict(lambda: np.zeros(c.vocab_size))
        for i in tqdm(range(1, len(tokens)), "learning", unit="token", delay=3, leave=False, disable=None):
            if tokens[i - 1] == c.bos_id:
                document = i - 1
                biases.clear()
            log_p = np.zeros((2, c.vocab_size))
            log_p[0] = -nll[stream, i]
            if c.ngrams:
                log_p[1] = inputs[stream, i - 1, -c.vocab_size :] / -UNITS_PER_NAT
            contexts = [tokens[i - n : i].tobytes() for n in range(min(MAX_CONTEXT, i - document) + 1)]
            logits = weights @ log_p + sum(biases[context] for context in contexts)
            logits -= logits.max()
            p = np.exp(logits)
            total = p.sum()
            out[stream, i] = math.log(total) - logits[tokens[i]]
            error = p / total  # the gradient of the logits
            error[tokens[i]] -= 1
            weights -= WEIGHT_LR * c.online_lr * (log_p @ error)
            for context in contexts:
                biases[context] -= c.online_lr * error
    return out


def mean_nll(nll):
    """Nats per scored token of [n_streams, length]: the first of each stream is not scored."""
    return float(nll[:, 1:].sum(dtype=np.float64) / max(1, nll[:, 1:].size))


@torch.no_grad()
def sample(folder, c, m, lookup, prompt, n_tokens, temperature=0.8, top_p=0.95):
    """Token ids that the run's models write after the ids `prompt`, which begin with a BOS. The most likely
    tokens that together have a share of top_p are drawn from. The context is computed again for each: slow,
    but simple.

    What c.recall and c.ngrams would find in the text itself is hidden from the model. Once it repeats itself,
    every length of n-gram agrees on how to go on, which in real text is right nearly always: it would never
    leave the loop."""
    scored = [(c_model, load_weights(folder, number, c_model, m)) for number, c_model in scored_models(c)]
    g = torch.Generator().manual_seed(c.seed)
    ids = list(prompt)
    for _ in range(n_tokens):
        inputs = lookup.inputs(np.array([ids], dtype=np.uint16), hide_own=True)
        mean = 0
        for c_model, p in scored:
            x = torch.from_numpy(inputs[:, -c_model.seq_len :].astype(np.int64))
            h = forward(p, x, c_model, m, phase_schedule(1.0, c_model))
            logits = make_logits(logit_parts(p, h[0, -1:], x[:, -1:], c_model, m), c_model)
            mean = mean + logits[0].softmax(-1).cpu() / len(scored)
        probs, order = (mean.log() / temperature).softmax(-1).sort(descending=True)
        probs[probs.cumsum(0) - probs >= top_p] = 0
        ids.append(int(order[torch.multinomial(probs, 1, generator=g)]))
        if ids[-1] == c.bos_id:
            break
    return ids[len(prompt) :]


harness.use(sys.modules[__name__])

if __name__ == "__main__":
    harness.main()
