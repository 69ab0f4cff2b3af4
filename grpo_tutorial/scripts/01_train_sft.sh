#!/usr/bin/env bash
# Stage 1, training: the prepared data becomes an adapter that writes in the tutorial's format.
# Environment: MODEL (default: the data's), GPU_COUNT (default: all visible), MAX_STEPS (default: one epoch), OUTPUT. More os-sft options may follow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v os-sft >/dev/null || PATH="$PWD/.venv/bin:$PATH"

os-sft data/sft_openmath_prepared \
    ${MODEL:+--model "$MODEL"} \
    --output "${OUTPUT:-outputs/sft_qwen_reasoning_model}" \
    --gpus "${GPU_COUNT:-auto}" \
    ${MAX_STEPS:+--max-steps "$MAX_STEPS"} \
    "$@"
