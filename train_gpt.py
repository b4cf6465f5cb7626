"""
Tokenrun: how low can validation loss go on a fixed budget of training tokens?

    python train_gpt.py                                   the pocket track, on whatever machine this is
    python train_gpt.py --n_layer 8 --dropout 0.1         every field of Config is an option
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track limited
    python train_gpt.py --resume runs/NAME                go on with a run that was killed or stopped
    python train_gpt.py --score runs/NAME --tokens data/pocket/val.bin --nll out.npy
    python train_gpt.py --sample runs/NAME --prompt "def "

A run leaves a folder: log.txt (this source, the environment, every step, the result), record.json, val_nll.npy and the
weights. Sections in order: config, machine, data, model, objective, optimizer, schedules, checkpoint, scoring, training,
dry run, main. Fork it, change anything but the command line: a referee runs --score.
"""
import time

START = time.monotonic()  # the track's clock starts before the imports, which take seconds

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
if torch.cuda.is_available():  # neither trains on a CPU, and they take seconds to import
    from torch.nn.attention import flex_attention as flex, varlen
    compiled_flex = torch.compile(flex.flex_attention)  # uncompiled, it writes out every score

HERE, SCRIPT = Path(__file__).resolve().parent, Path(__file__).name
SOURCE = Path(__file__).read_bytes()  # read at the start, so that the log shows what runs and not a later edit
SOURCE_SHA256, SOURCE_END = hashlib.sha256(SOURCE).hexdigest(), "\n==== end of source"
ASKED = ("steps", "device", "attention", "compile")  # the options beside Config's that hold when a run is resumed

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # both renamed in torch 2.13

class Stop(Exception):
    """Stop(message, status): the process ends here, with one line that says why and how to go on. Status 2, also where it is left
    out: something for the user to mend before anything is begun; 1: the run broke; 130: it was asked to stop."""

def require(holds, message):
    if not holds:
        raise Stop(message)

# ---- config -----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    """A recipe. The defaults are a plain model, tuned on pocket's data (rates, batch, context: short runs of one seed); PRESETS has the tracks'."""
    track: str = "pocket"
    data: str = "pocket"           # a folder of data/ beside this script, or a path with a slash in it
    train_tokens: int = 1_000_000  # the budget: the loader shows no token beyond the first so many
    seed: int = 0
    # model
    n_layer: int = 4
    n_embd: int = 192
    n_head: int = 2
    mlp_hidden: int = 512          # width of the SwiGLU
    seq_len: int = 1024            # tokens of context, in training and in scoring
    score_stride: int = 0          # scoring: windows begin so many tokens apart; one that overlaps the window before scores the rest; 0: none overlaps
    window_short: int = 128        # tokens that a short-window layer sees, the token itself included
    window_pattern: str = "SSSL"   # short and long windows, repeated over the layers; the last layer is always long
    softcap: float = 15.0          # logits are softcap * tanh(logits / softcap): keeps one token from costing too much
    value_proj: bool = True        # every layer adds a gated projection of the embedding x0 to its values (2410.17897)
    unet: bool = True              # layer i's output is added to the input of layer n_layer-1-i
    x0_mix: bool = True            # every layer starts from a * x + b * x0, both learned
    attn_gate: bool = True         # each head's output times a sigmoid of the layer's input: a head can rest
    recall: str = ""               # lengths, such as 4,8,16: beside each token the model reads what followed when its document last held the n-gram that ends here
    memory: str = ""               # ... and what followed when another of the training documents held it
    loop_first: int = 0            # looped layers: loop_first..loop_last run loop_times more
    loop_last: int = 0
    loop_times: int = 0
    loop_from: float = 0.5         # ... from this fraction of training on
    # regularization
    dropout: float = 0.0           # of what each attention and each MLP adds to the residual stream
    # learning more from the same tokens
    members: int = 1               # models trained one after the other, each from its own seed; their probabilities are averaged
    chains: int = 1                # the members form so many chains of equal length ...
    distill_alpha: float = 0.0     # ... in which, from the second member on, this share of the loss is KL to the member before (chain distillation)
    distill_temp: float = 1.0      # ... between distributions at this temperature
    student: str = ""              # then one model, with these changes to the recipe, learns from each in turn, from the last one's weights on if they fit, and alone is scored
    bag_size: int = 1              # token superposition (2605.06546): bags of so many tokens in, the next bag's tokens out ...
    bag_until: float = 0.0         # ... for this first fraction of training, then single tokens
    mtp_weight: float = 0.0        # of an auxiliary loss on the token after the next (2404.19737); its projection is not used in scoring
    iha: bool = False              # queries, keys and values of a layer's heads are mixed by learned matrices (2602.21371)
    ema: float = 0.0               # the final weights are an exponential average over training, with this decay per step
    # training
    epochs: float = 3.2            # passes over train_tokens (steps of bags count as steps of single tokens do)
    batch_tokens: int = 4096       # tokens per optimizer step, over all ranks
    device_tokens: int = 8192      # tokens per forward pass of one rank; smaller saves memory, costs speed
    loss_chunk: int = 1024         # tokens whose logits exist at the same time
    muon_lr: float = 0.04          # the attention and MLP matrices, and that of mtp
    muon_momentum: float = 0.95
    momentum_start: float = 0.85   # momentum rises from here to muon_momentum ...
    momentum_warmup: float = 0.1   # ... over this fraction of training
    muon_beta2: float = 0.95       # per-neuron second moment of the orthogonalized update
    embed_lr: float = 0.03         # AdamW: token embedding, and the tables of recall
    head_lr: float = 0.005         # AdamW: output head
    scalar_lr: float = 0.02        # AdamW: gates, residual and skip scalars, iha
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    weight_decay: float = 0.1      # decoupled, times the learning rate; on all but what scalar_lr is for
    wd_points: str = "0:1"         # its course: fraction of training : multiple of weight_decay, linear in between
    warmup: float = 0.01           # fraction of training until the learning rates reach their height
    warmdown: float = 0.6          # last fraction of training, in which they fall to zero
    # housekeeping
    probes: int = 8                # training in so many parts, and between them a look at the first probe_tokens of validation
    probe_tokens: int = 40_000
    save_every: int = 100          # steps between checkpoints
    cpu_threads: int = 4           # at most; pocket's rules allow four cores
    dtype: str = "auto"            # bf16, fp32, or auto: bf16 on GPUs and on CPUs with AMX or AVX512-BF16, else fp32

FINEWEB = dict(
    data="fineweb", train_tokens=100_000_000, seq_len=2048, window_short=1024, batch_tokens=524_288, device_tokens=16_384,
    loss_chunk=4096, embed_lr=0.15, head_lr=0.001, dropout=0.1, warmup=0.0, probes=12, probe_tokens=1_048_576, save_every=500,
    mtp_weight=0.3, iha=True, ema=0.995)  # these three after records/ablations

DEEP = FINEWEB | dict(n_layer=30, n_embd=1792, n_head=14, mlp_hidden=4864, epochs=18, muon_lr=0.01, weight_decay=1.3,
                      loop_first=15, loop_last=24, loop_times=2, loop_from=0.5)

POCKET = dict(recall="1,2,3,4,5,6,8,12,16,24,32", memory="3,4,5,6,8,12,16,24", mtp_weight=0.3, iha=True, distill_alpha=0.4)

PRESETS = {  # the FineWeb tracks': shapes and recipes of the published Slowrun records of 2026-07, in this script's terms
    "pocket": POCKET | dict(n_embd=128, mlp_hidden=352, muon_lr=0.03, weight_decay=0.4, epochs=1.9, members=2,
                            bag_size=2, bag_until=0.15, loop_first=1, loop_last=2, loop_times=1, loop_from=0.7),
    "pocket_unlimited": POCKET | dict(weight_decay=0.25, epochs=6.0, members=3, ema=0.99, score_stride=256),
    "mini": dict(data="mini", train_tokens=10_000_000, n_layer=12, n_embd=768, n_head=6, mlp_hidden=2112, seq_len=1024,
                 window_short=512, batch_tokens=65_536, device_tokens=65_536, loss_chunk=8192, dropout=0.1, weight_decay=0.8,
                 epochs=10, probe_tokens=262_144, save_every=500, mtp_weight=0.3, iha=True, ema=0.995),
    "tiny": FINEWEB | dict(n_layer=16, n_embd=1024, n_head=8, mlp_hidden=2816, epochs=13, muon_lr=0.04, weight_decay=0.8,
                           wd_points="0:1,0.125:1,0.5:0.125,1:1.5625", device_tokens=65_536),
    "limited": DEEP | dict(epochs=11, loop_last=20, loop_times=1, loop_from=0.64),
    "two_hour": DEEP | dict(device_tokens=8192),
    "unlimited": DEEP | dict(n_embd=2048, n_head=16, mlp_hidden=5632, loop_times=4, device_tokens=4096, members=8, distill_alpha=0.4)}

def check_config(c):
    """Refuse what cannot be trained, before anything is loaded."""
    below_one = {"dropout", "loop_from", "bag_until", "ema", "adam_beta1", "adam_beta2"}  # at 1 nothing would be left, or the phase never come
    zero_is_fine = {"seed", "score_stride", "loop_first", "loop_last", "loop_times", "probes"}
    not_fractions = {"softcap", "epochs", "muon_lr", "embed_lr", "head_lr", "scalar_lr", "weight_decay", "distill_temp", "mtp_weight"}
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if f.type is int:
            require(value >= (f.name not in zero_is_fine), f"--{f.name} {value}: must be {0 if f.name in zero_is_fine else 1} or more")
        if f.type is float:
            require(math.isfinite(value) and value >= 0, f"--{f.name} {value}: must be a number, 0 or more")
            require(value < 1 or f.name in not_fractions or value == 1 and f.name not in below_one,
                    f"--{f.name} {value:g}: is a fraction, choose one from 0 to {'below ' if f.name in below_one else ''}1")
    head_dim, rows = c.n_embd / c.n_head, c.batch_tokens / c.seq_len
    require(head_dim % 4 == 0, f"--n_embd {c.n_embd} --n_head {c.n_head}: heads of {head_dim:g} channels; half-rotated RoPE needs a multiple of 4")
    require(rows % 1 == 0, f"--batch_tokens {c.batch_tokens}: must be a multiple of --seq_len {c.seq_len}")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    require(rows % ranks == 0, f"--batch_tokens {c.batch_tokens}: its {rows:g} sequences cannot be divided among {ranks} ranks")
    require(c.device_tokens >= c.seq_len, f"--device_tokens {c.device_tokens}: must hold one sequence of --seq_len {c.seq_len}")
    require(c.score_stride <= c.seq_len, f"--score_stride {c.score_stride}: would leave tokens out; choose at most --seq_len {c.seq_len}")
    require(c.train_tokens > c.bag_size, f"--train_tokens {c.train_tokens}: must be {c.bag_size + 1} or more")
    require(c.window_pattern and not set(c.window_pattern) - set("SL"), f"--window_pattern {c.window_pattern!r}: write it in S and L")
    for name in ("softcap", "epochs", "distill_temp"):
        require(getattr(c, name) > 0, f"--{name} {getattr(c, name):g}: must be above 0")
    require(c.softcap <= 50 * min(1, c.distill_temp), f"--softcap {c.softcap:g} --distill_temp {c.distill_temp:g}: exponents beyond 50; lower the first or raise the second")
    require(c.warmup + c.warmdown <= 1, f"--warmup {c.warmup:g} --warmdown {c.warmdown:g}: together more than all of training")
    require(c.members % c.chains == 0, f"--members {c.members} --chains {c.chains}: chains are of equal length; choose a multiple")
    require(c.loop_times == 0 or c.loop_first <= c.loop_last < c.n_layer,
            f"--loop_first {c.loop_first} --loop_last {c.loop_last}: not a range of the model's layers 0 to {c.n_layer - 1}")
    require(c.dtype in ("auto", "bf16", "fp32"), f"--dtype {c.dtype}: choose auto, bf16 or fp32")
    for name, value in (("recall", c.recall), ("memory", c.memory)):
        require(re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", value), f"--{name} {value}: write lengths of n-grams with commas between, such as 4,8,16")
    pair = r"(\d+\.?\d*|\.\d+):(\d+\.?\d*|\.\d+)"
    require(re.fullmatch(f"{pair}(,{pair})*", c.wd_points) and wd_points(c) == sorted(wd_points(c)),
            f"--wd_points {c.wd_points}: write fraction:multiple pairs in rising order, such as 0:1,0.5:0.1,1:1.5")
    if c.student:
        student = models(c)[-1]
        require(student.distill_alpha > 0, f"--student {c.student}: learns nothing from the members with distill_alpha 0; add distill_alpha=0.5")
        check_config(student)

def models(c):
    """The configs of the models that a run trains, in order: its members, which differ in seed, then its student."""
    members = [dataclasses.replace(c, seed=c.seed + 1000 * k, student="") for k in range(c.members)]
    if not c.student:
        return members
    changes = dict(change.partition("=")[::2] for change in c.student.split(","))
    fixed = {"track", "data", "train_tokens", "seed", "members", "chains", "student", "recall", "memory", "softcap"}
    unfit = [name for name in changes if name not in Config.__dataclass_fields__ or name in fixed]
    require(not unfit, f"--student {c.student}: write name=value pairs with commas between, of recipe options; {(unfit or [''])[0]!r} is none")
    changes = {"bag_until": 0.0, "loop_from": 0.0} | typed(changes)  # it begins where they ended: past the bags, in all loops
    return [*members, dataclasses.replace(members[0], seed=c.seed + 1000 * c.members, **changes)]

def lessons(c):
    """(Config, those of its teachers) of each model that a run trains, in order."""
    trained = models(c)
    return [(one, trained[:c.members] if k == c.members else [trained[k - 1]] if c.distill_alpha and k % (c.members // c.chains) else [])
            for k, one in enumerate(trained)]

def typed(values):
    """Config fields as their types, from strings or numbers."""
    kinds = {name: Config.__dataclass_fields__[name].type for name in values}
    try:
        return {name: bool(int(value)) if kinds[name] is bool else kinds[name](value) for name, value in values.items()}
    except ValueError as e:
        raise Stop(f"a value of the recipe cannot be read: {e}")

# ---- machine ----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Machine:  # what this process runs on, and what follows from it
    device: torch.device
    dtype: torch.dtype     # of activations, and of matrices while they are multiplied; parameters stay float32
    rank: int = 0
    world_size: int = 1
    attention: str = "sdpa"
    block: object = None   # block() and objective_chunk(), compiled or as they stand
    objective_chunk: object = None
    compiled: bool = False
    why: dict = dataclasses.field(default_factory=dict)  # the reason of each choice, for the log

def setup_machine(c, args):
    """Find the device, join the other ranks where torchrun started several, choose dtype, attention and compiler."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_world_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    n_gpus = torch.cuda.device_count()
    require(not cuda or local_world_size <= n_gpus, f"--device cuda: torch sees {n_gpus} GPU(s) for {local_world_size} process(es); start fewer, or use --device cpu")
    if cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        fast, why = torch.cuda.is_bf16_supported(including_emulation=False), "bf16 tensor cores"
    else:
        device = torch.device("cpu")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, min(c.cpu_threads, cores) // local_world_size))
        has = getattr(torch.cpu, "get_capabilities", dict)()
        fast, why = has.get("amx_bf16", False) or has.get("avx512_bf16", False), "bf16 instructions"
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    bf16 = fast if c.dtype == "auto" else c.dtype == "bf16"
    m = Machine(device, torch.bfloat16 if bf16 else torch.float32, rank, world_size)
    m.why["dtype"] = f"{'bf16' if bf16 else 'fp32'} (the processor has {'' if fast else 'no '}{why})"
    pick_attention(m, c, args.attention)
    set_compiled(m, args.compile)
    return m

def pick_attention(m, c, wanted):
    """The first of varlen flash attention, FlexAttention and SDPA that works here, tried forward and backward."""
    reasons, names = [], ("varlen", "flex", "sdpa") if m.device.type == "cuda" else ("sdpa",)
    require(wanted in ("auto", *names), f"--attention {wanted}: needs a GPU; use --attention sdpa")
    for name in names if wanted == "auto" else (wanted,):
        try:
            q = torch.randn(2, 128, c.n_head, c.n_embd // c.n_head, device=m.device, dtype=m.dtype, requires_grad=True)
            masks = attention_masks(torch.zeros(2, 128, dtype=torch.bool, device=m.device), [64], name, m.dtype)
            attention(q, q, q, masks[64], name).sum().backward()
            m.attention, m.why["attention"] = name, f"{name} ({'; '.join(reasons) or 'the best that works here'})"
            return
        except Exception as e:  # whatever a missing or refusing kernel raises: the reason goes to the log
            reasons.append(f"{name} does not work here: {first_line(e)}")
    raise Stop(f"--attention {wanted}: {'; '.join(reasons)}")

def set_compiled(m, wanted, failure=None):
    """Use the compiled or the plain functions. torch.compile needs Triton on a GPU, a C++ compiler on a CPU. One layer is
    compiled, not the whole model: all layers share it, and so does every list of layers that a phase of training runs."""
    cuda = m.device.type == "cuda"
    found = torch.utils._triton.has_triton() if cuda else any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    name = f"{'Triton' if cuda else 'C++ compiler'} {'found' if found else 'not found'}"
    require(found or wanted != "on", f"--compile on: {name} here; install it, or use --compile auto")
    m.compiled = found and wanted != "off" and not failure
    m.why["compiled"] = f"{'yes' if m.compiled else 'no'} ({failure or f'{name}, --compile {wanted}'})"
    if m.compiled:
        torch._dynamo.config.recompile_limit = 64  # windows, phases and last micro-batches are shapes of their own
    m.block = torch.compile(block, dynamic=False) if m.compiled else block
    m.objective_chunk = torch.compile(objective_chunk, dynamic=False) if m.compiled else objective_chunk

def first_line(e):
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"

def all_reduce(m, tensor):
    """Sum over the ranks, in place."""
    if m.world_size > 1:
        dist.all_reduce(tensor)
    return tensor

# ---- data -------------------------------------------------------------------------------------------------------------

HEADER_INTS, MAGIC = 256, 20240520  # the shard format of llm.c and modded-nanogpt; data/README.md

def data_folder(c):
    return Path(c.data) if os.sep in c.data else HERE / "data" / c.data

def from_prepare(function, *args):
    """What a function of data/prepare.py returns. That file is not needed where the data is there."""
    from data import prepare
    try:
        return getattr(prepare, function)(*args)
    except prepare.DataError as e:
        raise Stop(str(e))

def read_meta(c, m):
    """meta.json of the run's data. The pocket shards are prepared on the spot where they are missing."""
    path = data_folder(c) / "meta.json"
    if c.data == "pocket" and not path.exists() and m.rank == 0:
        from_prepare("prepare_pocket")
    if m.world_size > 1:
        dist.barrier()
    require(path.exists(), f"{path}: no data there; python data/prepare.py --help says how to prepare it, --data names another folder")
    return read_json(path, check_meta)

def check_meta(meta):
    """meta, if it describes token shards; else KeyError, TypeError or ValueError."""
    texts = [meta["tokenizer"], meta["sha256"]["train.bin"], meta["sha256"]["val.bin"]]
    if not (0 <= meta["bos_id"] < meta["vocab_size"] <= NOTHING and meta["text_bytes"]["val"] > 0 and {*map(type, texts)} == {str}):
        raise ValueError("values out of range")
    return meta

def read_json(path, check):
    """check(what the file holds), which raises where that is not as it should be."""
    try:
        return check(json.loads(path.read_text()))
    except OSError as e:
        raise Stop(f"{path}: {e.strerror}; name the folder of a run or of prepared data")
    except (ValueError, KeyError, TypeError) as e:
        raise Stop(f"{path}: damaged, or of another version of this script ({first_line(e)}); make it anew")

def read_shard(path, vocab_size, sha256=None):
    """Token ids of a shard, uint16 [n], memory-mapped, after every check that the file is what it says it is."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        require(len(header) == HEADER_INTS and header[0] == MAGIC and header[1] == 1,
                f"{path}: not a token shard (its header does not begin with {MAGIC}, 1); data/README.md has the format")
        n = int(header[2])
        require(n > 1 and size == 4 * HEADER_INTS + 2 * n,
                f"{path}: {size:,} bytes, where the {n:,} tokens of its header take {4 * HEADER_INTS + 2 * n:,}; prepare the data again")
        require(sha256 is None or hashlib.sha256(np.memmap(path, mode="r")).hexdigest() == sha256,
                f"{path}: its sha256 is not the one in meta.json: it has changed, prepare the data again")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(n,))
    except OSError as e:
        raise Stop(f"{path}: {e.strerror}")
    check_ids(tokens, vocab_size, path)
    return tokens

def check_ids(tokens, vocab_size, path):
    require(int(tokens.max()) < vocab_size,
            f"{path}: holds token {tokens.max()}, but the vocabulary has only {vocab_size}: was it made with another tokenizer?")

NOTHING = 65535  # where no token is recalled; none has this id

def recalled(c):
    """How many tokens the model reads beside each."""
    return len(lengths(c.recall)) + len(lengths(c.memory))

def lengths(text):
    return [int(n) for n in text.split(",") if n]

class Recall:
    """Makes the model's inputs: beside each token, for each length n of c.recall, the token that followed the latest earlier occurrence, in the
    same document, of the n tokens which end here; for each of c.memory the same of the training documents, but never of a token's own one, for
    what a model is trained to trust must be as good on text that it has not seen. NOTHING where there is no such occurrence. Hard-wired induction
    (arXiv 2401.12973) and retrieval (2112.04426), exact and without attention: as far back as the document goes, and never ahead."""
    def __init__(self, tokens, bos_id, c):
        """tokens: [n], the training tokens of the budget; without c.memory only needed to train."""
        self.tokens, self.bos_id, self.c, self.index = tokens, bos_id, c, []
        if c.memory:
            ngrams, document, _ = self.ngrams(self.tokens[None])
            for n in lengths(c.memory):
                ngram, at = ngrams(n)[:-1], np.arange(len(self.tokens) - 1)
                order = np.argsort(ngram, kind="stable")
                ngram, documents = ngram[order], document[order]
                new = np.append(True, (ngram[1:] != ngram[:-1]) | (documents[1:] != documents[:-1]))
                self.index.append((order, ngram, documents, np.maximum.accumulate(np.where(new, at, 0))))

    def ngrams(self, streams):
        """(a function from n to a hash of the n-gram that ends at each token, each token's document, its place in that)"""
        tokens, at = streams.reshape(-1), np.arange(streams.size)
        starts = tokens == self.bos_id
        starts[::streams.shape[1]] = True
        # random codes of the tokens, times powers of an odd number, modulo 2**64: all n-grams at once, as differences of one running sum
        base, codes = 0x9E3779B97F4A7C15, np.random.default_rng(0).integers(0, 2 ** 64, NOTHING + 1, dtype=np.uint64)
        power, inverse = (np.cumprod(np.full(len(at), b, dtype=np.uint64)) for b in (base, pow(base, -1, 2 ** 64)))
        total = np.cumsum(codes[tokens] * inverse)
        return (lambda n: (total - np.append(np.zeros(min(n, len(at)), np.uint64), total[:-n])) * power,
                np.cumsum(starts, dtype=np.uint64), at - np.maximum.accumulate(np.where(starts, at, 0)))

    def inputs(self, streams=None):
        """Independent streams of ids [n_streams, length] -> uint16 [n_streams, length, 1 + recalled(c)]; None: the training tokens as one."""
        c, training = self.c, streams is None
        streams = self.tokens[None] if training else streams
        if not recalled(c):
            return streams[..., None]
        tokens, (ngrams, document, offset) = streams.reshape(-1), self.ngrams(streams)
        columns = np.full((1 + recalled(c), len(tokens)), NOTHING, dtype=np.uint16)
        columns[0] = tokens
        for column, n in zip(columns[1:], lengths(c.recall)):
            ngram = ngrams(n) + document * np.uint64(0xD6E8FEB86659FD93)
            order = np.argsort(ngram, kind="stable")
            here, before = order[1:], order[:-1]
            known = (ngram[here] == ngram[before]) & (offset[before] >= n - 1)
            column[here[known]] = tokens[before[known] + 1]
        for column, n, (order, known, documents, first) in zip(columns[1 + len(lengths(c.recall)):], lengths(c.memory), self.index):
            ngram = ngrams(n)
            found, asked = np.empty(len(tokens), np.int64), np.argsort(ngram)
            found[asked] = np.searchsorted(known, ngram[asked], side="right") - 1  # several times as fast as in the stream's order
            if training:
                found = np.where(documents[found] == document, first[found] - 1, found)
            good = (found >= 0) & (known[found] == ngram) & (offset >= n - 1)
            column[good] = self.tokens[order[found[good]] + 1]
        return columns.T.reshape(*streams.shape, -1)

class Loader:
    """Training batches as a function of the step alone: nothing to save, any position can be resumed.

    An epoch is the budget's documents in an order drawn from (seed, epoch), laid end to end and cut every seq_len tokens into
    rows, which are then shuffled. A document that would end with its row is taken early, so that the next row starts at a BOS.
    Every token but the epoch's first is a target exactly once; the last row is filled up with targets of -1: not counted.
    With bags of s tokens a row holds s * seq_len tokens, and each bag's targets are the s tokens of the next bag.
    inputs: [n, 1 + recalled(c)] of Recall, of which the first train_tokens are shown."""
    def __init__(self, inputs, bos_id, c, rank=0, world_size=1, bag=1):
        self.inputs = inputs[:c.train_tokens]
        self.tokens = self.inputs[:, 0]
        starts = np.union1d([0], np.flatnonzero(self.tokens == bos_id))
        self.starts, self.lengths = starts, np.diff(np.append(starts, len(self.tokens)))
        self.T, self.bag, self.seed, self.bos_id, self.epoch = c.seq_len * bag, bag, c.seed, bos_id, None
        self.rows_per_epoch = max(1, -(-(len(self.tokens) - bag) // self.T))  # ceil: the first token (or bag) of an epoch is no target
        self.batch_rows = c.batch_tokens // c.seq_len
        self.share = range(rank * self.batch_rows // world_size, (rank + 1) * self.batch_rows // world_size)
        self.steps = max(1, int(c.epochs * self.rows_per_epoch) // self.batch_rows)

    def start_epoch(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        shuffled, placed, order, filled, of_length = rng.permutation(len(self.starts)), set(), [], 0, {}
        for d in shuffled:
            of_length.setdefault(self.lengths[d], []).append(d)
        for d in shuffled:
            while d not in placed:
                fitting = of_length.get(-filled % self.T)  # what would end with its row
                while fitting and fitting[-1] in placed:
                    fitting.pop()
                order.append(fitting.pop() if fitting else d)
                placed.add(order[-1])
                filled += self.lengths[order[-1]]
        self.epoch, self.ends = epoch, np.cumsum(self.lengths[order])
        self.shift = self.starts[order] + self.lengths[order] - self.ends  # from a place in the epoch's stream to that in inputs
        self.rows = rng.permutation(self.rows_per_epoch)

    def row(self, i):
        """The T inputs of the epoch's stream from i*T on and the next one (or bag), as far as there are any."""
        at, stop = i * self.T, min((i + 1) * self.T + self.bag, len(self.tokens))
        first, last = np.searchsorted(self.ends, (at, stop - 1), side="right")
        cuts = [at, *self.ends[first:last], stop]
        return np.concatenate([self.inputs[a + shift:b + shift] for a, b, shift in zip(cuts, cuts[1:], self.shift[first:last + 1])])

    def batch(self, step):
        """This rank's inputs, int64 [rows, T, 1 + recalled(c)], its targets [rows, T / bag, bag], and the number of targets in the batch of all ranks."""
        x = np.full((len(self.share), self.T, self.inputs.shape[1]), self.bos_id, dtype=np.int64)
        y = np.full((len(self.share), self.T), -1, dtype=np.int64)
        n_targets = 0
        for j in range(self.batch_rows):
            epoch, k = divmod(step * self.batch_rows + j, self.rows_per_epoch)
            if epoch != self.epoch:
                self.start_epoch(epoch)
            i = int(self.rows[k])
            n_targets += max(0, min(self.T, len(self.tokens) - self.bag - i * self.T))
            if j in self.share:
                row, at = self.row(i), j - self.share.start
                x[at, :len(row[:self.T])], y[at, :len(row[self.bag:])] = row[:self.T], row[self.bag:, 0]
        return torch.from_numpy(x), torch.from_numpy(y).unflatten(1, (-1, self.bag)), n_targets

# ---- model ------------------------------------------------------------------------------------------------------------

GATE_CHANNELS = 32  # gates read only this many channels of the layer's input (Slowrun, modded-nanogpt)

def param_shapes(c, vocab_size):
    """Name -> shape of every parameter. Matrices are stacked over the layers, each as [out, in]."""
    L, D, H, gate = c.n_layer, c.n_embd, c.n_head, min(GATE_CHANNELS, c.n_embd)
    return {"wte": (vocab_size, D), "lm_head": (vocab_size, D),
            "attn": (L, 4 + c.value_proj, D, D),  # q, k, v, o, and the value projection of x0
            "mlp_in": (L, 2, c.mlp_hidden, D),    # gate, up
            "mlp_out": (L, D, c.mlp_hidden),
            **({"gates": (L, c.value_proj + c.attn_gate, H, gate)} if c.value_proj or c.attn_gate else {}),
            **({"mix": (L, 2)} if c.x0_mix else {}), **({"skip": (L // 2,)} if c.unet and L > 1 else {}),
            **({"recall": (recalled(c), vocab_size + 1, D)} if recalled(c) else {}),  # the last row: nothing
            **({"iha": (L, 3, H, H)} if c.iha else {}), **({"mtp": (1, D, D)} if c.mtp_weight else {})}

def init_params(c, vocab_size):
    """Float32 parameters on the CPU, started as in nanochat and Slowrun: layers as the identity, the first loss ln(vocab_size)."""
    g, bound = torch.Generator().manual_seed(c.seed), (3 / c.n_embd) ** 0.5  # uniform with variance 1 / fan_in
    start = {"mix": torch.tensor([1.1, 0.1]), "skip": torch.ones(1), "iha": torch.eye(c.n_head)}
    p = {name: start.get(name, torch.zeros(1)).expand(shape).clone() for name, shape in param_shapes(c, vocab_size).items()}
    p["wte"].normal_(0, 1, generator=g)
    p["lm_head"].normal_(0, 0.001, generator=g)
    for name in [name for name in ("attn", "mlp_in", "mtp") if name in p]:
        p[name].uniform_(-bound, bound, generator=g)
    p["attn"][:, 3] = 0
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

def attention_masks(starts, windows, impl, dtype):
    """What attention() needs for each window size, the same pairs for every implementation: token i sees token j if j <= i,
    i - j < window, and no document begins after j up to i. starts [B, T]: where one begins -> {window: mask}."""
    (B, T), device = starts.shape, starts.device
    if impl == "varlen":  # rows and documents are sequences of one long batch
        starts = starts.clone()
        starts[:, 0] = True
        firsts = starts.flatten().nonzero()[:, 0].int()
        room = 1 << max(B * T // 256, len(firsts)).bit_length()  # one shape to compile, nearly always; the rest is empty
        cu_seqlens = F.pad(firsts, (0, room - len(firsts)), value=B * T)
        return {w: (cu_seqlens, w) for w in windows}
    document = starts.cumsum(1, dtype=torch.int32) + 1
    if impl == "flex":
        def pairs(w):
            return lambda b, h, i, j: (j <= i) & (i - j < w) & (document[b, i] == document[b, j])
        return {w: flex.create_block_mask(pairs(w), B, None, T, T, device=device) for w in windows}
    masks = {}
    for w in windows:
        banded = 2 * w <= T and T % w == 0
        documents_q = document.unflatten(1, (-1, w)) if banded else document[:, None]  # [B, blocks, queries]
        documents_k = with_block_before(document, w) if banded else document[:, None]  # [B, blocks, keys]
        n_k = documents_k.size(2)
        distance = torch.arange(n_k - documents_q.size(2), n_k, device=device)[:, None] - torch.arange(n_k, device=device)
        forbidden = (documents_q[..., None] != documents_k[:, :, None]) | ((distance < 0) | (distance >= w))
        # added to the scores: SDPA would turn a mask of booleans into this anew in every layer
        masks[w] = torch.zeros(forbidden.shape, dtype=dtype, device=device).masked_fill_(forbidden, -math.inf).flatten(0, 1)[:, None]
    return masks

def with_block_before(x, w):
    """[B, T, ...] -> [B, T/w, 2w, ...]: each block of w tokens behind the one before it; zeros stand before the first."""
    blocks = x.unflatten(1, (-1, w))
    return torch.cat([F.pad(blocks, (0, 0) * (blocks.dim() - 2) + (1, 0))[:, :-1], blocks], dim=2)

def attention(q, k, v, mask, impl):
    """Softmax attention, scaled by head_dim ** -0.5, over the pairs that `mask` (of attention_masks) allows.
    q, k, v [B, T, H, head_dim] -> [B, T, H, head_dim]."""
    if impl == "varlen":
        cu_seqlens, window = mask
        T, flat = q.size(1), (-1, *q.shape[2:])
        y = varlen.varlen_attn(q.reshape(flat), k.reshape(flat), v.reshape(flat), cu_seqlens, cu_seqlens, T, T,
                               window_size=(window - 1, 0))
        return y.view(q.shape)
    if impl == "flex":
        return compiled_flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
    block_size, in_blocks = mask.size(-2), mask.size(-2) < mask.size(-1)
    if in_blocks:  # a short window: each block of queries has its own keys and those of the block before
        k, v = (with_block_before(x, block_size).flatten(0, 1) for x in (k, v))
    q_blocks, k, v = (x.transpose(1, 2) for x in (q.reshape(-1, block_size, *q.shape[2:]), k, v))
    if in_blocks:  # products and softmax one by one: SDPA is slow on problems this small
        y = torch.softmax((q_blocks * q.size(-1) ** -0.5) @ k.mT + mask, dim=-1) @ v
    else:
        y = F.scaled_dot_product_attention(q_blocks, k, v, attn_mask=mask)
    return y.transpose(1, 2).reshape(q.shape)

def block(x, x0, w, cos, sin, mask, impl, n_head, dropout):
    """One layer. x, x0 [B, T, D]; w: this layer's slice of every bank."""
    B, T, D = x.shape
    if "mix" in w:
        x = w["mix"][0] * x + w["mix"][1] * x0
    h, value_proj = norm(x), len(w["attn"]) > 4
    qkv = w["attn"][:3]
    if "iha" in w:
        qkv = torch.einsum("pij,pjdc->pidc", w["iha"], qkv.view(3, n_head, D // n_head, D))  # mixes the heads' projections, not activations
    q, k, v = F.linear(h, qkv.reshape(3 * D, D)).view(B, T, 3, n_head, D // n_head).unbind(2)
    if "gates" in w:
        gates = torch.sigmoid(F.linear(h[..., :w["gates"].size(-1)], w["gates"].flatten(0, 1))).view(B, T, -1, n_head, 1)
    if value_proj:
        v = v + 2 * gates[:, :, 0] * F.linear(x0, w["attn"][4]).view(v.shape)  # the gate starts at 2 * 1/2
    y = attention(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, mask, impl)
    if "gates" in w and len(w["gates"]) > value_proj:
        y = y * gates[:, :, -1]
    y = F.dropout(F.linear(y.reshape(B, T, D), w["attn"][3]), dropout, training=dropout > 0)
    x = x + y
    gate, up = F.linear(norm(x), w["mlp_in"].flatten(0, 1)).chunk(2, dim=-1)
    y = F.dropout(F.linear(F.silu(gate) * up, w["mlp_out"]), dropout, training=dropout > 0)
    return x + y

def layer_window(c, i):
    short = c.window_pattern[i % len(c.window_pattern)] == "S" and i < c.n_layer - 1
    return c.window_short if short else c.seq_len

def forward(p, inputs, c, m, bos_id, phase, training=False, compiled=False):
    """Hidden states [B, T, D] of inputs [B, T * bag, 1 + recalled(c)] (see Recall), normalized, ready for the head. phase: the layers to run, in
    order, and the size of a bag (see schedules). training: with dropout, drawn from torch's own generator."""
    layers, bag = phase
    tokens = inputs[..., 0]
    x, starts = F.embedding(tokens, p["wte"]), tokens == bos_id
    for k, table in enumerate(p["recall"].unbind(0) if "recall" in p else ()):
        x = x + F.embedding(inputs[..., 1 + k].clamp_max(len(table) - 1), table)
    if bag > 1:  # the mean over those tokens of a bag that belong to its last document
        bags = starts.unflatten(1, (-1, bag))
        begun = bags.cumsum(2)
        last = (begun == begun[:, :, -1:])[..., None]
        x, starts = (x.unflatten(1, (-1, bag)) * last).sum(2) / last.sum(2), bags.any(2)
    B, T, _ = x.shape
    cos, sin = rope_tables(T, c.n_embd // c.n_head, m.device, m.dtype)
    windows = [min(layer_window(c, i), T) for i in layers]
    masks = attention_masks(starts, sorted(set(windows)), m.attention, m.dtype)
    # every bank is cast and taken apart once per pass, not once per use
    banks = {name: p[name].to(m.dtype).unbind(0) for name in p if name not in ("wte", "lm_head", "recall", "skip", "mtp")}
    dropout = c.dropout if training else 0.0
    run_block = m.block if compiled else block  # scoring comes in all shapes, not worth compiling
    x = x0 = norm(x.to(m.dtype))
    skips = {}
    for i, window in zip(layers, windows):
        mirror = c.n_layer - 1 - i
        if "skip" in p and mirror in skips:
            x = x + p["skip"][mirror] * skips[mirror]
        x = run_block(x, x0, {name: bank[i] for name, bank in banks.items()}, cos, sin, masks[window], m.attention, c.n_head, dropout)
        if i < c.n_layer // 2:
            skips[i] = x
    return norm(x)

def flops_per_token(c, vocab_size, phase):
    """FLOPs of a forward pass per position: two per weight that is multiplied, and the attention over the average window."""
    weights = sum(math.prod(shape[1:]) for name, shape in param_shapes(c, vocab_size).items()
                  if name in ("attn", "mlp_in", "mlp_out", "gates"))
    windows = [min(layer_window(c, i), c.seq_len) for i in phase[0]]
    seen = [w - w * (w - 1) / 2 / c.seq_len for w in windows]  # tokens that the average token attends to
    return 2 * vocab_size * c.n_embd + sum(2 * weights + 4 * n * c.n_embd for n in seen)

# ---- objective --------------------------------------------------------------------------------------------------------

def head_logits(h, w, softcap):
    """Float32 logits [n, V] of hidden states [n, D] under the head [V, D]."""
    return F.linear(h, w).float().div_(softcap).tanh_().mul_(softcap)

def objective_chunk(z, grad, targets, softcap, alpha, temp, z_teacher):
    """Cross-entropy of one chunk of tokens, and its gradient, in one pass over z [n, V], the logits before the softcap. targets [n, K]: each token's K
    targets count alike; -1 counts nothing. Returns the sum of the losses in nats, pull [n, K] and total [n, 1], and overwrites grad [n, V]: the
    gradient of z is (grad + pull at the targets) / total. The softcap bounds the exponents, so no maximum comes off first; and total, known only
    after the pass, divides rows of the small factors when grad is multiplied.
    z_teacher [n, V]: logits of a model that this one learns from, or None. With it the loss is
    (1 - alpha) * CE + alpha * temp**2 * KL(teacher || model), both at temperature temp (arXiv 1503.02531)."""
    def capped(z):
        s = torch.tanh(z.float() / softcap)
        return softcap * s, (1 - s) * (1 + s)
    counted, weight = targets >= 0, 1.0 if z_teacher is None else 1 - alpha
    (logits, slope), (target_logits, target_slope) = capped(z), capped(z.gather(1, targets.clamp_min(0)))
    p = logits.exp()
    total = p.sum(-1, keepdim=True)
    loss = weight * ((total.log() - target_logits) * counted).sum()
    g = p * slope * (weight * counted.sum(1, keepdim=True))
    if z_teacher is not None:
        taught, logits_t = counted[:, :1], capped(z_teacher)[0]
        p_t, q = (logits_t / temp).exp(), (logits / temp).exp()
        total_t, total_q = p_t.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        kl = (p_t * (logits_t - logits)).sum(-1, keepdim=True) / (temp * total_t) + (total_q / total_t).log()
        loss = loss + alpha * temp ** 2 * (kl * taught).sum()
        g = g + slope * (q / total_q - p_t / total_t) * (alpha * temp * taught * total)
    grad.copy_(g)
    return loss, -weight * target_slope * counted * total, total

@torch.no_grad()
def objective(h, w, targets, c, m, scale, teacher=()):
    """The training loss, scale * sum over tokens and their targets of -log p(target), its gradient of h [N, D] from forward(), and that of w [V, D], the
    head in float32; both in h's dtype. targets [N, K]: K of each token, -1: none. teacher: (h [N, D_t], w [V, D_t]).
    Three matrix products, as many as the plain way needs, in buffers of [loss_chunk, V] that all chunks share: never all logits at once."""
    loss, grad_h, grad_w, cast = torch.zeros((), device=h.device), torch.empty_like(h), torch.zeros_like(w, dtype=h.dtype), w.to(h.dtype)
    # rows of 50,257 logits would not begin at multiples of 16 bytes, as a GPU's matrix products need to be fast: hence multiples of 64
    buffers = h.new_empty(3 if teacher else 2, min(c.loss_chunk, len(h)), -(-len(w) // 64) * 64)
    buffers[..., len(w):], buffers = 0, buffers[..., :len(w)]  # a product may read beyond an odd row's end, times zero: no NaN may lie there
    for i in range(0, len(h), c.loss_chunk):
        part, target = h[i:i + c.loss_chunk], targets[i:i + c.loss_chunk]
        z, grad, *shown = buffers[:, :len(part)]
        torch.mm(part, cast.T, out=z)
        if teacher:
            torch.mm(teacher[0][i:i + c.loss_chunk], teacher[1].T, out=shown[0])
        part_loss, pull, total = m.objective_chunk(z, grad, target, c.softcap, c.distill_alpha, c.distill_temp, *(shown or [None]))
        grad.index_put_((torch.arange(len(part), device=h.device)[:, None], target.clamp_min(0)), pull.to(h.dtype), accumulate=True)  # a bag may repeat one
        loss, size = loss + scale * part_loss, scale / total
        torch.mm(grad, cast, out=grad_h[i:i + c.loss_chunk]).mul_(size)
        torch.addmm(grad_w, grad.T, (part * size).to(h.dtype), out=grad_w)
    return loss, grad_h, grad_w

def token_nll(h, w, targets, c):
    """-log p(target) of every token in nats, float32 [N]: the scoring side of objective(). h [N, D], targets [N]."""
    logits = (head_logits(part, w.to(h.dtype), c.softcap) for part in h.split(c.loss_chunk))
    return torch.cat([z.logsumexp(-1) - z.gather(1, y[:, None])[:, 0] for z, y in zip(logits, targets.split(c.loss_chunk))])

# ---- optimizer --------------------------------------------------------------------------------------------------------

MUON_BANKS = ("attn", "mlp_in", "mlp_out", "mtp")
NO_DECAY = ("gates", "mix", "skip", "iha")

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
    """Muon for the banks of matrices, AdamW for the rest, each rank updating its share of every parameter. A parameter is seen as
    rows [n, ...]: single matrices for Muon, single numbers for AdamW. Rank r owns rows [r * per, (r + 1) * per) with
    per = ceil(n / world_size), and keeps optimizer state for these alone. A step sums the gradients onto their owners, updates
    there, and sends the result to everyone; one rank owns all and sends nothing."""
    def __init__(self, p, c, m):
        self.p, self.c, self.m, self.state = p, c, m, {}
        for name, w in p.items():
            rows = self.rows(name, w)
            mine = (-(-len(rows) // m.world_size), *rows.shape[1:])
            second = (*mine[:2], 1) if name in MUON_BANKS else mine
            self.state[name] = (torch.zeros(mine, device=w.device), torch.zeros(second, device=w.device))

    @staticmethod
    def rows(name, w):
        return w.view(-1, *w.shape[-2:]) if name in MUON_BANKS else w.view(-1)

    def pad(self, rows, length):
        return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, length - len(rows)))

    def gather(self, own, n, per):
        """All n rows from every rank's own ones."""
        if self.m.world_size == 1:
            return own
        whole = torch.empty(per * self.m.world_size, *own.shape[1:], device=own.device)
        all_gather(whole, self.pad(own, per))
        return whole[:n]

    @torch.no_grad()
    def step(self, step, lr, wd, momentum):
        """lr and wd: multiples of the config's (see schedules). Gradients are in p[name].grad and are dropped."""
        c, world, sums = self.c, self.m.world_size, {}
        for name, w in self.p.items():  # all sums are under way before the first update needs one
            grad, per = self.rows(name, w.grad), len(self.state[name][0])
            own, work = grad, None
            if world > 1:
                own = torch.empty(per, *grad.shape[1:], device=grad.device)
                work = reduce_scatter(own, self.pad(grad, per * world), async_op=True)
            sums[name], w.grad = (own, work), None
        for name, w in self.p.items():
            (grad, work), (first, second), rows = sums.pop(name), self.state[name], self.rows(name, w)
            if work:
                work.wait()
            per = len(first)
            own = rows[self.m.rank * per:(self.m.rank + 1) * per]
            n = len(own)  # the last ranks may own fewer rows than the others, or none
            decay = 0.0 if name in NO_DECAY else c.weight_decay * wd
            if name in MUON_BANKS:
                muon_update(own, grad[:n], first[:n], second[:n], c.muon_lr * lr, decay, momentum, c.muon_beta2, self.m.dtype)
            else:
                base = {"wte": c.embed_lr, "recall": c.embed_lr, "lm_head": c.head_lr}.get(name, c.scalar_lr)
                adamw_update(own, grad[:n], first[:n], second[:n], base * lr, decay, c.adam_beta1, c.adam_beta2, step)
            if world > 1:
                rows.copy_(self.gather(own, len(rows), per))

    @torch.no_grad()
    def state_dict(self):
        """Every rank's state put together, on the CPU of the first, in the shape that one rank would have: resumes on any number."""
        keep = "cpu" if self.m.rank == 0 else "meta"  # only the first writes it
        return {name: [self.gather(own, len(self.rows(name, w)), len(own)).to(keep) for own in self.state[name]] for name, w in self.p.items()}

    @torch.no_grad()
    def load_state_dict(self, full):
        for name, parts in full.items():
            for own, whole in zip(self.state[name], parts):
                mine = whole[self.m.rank * len(own):(self.m.rank + 1) * len(own)]
                own[:len(mine)].copy_(mine)

# ---- schedules: pure functions of the fraction of training that is done, in [0, 1] ------------------------------------

def lr_schedule(done, c):
    """Warmup, hold, warmdown: the multiple of every learning rate. `done` is taken at the middle of a step, so that
    neither the first nor the last step is wasted on a rate of zero."""
    return done / c.warmup if done < c.warmup else min(1.0, (1 - done) / max(c.warmdown, 1e-9))

def momentum_schedule(done, c):
    return c.momentum_start + (c.muon_momentum - c.momentum_start) * min(1.0, done / max(c.momentum_warmup, 1e-9))

def wd_schedule(done, c):
    return float(np.interp(done, *zip(*wd_points(c))))

def wd_points(c):
    return [tuple(map(float, point.split(":"))) for point in c.wd_points.split(",")]

def phase_schedule(done, c):
    """(layers, bag size): which layers run, in order, and how many tokens a position holds."""
    layers = list(range(c.n_layer))
    if c.loop_times and done >= c.loop_from:
        loop = layers[c.loop_first:c.loop_last + 1]
        layers[c.loop_last + 1:c.loop_last + 1] = loop * c.loop_times
    return tuple(layers), c.bag_size if done < c.bag_until else 1

# ---- checkpoint -------------------------------------------------------------------------------------------------------

def write_file(path, data):
    """Write bytes so that `path` holds all of them or is as it was, whatever happens."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the rename must reach the disk, too
    os.close(folder)

def write_npy(path, array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_file(path, buffer.getbuffer())

def saved(run, kind):
    """Checkpoints of a kind ("state": to go on from; "weights": to score), oldest first."""
    return sorted(run.glob(f"{kind}-*.*.pt"), key=lambda path: (len(path.name), path.name))  # longer names have larger numbers

def save_tensors(run, kind, number, content, keep=None):
    """Write run/KIND-NUMBER.DIGEST.pt, and delete all but the newest `keep` of its kind. The digest is of the bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:16]
    write_file(run / f"{kind}-{number:07d}.{digest}.pt", buffer.getbuffer())
    for old in saved(run, kind)[:-keep] if keep else []:
        old.unlink()

def load_tensors(path):
    """What save_tensors wrote, or None where the file is damaged or was never one. Unpickles nothing but tensors and numbers."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] == path.name.split(".")[-2]:
        with contextlib.suppress(RuntimeError, pickle.UnpicklingError, EOFError):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

def save_state(run, p, optimizer, ema, progress, log, m):
    """Everything that training needs to go on as if it had never stopped. progress: the model and its step, seconds on the track's
    clock over all parts of the run, seconds of compilation beside it, the length of the log so far, and the most ranks
    and threads that it had. Between two models there is no more than that: p and ema are {}, the optimizer is None."""
    optimizer_state = optimizer.state_dict() if optimizer else {}  # every rank takes part in this
    if m.rank == 0:
        progress["log_bytes"] = log.sync()
        params, average = ({name: w.detach().cpu() for name, w in x.items()} for x in (p, ema))
        save_tensors(run, "state", progress["model"] * 10 ** 7 + progress["step"],
                     {"params": params, "optimizer": optimizer_state, "ema": average, "progress": progress, "source": SOURCE_SHA256}, keep=2)

def load_state(run):
    """The newest undamaged checkpoint of a run, or that of a run not begun."""
    for path in reversed(saved(run, "state")):
        if state := load_tensors(path):
            require(state["source"] == SOURCE_SHA256,
                    f"--resume {run}: {SCRIPT} has changed since this run began; restore the source that its log.txt holds")
            return state
        print(f"{path}: damaged, going back to the checkpoint before it", file=sys.stderr)
    return {"params": {}, "progress": {"model": 0, "step": 0, "seconds": 0.0, "compile_seconds": 0.0, "log_bytes": 0}}

def read_run(run):
    """(Config, meta of its data, the other options it was started with) of a run folder."""
    return read_json(run / "config.json", lambda stored: (
        make_config(stored["config"]), check_meta(stored["data"]), {name: stored[name] for name in ASKED}))

def load_weights(run, number, c, meta, m):
    """The weights of a run's model `number`, checked against the shapes of its config."""
    for path in run.glob(f"weights-{number:07d}.*.pt"):
        p = load_tensors(path)
        require(isinstance(p, dict) and {name: tuple(w.shape) for name, w in p.items()} == param_shapes(c, meta["vocab_size"]),
                f"{path}: damaged, or not the weights that {run / 'config.json'} describes; train the run again")
        return {name: w.to(m.device, torch.float32) for name, w in p.items()}
    raise Stop(f"{run}: lacks the final weights of model {number + 1}; finish the run with --resume {run}")

def load_run(run, args):
    """(Config, machine, meta, Recall) of a run folder that is to be scored."""
    c, meta, _ = read_run(run)
    args.compile = "off"  # scoring comes in all shapes
    tokens = read_shard(data_folder(c) / "train.bin", meta["vocab_size"], meta["sha256"]["train.bin"])[:c.train_tokens] if c.memory else ()
    return c, setup_machine(c, args), meta, Recall(tokens, meta["bos_id"], c)

# ---- scoring ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def stream_nll(p, inputs, c, m, bos_id, phase):
    """Negative log-likelihood in nats of every token of independent streams, float32 [n_streams, length] on every rank, from what Recall
    makes of their ids, [n_streams, length, 1 + recalled(c)].
    Windows of seq_len begin where the one before ends or, with score_stride, so many tokens after its beginning: each token is predicted once, from
    the tokens before it in the earliest window that holds it. The first token of a stream has no context and gets 0."""
    n, length, _ = inputs.shape
    out = torch.zeros(n, length, device=m.device)
    stride = c.score_stride or c.seq_len
    n_full = max(0, (length - 1 - c.seq_len) // stride + 1)
    rest = length - 1 - n_full * stride  # of which the last whole window has scored the first seq_len - stride
    for first, count, T in ((0, n_full, c.seq_len), (n_full, not n_full or rest > c.seq_len - stride, rest)):
        windows = [(row, i * stride) for row in range(n) for i in range(first, first + count)][m.rank::m.world_size] if T else []
        rows = max(1, c.device_tokens // max(T, 1))
        for i in tqdm(range(0, len(windows), rows), "scoring", unit="batch", delay=3, leave=False, disable=m.rank > 0):
            part = windows[i:i + rows]
            ids = torch.from_numpy(np.stack([inputs[row, at:at + T + 1] for row, at in part]).astype(np.int64)).to(m.device)
            h = forward(p, ids[:, :-1], c, m, bos_id, phase)
            nll = token_nll(h.flatten(0, 1), p["lm_head"], ids[:, 1:, 0].flatten(), c).view(len(part), T)
            for (row, at), values in zip(part, nll):
                new = c.seq_len - stride if at else 0
                out[row, at + 1 + new:at + 1 + T] = values[new:]
    return all_reduce(m, out).cpu().numpy()

def scored_models(c):
    """(number of the weights, config) of the models whose averaged probabilities are a run's: all members, or the student alone."""
    return list(enumerate(models(c)))[-1 if c.student else 0:]

def mix_nll(total, nll):
    """-log of the sum of the probabilities of models that were added before, of which `total` is that (None: there are none), and of one more."""
    nll = nll.astype(np.float64)
    return nll if total is None else -np.logaddexp(-total, -nll)

def run_nll(run, inputs, c, m, meta, show=None):
    """NLL of every token under the mean probability of a run's models, float64 [n_streams, length]: one model in memory at a time."""
    total, scored = None, scored_models(c)
    for n, (number, one) in enumerate(scored, 1):
        nll = stream_nll(load_weights(run, number, one, meta, m), inputs, one, m, meta["bos_id"], phase_schedule(1.0, one))
        total = mix_nll(total, nll)
        if show and len(scored) > 1:
            show(f"member {number + 1} alone: {mean_nll(nll):.6f}; the members so far together: {mean_nll(total + math.log(n)):.6f} nats per token")
    total = np.maximum(0, total + math.log(len(scored)))  # up to rounding it is
    total[:, 0] = 0
    return total

def mean_nll(nll):
    """Nats per scored token of [n_streams, length]: the first of each stream is not scored."""
    return float(nll.sum(dtype=np.float64) / max(1, nll.size - len(nll)))

def score_command(args):
    """--score RUN --tokens FILE --nll OUT.npy: the contract that a referee relies on."""
    require(args.tokens and args.nll and args.nll.suffix == ".npy" and args.nll.parent.is_dir(),
            f"--score: needs --tokens FILE and --nll OUT.npy in a folder that exists, not --tokens {args.tokens} --nll {args.nll}")
    c, m, meta, recall = load_run(args.score, args)
    shard = args.tokens.suffix != ".npy"
    try:
        streams = read_shard(args.tokens, meta["vocab_size"])[None] if shard else np.load(args.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as e:
        raise Stop(f"--tokens {args.tokens}: cannot be read as an array of numbers ({first_line(e)})")
    kind = f"{streams.dtype} {list(streams.shape)}" if isinstance(streams, np.ndarray) else "an archive"
    require(kind.startswith("uint16 [") and streams.ndim == 2 and streams.size, f"--tokens {args.tokens}: {kind}, not uint16 [n_streams, length]")
    if not shard:
        check_ids(streams, meta["vocab_size"], args.tokens)
    nll = run_nll(args.score, recall.inputs(streams), c, m, meta).astype(np.float32)
    if m.rank == 0:
        write_npy(args.nll, nll[0] if shard else nll)
        print(f"{args.nll}: {nll.size - len(nll):,} tokens scored, {mean_nll(nll):.6f} nats per token")

@torch.no_grad()
def sample(run, c, m, meta, recall, prompt, n_tokens, temperature=0.8):
    """Text that the run's models write after `prompt`. The whole context is computed anew for each token: slow, and simple."""
    encoding = from_prepare("get_encoding", meta["tokenizer"])
    scored = [(one, load_weights(run, number, one, meta, m)) for number, one in scored_models(c)]
    g, ids = torch.Generator().manual_seed(c.seed), [meta["bos_id"]] + encoding.encode_ordinary(prompt)
    for _ in range(n_tokens):
        mean, inputs = 0, recall.inputs(np.array([ids], dtype=np.uint16))
        for one, p in scored:
            x = torch.from_numpy(inputs[:, -one.seq_len:].astype(np.int64)).to(m.device)
            h = forward(p, x, one, m, meta["bos_id"], phase_schedule(1.0, one))
            mean = mean + head_logits(h[0, -1:], p["lm_head"].to(h.dtype), one.softcap)[0].softmax(-1).cpu() / len(scored)
        ids.append(int(torch.multinomial((mean.log() / temperature).softmax(-1), 1, generator=g)))
        if ids[-1] == meta["bos_id"]:
            break
    return encoding.decode([i for i in ids if i != meta["bos_id"]])

# ---- training ---------------------------------------------------------------------------------------------------------

class Log:
    """log.txt and the terminal, on rank 0. The file is locked: two processes would spoil each other's run."""
    def __init__(self, run, m):
        self.file, self.shown = None, -math.inf
        if m.rank == 0:
            self.file = open(run / "log.txt", "ab")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Stop(f"--resume {run}: another process is at work on this run; wait for it, or stop it first")

    def __call__(self, line, show=True, pause=0.0):
        """pause: on the terminal only if nothing was for so many seconds."""
        if self.file:
            self.file.write(line.encode() + b"\n")
            self.file.flush()
            if show and time.monotonic() - self.shown >= pause:
                self.shown = time.monotonic()
                print(line, flush=True)

    def cut(self, length):
        """What was logged after the checkpoint from which a run goes on is dropped: the log reads as one."""
        if self.file:
            self.file.truncate(length)

    def sync(self):
        """Put on disk what was written so far. Returns its length in bytes."""
        os.fsync(self.file.fileno())
        return self.file.tell()

def hardware(m):
    if m.device.type == "cuda":
        return f"{m.world_size} x {torch.cuda.get_device_name(m.device)}"
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"

def train_pass(p, x, y, n_targets, c, m, bos_id, phase, seed, teacher=None):
    """Forward and backward of one micro-batch; gradients add up in p[name].grad. teacher: (Config, weights) of the model that
    this one learns from. Returns its part of the mean loss."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))  # what is dropped depends on the step alone, so a resumed run repeats it
    x, y = x.to(m.device, non_blocking=True), y.to(m.device, non_blocking=True)
    shown = ()
    if teacher and phase[1] == 1:  # there is nothing to learn about bags
        t, p_t = teacher
        with torch.no_grad():
            shown = forward(p_t, x, t, m, bos_id, phase_schedule(1.0, t), compiled=True).flatten(0, 1), p_t["lm_head"].to(m.dtype)
    h, head = forward(p, x, c, m, bos_id, phase, training=True, compiled=True).flatten(0, 1), p["lm_head"]
    roots, (loss, *grads) = [h, head], objective(h, head, y.flatten(0, 1), c, m, 1 / n_targets, shown)
    if "mtp" in p:
        later, h_later = F.pad(y[:, 1:], (0, 0, 0, 1), value=-1), norm(F.linear(h, p["mtp"][0].to(h.dtype)))
        loss_later, *grads_later = objective(h_later, head, later.flatten(0, 1), c, m, c.mtp_weight / n_targets)
        loss, roots, grads = loss + loss_later, [*roots, h_later, head], [*grads, *grads_later]
    torch.autograd.backward(roots, grads)
    return loss

class Schedule:
    """What a model trains on, step by step: bags first, if it has any, then single tokens. All a function of the step."""
    def __init__(self, inputs, bos_id, c, m, steps=None):
        self.plain = Loader(inputs, bos_id, c, m.rank, m.world_size)
        self.total = min(self.plain.steps, steps or self.plain.steps)
        self.phases = [phase_schedule((step + 0.5) / self.total, c) for step in range(self.total)]
        self.n_bags = sum(bag > 1 for _, bag in self.phases)
        self.bags = Loader(inputs, bos_id, c, m.rank, m.world_size, c.bag_size) if self.n_bags else None

    def batch(self, step):
        return self.bags.batch(step) if step < self.n_bags else self.plain.batch(step - self.n_bags)

    def epoch(self, step):
        """Passes over the budget in the first `step` steps."""
        parts = (self.bags, min(step, self.n_bags)), (self.plain, max(0, step - self.n_bags))
        return sum(n * loader.batch_rows / loader.rows_per_epoch for loader, n in parts if loader)

def train_flops(c, schedule, vocab_size, teachers):
    """Of a model's training: a backward pass costs two forward passes, a teacher one."""
    taught = sum(flops_per_token(t, vocab_size, phase_schedule(1.0, t)) for t in teachers[:1])  # one at a time, all of one recipe
    later = 2 * c.n_embd * (c.n_embd + vocab_size) * (c.mtp_weight > 0)
    return c.batch_tokens * sum(3 * (flops_per_token(c, vocab_size, phase) + later) + taught * (phase[1] == 1) for phase in schedule.phases)

def distinct(runs):
    """Those that differ in more than the seed."""
    return list({(dataclasses.replace(c, seed=0), bool(taught)): (c, schedule, taught) for c, schedule, taught in runs}.values())

def compile_all(runs, m, meta):
    """Compile every phase of training on made-up tokens; where that fails, go on without. runs: (Config, Schedule, teachers' configs) of
    each model that is to be trained. Returns the seconds it took."""
    all_reduce(m, torch.zeros(1, device=m.device)).item()  # waiting for a rank that is late is not compilation ...
    began, vocab_size = time.monotonic(), meta["vocab_size"]
    if m.compiled and runs:
        if m.rank == 0:
            print("compiling, for half a minute or so ...", flush=True)
        try:
            for c, schedule, taught in distinct(runs):
                p = {name: w.to(m.device).requires_grad_() for name, w in init_params(c, vocab_size).items()}
                teacher = (taught[0], {name: w.to(m.device) for name, w in init_params(taught[0], vocab_size).items()}) if taught else None
                for phase in sorted(set(schedule.phases)):
                    for rows in {len(part) for part in torch.arange(len(schedule.plain.share)).split(c.device_tokens // c.seq_len)}:
                        x = torch.zeros(rows, c.seq_len * phase[1], 1 + recalled(c), dtype=torch.long)
                        train_pass(p, x, x[..., 0].contiguous().unflatten(1, (-1, phase[1])), 1, c, m, meta["bos_id"], phase, (0,), teacher)
        except RuntimeError as e:  # as which torch._dynamo passes on whatever the compiler ran into
            set_compiled(m, "auto", f"the compiler failed, {first_line(e)}")
    all_reduce(m, torch.zeros(1, device=m.device)).item()  # ... but waiting for the slowest compiler is
    return time.monotonic() - began

def train(c, runs, run, m, meta, probe, asked_to_stop, log):
    """Train the models of a run from its last checkpoint, or from the start. runs: (Config, Schedule, its teachers' configs) of each;
    probe: inputs [1, length, 1 + recalled(c)] that are looked at in between. Returns its progress."""
    state = load_state(run)
    progress, trained = state["progress"], models(c)
    progress |= {"ranks": max(m.world_size, progress.get("ranks", 0)), "threads": max(torch.get_num_threads(), progress.get("threads", 0))}
    log.cut(progress["log_bytes"])
    if progress["log_bytes"]:
        log(f"resumed at step {progress['step']} of model {progress['model'] + 1}")
    else:
        log(f"==== source {SCRIPT} bytes={len(SOURCE)} sha256={SOURCE_SHA256}\n{SOURCE.decode()}{SOURCE_END}", show=False)
        log(f"config {json.dumps(dataclasses.asdict(c))}\ndata {json.dumps(meta)}", show=False)
        n_params = sum(math.prod(shape) for shape in param_shapes(c, meta["vocab_size"]).values())
        log(f"run {run}: track {c.track}, {len(trained)} model(s), the first of {n_params:,} parameters, {runs[0][1].total} steps of {c.batch_tokens:,} tokens, "
            f"{c.epochs:g} epochs of {c.train_tokens:,}, seed {c.seed}")
    log(f"packages: python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; {platform.system()}\n"
        f"hardware: {hardware(m)}; {m.world_size} rank(s) of {torch.get_num_threads()} thread(s)\n"
        f"dtype: {m.why['dtype']}\nattention: {m.why['attention']}")
    compile_seconds = compile_all(runs[progress["model"]:], m, meta)
    log(f"compiled: {m.why['compiled']}; {compile_seconds:.1f} s, which the clock leaves out")
    progress["compile_seconds"] += compile_seconds
    start = START + compile_seconds - progress["seconds"]  # where the clock would have begun, had the run never stopped
    total = None
    for k, (one, schedule, taught) in enumerate(runs):
        new = k >= progress["model"]
        if new:
            teachers = [(trained.index(t), t) for t in taught]
            p = train_model(k, one, run, m, meta, schedule, teachers, state if state["params"] else None, progress, log, probe, start, asked_to_stop, len(runs))
            if m.rank == 0:
                save_tensors(run, "weights", k, {name: w.detach().cpu() for name, w in p.items()})
            del p  # the next model needs the memory
            progress |= {"model": k + 1, "step": 0, "seconds": time.monotonic() - start}
            state = {"params": {}}
        if m.world_size > 1:
            dist.barrier()  # all ranks read what the first has written
        if len(runs) > 1:  # the running mean also needs the models that an earlier part of the run has trained
            nll = stream_nll(load_weights(run, k, one, meta, m), probe, one, m, meta["bos_id"], phase_schedule(1.0, one))
            total = mix_nll(total, nll) if k < c.members else total
            if new:
                together = mean_nll(total) + math.log(min(k + 1, c.members))
                log(f"member {k + 1} done: val_loss {mean_nll(nll):.4f}, the members so far together {together:.4f}, on the first {nll.size:,} tokens")
        if new:
            save_state(run, {}, None, {}, progress, log, m)
    return progress

TURN = 25  # to load the next teacher takes no longer than a step or two

def train_model(k, c, run, m, meta, schedule, teachers, state, progress, log, probe, start, asked_to_stop, n_models):
    """Train one model of a run, from the state of a checkpoint or from the start. teachers: (number, Config) of the models that it learns from, TURN
    steps from each in turn: that costs what one costs, and in the mean its gradient is that of their mean probability. Returns its final weights."""
    bos_id, total = meta["bos_id"], schedule.total
    shapes = param_shapes(c, meta["vocab_size"])
    if goes_on := not state and k == c.members and shapes.items() <= param_shapes(teachers[-1][1], meta["vocab_size"]).items():  # in its teachers' shape
        log(f"model {k + 1} goes on from the weights of model {k}")
    begin = state or {"params": load_weights(run, *teachers[-1], meta, m) if goes_on else init_params(c, meta["vocab_size"])}
    p = {name: begin["params"][name].to(m.device).requires_grad_() for name in shapes}
    ema = {name: w.detach().to(m.device, copy=True) for name, w in begin.get("ema", p).items()} if c.ema else {}
    optimizer = MuonAdamW(p, c, m)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    who = f"member {k + 1} " if n_models > 1 else ""
    probe_at = {round(total * (i + 1) / c.probes) for i in range(c.probes - 1)}
    first, began, teacher = progress["step"], time.monotonic(), None
    for step in range(first, total):
        done, phase = (step + 0.5) / total, schedule.phases[step]
        lr = lr_schedule(done, c)
        if teachers and (step == first or step % TURN == 0 and len(teachers) > 1):
            teacher = None  # its memory is free before the next one comes
            number, t = teachers[step // TURN % len(teachers)]
            teacher = t, load_weights(run, number, t, meta, m)
        x, y, n_targets = schedule.batch(step)
        loss = torch.zeros((), device=m.device)
        for i, (xs, ys) in enumerate(zip(x.split(c.device_tokens // c.seq_len), y.split(c.device_tokens // c.seq_len))):
            loss += train_pass(p, xs, ys, n_targets, c, m, bos_id, phase, (c.seed, step, m.rank, i), teacher)
        optimizer.step(step, lr, wd_schedule(done, c), momentum_schedule(done, c))
        for name, w in ema.items():
            w.lerp_(p[name].detach(), 1 - min(c.ema, (step + 1) / (step + 10)))  # a young average forgets its first steps
        loss, stopping = all_reduce(m, torch.stack([loss, torch.tensor(float(bool(asked_to_stop)), device=m.device)])).tolist()
        saving = (step + 1) % c.save_every == 0 or step + 1 == total or stopping
        if not math.isfinite(loss) or saving and not all(w.isfinite().all() for w in p.values()):  # the same on every rank
            raise Stop(f"{who}step {step + 1}: the loss is {loss:.4f} and no longer finite, or the weights are not; the last good checkpoint is "
                       f"{(saved(run, 'state') or ['none, for it came before the first'])[-1]}", 1)
        now = time.monotonic()
        speed = (step + 1 - first) * c.batch_tokens / (now - began)
        progress |= {"step": step + 1, "seconds": now - start}
        log(f"{who}step {step + 1}/{total} epoch {schedule.epoch(step + 1):.3f} loss {loss:.4f} "
            f"lr {lr * c.muon_lr:.5f} tok/s {speed:.0f} time {progress['seconds']:.1f}s "
            f"left {(total - step - 1) * c.batch_tokens / speed:.0f}s", pause=2.0 * (step + 1 < total))
        if step + 1 in probe_at:
            # between bags the model cannot predict single tokens yet, so the probe is of what it would be scored as
            nll = stream_nll(ema or p, probe, c, m, bos_id, (phase[0], 1))
            log(f"{who}probe {step + 1}/{total} val_loss {mean_nll(nll):.4f} on the first {nll.size:,} tokens")
        if saving:
            save_state(run, p, optimizer, ema, progress, log, m)
        if stopping:
            raise Stop(f"stopped at {who}step {step + 1}/{total} and saved; go on with: python {SCRIPT} --resume {run}", 130)
    return ema or p

def finish(progress, log, c, runs, run, m, meta, recall, val_tokens, steps):
    """After the clock: score the final weights, write the record."""
    nll = run_nll(run, recall.inputs(val_tokens[None]), c, m, meta, log)
    if m.rank > 0:
        return
    vocab_size, scored = meta["vocab_size"], [one for _, one in scored_models(c)]
    write_npy(run / "val_nll.npy", np.add.reduceat(nll[0], np.arange(0, nll.size, 1000)))
    record = {
        "track": c.track, "trial": steps is not None, "seed": c.seed, "members": len(runs), "scored": len(scored),
        "val_loss": mean_nll(nll), "val_bpb": nll.sum() / math.log(2) / meta["text_bytes"]["val"], "val_tokens": nll.size - 1,
        "train_seconds": progress["seconds"], "compile_seconds": progress["compile_seconds"], "steps": sum(schedule.total for _, schedule, _ in runs),
        "train_tokens": c.train_tokens, "tokens_seen": sum(one.batch_tokens * bag for one, schedule, _ in runs for _, bag in schedule.phases),
        "parameters": sum(math.prod(shape) for one in scored for shape in param_shapes(one, vocab_size).values()),
        "train_flops": sum(train_flops(one, schedule, vocab_size, taught) for one, schedule, taught in runs),
        "score_flops_per_token": sum(flops_per_token(one, vocab_size, phase_schedule(1.0, one)) * one.seq_len / (one.score_stride or one.seq_len)
                                     for one in scored),
        "source_sha256": SOURCE_SHA256, "data_sha256": meta["sha256"], "hardware": hardware(m), "ranks": progress["ranks"],
        "threads": progress["threads"], "torch": torch.__version__, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(m.device) if m.device.type == "cuda" else rss
    log(f"trained for {progress['seconds']:.1f} s, {record['tokens_seen']:,} tokens seen, {record['train_flops']:.4g} FLOPs, "
        f"peak memory {peak / 2 ** 20:.0f} MiB")
    try:
        log(f"---- what the model writes on its own\n{sample(run, c, m, meta, recall, '', 300)}\n----")
    except Exception as e:  # whatever ails a tokenizer, it does not spoil a finished run
        log(f"no sample: {first_line(e)}")
    log(f"val_loss {record['val_loss']:.6f} nats per token, {record['val_bpb']:.6f} bits per byte, {record['val_tokens']:,} tokens scored\n"
        f"the run is in {run}")
    log.sync()
    write_file(run / "record.json", json.dumps(record, indent=1).encode() + b"\n")
    for path in [*saved(run, "state")[:-1], *run.glob("*.tmp")]:  # the last state holds no more than the clock; a kill may have left a file half-written
        path.unlink()

def train_command(given, args):
    """A new run, or the rest of one."""
    if run := args.resume:
        c, meta, asked = read_run(run)
        vars(args).update({name: value for name, value in asked.items() if getattr(args, name) in (None, "auto")})
        more, student = given.get("members", c.members), given.get("student", c.student)
        require(more >= c.members and (more == c.members or c.chains == 1 and not c.student) and (student == c.student or not c.student),
                f"--members {more} --student {student}: the run has {c.members}{' in several chains' * (c.chains > 1)}{' and its student' * bool(c.student)}; "
                "one chain can be given more members, and any a student, before it has one")
        c = dataclasses.replace(c, members=more, student=student)
        check_config(c)
        finished = (run / "record.json").exists() and read_json(run / "record.json", lambda record: record["members"] == len(models(c)))
        require(not finished, f"--resume {run}: this run is finished, its score is in record.json; "
                "--members with a larger number goes on with it, and so does --student")
        m = setup_machine(c, args)
    else:
        c = make_config(given)
        m = setup_machine(c, args)
        c = dataclasses.replace(c, dtype="bf16" if m.dtype == torch.bfloat16 else "fp32")  # a resumed run must not choose anew
        meta = read_meta(c, m)
        names = [str(args.run_dir or Path("runs") / f"{c.track}_{time.strftime('%Y%m%d_%H%M%S')}_s{c.seed}")]
        if m.world_size > 1:
            dist.broadcast_object_list(names, src=0, device=m.device)  # the clocks of the ranks may differ
        run = Path(names[0])
    train_tokens, val_tokens = (read_shard(data_folder(c) / f, meta["vocab_size"], meta["sha256"][f]) for f in ("train.bin", "val.bin"))
    require(len(train_tokens) >= c.train_tokens, f"--train_tokens {c.train_tokens}: the training shard holds only {len(train_tokens)}; lower it")
    recall = Recall(train_tokens[:c.train_tokens], meta["bos_id"], c)
    inputs = recall.inputs()[0]
    runs = [(one, Schedule(inputs, meta["bos_id"], one, m, args.steps), taught) for one, taught in lessons(c)]
    if m.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
    log = Log(run, m)  # from here on the folder is this process's alone
    if m.rank == 0:
        require(args.resume or not (run / "config.json").exists(), f"{run}: another run took this name just now; name one with --run_dir")
        content = {name: getattr(args, name) for name in ASKED} | {"config": dataclasses.asdict(c), "data": meta}
        write_file(run / "config.json", json.dumps(content, indent=1).encode())
    asked_to_stop = []

    def note(number, frame):
        if asked_to_stop and time.monotonic() > asked_to_stop[0] + 10:  # again, and not just twice at once; or training is over
            raise Stop(f"stopped; go on with: python {SCRIPT} --resume {run}", 130)
        asked_to_stop.append(time.monotonic())
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    progress = train(c, runs, run, m, meta, recall.inputs(val_tokens[None, :c.probe_tokens]), asked_to_stop, log)
    asked_to_stop.insert(0, -math.inf)
    finish(progress, log, c, runs, run, m, meta, recall, val_tokens, args.steps)

def join_runs(folders, run):
    """--join RUN RUN ...: finished runs of one recipe and different seeds, each a chain trained apart, become one run that is trained but not
    scored, as if they had run side by side: the clock is the slowest one's, their ranks add up."""
    parts = [(path, *read_run(path), load_state(path)["progress"]) for path in folders]
    _, c, meta, asked, _ = parts[0]
    seeds, text = {one.seed for _, part, *_ in parts for one in models(part)}, []
    joined = dataclasses.replace(c, members=c.members * len(parts), chains=len(parts))
    for path, part, data, given, _ in parts:
        require((path / "record.json").exists(), f"--join {path}: is not finished; go on with --resume {path}")
        require((dataclasses.replace(part, seed=c.seed), data, given["steps"], part.chains, part.student) == (c, meta, asked["steps"], 1, ""),
                f"--join {path}: differs from {folders[0]} in more than the seed, or has chains or a student already")
    require(run and not run.exists() and len(seeds) == joined.members > c.members, "--join: name several runs of different seeds, and with --run_dir a new folder")
    run.mkdir(parents=True)
    for i, (path, part, *_, progress) in enumerate(parts):
        head, _, lines = (path / "log.txt").read_bytes()[:progress["log_bytes"]].decode().partition(SOURCE_END)
        text = text or [f"{head}{SOURCE_END}\nconfig {json.dumps(dataclasses.asdict(joined))}\ndata {json.dumps(meta)}"]
        text += [f"chain {i + 1} of {len(parts)}: {progress['ranks']} rank(s), {progress['seconds']:.1f} s, seed {part.seed}{lines}".rstrip()]
        text[-1] = re.sub(r"(?m)^(?:member (\d+) )?(?=(step|probe) \d|done:)", lambda found: f"member {i * c.members + int(found[1] or 1)} ", text[-1])
        for k in range(c.members):
            weights = next(path.glob(f"weights-{k:07d}.*.pt"))
            shutil.copy(weights, run / weights.name.replace(f"{k:07d}", f"{i * c.members + k:07d}"))
    log = "\n".join([*text, ""]).encode()
    write_file(run / "log.txt", log)
    clock = {name: total(progress[name] for *_, progress in parts) for name, total in (("seconds", max), ("compile_seconds", max), ("ranks", sum), ("threads", max))}
    clock |= {"model": joined.members, "step": 0, "log_bytes": len(log)}
    save_tensors(run, "state", joined.members * 10 ** 7, {"params": {}, "source": SOURCE_SHA256, "progress": clock})
    write_file(run / "config.json", json.dumps(read_json(folders[0] / "config.json", dict) | {"config": dataclasses.asdict(joined)}, indent=1).encode())
    print(f"{run}: {joined.members} members in {len(parts)} chains; score them with: python {SCRIPT} --resume {run}")

# ---- dry run ----------------------------------------------------------------------------------------------------------

GPU_FLOPS, GPU_BYTES, UTILIZATION = 989e12, 80e9, 0.4  # an H100: dense bf16, its memory, and what share of the first is assumed here

class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and their peak."""
    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self.known.add(tensor.untyped_storage())
                self.add(tensor.untyped_storage().nbytes())
                weakref.finalize(tensor.untyped_storage(), self.add, -tensor.untyped_storage().nbytes())
        return out

    def add(self, n):
        self.live, self.peak = self.live + n, max(self.peak, self.live + n)

def step_memory(c, teachers, phase, vocab_size, m):
    """Bytes that one rank holds at the peak of an optimizer step, {kind: bytes} with "peak" last: train_pass() and the optimizer run in a Ledger.
    With m.compiled a layer keeps for its backward pass what torch.compile's partitioner decides. On a GPU, windows are not masks in memory: one
    layer's mask stands for all here, and is taken off."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    gpu, ledger, kinds, chunk = m.attention != "sdpa", Ledger(), {}, objective_chunk

    def noted_chunk(*args):
        buffers, peak = args[0].untyped_storage().nbytes(), ledger.peak
        kinds.setdefault("activations", ledger.live - buffers - kinds["weights"] - kinds["optimizer"] - masks)  # the weights in bf16 among them
        ledger.peak = before = ledger.live
        out = chunk(*args)
        inside = 0 if m.compiled else ledger.peak - before  # compiled it is one loop over its buffers
        kinds["logits chunk"], ledger.peak = max(kinds.get("logits chunk", 0), buffers + inside), max(peak, before + inside)
        return out
    graphs = {}

    def compiled_block(*args):
        kind = (torch.is_grad_enabled(), *(getattr(arg, "shape", arg) for arg in tree_leaves(args)))  # a graph for each, as torch.compile has
        if kind not in graphs:
            graphs[kind] = aot_function(block, nop, nop, partition_fn=min_cut_rematerialization_partition)
        return graphs[kind](*args)
    rows = min(c.batch_tokens // c.seq_len // m.world_size, c.device_tokens // c.seq_len)
    masks = rows * c.seq_len ** 2 * m.dtype.itemsize if gpu else 0
    c = dataclasses.replace(c, window_pattern="L") if gpu else c
    m = dataclasses.replace(m, attention="sdpa", objective_chunk=noted_chunk, block=compiled_block if m.compiled else block)
    with ledger:
        p, *others = [{name: torch.zeros(shape) for name, shape in param_shapes(one, vocab_size).items()} for one in (c, *teachers[:1], *[c] * (c.ema > 0))]
        kinds["weights"] = ledger.live
        optimizer = MuonAdamW({name: w.requires_grad_() for name, w in p.items()}, c, m)
        kinds["optimizer"], kinds["gradients"] = ledger.live - kinds["weights"], sum(4 * w.numel() for w in p.values())
        x = torch.zeros(rows, c.seq_len * phase[1], 1 + recalled(c), dtype=torch.long)
        for _ in range(min(2, c.batch_tokens // m.world_size // c.seq_len // rows)):  # the second micro-batch finds gradients there
            train_pass(p, x, x[..., 0].unflatten(1, (-1, phase[1])), 1, c, m, 0, phase, (0,), (teachers[0], others[0]) if teachers else None)
        optimizer.step(0, 1.0, 1.0, 0.95)
    return kinds | {"peak": ledger.peak - masks}

def dry_run(c, n_ranks):
    """--dry_run: what a run would take on so many GPUs (pocket's tracks: processes on a CPU). Needs neither them nor the data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    rules = HERE / "records" / "tracks.json"
    rule = json.loads(rules.read_text())["tracks"].get(c.track, {}) if rules.exists() else {}
    n_ranks, gpu = n_ranks or min(rule.get("max_ranks", 1), c.batch_tokens // c.seq_len), not c.track.startswith("pocket")
    require(n_ranks > 0 and c.batch_tokens // c.seq_len % n_ranks == 0, f"--dry_run {n_ranks}: --batch_tokens {c.batch_tokens} cannot be divided among so many")
    meta = data_folder(c) / "meta.json"
    vocab_size = read_json(meta, check_meta)["vocab_size"] if meta.exists() else 257 if c.data == "pocket" else 50257
    if n_ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    m = Machine(torch.device("cpu"), torch.float32 if c.dtype == "fp32" else torch.bfloat16, 0, n_ranks, "varlen" if gpu else "sdpa", compiled=True)
    nothing = np.broadcast_to(np.uint16(0), (c.train_tokens, 1 + recalled(c)))
    runs, peak = [(one, Schedule(nothing, NOTHING, one, m), taught) for one, taught in lessons(c)], 0
    print(f"{c.track}: {len(runs)} model(s) on {n_ranks} {'GPU(s)' if gpu else 'CPU process(es)'}")
    for one, schedule, taught in distinct(runs):
        rows = [MuonAdamW.rows(name, torch.empty(shape, device="meta")) for name, shape in param_shapes(one, vocab_size).items()]
        share = sum(-(-len(w) // n_ranks) * w[0].numel() for w in rows)  # what a rank updates, see MuonAdamW: summed for it, and sent by it
        print(f"{sum(w.numel() for w in rows):,} parameters, {len(taught)} teacher(s), {schedule.total:,} steps of {one.batch_tokens:,} tokens")
        for phase in dict.fromkeys(schedule.phases):
            print(f"  {schedule.phases.count(phase):,} steps of {len(phase[0])} layers in turn and bags of {phase[1]}: "
                  f"{flops_per_token(one, vocab_size, phase):.4g} FLOPs forward per position")
        with FakeTensorMode(allow_non_fake_inputs=True):
            kinds = step_memory(one, taught, max(schedule.phases, key=lambda phase: flops_per_token(one, vocab_size, phase)), vocab_size, m)
        peak = max(peak, kinds["peak"])
        print(f"  memory of each in GB: {', '.join(f'{kind} {size / 1e9:.2f}' for kind, size in kinds.items())}\n"
              f"  each sends {8e-9 * share * (n_ranks - 1):.3g} GB in a step")
    flops = sum(train_flops(one, schedule, vocab_size, taught) for one, schedule, taught in runs)
    print(f"{flops:.4g} FLOPs in all")
    if gpu:
        seconds, cap = flops / (n_ranks * GPU_FLOPS * UTILIZATION), rule.get("max_seconds", math.inf)
        print(f"{seconds:,.0f} s at {UTILIZATION:.0%} of an H100's {GPU_FLOPS / 1e12:.0f} TFLOP/s; the track's cap of {cap:,} s "
              f"{'holds' if seconds <= cap else 'does NOT hold'} it, and a card of {GPU_BYTES / 1e9:.0f} GB {'holds' if peak <= GPU_BYTES else 'does NOT hold'} the memory")

# ---- main -------------------------------------------------------------------------------------------------------------

def parse_args(argv):
    """(the recipe's options that were given, all others)"""
    def refuse(message):
        raise Stop(f"{message}; --help lists the options")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = refuse
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped or killed")
    what.add_argument("--score", type=Path, metavar="RUN", help="score the tokens of --tokens with a run's model, write --nll")
    what.add_argument("--sample", type=Path, metavar="RUN", help="let a run's model write, after --prompt, --length tokens")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="a shard, or .npy uint16 [n_streams, length] of independent streams")
    parser.add_argument("--nll", type=Path, metavar="OUT.npy", help="nats per token, in the shape of --tokens")
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--length", type=int, metavar="N", help="tokens that --sample writes at most [500]")
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="folder of a new run (default: runs/TRACK_TIME_SEED)")
    what.add_argument("--dry_run", type=int, nargs="?", const=0, metavar="GPUS",
                      help="say what a run would take on so many GPUs (as many as the track allows), and train nothing")
    what.add_argument("--join", type=Path, nargs="+", metavar="RUN", help="make one run, --run_dir, of finished chains that were trained apart")
    parser.add_argument("--steps", type=int, metavar="N", help="squeeze a new run into N steps: a trial, never a record")
    for name, choices in (("device", "auto cpu cuda"), ("attention", "auto varlen flex sdpa"), ("compile", "auto on off")):
        parser.add_argument(f"--{name}", default="auto", choices=choices.split())
    recipe = parser.add_argument_group("recipe (the fields of Config, with the pocket track's values)")
    comments = dict(re.findall(r"^    (\w+): \w+ = [^#\n]*# (.*)$", SOURCE.decode(), re.MULTILINE))
    for f in dataclasses.fields(Config):
        recipe.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{comments.get(f.name, '')} [{PRESETS['pocket'].get(f.name, f.default)}]", **(
            dict(type=int, choices=(0, 1)) if f.type is bool else dict(type=f.type, metavar={int: "N", float: "X", str: "TEXT"}[f.type])))
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    if args.run_dir and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (args.run_dir / "config.json").exists():
        given, args.resume, args.run_dir, args.steps = {}, args.run_dir, None, None  # torchrun begins the same command again after a rank was lost
    kept = args.resume or args.score or args.sample or args.join
    unfit = [name for name in given if kept and not (args.resume and name in ("members", "student"))]
    unfit += [name for name in ("run_dir", "steps") if getattr(args, name) and (kept or args.dry_run is not None) and not (args.join and name == "run_dir")]
    require(not unfit, f"--{(unfit or [''])[0]}: is for a new run, leave it out")
    for name, what_for in (("tokens", "score"), ("nll", "score"), ("prompt", "sample"), ("length", "sample")):
        require(getattr(args, name) is None or getattr(args, what_for), f"--{name}: goes with --{what_for} RUN")
    require(args.steps is None or args.steps > 0, f"--steps {args.steps}: must be 1 or more")
    require(not args.run_dir or not (args.run_dir / "config.json").exists(),
            f"--run_dir {args.run_dir}: already holds a run; go on with --resume {args.run_dir}, or name another folder")
    return given, args

def make_config(given):
    """The track's preset with the given values on top."""
    track = given.get("track", "pocket")
    require(track in PRESETS, f"--track {track}: choose one of {', '.join(PRESETS)}")
    c = Config(**typed(PRESETS[track] | {"track": track} | given))
    check_config(c)
    return c

def main():
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        given, args = parse_args(sys.argv[1:])
        if args.score:
            score_command(args)
        elif args.dry_run is not None:
            dry_run(make_config(given), args.dry_run)
        elif args.join:
            join_runs(args.join, args.run_dir)
        elif args.sample:
            print(sample(args.sample, *load_run(args.sample, args), args.prompt or "", args.length or 500))
        else:
            train_command(given, args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (Stop, KeyboardInterrupt) as e:
        message, status = (*e.args, 2)[:2] if isinstance(e, Stop) else ("interrupted", 130)
    except OSError as e:  # reading is checked where it happens: this is a disk that is full, or may not be written
        message, status = f"cannot read or write {e.filename or 'in the run folder'}: {e.strerror}; what was saved is intact, --resume goes on", 1
    except RuntimeError as e:
        if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        message, status, speaks = f"the connection to another rank is lost ({first_line(e)}); --resume goes on from the last checkpoint", 1, True
    if speaks:
        print(f"{SCRIPT}: {message}", file=sys.stderr)
    sys.exit(status)

if __name__ == "__main__":
    main()
