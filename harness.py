"""
The harness: it trains and scores what train_gpt.py defines, on the machine that it finds, and writes the
run's folder. Records leave this file as it is.

script, below, is train_gpt.py. The harness calls its Config, SMALL, PRESETS and check_recipe; model_configs
and training_plan; Lookup; train_model, train_pass, train_step, step_weights and MuonAdamW; stream_nll,
run_nll, scored_models, add_model, mean_nll and sample; functions and try_attention; init_params, param_table,
param_shapes, n_params, n_inputs and flops_per_token; lr_schedule and phase_schedule. Of an optimizer it uses
p, m, state, shard_size, items(), shard(), whole() and update(). Of the Config's fields it needs those of the
data, the batches, the members and the evaluations. Everywhere, c is the Config, m the Machine, and p the
weights, a dict of tensors by name.
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
LOG_HEAD = "==== source "
SOURCE_END = "\n==== end of source"


class Source(NamedTuple):
    """A file of which a run is made. Read when it is imported, so that the log shows what runs and not a
    later edit."""

    name: str
    content: bytes
    sha256: str


def read_source(path):
    content = Path(path).read_bytes()
    return Source(Path(path).name, content, hashlib.sha256(content).hexdigest())


script = None  # the module train_gpt.py
SCRIPT = ""  # its file's name
SOURCES = [read_source(__file__)]  # the script's and this one


def use(module):
    """Train and score what this module defines: train_gpt.py calls this with itself."""
    global script, SCRIPT
    script = module
    SCRIPT = Path(module.__file__).name
    SOURCES[:] = [read_source(module.__file__), SOURCES[-1]]


def sources_sha256():
    return " ".join(source.sha256 for source in SOURCES)


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
    functions: object = None  # the script's, plain or compiled, that training runs
    reasons: dict = dataclasses.field(default_factory=dict)  # of each choice, for the log

    def __post_init__(self):
        self.functions = script.functions(self)

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
            script.try_attention(m, c)
        except Exception as e:  # whatever a missing or refusing kernel raises: the reason goes to the log
            failures.append(f"{name} does not work here: {first_line(e)}")
            if torch.nn.attention.current_flash_attention_impl():
                torch.nn.attention.restore_flash_attention_impl()
            continue
        m.reasons["attention"] = f"{name} ({'; '.join(failures) or 'the best that works here'})"
        return
    raise UserError(f"--attention {wanted}: {'; '.join(failures)}")


# On a CPU, compiling takes about a minute, and steps are then 1.1 to 1.5 times as fast: a training run of a
# few minutes finishes sooner without it.
COMPILE_FROM_FLOPS = 2e13


def set_compiled(m, wanted, train_flops=math.inf, failure=None):
    """Use the compiled or the plain functions. torch.compile needs Triton on a GPU, a C++ compiler on a
    CPU."""
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
    if m.compiled:
        # Windows, phases and last micro-batches each bring new shapes. Not without need: the first use of
        # torch._dynamo imports it, which takes seconds.
        torch._dynamo.config.recompile_limit = 64
    m.functions = script.functions(m)


def to_device(x, m):
    """A tensor of the CPU on this process's device. The process does not wait for what a GPU has yet to do,
    as it would to copy from memory that is not pinned."""
    if m.device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(m.device, non_blocking=True)


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
    in_range = typed and 0 <= bos_id < vocab_size <= script.NO_TOKEN and 0 < text_bytes < 2**40
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
    known = {preset.get("data") for preset in script.PRESETS.values()}
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
        for name, start in new_state(script.Config())["progress"].items():
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
            self.shard = self.thread.submit(write_tensors, path, shard_state(optimizer, ema))
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
    made_by = {"source": sources_sha256(), "recipe": recipe_sha256(c)}
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
        same = force or state["source"] == sources_sha256()
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


def own_tensors(optimizer, ema, name):
    """{kind: tensor} of what this rank keeps of a parameter beside its weights: an entry for each item of its
    shard, and perhaps some beyond."""
    kinds = {f"state{i}": items for i, items in enumerate(optimizer.state[name])}
    return kinds | {"ema": ema[name]} if ema else kinds


@torch.no_grad()
def shard_state(optimizer, ema=None):
    """{name: {kind: items}} of this rank's shard of the weights, the optimizer's state and, if there is one,
    the weights' average: a copy in the memory of the CPU, which later steps do not change. ema: {name: this
    rank's shard}."""
    copies = {}
    for name, w in optimizer.p.items():
        shard = optimizer.shard(name, w)
        kinds = {"w": shard}
        for kind, items in own_tensors(optimizer, ema, name).items():
            kinds[kind] = items[: len(shard)]
        copies[name] = {kind: items.to("cpu", copy=True) for kind, items in kinds.items()}
    return copies


@torch.no_grad()
def restore_state(optimizer, shards, ema=None):
    """Take over what shard_state() returned on the ranks of a run, in their order, however many they were:
    all of the weights, and this rank's shard of the rest."""
    for name, w in optimizer.p.items():
        kinds = {"w": (optimizer.items(name, w), 0)}
        for kind, items in own_tensors(optimizer, ema, name).items():
            kinds[kind] = (items, optimizer.m.rank * optimizer.shard_size[name])
        for kind, (target, begin) in kinds.items():
            at = -begin  # where the next part's items belong in the target
            for part in (shard[name][kind] for shard in shards):
                taken = part[max(0, -at) : max(0, len(target) - at)]
                target[max(0, at) :][: len(taken)].copy_(taken)
                at += len(part)
            if at != len(optimizer.items(name, w)) - begin:
                raise ValueError(f"{name} is of another size")


def load_shards(folder, names, optimizer, ema):
    """Load the weights, moments and average that the files of a checkpoint hold."""
    try:
        restore_state(optimizer, [load_tensors(folder / name) for name in names], ema)
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
        fits = fits and {name: tuple(w.shape) for name, w in p.items()} == script.param_shapes(c)
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
    c: object  # the script's Config
    m: Machine
    meta: dict  # of its data
    trial: bool  # cut short by --steps or resumed with another script: never a record
    plan: list
    lookup: object  # the script's Lookup
    val_inputs: np.ndarray  # of the whole validation stream, [1, length, n_inputs(c)]
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
        parts = []
        for source in SOURCES:
            header = f"{LOG_HEAD}{source.name} bytes={len(source.content)} sha256={source.sha256}"
            parts.append(f"{header}\n{source.content.decode()}{SOURCE_END}")
        log("\n".join(parts), show=False)  # as one: nothing may come between them
        log(f"config {json.dumps(dataclasses.asdict(c))}\ndata {json.dumps(run.meta)}", show=False)
        size = f"{len(run.plan)} model(s), the first of {script.n_params(c):,} parameters"
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
            p = script.train_model(run, model, shards, saver)
            shards = []  # they were of this model; the next one starts afresh
            if m.is_main:
                save_weights(run.folder, model, p)
            del p  # the next model needs the memory
            progress |= {"model": model.number + 1, "step": 0, "seconds": run.seconds()}
        barrier(m)  # all ranks read what the first has written
        # When a run is resumed, the models that it has trained already are only scored again, for the mean.
        if len(run.plan) > 1:
            nll = script.stream_nll(
                load_weights(run.folder, model.number, model.c, m), run.eval_inputs, model.c, m
            )
            if model.number < run.c.members:
                total = script.add_model(total, nll)
            if is_new:
                n = min(model.number + 1, run.c.members)
                together = script.mean_nll(total) + math.log(n)
                so_far = f"val_loss {script.mean_nll(nll):.4f}, the members so far together {together:.4f}"
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
            val_loss = script.mean_nll(script.stream_nll(weights, run.eval_inputs, c, m))
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
        seconds = time.monotonic() - self.began
        seconds_per_flop = seconds / self.flops_done
        lr = script.lr_schedule(model.batches.done(step), c) * getattr(c, "muon_lr", 1.0)
        speed = (step + 1 - self.first_step) * c.batch_tokens / seconds
        # Of the whole run's training, evaluations and checkpoints, at the speed so far.
        left = seconds_left(run.plan[model.number :], step + 1, seconds_per_flop, run.m)
        so_far = run.seconds()
        epoch = model.batches.epochs_done(step + 1)
        times = f"tok/s {speed:.0f} time {so_far:.1f}s left {left:.0f}s"
        line = f"{where} epoch {epoch:.3f} {terms} lr {lr:.5f} {times}"
        run.log(line, pause=0.0 if step + 1 == n_steps else 2.0)
        if step + 1 == self.first_step + 100:  # now the speed is known: will the run end in the track's time?
            ask_referee(run, "--seconds", f"{so_far + left:.0f}")
        if val_loss is not None:
            run.log(f"{model.name}eval {step + 1}/{n_steps} val_loss {val_loss:.4f} on {run.eval_name}")
        place = {"model": model.number + 1, "step": step + 1, "steps": n_steps, "epoch": epoch}
        rates = {"lr": lr, "tokens_per_second": speed, "seconds": so_far}
        run.metrics(**place, **losses, **rates, val_loss=val_loss)


def evaluation_inputs(inputs, c):
    """c.eval_windows windows of seq_len tokens, spread evenly over a stream's inputs [length, n_inputs(c)]:
    [n, seq_len + 1, ...]. Scored as streams of their own, they get what consecutive windows of the whole
    stream get."""
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
    nll = script.run_nll(run.folder, run.val_inputs, c, m, log)
    if not m.is_main:
        return
    # Sums over blocks of 1,000 tokens, which leaderboard.py compares between runs.
    write_npy(run.folder / "val_nll.npy", np.add.reduceat(nll[0], np.arange(0, nll.size, 1000)))
    scored = [c_model for _, c_model in script.scored_models(c)]
    score_flops = 0
    for c_model in scored:
        passes_per_token = c_model.seq_len / (getattr(c_model, "score_stride", 0) or c_model.seq_len)
        score_flops += script.flops_per_token(c_model, script.phase_schedule(1.0, c_model)) * passes_per_token
    record = {
        "track": c.track,
        "trial": run.trial,
        "seed": c.seed,
        "members": len(run.plan),  # all that were trained, a student included; --resume compares this
        "scored": len(scored),
        "val_loss": script.mean_nll(nll),
        "val_bpb": nll.sum() / math.log(2) / run.meta["text_bytes"]["val"],
        "val_tokens": nll.size - 1,
        "train_seconds": progress["seconds"],
        "compile_seconds": progress["compile_seconds"],
        "steps": sum(model.batches.steps for model in run.plan),
        "train_tokens": c.train_tokens,
        "tokens_seen": sum(model.batches.tokens_seen() for model in run.plan),
        "parameters": sum(map(script.n_params, scored)),
        "train_flops": sum(model.train_flops for model in run.plan),
        "score_flops_per_token": score_flops,
        "source_sha256": SOURCES[0].sha256,
        "harness_sha256": SOURCES[1].sha256,
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
        written = script.sample(run.folder, c, m, run.lookup, prompt, 300)
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
    return script.training_plan(
        c, np.broadcast_to(np.uint16(0), (c.train_tokens, script.n_inputs(c))), m, steps
    )


def made_up_weights(model, m):
    """A model's weights as they are drawn, and its teacher, (Config, weights), or None."""
    p = {name: w.to(m.device).requires_grad_() for name, w in script.init_params(model.c).items()}
    teacher = None
    if model.teachers:
        c_teacher = model.teachers[0].c
        teacher = c_teacher, {name: w.to(m.device) for name, w in script.init_params(c_teacher).items()}
    return p, teacher


def compile_model(model, m):
    """A training pass for every phase and every size of micro-batch, and an update of every parameter."""
    c = model.c
    p, teacher = made_up_weights(model, m)
    rows = torch.arange(len(model.batches.plain.shard)).split(c.device_tokens // c.seq_len)
    for phase in sorted(set(model.batches.phases)):
        for n_rows in {len(part) for part in rows}:
            x = torch.zeros(n_rows, c.seq_len * phase.bag_size, script.n_inputs(c), dtype=torch.long)
            y = x[..., 0].contiguous().unflatten(1, (-1, phase.bag_size))
            with script.step_weights(p, c, m) as weights:
                script.train_pass(weights, x, y, 1, c, m, phase, (0,), teacher)
    optimizer = script.MuonAdamW(p, c, m)
    with torch.no_grad():
        for name, w in p.items():
            optimizer.update(name, w, torch.zeros_like(optimizer.shard(name, w)), 0, 1.0, 1.0, 0.9)


def seconds_left(plan, step, seconds_per_flop, m):
    """Seconds that the models of a plan take from a step of the first one on, with all that is done beside
    the steps: evaluations, counted in FLOPs, and checkpoints, estimated from their size."""
    seconds = 0.0
    for model in plan:
        c = model.c
        n_steps = model.batches.steps
        n_evals = c.evals * (1 - step / n_steps)
        eval_flops = c.eval_windows * c.seq_len * script.flops_per_token(c, script.phase_schedule(1.0, c))
        seconds += (sum(model.step_flops[step:]) + n_evals * eval_flops) * seconds_per_flop
        n_saves = (n_steps - 1) // c.save_every - step // c.save_every
        seconds += n_saves * shard_size(model, m) * COPY_SECONDS_PER_GB
        seconds += 4e-9 * script.n_params(c) * SAVE_SECONDS_PER_GB  # the final weights, by the first rank
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
    optimizer = script.MuonAdamW(p, model.c, m)
    for phase in sorted(set(model.batches.phases)):
        step = model.batches.phases.index(phase)
        for i in range(1 + FIT_STEPS):
            losses = script.train_step(p, optimizer, model, step, model.batches.batch(step), m, teacher)
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


def n_kept(c):
    """Numbers that the optimizer keeps beside the weights, and of their average."""
    # Moments. Scripts may have optimizers of their own, for which two are assumed, and no average.
    copies = {"muon": 1, "adamw": 2}
    averages = getattr(c, "ema", 0) > 0
    sizes = {name: math.prod(shape) for name, shape in script.param_shapes(c).items()}
    table = script.param_table(c)
    return sum((copies.get(table[name].optimizer, 2) + averages) * size for name, size in sizes.items())


def memory_estimate(model, m):
    """GB that one rank holds at the peak of a compiled step, {kind: GB}. A formula, not a measurement:
    tests/test_dry_run.py holds it to 10% of a simulated step."""
    c = model.c
    low = m.dtype.itemsize
    n = script.n_params(c)
    n_weights = n + (script.n_params(model.teachers[0].c) if model.teachers else 0)
    rows = min(c.batch_tokens // c.seq_len // m.world_size, c.device_tokens // c.seq_len)
    tokens = rows * c.seq_len
    n_layers = max(len(phase.layers) for phase in model.batches.phases)
    # What torch.compile keeps of a layer for its backward pass, in numbers per token.
    extras = 2 * getattr(c, "value_proj", 0) + getattr(c, "attn_gate", 0) + (getattr(c, "dropout", 0) > 0)
    per_layer = (10 + extras) * c.n_embd + 3 * getattr(c, "mlp_hidden", 4 * c.n_embd)
    # The head's copy in low precision, a teacher's, and the gradient of the micro-batch at hand.
    heads = (low * (2 if model.teachers else 1) + 4) * c.vocab_size * c.n_embd
    # Buffers that a compiled chunk_grad() holds: so many in low precision, and so many in float32.
    per_logit = 3 * low + 4 * 4 if model.teachers else 2 * low + 2 * 4
    sizes = {
        "weights": 4 * n_weights,
        "optimizer": 4 * n_kept(c) / m.world_size,
        "gradients": 4 * n,
        "activations": low * (tokens * (n_layers * per_layer + 5 * c.n_embd) + n) + heads,
        "logits": min(tokens, c.loss_chunk) * c.vocab_size * per_logit,
    }
    return {kind: size / 1e9 for kind, size in sizes.items()}


def shard_size(model, m):
    """GB that each rank copies and writes in a checkpoint."""
    return 4e-9 * (script.n_params(model.c) + n_kept(model.c)) / m.world_size


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
        n = script.n_params(model.c)
        phases = model.batches.phases
        steps = f"{len(phases):,} steps of {c.batch_tokens:,} tokens"
        print(f"{n:,} parameters, {len(model.teachers)} teacher(s), {steps}")
        for phase in dict.fromkeys(phases):
            flops = script.flops_per_token(model.c, phase)
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
    if any(getattr(c, name, "") for name in ("memory", "ngrams")):
        path = find_data(c, m) / "train.bin"
        train_tokens = read_shard(path, c.vocab_size, meta["sha256"]["train.bin"])[: c.train_tokens]
    return c, m, meta, script.Lookup(train_tokens, c)


def sample_command(given, args):
    """--sample RUN --prompt TEXT: the prompt, and what the run's models write after it."""
    c, m, meta, lookup = load_run(args.sample, given, args)
    encoding = from_prepare("get_encoding", meta["tokenizer"])
    prompt = [c.bos_id, *encoding.encode_ordinary(args.prompt or "")]
    written = script.sample(args.sample, c, m, lookup, prompt, args.length or 500)
    if m.is_main:
        print(printable(encoding.decode([i for i in prompt + written if i != c.bos_id])))


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
    nll = script.run_nll(args.score, lookup.inputs(streams), c, m).astype(np.float32)
    if m.is_main:
        write_npy(args.nll, nll[0] if is_shard else nll)
        print(f"{args.nll}: {nll[:, 1:].size:,} tokens scored, {script.mean_nll(nll):.6f} nats per token")


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
        check_config(c)  # once more: what depends on the vocabulary is known only now
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
    lookup = script.Lookup(train_tokens[: c.train_tokens], c)
    inputs = lookup.training_inputs()
    plan = script.training_plan(c, inputs, m, options["steps"])
    set_compiled(m, args.compile, sum(model.train_flops for model in plan))
    fit_seconds = 0.0
    if args.fit:
        c, fit_seconds = fit(c, m)
        plan = script.training_plan(c, inputs, m)
    val_inputs = lookup.inputs(val_tokens[None])
    log = Log(folder, m)  # from here on the folder is this process's alone
    state = load_state(folder, c, m, args.force) if args.resume else new_state(c)
    options["trial"] = options["trial"] or state["source"] != sources_sha256()
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
    require(n_finished != len(script.model_configs(c)), f"--resume {folder}: this run is finished, {remedy}")
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
    ("dropout loop_from bag_until ema adam_beta1 adam_beta2", 0, BELOW_1),
    ("softcap epochs distill_temp", 1e-6, 1e6),
)


def check_config(c):
    """Refuse what cannot be trained, before anything is loaded. A new field needs no line here."""
    for names, low, high in RANGES:
        for name in names.split():
            value = getattr(c, name, low)  # a script may have dropped an option
            require(low <= value <= high, f"--{name} {value}: must be from {low} to {high:.10g}")
    steps = int(c.epochs * c.train_tokens / c.batch_tokens)
    require(steps < 10**7, f"--epochs {c.epochs}: {steps:,} steps, but checkpoints count to 10,000,000")
    require(c.dtype in ("auto", "bf16", "fp32"), f"--dtype {c.dtype}: choose auto, bf16 or fp32")
    script.check_recipe(c)


KINDS = {bool: "0 or 1", int: "a whole number", float: "a number", str: "one line of text"}
BOOLS = {"0": False, "1": True, "false": False, "true": True}


def parse_value(name, value):
    """A value of the Config field `name`: of the field's type, or a string that holds one."""
    kind = script.Config.__dataclass_fields__[name].type
    fits = type(value) in (kind, str) or (kind is float and type(value) is int)
    with contextlib.suppress(ValueError, OverflowError, KeyError):
        if fits and str(value).isprintable():
            return BOOLS[str(value).lower()] if kind is bool else kind(value)
    raise UserError(f"--{name} {value}: must be {KINDS[kind]}")


def parse_changes(option, text, names):
    """{name: value} of an option that holds name=value,... of those fields of the Config."""
    changes = dict(change.partition("=")[::2] for change in text.split(","))
    for name in changes:
        hint = did_you_mean(name, names, "write name=value pairs of recipe options")
        require(name in names, f"--{option} {text}: {name!r} is not an option that it can change; {hint}")
    return {name: parse_value(name, value) for name, value in changes.items()}


def make_config(given):
    """The track's preset with the given values on top; without a track, the small recipe."""
    track = given.get("track", "pocket")
    require(track in script.PRESETS, f"--track {track}: choose one of {', '.join(script.PRESETS)}")
    preset = script.PRESETS[track] if "track" in given else script.SMALL
    values = preset | {"track": track} | given
    c = script.Config(**{name: parse_value(name, value) for name, value in values.items()})
    check_config(c)
    return c


def parse_path(name, value):
    require(value, f"--{name}: is empty; name a file or folder")  # Path("") is the current folder
    return Path(value)


def parse_args(argv):
    """(the recipe's options that were given, all others)"""
    parser = argparse.ArgumentParser(description=script.__doc__, allow_abbrev=False)
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
    group = parser.add_argument_group("recipe: the fields of Config [value without --track]")
    # The comment behind a field of Config is its help.
    comments = dict(
        re.findall(r"^    (\w+): \w+ = [^#\n]*# (.*)$", SOURCES[0].content.decode(), re.MULTILINE)
    )
    metavars = {int: "N", float: "X", str: "TEXT", bool: "0|1"}
    for field in dataclasses.fields(script.Config):
        parse = functools.partial(parse_value, field.name)
        text = f"{comments.get(field.name, '')} [{script.SMALL.get(field.name, field.default)}]".replace(
            "%", "%%"
        )
        taken = f"{SCRIPT}: Config has a field {field.name}, an option of the harness; name it otherwise"
        require(f"--{field.name}" not in parser.format_usage().replace("[", " ").split(), taken)
        option = group.add_argument(f"--{field.name}", type=parse, default=argparse.SUPPRESS, help=text)
        option.metavar = metavars[field.type]
    for before, word in itertools.pairwise(["", *argv]):
        # A name with a newline in it would forge lines of the log.
        fits = word.isprintable() or before == "--prompt" or word.startswith("--prompt=")
        require(fits, f"{word!a}: has characters that cannot be printed; leave them out")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in script.Config.__dataclass_fields__}
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
    fitting = script.Config.__dataclass_fields__
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
