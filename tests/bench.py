"""
Speed and memory of train_gpt.py against a plain PyTorch model of the same shape, both run in turns on this
machine.

    python tests/bench.py                    # speed at the pocket track's shape, memory at GPT-2's vocabulary
    python tests/bench.py --track limited --n_layer 6 --loop_times 0      # any option of train_gpt.py
    python tests/bench.py --steps 8          # optimizer steps of a round
    python tests/bench.py --loss 0.003       # the loss of the plain model on pocket, at this rate of AdamW

The plain model is what one writes first: nn.Module layers, SDPA with is_causal, SwiGLU, full logits,
F.cross_entropy, torch.optim.AdamW, autocast to the same dtype, with and without torch.compile. It leaves
out this script's gates, value projections, skips and document masks, so it has the lighter job. The model
FLOPs utilization is over the best matrix product of this very run. Prints figures; decides nothing.
"""

import argparse
import dataclasses
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import harness
import train_gpt as t  # first: it sets up OpenMP before torch is imported

import torch  # isort: skip
import torch.nn as nn  # isort: skip
import torch.nn.functional as F  # isort: skip


class PlainLayer(nn.Module):
    def __init__(self, D, H, hidden):
        super().__init__()
        self.H = H
        self.norm1 = nn.RMSNorm(D)
        self.norm2 = nn.RMSNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate = nn.Linear(D, hidden, bias=False)
        self.up = nn.Linear(D, hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        heads = self.qkv(self.norm1(x)).split(D, -1)
        q, k, v = (z.view(B, T, self.H, -1).transpose(1, 2) for z in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.seq_len, c.n_embd)
        self.layers = nn.ModuleList(PlainLayer(c.n_embd, c.n_head, c.mlp_hidden) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe.weight[: x.size(1)]
        for layer in self.layers:
            h = layer(h)
        logits = self.head(self.norm(h)).flatten(0, 1).float()
        return F.cross_entropy(logits, y.flatten(), ignore_index=-1)


def autocast(m):
    return torch.autocast(m.device.type, m.dtype, enabled=m.dtype != torch.float32)


def with_vocabulary(c, size):
    return dataclasses.replace(c, vocab_size=size, bos_id=size - 1)


def make_step(which, c, m):
    """A function that takes one optimizer step on random tokens."""
    shape = (c.batch_tokens // c.seq_len, c.seq_len + 1, t.n_inputs(c))
    inputs = torch.randint(c.vocab_size - 1, shape)
    n_rows = c.device_tokens // c.seq_len
    if which.startswith("tokenrun"):
        return tokenrun_step(which, c, m, inputs, n_rows)
    x = inputs[:, :-1, 0].to(m.device)
    y = inputs[:, 1:, 0].to(m.device)
    model = PlainGPT(c).to(m.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model) if which.endswith("compiled") else model

    def step():
        for x_part, y_part in zip(x.split(n_rows), y.split(n_rows)):
            with autocast(m):
                loss = forward(x_part, y_part) * len(x_part) / len(x)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokenrun_step(which, c, m, inputs, n_rows):
    m = dataclasses.replace(m, reasons={})
    harness.set_compiled(m, "on" if which.endswith("compiled") else "off")
    p = {name: w.to(m.device).requires_grad_() for name, w in t.init_params(c).items()}
    optimizer = t.MuonAdamW(p, c, m)
    phase = t.phase_schedule(1.0, c)
    inputs = inputs.cpu()  # as a batch comes, in which the process finds the documents
    x = inputs[:, :-1].contiguous()
    y = inputs[:, 1:, :1].contiguous()

    def step():
        with t.step_weights(p, c, m) as weights:
            for x_part, y_part in zip(x.split(n_rows), y.split(n_rows)):
                t.train_pass(weights, x_part, y_part, c.batch_tokens, c, m, phase, (0,))
        optimizer.step(1, 1.0, 1.0, 0.95)

    return step


def synchronize(m):
    if m.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, m):
    synchronize(m)
    began = time.perf_counter()
    function()
    synchronize(m)
    return time.perf_counter() - began


def matrix_product(m):
    """FLOPs per second of the best of ten square matrix products in the machine's dtype."""
    n = 8192 if m.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=m.device, dtype=m.dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ a, m) for _ in range(10))


def speed(c, m, n_rounds, n_steps):
    names = ["tokenrun", "plain"]
    if m.compiled:
        names += ["tokenrun compiled", "plain compiled"]
    steps = {name: make_step(name, c, m) for name in names}
    for step in steps.values():
        step()
        step()
    seconds = {name: [] for name in names}
    for _ in range(n_rounds):
        for name, step in steps.items():
            taken = seconds_of(lambda step=step: [step() for _ in range(n_steps)], m)
            seconds[name].append(taken / n_steps)
    # The last step of training, without a teacher: what tokenrun_step() takes.
    phase = t.phase_schedule(1.0, c)
    forward_flops = t.flops_per_token(c, phase)
    if c.mtp_weight:
        forward_flops += 2 * c.n_embd * (c.n_embd + c.vocab_size)
    flops = 3 * forward_flops
    peak = matrix_product(m)
    print(f"a matrix product: {peak / 1e12:.3g} TFLOP/s; a token's training: {flops:.4g} FLOPs")
    for name in names:
        low, middle, high = (c.batch_tokens / f(seconds[name]) for f in (max, statistics.median, min))
        line = f"{name:18} {middle:10,.0f} tokens/s (lowest {low:,.0f}, highest {high:,.0f}"
        line += f" of {n_rounds} rounds of {n_steps} steps)"
        if name.startswith("tokenrun"):
            line += f", utilization {middle * flops / peak:.1%}"
        print(line)
    for ours in names[::2]:
        for plain in names[1::2]:
            ratios = [b / a for a, b in zip(seconds[ours], seconds[plain])]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{ours} / {plain}: {statistics.median(ratios):.2f} times the tokens per second ({spread})")


def objective_cost(c, m, n_rounds):
    """The objective with its gradients against nothing but its three matrix products, chunk by chunk as it
    goes and into memory that is there: what no objective of this chunk can beat."""
    h = torch.randn(c.device_tokens, c.n_embd, device=m.device, dtype=m.dtype)
    # Logits of a trained model's size: beyond the softcap gradients are denormals.
    w = torch.randn(c.vocab_size, c.n_embd, device=m.device) / c.n_embd**0.5
    head = t.padded_head(w, m.dtype)
    targets = torch.randint(c.vocab_size, (c.device_tokens, 1), device=m.device)
    scale = torch.tensor(1 / c.device_tokens, device=m.device)
    logits = h.new_empty(min(c.loss_chunk, len(h)), len(head))
    grad_h = torch.empty_like(h)
    grad_head = torch.empty_like(head)

    def objective():
        t.objective(t.LogitParts(h, head), targets, scale, c, m)

    def products():
        for part, out in zip(h.split(c.loss_chunk), grad_h.split(c.loss_chunk)):
            z = logits[: len(part)]
            torch.mm(part, head.T, out=z)
            torch.mm(z, head, out=out)
            torch.mm(z.T, part, out=grad_head)

    pairs = [(seconds_of(objective, m), seconds_of(products, m)) for _ in range(n_rounds + 1)]
    ratios = [a / b for a, b in pairs[1:]]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} of {n_rounds} rounds"
    print(
        f"the objective takes {statistics.median(ratios):.2f} times as long as its products alone ({spread})"
    )


def plain_loss(c, m, lr):
    """Validation loss of the plain model after one epoch of the pocket track: AdamW (0.9, 0.95), weight decay
    0.1, a tenth of warmup, cosine to zero, gradients clipped at 1."""
    folder = harness.data_folder(c)
    train_tokens = harness.read_shard(folder / "train.bin", c.vocab_size)
    val_tokens = harness.read_shard(folder / "val.bin", c.vocab_size)
    loader = t.Loader(train_tokens[:, None], c)
    torch.manual_seed(c.seed)
    model = PlainGPT(c).to(m.device)
    for name, w in model.named_parameters():
        if w.dim() == 2:
            into_residual = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(w, 0, 0.02 / (2 * c.n_layer) ** 0.5 if into_residual else 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(loader.steps):
        done = (step + 0.5) / loader.steps
        if done < 0.1:
            share = done / 0.1
        else:
            share = 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)
        optimizer.param_groups[0]["lr"] = lr * share
        x, y, _ = loader.batch(step)
        with autocast(m):
            loss = model(x[..., 0].to(m.device), y[..., 0].to(m.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    n = len(val_tokens) - 1
    total = 0.0
    with torch.no_grad(), autocast(m):
        for i in range(0, n, c.seq_len):
            part = torch.from_numpy(val_tokens[i : i + c.seq_len + 1].astype(np.int64)).to(m.device)
            total += model(part[None, :-1], part[None, 1:]).item() * (len(part) - 1)
    size = f"{sum(w.numel() for w in model.parameters()):,} parameters"
    recipe = f"one epoch of AdamW, lr {lr:g}, batches of {c.batch_tokens:,} tokens, seed {c.seed}"
    print(f"plain model, {size}, {recipe}: val_loss {total / n:.4f}")


def peak_bytes(m):
    if m.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux: ru_maxrss of a child begins at its parent's peak, VmHWM does not.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(which, c, m):
    """Peak bytes of a process that takes two steps, and what it held before the first."""
    step = make_step(which, c, m)
    before = peak_bytes(m)
    step()
    step()
    return peak_bytes(m), before


def compare_memory():
    peaks = {}
    for which in ("tokenrun", "plain"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", which]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[which], before = json.loads(out.splitlines()[-1])
        at_start = f"{before / 2**20:,.0f} MiB of them before the first step"
        print(f"{which:18} {peaks[which] / 2**20:8,.0f} MiB ({at_start})")
    print(f"tokenrun / plain: {peaks['tokenrun'] / peaks['plain']:.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vocab", type=int, help="for the speed (default: that of the track's tokenizer)")
    parser.add_argument("--memory_vocab", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss", type=float, metavar="LR")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args()
    try:
        given, args = harness.parse_args(rest)
        c = harness.make_config({"track": "pocket", "members": 1, "bag_until": 0.0} | given)
        m = harness.setup_machine(c, args)
        if own.loss:
            meta = harness.read_json(harness.find_data(c, m) / "meta.json", harness.check_meta)
            c = dataclasses.replace(harness.with_vocabulary(c, meta), epochs=1.0)
    except harness.UserError as e:
        sys.exit(f"bench.py: {e}")
    if own.loss:
        plain_loss(c, m, own.loss)
        return
    if own.memory_of:
        print(json.dumps(peak_memory(own.memory_of, with_vocabulary(c, own.memory_vocab), m)))
        return
    harness.set_compiled(m, args.compile)
    vocab_size = own.vocab or harness.read_rules(c.track).get("vocab_size", 50257)
    shape = f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, SwiGLU {c.mlp_hidden}"
    print(f"{shape}, {c.batch_tokens:,} tokens a step in sequences of {c.seq_len}")
    reasons = "; ".join(f"{choice}: {reason}" for choice, reason in m.reasons.items())
    print(f"{harness.hardware(m)}, {torch.get_num_threads()} threads, torch {torch.__version__}; {reasons}")
    print(f"\nspeed, vocabulary {vocab_size:,}, a whole step with its optimizer")
    c = with_vocabulary(c, vocab_size)
    speed(c, m, own.rounds, args.steps or 4)
    objective_cost(c, m, own.rounds)
    print(f"\npeak memory, vocabulary {own.memory_vocab:,}, in a process of its own")
    compare_memory()


if __name__ == "__main__":
    main()
