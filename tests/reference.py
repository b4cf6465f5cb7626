"""What the reference tests share: train_gpt.py from the inside, in arithmetic that leaves no doubt."""

import contextlib
import io
import math
import os

import numpy as np
import torch

import harness
import runs
import train_gpt as t
from runs import ROOT, TINY

BOS = 256

# Two ways to compute one thing in float64. A result here comes from some thousands of operations, each of
# which rounds by 2**-53 = 1.1e-16, and training amplifies a difference perhaps a thousandfold: 1e-10 at the
# very most, on any processor. A mistake in a formula is larger than 1e-6.
EXACT = dict(rtol=1e-9, atol=1e-9)

# What float32, with which the script works where it is not told otherwise, costs a single operation.
EPS = 2**-24


def config(**changes):
    """The tiny recipe on the data of bytes."""
    return t.Config(**(TINY | dict(vocab_size=257, bos_id=BOS) | changes))


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, **EXACT)


class Float64Torch:
    """What the script sees as torch: float32 is float64. For everyone else torch stays what it is."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def float64():
    """Let the script compute in float64 whatever it computes in float32."""
    to_float32 = torch.Tensor.float
    default = torch.get_default_dtype()
    t.torch = harness.torch = Float64Torch()
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        t.torch = harness.torch = torch
        torch.Tensor.float = to_float32
        torch.set_default_dtype(default)


# The same for a process of its own, to its end. The first backward pass imports torch._dynamo, which takes
# seconds: once here, not in each process that is forked.
FLOAT64_PROCESS = """
import torch._dynamo
import reference
import harness
import train_gpt as t
context = reference.float64()
context.__enter__()
"""

# What a run does at its end beside its score takes longer than the training of a tiny model, and is tested
# elsewhere.
QUICK_END = """
t.sample = lambda *args: []
harness.ask_referee = lambda *args: None
"""


def make_machine(**changes):
    """A GPU where there is one, float32 (or float64, see above), nothing compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    m = harness.Machine(device, t.torch.float32)
    for name, value in changes.items():
        setattr(m, name, value)
    return m


def make_params(c, seed=0):
    """Weights of a size that makes every part of the model matter; those of a fresh model are zero in many
    places."""
    g = torch.Generator().manual_seed(seed)
    device = make_machine().device
    shapes = t.param_shapes(c)
    return {name: (torch.randn(shape, generator=g) * 0.3).to(device) for name, shape in shapes.items()}


def trainable(p):
    return {name: w.clone().requires_grad_() for name, w in p.items()}


def random_tokens(B, T, seed=0, bos_share=0.05):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (B, T))
    x[rng.random((B, T)) < bos_share] = BOS
    return torch.from_numpy(x).to(make_machine().device)


def allowed_pairs(tokens, window):
    """[T, T]: whether token i of a row sees token j, decided one by one."""
    document = np.cumsum(tokens.cpu().numpy() == BOS).tolist()
    places = range(len(tokens))
    allowed = [[j <= i and i - j < window and document[i] == document[j] for j in places] for i in places]
    return torch.tensor(allowed, device=tokens.device)


def plain_attention(q, k, v, tokens, window):
    """Softmax over every score, the forbidden ones at -inf."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.size(-1))
    for b, row in enumerate(tokens):
        scores[b].masked_fill_(~allowed_pairs(row, window), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def head_logits(h, w, c):
    """All logits at once."""
    return c.softcap * torch.tanh(h @ w.T / c.softcap)


def run_main(*argv):
    """Run a command line of the imported script, whose functions a test may have replaced. Returns (exit
    status, what it printed, what it printed as errors)."""
    functions = t.sample, harness.ask_referee
    exec(QUICK_END, {"t": t, "harness": harness})
    out = io.StringIO()
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = runs.in_this_process(harness.main, [ROOT / "train_gpt.py", *argv])
    finally:
        t.sample, harness.ask_referee = functions
    return status, out.getvalue(), err.getvalue()


def environment(**changes):
    """Of a process of its own that imports the script. One thread: several wait for each other where others
    work."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | changes


def weights_of(run):
    """Weights of all models of a run, under numbered names."""
    found = {}
    for i, path in enumerate(harness.saved(run, harness.WEIGHTS_FILE)):
        for name, w in harness.load_tensors(path)["params"].items():
            found[f"{i} {name}"] = w
    return found
