#!/usr/bin/env bash
# Stage 2, preparation: problems with known answers become prompts in the format that stage 1 taught.
# Environment: SFT_MODEL (the adapter of stage 1), GRPO_DATASET, GRPO_SAMPLES (rows; default all), GPU_COUNT (shards; default 1). More os-data options may follow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v os-data >/dev/null || PATH="$PWD/.venv/bin:$PATH"

dataset="${GRPO_DATASET:-open-r1/DAPO-Math-17k-Processed}"
[ "$dataset" != open-r1/DAPO-Math-17k-Processed ] || set -- --subset en "$@"

os-data "$dataset" \
    --method grpo \
    --model "${SFT_MODEL:-outputs/sft_qwen_reasoning_model}" \
    --chat-template reasoning \
    --output data/grpo_dapo_prepared \
    --gpus "${GPU_COUNT:-1}" \
    ${GRPO_SAMPLES:+--samples "$GRPO_SAMPLES"} \
    "$@"
