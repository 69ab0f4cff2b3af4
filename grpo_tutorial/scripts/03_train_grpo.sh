#!/usr/bin/env bash
# Stage 2, training: the adapter of stage 1 solves the prepared problems, and what earns more reward becomes likelier.
# Environment: SFT_MODEL (the adapter of stage 1), GPU_COUNT (default: all visible), MAX_STEPS (default: one epoch), OUTPUT. More os-grpo options may follow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v os-grpo >/dev/null || PATH="$PWD/.venv/bin:$PATH"

os-grpo data/grpo_dapo_prepared \
    --task math \
    --model "${SFT_MODEL:-outputs/sft_qwen_reasoning_model}" \
    --output "${OUTPUT:-outputs/grpo_final_model}" \
    --gpus "${GPU_COUNT:-auto}" \
    ${MAX_STEPS:+--max-steps "$MAX_STEPS"} \
    "$@"
