#!/usr/bin/env bash
# Stage 1 in one script: what 00_prepare_sft_dataset.sh and 01_train_sft.sh do, with one opensloth command.
# Environment: MODEL, SFT_DATASET, SFT_SAMPLES, GPU_COUNT, MAX_STEPS, OUTPUT as there. More os-train sft options may follow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v os-train >/dev/null || PATH="$PWD/.venv/bin:$PATH"

python3 grpo_tutorial/scripts/prepare_sft_data.py

os-train sft grpo_tutorial/data/sft_openmath_raw.jsonl \
    --model "${MODEL:-unsloth/Qwen3-4B-Base}" \
    --chat-template reasoning \
    --output "${OUTPUT:-outputs/sft_qwen_reasoning_model}" \
    --gpus "${GPU_COUNT:-auto}" \
    ${MAX_STEPS:+--max-steps "$MAX_STEPS"} \
    "$@"
