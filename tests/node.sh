#!/usr/bin/env bash
# The first hour on a rented node, of one GPU or eight: does training work there, and how fast is it?
#
#     bash tests/node.sh                 every track for GPUs
#     bash tests/node.sh solo tiny       these tracks alone
#
# It ends at once, and says what to do, where the machine cannot work. Otherwise it runs the steps below, each with its
# limit of time, and ends with a table of them, after about 40 minutes on 8xH100: an estimate, nothing of it has been
# measured. What it prints is also in node.txt, the file to send in. Status 0: all went well; 1: a step failed, or took
# too long; 2: the machine cannot work.
#
# In the environment: DATA, as --data of train_gpt.py (mini; made by `python data/prepare.py mini`); RANKS, the numbers
# of ranks that are compared ("1 2 8", as far as there are GPUs); FILE, in place of node.txt. Without a GPU everything
# has the size of a toy, trains on pocket, and its ranks meet over gloo: so this script is tested.
set -uo pipefail
cd "$(dirname "$0")/.."
if ! python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
    echo "node.sh: python has no torch; pip install -r requirements.txt, in the environment that is active" >&2
    exit 2
fi
tracks=("$@")
if [ $# = 0 ]; then
    tracks=(mini solo tiny limited two_hour unlimited)
fi
profiled=${tracks[0]}
for track in "${tracks[@]}"; do
    if [ "$track" = limited ]; then
        profiled=limited
    fi
done
# Those that compute on a GPU where there is one. Without one a few stand for them: they are in the project's tests.
tests=(tests/test_gpu_path.py -k float32)
if nvidia-smi -L >/dev/null 2>&1; then
    tests=(tests/test_gpu_path.py tests/test_model.py tests/test_optim.py)
fi

mkdir -p runs
folder=$(mktemp -d runs/node.XXXXXX)
trap 'rm -rf "$folder"' EXIT
options=(--folder "$folder" ${DATA:+--data "$DATA"} ${RANKS:+--ranks "$RANKS"})
table=()
failed=0

step() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS status outcome
    shift 2
    printf '\n==== %s\n' "$name"
    timeout --kill-after=60 "$limit" "$@"
    status=$?
    case $status in
        0) outcome=ok ;;
        3) outcome=skipped ;;
        124 | 137) outcome="over its limit" ;;
        *) outcome="FAILED, status $status" ;;
    esac
    if [ "$status" != 0 ] && [ "$status" != 3 ]; then
        failed=1
    fi
    table+=("$(printf '%-20s %-18s %5d s of %5d' "$name" "$outcome" $((SECONDS - began)) "$limit")")
}

hour() {
    date -u
    step check 300 python tests/node.py check "${tracks[@]}" "${options[@]}"
    if [ "$failed" != 0 ]; then
        failed=2
        return
    fi
    step "reference tests" 900 python -m pytest -q -n 0 "${tests[@]}"
    step attention 300 python tests/node.py attention "${options[@]}"
    step ranks 1200 python tests/node.py ranks "${options[@]}"
    step resume 600 python tests/node.py resume "${options[@]}"
    for track in "${tracks[@]}"; do
        step "$track" 1200 python tests/node.py preset "$track" "${options[@]}"
    done
    step "profile of $profiled" 600 python tests/node.py profile "$profiled" "${options[@]}"
    step verdict 300 python tests/node.py verdict "${tracks[@]}" "${options[@]}"
}

{
    hour
    printf '\n==== table\n'
    printf '%s\n' "${table[@]}"
    exit "$failed"
} 2>&1 | tee "${FILE:-node.txt}"
