#!/usr/bin/env bash
# Stage 1, preparation: download and format the worked solutions, then turn them into token rows and packs.
# Environment: MODEL, SFT_DATASET, SFT_SAMPLES (rows; default all), GPU_COUNT (shards; default 1). More os-data options may follow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v os-data >/dev/null || PATH="$PWD/.venv/bin:$PATH"

python3 grpo_tutorial/scripts/prepare_sft_data.py

os-data grpo_tutorial/data/sft_openmath_raw.jsonl \
    --model "${MODEL:-unsloth/Qwen3-4B-Base}" \
    --chat-template reasoning \
    --output data/sft_openmath_prepared \
    --gpus "${GPU_COUNT:-1}" \
    "$@"
