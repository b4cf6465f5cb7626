"""
Speed and memory of train_gpt.py against a plain PyTorch model of the same shape, both run in turns on this machine.

    python tests/bench.py                          # speed at the pocket track's shape, memory at GPT-2's vocabulary
    python tests/bench.py --track limited --n_layer 6 --loop_times 0 --batch_tokens 65536     # any option of train_gpt.py; --steps: of a round
    python tests/bench.py --loss 0.003             # one epoch of AdamW at this rate: the plain model's loss on pocket

The plain model is what one writes first: nn.Module layers, SDPA with is_causal, SwiGLU, full logits, F.cross_entropy,
torch.optim.AdamW, autocast to the same dtype, with and without torch.compile. It leaves out this script's gates,
value projections, skips and document masks, so it has the lighter job. The model FLOPs utilization is over the best matrix product of this
very run. Prints figures; decides nothing.
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
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402


class PlainLayer(nn.Module):
    def __init__(self, D, H, hidden):
        super().__init__()
        self.H, self.norm1, self.norm2 = H, nn.RMSNorm(D), nn.RMSNorm(D)
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate, self.up, self.down = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False), nn.Linear(hidden, D, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (z.view(B, T, self.H, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(D, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainGPT(nn.Module):
    def __init__(self, c, vocab):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, c.n_embd), nn.Embedding(c.seq_len, c.n_embd)
        self.layers = nn.ModuleList(PlainLayer(c.n_embd, c.n_head, c.mlp_hidden) for _ in range(c.n_layer))
        self.norm, self.head = nn.RMSNorm(c.n_embd), nn.Linear(c.n_embd, vocab, bias=False)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe.weight[:x.size(1)]
        for layer in self.layers:
            h = layer(h)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), y.flatten(), ignore_index=-1)


def make_step(which, c, m, vocab):
    """A function that takes one optimizer step on random tokens."""
    inputs = torch.randint(vocab - 1, (c.batch_tokens // c.seq_len, c.seq_len + 1, 1 + t.recalled(c)))
    x, y = inputs[:, :-1, 0].contiguous(), inputs[:, 1:, 0].contiguous()
    if which.startswith("tokenrun"):
        m = dataclasses.replace(m, why={})
        t.set_compiled(m, "on" if which.endswith("compiled") else "off")
        p = {name: w.to(m.device).requires_grad_() for name, w in t.init_params(c, vocab).items()}
        optimizer, phase = t.MuonAdamW(p, c, m), t.phase_schedule(1.0, c)

        def step():
            for i in range(0, len(x), c.device_tokens // c.seq_len):
                part = slice(i, i + c.device_tokens // c.seq_len)
                t.train_pass(p, inputs[part, :-1], y[part, :, None], y.numel(), c, m, vocab - 1, phase, (0,))
            optimizer.step(1, 1.0, 1.0, 0.95)
    else:
        model = PlainGPT(c, vocab).to(m.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        forward = torch.compile(model) if which.endswith("compiled") else model
        xd, yd = x.to(m.device), y.to(m.device)

        def step():
            for x, y in zip(xd.split(c.device_tokens // c.seq_len), yd.split(c.device_tokens // c.seq_len)):
                with torch.autocast(m.device.type, m.dtype, enabled=m.dtype != torch.float32):
                    loss = forward(x, y) * len(x) / len(xd)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return step


def synchronize(m):
    if m.device.type == "cuda":
        torch.cuda.synchronize()


def matrix_product(c, m):
    """FLOPs per second of the best of ten square matrix products in the machine's dtype."""
    n = 8192 if m.device.type == "cuda" else 2048
    a, seconds = torch.randn(n, n, device=m.device, dtype=m.dtype), []
    for _ in range(10):
        synchronize(m)
        began = time.perf_counter()
        a @ a
        synchronize(m)
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def speed(c, m, vocab, rounds, steps):
    which = ["tokenrun", "plain"] + (["tokenrun compiled", "plain compiled"] if m.compiled else [])
    functions = {name: make_step(name, c, m, vocab) for name in which}
    for step in functions.values():
        step(), step()
    seconds = {name: [] for name in which}
    for _ in range(rounds):
        for name, step in functions.items():
            synchronize(m)
            began = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(m)
            seconds[name].append((time.perf_counter() - began) / steps)
    one_step = types.SimpleNamespace(phases=[t.phase_schedule(1.0, c)])
    flops, peak = t.train_flops(c, one_step, vocab, ()) / c.batch_tokens, matrix_product(c, m)
    print(f"a matrix product: {peak / 1e12:.3g} TFLOP/s; a token's training: {flops:.4g} FLOPs")
    for name in which:
        low, middle, high = (c.batch_tokens / f(seconds[name]) for f in (max, statistics.median, min))
        print(f"{name:18} {middle:10,.0f} tokens/s (lowest {low:,.0f}, highest {high:,.0f} of {rounds} rounds of {steps} steps)"
              + (f", utilization {middle * flops / peak:.1%}" if name.startswith("tokenrun") else ""))
    for a in which[::2]:
        for b in which[1::2]:
            ratios = [y / x for x, y in zip(seconds[a], seconds[b])]
            print(f"{a} / {b}: {statistics.median(ratios):.2f} times the tokens per second ({min(ratios):.2f} to {max(ratios):.2f})")


def objective_cost(c, m, vocab, rounds):
    """The objective with its gradients against nothing but its three matrix products, chunk by chunk as it goes, over rows of a multiple of 64 logits
    and into memory that is there: what no objective of this chunk can beat."""
    h = torch.randn(c.device_tokens, c.n_embd, device=m.device, dtype=m.dtype)
    w = torch.randn(-(-vocab // 64) * 64, c.n_embd, device=m.device) / c.n_embd ** 0.5  # logits of a trained model's size: beyond the softcap are denormals
    targets = torch.randint(vocab, (c.device_tokens, 1), device=m.device)
    head, logits, grad_h, grad_w = w.to(m.dtype), h.new_empty(min(c.loss_chunk, len(h)), len(w)), torch.empty_like(h), torch.empty_like(w, dtype=m.dtype)

    def objective():
        t.objective(h, w[:vocab], targets, c, m, 1.0)

    def products():
        for i in range(0, len(h), c.loss_chunk):
            part, out = h[i:i + c.loss_chunk], grad_h[i:i + c.loss_chunk]
            torch.mm(part, head.T, out=logits[:len(part)])
            torch.mm(logits[:len(part)], head, out=out)
            torch.mm(logits[:len(part)].T, part, out=grad_w)
    seconds = {objective: [], products: []}
    for _ in range(rounds + 1):
        for step in seconds:
            synchronize(m)
            began = time.perf_counter()
            step()
            synchronize(m)
            seconds[step].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(*(times[1:] for times in seconds.values()))]
    print(f"the objective takes {statistics.median(ratios):.2f} times as long as its matrix products alone ({min(ratios):.2f} to {max(ratios):.2f} of {rounds} rounds)")


def plain_loss(c, m, lr):
    """Validation loss of the plain model after one epoch of the pocket track: AdamW (0.9, 0.95), weight decay 0.1, a tenth of
    warmup, cosine to zero, gradients clipped at 1."""
    meta = t.read_meta(c, m)
    train, val = (t.read_shard(t.data_folder(c) / name, meta["vocab_size"]) for name in ("train.bin", "val.bin"))
    loader = t.Loader(train[:, None], meta["bos_id"], c)
    torch.manual_seed(c.seed)
    model = PlainGPT(c, meta["vocab_size"]).to(m.device)
    for name, w in model.named_parameters():
        if w.dim() == 2:
            nn.init.normal_(w, 0, 0.02 / (2 * c.n_layer) ** 0.5 if name.endswith(("o.weight", "down.weight")) else 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    cast = torch.autocast(m.device.type, m.dtype, enabled=m.dtype != torch.float32)
    for step in range(loader.steps):
        done = (step + 0.5) / loader.steps
        optimizer.param_groups[0]["lr"] = lr * (done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))
        x, y, _ = loader.batch(step)
        with cast:
            loss = model(x[..., 0].to(m.device), y[..., 0].to(m.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    n, T, total = len(val) - 1, c.seq_len, 0.0
    with torch.no_grad(), cast:
        for i in range(0, n, T):
            part = torch.from_numpy(val[i:i + T + 1].astype(np.int64)).to(m.device)
            total += model(part[None, :-1], part[None, 1:]).item() * (len(part) - 1)
    print(f"plain model, {sum(w.numel() for w in model.parameters()):,} parameters, one epoch of AdamW, lr {lr:g}, batches of {c.batch_tokens:,} tokens, "
          f"seed {c.seed}: val_loss {total / n:.4f}")


def peak_memory(which, c, m, vocab):
    """Peak bytes of a process that takes two steps, and what it held before the first."""
    def peak():
        if m.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        # Linux: ru_maxrss of a child begins at its parent's peak, VmHWM does not
        status = Path("/proc/self/status")
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
        return int(lines[0].split()[1]) * 1024 if lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(which, c, m, vocab)
    before = peak()
    step(), step()
    return peak(), before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--vocab", type=int, help="for the speed (default: that of the track's tokenizer)")
    parser.add_argument("--memory_vocab", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss", type=float, metavar="LR")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args()
    try:
        given, args = t.parse_args(rest)
        c = t.make_config({"members": 1, "bag_until": 0.0} | given)
    except t.Stop as e:
        sys.exit(f"bench.py: {e.args[0]}")
    vars(args).update(vars(own))
    args.vocab = args.vocab or (257 if c.data == "pocket" else 50257)
    if args.memory_of:
        args.compile = "off"
    m = t.setup_machine(c, args)
    if args.loss:
        plain_loss(dataclasses.replace(c, epochs=1.0), m, args.loss)
        return
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of, c, m, args.memory_vocab)))
        return
    print(f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, SwiGLU {c.mlp_hidden}, {c.batch_tokens:,} tokens a step in sequences of {c.seq_len}")
    print(f"{t.hardware(m)}, {torch.get_num_threads()} threads, torch {torch.__version__}; " + "; ".join(f"{k}: {v}" for k, v in m.why.items()))
    print(f"\nspeed, vocabulary {args.vocab:,}, a whole step with its optimizer")
    speed(c, m, args.vocab, args.rounds, args.steps or 4)
    objective_cost(c, m, args.vocab, args.rounds)
    print(f"\npeak memory, vocabulary {args.memory_vocab:,}, in a process of its own")
    peaks = {}
    for which in ("tokenrun", "plain"):
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory_of", which], check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[which], before = json.loads(out.splitlines()[-1])
        print(f"{which:18} {peaks[which] / 2 ** 20:8,.0f} MiB ({before / 2 ** 20:,.0f} MiB of them before the first step)")
    print(f"tokenrun / plain: {peaks['tokenrun'] / peaks['plain']:.2f}")


if __name__ == "__main__":
    main()
