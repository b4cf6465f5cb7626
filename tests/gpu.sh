#!/usr/bin/env bash
# Everything that only a GPU can show, in three parts of less than ten minutes each:
#     bash tests/gpu.sh tests   the tests that run on the GPU, and short runs with each kind of attention
#     bash tests/gpu.sh speed   speed, utilization and memory against a plain model, at the shapes of `limited` and `tiny`
#     bash tests/gpu.sh mini    the mini track, its audit, and a record's folder without its note: runs/mini
# Output goes to the terminal and to gpu_PART.txt, or the file named. Needs an environment with the packages of requirements.txt (any torch from
# 2.11 on) and the shards in data/pocket and data/mini.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?tests, speed or mini}
{
    rc=0
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    case $part in
    tests)
        timeout 400 python -m pytest -q --durations=10 || rc=1
        for attention in varlen flex sdpa; do
            run=$(mktemp -d)
            python train_gpt.py --device cuda --attention "$attention" --steps 60 --run_dir "$run/run" && grep -E "^(attention|compiled|member . step 60|val_loss)" "$run/run/log.txt" || rc=1
        done ;;
    speed)
        python tests/bench.py --track limited --n_layer 10 --loop_times 0 --mtp_weight 0 --batch_tokens 65536 || rc=1
        python tests/bench.py --track tiny --mtp_weight 0 --batch_tokens 65536 --device_tokens 32768 || rc=1 ;;
    mini)
        python train_gpt.py --track mini --run_dir runs/mini && python records/audit.py runs/mini || rc=1 ;;
    *)
        echo "$part: choose tests, speed or mini"; rc=2 ;;
    esac
    exit $rc
} 2>&1 | tee "${2:-gpu_$part.txt}"
