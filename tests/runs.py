"""How the tests run a script, and read what its runs leave. Nothing here imports the script."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(os.environ.get("TOKENRUN_SCRIPT", ROOT / "train_gpt.py")).resolve()
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "records"))

import audit
import reading

HEADER_BYTES = 1024  # of a shard: 256 int32

# A model so small that a run takes a second or two.
SIZES = dict(
    n_layer=3,
    n_embd=32,
    mlp_hidden=48,
    seq_len=64,
    window_short=24,
    window_pattern="SL",
    batch_tokens=512,
    device_tokens=256,
    loss_chunk=100,
    train_tokens=20_000,
    epochs=1.0,
    evals=2,
    eval_windows=4,
    save_every=5,
    dtype="fp32",
    cpu_threads=1,  # for so small a model two are no faster, and far slower beside another process
)

# The techniques of the tracks' presets, switched off, and the rates that go with them set back.
PLAIN_RECIPE = dict(
    recall="",
    memory="",
    loop_first=0,
    loop_last=0,
    loop_times=0,
    loop_from=0.5,
    dropout=0.0,
    members=1,
    chains=1,
    distill_alpha=0.0,
    distill_temp=1.0,
    student="",
    bag_size=1,
    bag_until=0.0,
    mtp_weight=0.0,
    iha=0,
    ema=0.0,
    score_stride=0,
    muon_lr=0.04,
    weight_decay=0.1,
)
TINY = SIZES | PLAIN_RECIPE

# The pocket track's own recipe at that size, with whatever the script puts into it, as two members.
RECIPE = SIZES | dict(
    track="pocket",
    epochs=0.5,
    device_tokens=4096,
    window_short=16,  # divides the context, as in every preset; TINY's does not
    loop_first=1,
    loop_last=1,
    members=2,
    chains=1,
    student="",
    score_stride=0,
    save_every=3,
)

PLAIN = ["--compile", "off", "--device", "cpu"]


# ---- the command line


def in_this_process(run, argv):
    """Call run() with a command line, as if in a process of its own: that saves the seconds that importing
    torch takes. Returns the exit status."""
    argv_before, path_before, threads = sys.argv, sys.path[:], torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [str(word) for word in argv]
    sys.path.insert(0, str(Path(argv[0]).parent))
    # A process of its own would import what lies beside the script, too.
    imported = sys.modules.pop("harness", None)
    # A script that does not handle SIGTERM is ended by it, and pytest is not.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        run()
        status = 0
    except SystemExit as stopped:
        status = stopped.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    finally:
        sys.modules.pop("harness", None)
        if imported:
            sys.modules["harness"] = imported
        sys.argv = argv_before
        sys.path[:] = path_before
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status or 0


def run_script(argv, script=SCRIPT):
    """Run a command line of the script in this process. Returns its exit status."""
    return in_this_process(lambda: runpy.run_path(str(script), run_name="__main__"), [script, *argv])


def run_here(command, seconds):
    """In place of run_limited() of records/audit.py, which starts a process that takes seconds to import
    torch: `python SCRIPT WORDS` or `python -c CODE WORDS`, in this process."""
    _, script, *argv = command
    if script == "-c":
        code, *argv = argv
        status = in_this_process(lambda: exec(code, {"__name__": "__main__"}), [ROOT / "code", *argv])
    else:
        status = run_script(argv, script)
    return status, "it ran in the tests' own process"


@functools.cache
def script_options():
    """Names of the options that --help lists."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert run_script(["--help"]) == 0
    return set(re.findall(r"--(\w+)", text.getvalue()))


def options(**values):
    """Words of a command line. What the script has no option for is left out: a contestant may have removed
    it."""
    words = []
    for name, value in values.items():
        if name in script_options():
            words += [f"--{name}", str(int(value) if isinstance(value, bool) else value)]
    return words


class Forked:
    """A command line of the script in a process of its own, forked from one that has imported torch already,
    which saves seconds."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", "torch.distributed", "numpy.random", "tqdm"])
    started = []

    def __init__(self, argv, folder, **env):
        self.out, self.err = (folder / f"{name}_{os.urandom(4).hex()}.txt" for name in ("out", "err"))
        self.err.touch()
        words = [str(word) for word in argv]
        self.process = self.server.Process(target=run_forked, args=(words, self.out, self.err, env))
        self.process.start()
        self.started.append(self)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def poll(self):
        """The exit status, or None."""
        return self.process.exitcode

    def wait(self):
        """(exit status, what it printed, what it printed as errors), after its end."""
        self.process.join(600)
        return self.process.exitcode, self.out.read_text(), self.err.read_text()

    def kill(self):
        self.process.kill()
        self.process.join()


def run_forked(argv, out, err, env):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(env)
    sys.exit(run_script(argv))


def start(data, run, *argv, recipe=TINY, **env):
    """A new run in a process of its own."""
    return Forked([*options(**recipe, data=data), "--run_dir", run, *PLAIN, *argv], run.parent, **env)


def resume(run, *argv, **env):
    """The rest of a run in a process of its own: (exit status, what it printed, what it printed as
    errors)."""
    return Forked(["--resume", run, *PLAIN, *argv], run.parent, **env).wait()


def start_ranks(n, data, run, *argv):
    """A new run in n processes that work together, told so as torchrun tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [start(data, run, *argv, RANK=str(i), LOCAL_RANK=str(i), **env) for i in range(n)]


def wait_for(condition, *processes):
    """Until the condition holds, while processes run. The limit only ends a test that would hang."""
    limit = time.monotonic() + 300
    while not condition():
        for process in processes:
            assert process.poll() is None, process.wait()
        assert time.monotonic() < limit
        time.sleep(0.0002)


def stop_at(step, number, run, argv, **kwargs):
    """Run a command line in this process, and send it a signal when its log has come to the step. Returns the
    exit status."""
    ended = threading.Event()

    def watch():
        while not ended.is_set():
            if has_logged(run, f"step {step}/"):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return run_script(argv, **kwargs)
    finally:
        ended.set()
        watcher.join()


def score(cli, run, tokens, folder):
    """The NLL of a shard (a path) or of rows (an array), as --score writes it."""
    out = folder / "nll.npy"
    if isinstance(tokens, np.ndarray):
        np.save(folder / "tokens.npy", tokens)
        tokens = folder / "tokens.npy"
    status, _, err = cli("--score", run, "--tokens", tokens, "--nll", out, *PLAIN)
    assert status == 0, err
    nll = np.load(out, allow_pickle=False)
    out.unlink()
    return nll


# ---- the referee's side


# How far pocket's seeds spread, as the tests' repositories state it. This one's changes with its logs.
SEED_SPREAD = {"seed_sd": 0.00283, "seed_df": 54}


def make_repository(root, tiny_data, **rules):
    """A repository as the referee sees one, whose pocket track is the tests' tiny data. rules: more of the
    track's."""
    (root / "records").mkdir(parents=True)
    shutil.copytree(tiny_data, root / "data" / "pocket")
    meta = json.loads((tiny_data / "meta.json").read_text())
    tracks = reading.read_tracks()
    # So little text is uneven: its test loss is far from the validation loss.
    dataset = tracks["datasets"]["pocket"]
    dataset |= SEED_SPREAD
    dataset |= {"train_tokens": TINY["train_tokens"], "sha256": meta["sha256"], "max_test_gap": 1.0}
    dataset |= {f"{split}_tokens": meta["tokens"][split] for split in ("val", "test")}
    dataset |= {f"{split}_bytes": meta["text_bytes"][split] for split in ("val", "test")}
    tracks["tracks"]["pocket"] |= rules
    (root / "records" / "tracks.json").write_text(json.dumps(tracks))


# ---- what runs leave


def tokens_of(path):
    return np.fromfile(path, dtype="<u2")[HEADER_BYTES // 2 :]


def record_of(run):
    return json.loads((run / "record.json").read_text())


def log_lines(run):
    """Lines of a run's log after the script's source."""
    return audit.split_log((run / "log.txt").read_bytes())[1].decode().splitlines()


def has_logged(run, text):
    """Whether the log of a run that is under way has come to a line that begins so."""
    path = run / "log.txt"
    if not path.exists():
        return False
    _, _, rest = path.read_bytes().partition(b"\n==== end of source\n")
    return b"\n" + text.encode() in rest


def told(run):
    """What the log says of training and score, without times: where a run was interrupted must not show in
    it."""
    lines = [line for line in log_lines(run) if re.match(r"(member \d+ )?(step|eval) \d+/|val_loss ", line)]
    return [line.split(" lr ")[0] for line in lines]


def steps_of(run):
    """What the log says of each step."""
    return [line for line in told(run) if re.match(r"(member \d+ )?step ", line)]


def assert_same_end(run, undisturbed):
    """Bit for bit the same run, and a folder that holds nothing half-written."""
    assert (run / "val_nll.npy").read_bytes() == (undisturbed / "val_nll.npy").read_bytes()
    assert told(run) == told(undisturbed)
    same = "trial seed val_loss val_bpb steps tokens_seen parameters train_flops source_sha256"
    for name in same.split():
        assert record_of(run)[name] == record_of(undisturbed)[name], name
    assert not list(run.glob("*.tmp"))


def assert_same_model(run, finished_run, second_seed, data, cli, folder):
    """Several ranks add in another order than one, and training lets that rounding grow. How far depends on
    the machine and on the model, so the measure is how much the NLL of single tokens differs between two
    seeds. Of that, measured with train_gpt.py: rounding makes a hundredth, dropout of 0.1 that each rank
    draws for itself a third, ranks that do not share their gradients 0.7, and ranks that read the same rows
    0.8. The limit is a half."""
    paths = (run, finished_run, second_seed)
    nll, one, other = (score(cli, path, data / "val.bin", folder) for path in paths)
    assert np.std(nll - one) < 0.5 * np.std(other - one)
    assert [line.split()[1] for line in steps_of(run)] == [line.split()[1] for line in steps_of(finished_run)]


def assert_refused(result, named, *absent):
    """A mistake of the user: status 2, one line that names the option or the file, and nothing written."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    assert str(named) in err
    for path in absent:
        assert not path.exists(), path
