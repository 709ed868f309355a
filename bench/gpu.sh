#!/usr/bin/env bash
# Tests and measures the GPU path: the tests of kernels and decode loop, natively; every kernel; the
# decode loop on random weights of two model shapes; real weights beside transformers' own continuous
# batching. Each step checks its results first and reports nothing if they are wrong.
#
#   bench/gpu.sh OUT_FOLDER
#
# Leaves NAME.json (the last line of a step's output), NAME.md (its tables), NAME.log and summary.md in
# OUT_FOLDER, and of the tests tests.txt. Under twelve minutes on an H100 or H200 by its own limits: a step
# that takes too long is cut off and named. Ends with status 1 if any step failed.
#
# From the environment: OFFRAMP (the command), DEVICE, DTYPE, LARGE and SMALL (model shapes), ROWS,
# TOKENS (launches of the decode loop, and tokens of an answer), SECONDS_EACH (a kernel's timing),
# EXIT_VOCAB (tokens that exits choose from), MODEL (real weights; "" leaves them out), TESTS (files and
# options of pytest; "" leaves them out).
set -uo pipefail

if (($# != 1)); then
    sed -n '2,6p' "$0" >&2
    exit 2
fi
mkdir -p "$1" || exit
out=$(realpath "$1")
cd "$(dirname "$0")/.." || exit
read -ra offramp <<<"${OFFRAMP:-python3 -m offramp}"
device=${DEVICE:-cuda} dtype=${DTYPE:-bf16} large=${LARGE:-llama-3-8b} small=${SMALL:-llama-3.2-1b}
rows=${ROWS:-1,8,32,128} model=${MODEL-smollm2-135m}
tests=${TESTS-tests/kernels tests/server/engine/test_device_decoder.py -k "not compil and not native"}
failed=0

# step NAME SECONDS COMMAND...: runs the command, keeps its output and what its last line says.
step() {
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    printf '%s\n' "$*" >&2
    timeout "$limit" "$@" >"$out/$name.out" 2>"$out/$name.log" || status=$?
    if ((status == 0)); then
        tail -n 1 "$out/$name.out" >"$out/$name.json"
    else
        failed=1
        tail -n 3 "$out/$name.log" >&2
    fi
    printf '| %s | %s | %s | `%s` |\n' "$name" "$status" "$((SECONDS - begun))" "$*" >>"$out/summary.md"
}

printf '%s, %s\n\n| step | status | seconds | command |\n|---|---|---|---|\n' \
    "$(date -u +%F)" "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || uname -m)" \
    >"$out/summary.md"

if [[ -n $tests ]]; then
    # Tests compile kernels most of the time: as many at once as there are processors, if they can.
    spread=$(python3 -c 'import xdist' 2>/dev/null && echo '-n auto')
    eval "step tests 240 python3 -m pytest -q -W default $spread $tests"
    cp "$out/tests.out" "$out/tests.txt"
    rm -f "$out/tests.json"
fi
kernels=(bench kernels --device "$device" --dtype "$dtype" --rows "$rows")
kernels+=(--seconds "${SECONDS_EACH:-0.05}")
engine=(bench engine --device "$device" --dtype "$dtype" --batch "$rows" --exit-trace 0.6)
engine+=(--hold throughput --tokens "${TOKENS:-64}" --exit-vocab "${EXIT_VOCAB:-8192}")

step "kernels-$large" 120 "${offramp[@]}" "${kernels[@]}" \
    --model-shape "$large" --markdown "$out/kernels-$large.md"
step "engine-$large" 180 "${offramp[@]}" "${engine[@]}" \
    --model-shape "$large" --markdown "$out/engine-$large.md"
step "engine-$small" 100 "${offramp[@]}" "${engine[@]}" \
    --model-shape "$small" --markdown "$out/engine-$small.md"
if [[ -n $model ]]; then
    case $dtype in bf16) full=bfloat16 ;; fp16) full=float16 ;; *) full=float32 ;; esac
    step real-weights 120 "${offramp[@]}" bench --model "$model" --device "$device" --dtype "$full" \
        --modes off,adaptive --concurrency "$rows" --rounds 2 --max-tokens "${TOKENS:-64}" \
        --peer transformers-batching --noisy
    cp "$out/real-weights.out" "$out/real-weights.md"
fi
rm -f "$out"/*.out
cat "$out/summary.md"
exit "$failed"
