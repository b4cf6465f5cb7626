#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: the tests on the GPU, speed and memory against a plain model at two
# shapes, and a short run. Leaves its output in the file named, gpu.txt by default. Needs an environment with the
# packages of requirements.txt (any torch from 2.11 on) and the shards in data/pocket.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu.txt}
{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python -m pytest -q tests/test_model.py tests/test_optim.py
    python tests/bench.py --n_layer 12 --n_embd 768 --n_head 6 --mlp_hidden 2048 --seq_len 2048 --batch_tokens 32768 --loss_chunk 4096 --vocab 50304
    python tests/bench.py --n_layer 16 --n_embd 1024 --n_head 8 --mlp_hidden 2816 --seq_len 2048 --batch_tokens 65536 --loss_chunk 4096 --vocab 50304
    for attention in varlen flex sdpa; do
        run=$(mktemp -d)
        python train_gpt.py --device cuda --attention "$attention" --steps 60 --run_dir "$run/run" && grep -E "^(attention|compiled|step 60|val_loss)" "$run/run/log.txt"
    done
} 2>&1 | tee "$out"
