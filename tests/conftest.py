import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402
from data import prepare  # noqa: E402

# a model small enough that a run takes seconds, with every kind of layer in it
TINY = dict(n_layer=3, n_embd=32, n_head=2, mlp_hidden=48, seq_len=64, window_short=24, window_pattern="SL", batch_tokens=512,
            device_tokens=256, loss_chunk=100, train_tokens=20_000, epochs=1.0, probes=2, probe_tokens=1000, save_every=5, dtype="fp32")
TINY = {name: getattr(t.Config, name) for name in t.PRESETS["pocket"]} | TINY  # what the track's preset changes is changed back

PLAIN = ["--compile", "off", "--device", "cpu"]


def options(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(int(value) if isinstance(value, bool) else value))]


@pytest.fixture
def machine():
    """The machine that tests of functions run on: a GPU where there is one, float32, nothing compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return t.Machine(device, torch.float32, block=t.block, objective_chunk=t.objective_chunk)


@pytest.fixture
def params():
    """Weights of a size that makes every part of the model matter; those of a fresh model are zero in many places."""
    def make(c, vocab_size=257, seed=0, device="cuda" if torch.cuda.is_available() else "cpu"):
        g = torch.Generator().manual_seed(seed)
        return {name: (torch.randn(shape, generator=g) * 0.3).to(device) for name, shape in t.param_shapes(c, vocab_size).items()}
    return make


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of shards made from this project's own source text."""
    folder = tmp_path_factory.mktemp("data") / "own"
    texts = {p.name: p.read_text() for p in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py"))}
    names = [f"{name}#{i}" for name in texts for i in range(0, len(texts[name]), 3000)]
    splits = prepare.encode_documents(names, lambda n: texts[n.split("#")[0]][int(n.split("#")[1]):][:3000].encode("ascii", "replace"), 256,
                                      {"val": 3010, "test": 3000, "train": 30_000}, "test")
    prepare.write_dataset(folder, splits, "bytes", "the tests")
    return folder


@pytest.fixture(scope="session")
def pocket():
    """The pocket shards, prepared where they are missing."""
    if not (ROOT / "data" / "pocket" / "meta.json").exists():
        prepare.prepare_pocket()


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run train_gpt.py's command line in this process. Returns (exit status, what it printed, what it printed as errors)."""
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, argv)])
        try:
            t.main()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


@pytest.fixture(scope="session")
def finished_run(tiny_data, tmp_path_factory):
    """A finished tiny run, trained once for all tests that only read it."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    before, sys.argv = sys.argv, ["train_gpt.py", *options(**TINY, data=tiny_data), "--run_dir", str(run), "--compile", "off", "--device", "cpu"]
    try:
        t.main()
    finally:
        sys.argv = before
    return run


def tokens_of(path):
    return np.fromfile(path, dtype="<u2")[2 * t.HEADER_INTS:]
