#!/usr/bin/env bash
# Tunes the backbone for its exits and trains the exits on it; meant for a machine with a GPU.
#
#   bench/train_gpu.sh OUT.safetensors WORK_FOLDER EXIT_LAYERS PROMPTS...
#
# The last line of the output is the metrics as JSON; OUT and its deltas lie beside each other. A run
# that was cut short goes on in WORK_FOLDER when called again with the same arguments.
#
# From the environment: OFFRAMP (the command), MODEL, MINUTES of tuning (answers before it and heads
# after it take their own time), SOURCE (--answers if the files hold answers, not prompts), and EXTRA
# (more options of `offramp exits train`, which win over those here).
set -euo pipefail

if (($# < 4)); then
    sed -n '2,4p' "$0" >&2
    exit 2
fi
out=$1 work=$2 layers=$3
shift 3
read -ra extra <<<"${EXTRA:-}"

"${OFFRAMP:-offramp}" exits train \
    --model "${MODEL:-smollm2-135m}" --out "$out" --work "$work" --exit-layers "$layers" \
    "${SOURCE:---prompts}" "$@" --concurrency 256 --max-tokens 192 \
    --backbone tuned --minutes "${MINUTES:-8}" --tune-epochs 50 \
    ${extra[@]+"${extra[@]}"}
