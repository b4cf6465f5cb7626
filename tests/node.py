"""
The steps of tests/node.sh: does training work on this node, and how fast?

    python tests/node.py STEP --folder DIR [TRACK] [--data DATA] [--ranks "1 2 8"] [--steps N]

check       what the machine is; ends with status 2, and a line for each reason, where it cannot work
attention   every kind of attention that the machine has, against SDPA in float64
ranks       short runs on 1, 2 and 8 ranks: do they lose the same at every step?
resume      one rank of such a run is killed; torchrun starts it again from its checkpoint
preset      a track's recipe, cut down to some steps: through all phases, an evaluation and saves
profile     three steps of a track's recipe, and the ten kernels that take longest
verdict     what full runs would take by these measurements, and what to lower where that is too much

Status 3: left out, for a reason that is printed. Without a GPU everything has the size of a toy.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import bench
from bench import harness, t  # train_gpt.py, imported before torch
from runs import ROOT, SIZES

import torch  # isort: skip
import torch.distributed as dist  # isort: skip

ON_GPU = torch.cuda.is_available()
TRACKS = [track for track in t.PRESETS if "max_ranks" in harness.read_rules(track)]
RANKS_OF_A_NODE = 8
SKIPPED = 3

# Without a GPU: a recipe that takes seconds, whose loop is a layer that it has.
TOY = SIZES | dict(n_head=2, loop_first=1, loop_last=1)
OF_THE_TRACK = ("train_tokens", "epochs", "evals", "eval_windows", "save_every")
TOY = {name: value for name, value in TOY.items() if name not in OF_THE_TRACK}
TOY_COMMAND = ["--device", "cpu", "--compile", "off"]


def say(line=""):
    print(line, flush=True)


def gigabytes(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB"


# ---- runs


def words(options):
    return [f"--{name}={value}" for name, value in options.items()]


def ranks_of(track):
    """GPUs of a node that train one of the track's models."""
    return min(harness.read_rules(track)["max_ranks"], RANKS_OF_A_NODE)


def recipe(track, n_ranks, steps, data):
    """Options that cut a track's recipe down: its models in their size, its batches as large for each of
    n_ranks GPUs as for each of the track's, other data, as few steps and evaluations as show every phase. Of
    an ensemble two members, so that one has a teacher."""
    c = harness.make_config({"track": track, "data": data})
    n_tokens = json.loads((harness.data_folder(c) / "meta.json").read_text())["tokens"]["train"]
    options = {"track": track, "data": data}
    options["batch_tokens"] = c.batch_tokens * n_ranks // ranks_of(track)
    if not ON_GPU:
        options |= TOY
    options |= {"train_tokens": min(c.train_tokens, n_tokens), "members": min(2, c.members)}
    return options | {"evals": 2, "eval_windows": 32, "save_every": max(1, steps // 3)}


def comparable(data):
    """Options of runs that are to agree on any number of ranks: `mini`, without what each rank draws for
    itself, in micro-batches of one size on all of them."""
    options = recipe("mini", 1, COMPARED_STEPS, data) | {"dropout": 0.0}
    c = harness.make_config(options)
    return options | {"device_tokens": max(c.seq_len, c.batch_tokens // RANKS_OF_A_NODE)}


def planned(options, n_ranks, steps=None):
    """(the models that these options train, a rank's Machine). Needs no data."""
    c = harness.with_expected_vocabulary(harness.make_config(options))
    m = harness.Machine(torch.device("cpu"), torch.bfloat16, 0, n_ranks)
    return harness.plan_without_data(c, m, steps), m


def memory_gb(plan, m):
    """GB that a rank holds at the most, by --dry_run's formula."""
    return max(sum(harness.memory_estimate(model, m).values()) for model in plan)


def torchrun(n_ranks, *argv):
    """A command line on so many ranks of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    return [sys.executable, *launcher, *map(str, argv)]


def on_ranks(n_ranks, *argv):
    """The same; one rank starts as most people would start it."""
    return torchrun(n_ranks, *argv) if n_ranks > 1 else [sys.executable, *map(str, argv)]


@contextlib.contextmanager
def running(command):
    """A process that does not outlive this one: what the next step measures would suffer."""
    # Without the first, a rank that is started again can meet a dead one's address (pytorch issue 135712).
    # The second is torchrun's own choice, of which it would warn.
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=settings | os.environ)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def train(run, n_ranks, options, steps):
    """Train a run that is cut down to so many steps. Returns the most memory that one GPU held meanwhile, by
    the driver, in bytes."""
    argv = [*words(options), f"--steps={steps}", f"--run_dir={run}", *([] if ON_GPU else TOY_COMMAND)]
    command = on_ranks(n_ranks, ROOT / "train_gpt.py", *argv)
    say(f"$ {' '.join(command)}")
    held = 0
    with running(command) as process:
        while process.poll() is None:
            used, _ = query_gpus("memory.used")
            held = max([held, *(int(mib) * 2**20 for mib in used if mib.isdigit())])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
    if process.returncode:
        sys.exit(f"node.py: the run ended with status {process.returncode}")
    return held


def metrics_of(run):
    """Lines of a run's metrics.jsonl; of a step that a restart repeated, the last one."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return list({(entry["model"], entry["step"]): entry for entry in entries}.values())


def losses_of(run):
    return np.array([entry["loss"] for entry in metrics_of(run)])


# ---- check


def query_gpus(field):
    """(what nvidia-smi says of each GPU, a list of texts; why it says nothing). Neither where there is no
    nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [], (done.stdout + done.stderr).strip().partition("\n")[0] or "no message"
    return done.stdout.splitlines(), ""


# The oldest driver that runs each major version of CUDA (NVIDIA's release notes of CUDA, table "CUDA Toolkit
# and Minimum Required Driver Version").
DRIVERS = {12: 525, 13: 580}


@dataclasses.dataclass
class Machine:
    """What is known of a machine before anything runs on it."""

    broken: str  # why nvidia-smi shows nothing, though it is there
    drivers: list  # of each GPU that it shows, such as "580.65.06"
    capabilities: list  # of each, such as "9.0"
    used: list  # MiB of each GPU's memory that is taken
    cuda: str | None  # that torch is built for
    usable: bool  # torch can use a GPU
    error: str  # why not
    free_disk: float  # bytes
    free_memory: float  # bytes of the host
    needed_disk: float
    needed_memory: float
    folder: Path  # of the data
    data: str
    has_data: bool


def problems(machine):
    """Reasons why nothing can be measured here, one line each, with the remedy."""
    found = []
    if machine.broken:
        found.append(f"nvidia-smi: {machine.broken}; fix the driver")
    if machine.drivers and not machine.cuda:
        found.append("torch is built for CPUs alone: pip install -r requirements.txt in a new environment")
    elif machine.drivers and not machine.usable:
        needed = DRIVERS.get(int(machine.cuda.split(".")[0]))
        driver = machine.drivers[0]
        if needed and int(driver.split(".")[0]) < needed:
            remedy = f"update it to {needed} or newer, or rent a machine that has it"
            found.append(
                f"driver {driver}: too old for the CUDA {machine.cuda} of the installed torch; {remedy}"
            )
        else:
            found.append(f"torch can use no GPU ({machine.error}): fix that first")
    for i, capability in enumerate(machine.capabilities):
        if float(capability) < 8.0:
            remedy = "rent an A100 (8.0), H100 or H200 (9.0), or newer"
            found.append(f"GPU {i}: compute capability {capability} has no bf16; {remedy}")
    for i, used in enumerate(machine.used):
        if used > 1024:
            found.append(f"GPU {i}: {used} MiB of its memory are taken; end the process that holds them")
    if not machine.has_data:
        remedy = f"python data/prepare.py {machine.data}"
        found.append(
            f"{machine.folder}: no data there; prepare it with {remedy}, or name a folder with DATA="
        )
    for what, free, needed in (
        ("disk", machine.free_disk, machine.needed_disk),
        ("memory of the host", machine.free_memory, machine.needed_memory),
    ):
        if free < needed:
            remedy = "free some, rent more, or name fewer tracks"
            found.append(f"{what}: {gigabytes(free)} free, checkpoints need {gigabytes(needed)}; {remedy}")
    return found


def checkpoint_bytes(track, n_ranks):
    """(most bytes that a run's folder takes, bytes of the host's memory): two checkpoints and the next, all
    models' weights; one checkpoint in memory, and what each process takes anyway."""
    plan, m = planned({"track": track} | ({} if ON_GPU else TOY), n_ranks)
    state = 1e9 * n_ranks * max(harness.shard_size(model, m) for model in plan)
    weights = sum(4 * t.n_params(model.c) for model in plan)
    process = 4e9 if ON_GPU else 0.4e9  # assumed
    return 3 * state + weights, state + n_ranks * process


def available_memory():
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024


def this_machine(options):
    error = ""
    if not ON_GPU:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as e:
            error = harness.first_line(e)
    needs = [checkpoint_bytes(track, options.n_ranks) for track in options.tracks]
    folder = harness.data_folder(harness.make_config({"data": options.data}))
    # pocket's shards are made on the spot
    has_data = options.data == "pocket" or (folder / "meta.json").exists()
    drivers, broken = query_gpus("driver_version")
    capabilities, _ = query_gpus("compute_cap")  # an old driver does not know the field
    used, _ = query_gpus("memory.used")
    return Machine(
        broken=broken,
        drivers=drivers,
        capabilities=capabilities,
        used=[int(mib) for mib in used if mib.isdigit()],
        cuda=torch.version.cuda,
        usable=ON_GPU,
        error=error,
        free_disk=shutil.disk_usage(options.folder).free,
        free_memory=available_memory(),
        needed_disk=max(disk for disk, _ in needs),
        needed_memory=max(memory for _, memory in needs),
        folder=folder,
        data=options.data,
        has_data=has_data,
    )


def check(options):
    machine = this_machine(options)
    say(f"python {sys.version.split()[0]}, torch {torch.__version__}, built for CUDA {torch.version.cuda}")
    for gpu in query_gpus("index,name,memory.total,driver_version,power.limit,clocks.max.sm")[0]:
        say(f"GPU {gpu}")
    if machine.drivers:
        subprocess.run(["nvidia-smi", "topo", "-m"])
    say(f"disk: {gigabytes(machine.free_disk)} free, checkpoints need {gigabytes(machine.needed_disk)}")
    say(f"memory: {gigabytes(machine.free_memory)} free, they need {gigabytes(machine.needed_memory)}")
    if Path("/dev/shm").exists():
        say(f"/dev/shm: {gigabytes(shutil.disk_usage('/dev/shm').free)} free")
    found = problems(machine)
    for line in found:
        say(f"node.py: {line}")
    if found:
        sys.exit(2)
    if machine.data == "pocket":
        harness.find_data(t.Config(), harness.Machine(torch.device("cpu"), torch.float32))
    m = one_rank()
    say(f"{harness.hardware(m)}, {os.cpu_count()} cores; {m.reasons['attention']}")
    product = bench.matrix_product(m)
    say(f"a matrix product in {m.reasons['dtype']}: {product / 1e12:.4g} TFLOP/s")
    (options.folder / "product.json").write_text(json.dumps(product))


def one_rank():
    """The script's Machine of this process alone."""
    given, args = harness.parse_args([] if ON_GPU else TOY_COMMAND)
    return harness.setup_machine(harness.make_config({"track": "mini"} | given), args)


# ---- attention


def attention(options):
    """Outputs and gradients at the presets' shapes: a row that is one document, in which windows count, and
    one of sixteen documents or so."""
    m = one_rank()
    shape = (2, 2048, 14, 128) if ON_GPU else (2, 128, 2, 16)
    B, T = shape[:2]
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=g).to(m.device, m.dtype) for _ in range(4)]
    starts = torch.rand(B, T, generator=g) < 16 / T
    starts[0] = False
    kinds = ("varlen", "flex", "sdpa") if ON_GPU else ("sdpa",)
    # Each of the four products in a row rounds its factors to the dtype, by up to half of eps; sums over T
    # numbers are in float32.
    bound = 4 * torch.finfo(m.dtype).eps / 2 + T * torch.finfo(torch.float32).eps / 2
    failed = False

    def outputs(kind, window, dtype):
        q, k, v, grad = (x.to(dtype) for x in inputs)
        heads = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
        mask = t.attention_masks(starts, [window], dataclasses.replace(m, attention=kind, dtype=dtype))[
            window
        ]
        y = t.attention(*heads, mask, kind)
        return [y.detach(), *torch.autograd.grad(y, heads, grad)]

    for window in (T // 16, T // 2, T):
        expected = outputs("sdpa", window, torch.float64)
        for kind in kinds:
            try:
                got = outputs(kind, window, m.dtype)
            except Exception as e:  # whatever a missing kernel raises
                say(f"{kind}, window {window}: {harness.first_line(e)}")
                failed = True
                continue
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected)]
            agrees = max(errors) < bound
            failed = failed or not agrees
            listed = ", ".join(f"{name} {error:.1e}" for name, error in zip(("y", "dq", "dk", "dv"), errors))
            verdict = "agrees" if agrees else "DIFFERS"
            say(f"{kind}, window {window}: {verdict}; off by {listed} of the norm, {bound:.1e} allowed")
    if failed:
        sys.exit(1)


# ---- ranks, and a rank that is killed

# Of the difference between two seeds, in the losses of the same steps: what rounding may make of it. Measured
# at toy size on two ranks: rounding makes 4e-6 in bf16 and less than 1e-3 in float32, gradients that are not
# shared 0.98, ranks that read the same rows 2.2. A GPU's kernels may add in another order each time.
SPREAD = 0.2
COMPARED_STEPS = 15


def assert_close(name, losses, expected, other_seed):
    """Whether a run loses what another does: how far rounding grows depends on the model, so the measure is
    what another seed changes."""
    if len(losses) != len(expected):
        sys.exit(f"node.py: {name}: {len(losses)} steps instead of {len(expected)}")
    share = np.abs(losses - expected).mean() / np.abs(other_seed - expected).mean()
    largest = np.abs(losses - expected).max()
    say(f"{name}: largest difference of a step's loss {largest:.2e}, mean {share:.2g} of another seed's")
    if not share < SPREAD:
        for step, (a, b) in enumerate(zip(losses, expected), start=1):
            say(f"  step {step}: {a:.6f}, expected {b:.6f}")
        sys.exit(f"node.py: {name}: does not agree; {SPREAD:.0%} would be rounding")


def ranks(options):
    compared = comparable(options.data)
    numbers = options.ranks
    for n in numbers:
        train(options.folder / f"ranks{n}", n, compared, COMPARED_STEPS)
    train(options.folder / "seed1", numbers[0], compared | {"seed": 1}, COMPARED_STEPS)
    one, *others = (options.folder / f"ranks{n}" for n in numbers)
    if not others:
        say(f"{numbers[0]} rank alone: nothing to compare")
    for run in others:
        assert_close(f"{run.name} against {one.name}", *map(losses_of, (run, one, options.folder / "seed1")))


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            if re.search(rf"^PPid:\s+{pid}$", path.read_text(), re.MULTILINE):
                found.append(int(path.parent.name))
    return sorted(found)


def resume(options):
    """kill -9 for one rank of the run that `ranks` has trained undisturbed."""
    n_ranks = options.ranks[-1]
    undisturbed = options.folder / f"ranks{n_ranks}"
    run = options.folder / "killed"
    argv = [*words(comparable(options.data)), f"--steps={COMPARED_STEPS}", f"--run_dir={run}"]
    argv += [] if ON_GPU else TOY_COMMAND
    command = torchrun(n_ranks, ROOT / "train_gpt.py", *argv)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    with running(command) as process:
        while not harness.saved(run, harness.INDEX_FILE) and process.poll() is None:
            time.sleep(0.001)
        ranks_left = children(process.pid)
        if not ranks_left:
            sys.exit("node.py: the run ended before its first checkpoint, or at it")
        os.kill(ranks_left[-1], signal.SIGKILL)
        killed_at = time.monotonic()
        say(f"killed process {ranks_left[-1]}, one of {n_ranks} ranks")
        if process.wait():
            sys.exit(f"node.py: the run ended with status {process.returncode}")
    log = (run / "log.txt").read_text()
    resumed = re.findall(r"^resumed at step \d+", log, re.MULTILINE)
    if not resumed:
        sys.exit("node.py: the run ended before the kill; nothing was resumed")
    say(f"{resumed[-1]}; over {time.monotonic() - killed_at:.0f} s after the kill")
    assert_close("the resumed run", *map(losses_of, (run, undisturbed, options.folder / "seed1")))


# ---- a track's recipe, cut down


def gpu_gb():
    """Of one GPU; without one, of those that the tracks are made for."""
    if not ON_GPU:
        return harness.GPU_GB
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def require_memory(track, plan, m):
    """Leave the step out where the track's recipe does not fit in a GPU."""
    needed = memory_gb(plan, m)
    if needed + harness.RESERVE_GB > gpu_gb():
        needs = f"{needed:.1f} GB by --dry_run, and {harness.RESERVE_GB} in reserve"
        say(f"{track} on {m.world_size} GPU(s): needs {needs}; a GPU has {gpu_gb():.1f}")
        sys.exit(SKIPPED)


def undisturbed_steps(entries, plan):
    """{FLOPs of a step: seconds of each such step}, of lines of metrics.jsonl: without a phase's first step,
    and without those that an evaluation or a save, which goes on in the background, may slow down."""
    found = {}
    for before, entry in zip(entries, entries[1:]):
        if before["model"] != entry["model"]:
            continue
        model = plan[entry["model"] - 1]
        at = entry["step"] - 1
        save_every = model.c.save_every
        begins_phase = model.step_flops[at] != model.step_flops[at - 1]
        beside_save = at >= save_every and at % save_every < save_every // 2
        if not begins_phase and not beside_save and before["val_loss"] is None:
            found.setdefault(model.step_flops[at], []).append(entry["seconds"] - before["seconds"])
    return found


def seconds_after_saves(entries, plan):
    """What the steps take that follow a save, with the copy that it makes."""
    found = []
    for before, entry in zip(entries, entries[1:]):
        if before["model"] == entry["model"] and before["step"] % plan[0].c.save_every == 0:
            found.append(entry["seconds"] - before["seconds"])
    return found


def preset(options):
    track = options.track
    n_ranks = min(options.n_ranks, ranks_of(track))
    cut = recipe(track, n_ranks, options.steps, options.data)
    plan, m = planned(cut, n_ranks, options.steps)
    require_memory(track, plan, m)
    run = options.folder / track
    held = train(run, n_ranks, cut, options.steps)
    entries = metrics_of(run)
    seconds = {flops: statistics.median(taken) for flops, taken in undisturbed_steps(entries, plan).items()}
    product = json.loads((options.folder / "product.json").read_text())
    for flops, taken in seconds.items():
        per_gpu = flops / taken / n_ranks
        say(
            f"{track}: {taken:.3f} s for a step of {flops:.4g} FLOPs on {n_ranks} rank(s), away from saves: "
            f"{per_gpu / 1e12:.4g} TFLOP/s each, {per_gpu / harness.GPU_FLOPS:.1%} of an H100's "
            f"{harness.GPU_FLOPS / 1e12:.0f}, {per_gpu / product:.1%} of a matrix product's here"
        )
    after_saves = ", ".join(f"{taken:.3f}" for taken in seconds_after_saves(entries, plan))
    shard = max(harness.shard_size(model, m) for model in plan)
    copy = f"{shard * harness.COPY_SECONDS_PER_GB:.3f} s by --dry_run for a copy of {shard:.2f} GB"
    say(f"{track}: steps after a save {after_saves} s; {copy}")
    peak = re.search(r"peak memory (\d+) MiB", (run / "log.txt").read_text())
    peak = int(peak[1]) * 2**20 / 1e9
    of_what = "of a GPU" if ON_GPU else "of a process on the host, which is another thing"
    say(
        f"{track}: peak memory {peak:.2f} GB {of_what}; {memory_gb(plan, m):.2f} by --dry_run, "
        f"{held / 1e9:.2f} with all that the driver counts"
    )
    measured = {
        "n_ranks": n_ranks,
        "seconds_per_flop": max(taken / flops for flops, taken in seconds.items()),
        "startup": entries[0]["seconds"],  # with the first step, which is the slowest
        "peak": peak,
        "estimated": memory_gb(plan, m),
        "gpu": gpu_gb() if ON_GPU else None,
    }
    (options.folder / f"{track}.json").write_text(json.dumps(measured))
    shutil.rmtree(run)  # its checkpoints are large


# ---- profile


def profile(options):
    """Three steps of a recipe's last phase. Of a node's ranks the first one tells."""
    track = options.track
    n_ranks = min(options.n_ranks, ranks_of(track))
    cut = recipe(track, n_ranks, options.steps, options.data)
    if "RANK" not in os.environ:
        require_memory(track, *planned(cut, n_ranks, options.steps))
    if "RANK" not in os.environ and n_ranks > 1:
        with running(torchrun(n_ranks, __file__, *sys.argv[1:])) as process:
            sys.exit(process.wait())
    given, args = harness.parse_args([*words(cut), *([] if ON_GPU else TOY_COMMAND)])
    c = harness.make_config(given)
    m = harness.setup_machine(c, args)
    harness.set_compiled(m, args.compile)
    folder = harness.find_data(c, m)
    c = harness.with_vocabulary(c, harness.read_json(folder / "meta.json", harness.check_meta))
    tokens = harness.read_shard(folder / "train.bin", c.vocab_size)[: c.train_tokens]
    plan = t.training_plan(c, t.Lookup(tokens, c).training_inputs(), m, options.steps)
    model = plan[-1]
    harness.compile_all([model], m)
    p, teacher = harness.made_up_weights(model, m)
    optimizer = t.MuonAdamW(p, c, m)
    batch = model.batches.batch(options.steps - 1)

    def steps(n):
        for _ in range(n):
            t.train_step(p, optimizer, model, options.steps - 1, batch, m, teacher)

    steps(2)
    n_steps = 3
    kind = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        taken = bench.seconds_of(lambda: steps(n_steps), m)
    if m.is_main:
        report_profile(profiler.key_averages(), taken, n_steps)
    harness.barrier(m)
    if dist.is_initialized():
        dist.destroy_process_group()


def report_profile(events, taken, n_steps):
    spent = {}
    for event in events:
        if not event.is_user_annotation:  # these stand for the kernels inside, which are there themselves
            spent[event.key] = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
    total = sum(spent.values())
    counts = {event.key: event.count for event in events}
    say(f"{n_steps} steps in {taken:.3f} s, {total / 1e6:.3f} s of them in kernels; a step's ten largest:")
    for name, microseconds in sorted(spent.items(), key=lambda item: -item[1])[:10]:
        share = microseconds / total
        calls = counts[name] / n_steps
        say(f"  {microseconds / n_steps / 1e3:9.3f} ms {share:6.1%} {calls:7.1f} calls  {name[:80]}")


# ---- verdict


def verdict_on(track, measured):
    """What a full run of a track would take, by what `preset` has measured of it: lines."""
    n_ranks = ranks_of(track)
    plan, m = planned({"track": track}, n_ranks)
    c = plan[0].c
    cap = harness.read_rules(track)["max_seconds"]
    # On fewer GPUs, each has had the share of one of the track's.
    per_flop = measured["seconds_per_flop"] * measured["n_ranks"] / n_ranks
    startup = measured["startup"]
    beside = startup + harness.seconds_left(plan, 0, 0.0, m)
    seconds = startup + harness.seconds_left(plan, 0, per_flop, m)
    allowed = harness.FIT_SHARE * cap
    lines = [f"{track}: {seconds:,.0f} s of {cap:,} on {n_ranks} GPU(s), from {measured['n_ranks']} measured"]
    if seconds > allowed:
        missed = f"{seconds - cap:,.0f} s too long" if seconds > cap else "too close to the limit"
        faster = (seconds - beside) / (allowed - beside) - 1
        try:
            fitted, then = harness.shortened(c, m, cap, startup, per_flop)
            remedy = f"--epochs {fitted.epochs:g} instead of {c.epochs:g} takes {then:,.0f} s; --fit finds it"
            lines.append(f"  {missed}: {remedy}; at steps {faster:.1%} faster all of them would fit")
        except harness.UserError as e:
            lines.append(f"  {missed}: {e}")
    if measured["gpu"]:
        lines += memory_verdict(c, plan, m, measured)
    return lines


def memory_verdict(c, plan, m, measured):
    off = measured["peak"] / measured["estimated"]
    limit = measured["gpu"] - harness.RESERVE_GB
    needed = off * memory_gb(plan, m)
    line = f"  {needed:.1f} GB of {measured['gpu']:.1f}; measured {off:.2f} times what --dry_run says"
    if needed <= limit:
        return [line]
    device_tokens = c.device_tokens
    while needed > limit and device_tokens >= 2 * c.seq_len:
        device_tokens //= 2
        needed = off * memory_gb(*planned({"track": c.track, "device_tokens": device_tokens}, m.world_size))
    if needed > limit:
        return [line, "  too much with any --device_tokens: lower --n_embd or --n_layer"]
    remedy = f"--device_tokens {device_tokens} instead of {c.device_tokens} takes {needed:.1f} GB"
    return [line, f"  leaves less than {harness.RESERVE_GB} GB: {remedy}"]


def verdict(options):
    for track in options.tracks:
        path = options.folder / f"{track}.json"
        if path.exists():
            say("\n".join(verdict_on(track, json.loads(path.read_text()))))
        else:
            say(f"{track}: not measured")


# ---- main


STEPS = {f.__name__: f for f in (check, attention, ranks, resume, preset, profile, verdict)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("tracks", nargs="*", metavar="TRACK", help=f"{', '.join(TRACKS)} [all]")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and what was measured")
    parser.add_argument("--data", default="mini" if ON_GPU else "pocket", help="as --data of train_gpt.py")
    parser.add_argument(
        "--ranks", default="1 2 8", help="numbers of ranks to compare, as far as GPUs are there"
    )
    parser.add_argument("--steps", type=int, default=24 if ON_GPU else 9, help="of a recipe that is cut down")
    options = parser.parse_args()
    options.tracks = options.tracks or TRACKS
    options.track = options.tracks[0]
    options.ranks = [int(n) for n in options.ranks.split()]
    options.n_ranks = 2
    if ON_GPU:
        n_gpus = torch.cuda.device_count()
        options.ranks = [n for n in options.ranks if n <= n_gpus]
        options.n_ranks = max(n for n in (1, 2, 4, 8) if n <= n_gpus)  # that divide every batch
    # When its time is over, it ends what it has started before it ends itself.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        for track in options.tracks:
            harness.require(track in TRACKS, f"{track}: no track for GPUs; choose from {', '.join(TRACKS)}")
        STEPS[options.step](options)
    except harness.UserError as e:
        say(f"node.py: {e}")
        sys.exit(e.status)


if __name__ == "__main__":
    main()
