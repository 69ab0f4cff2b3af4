#!/usr/bin/env bash
# Stage 2 in one script: what 02_prepare_grpo_dataset.sh and 03_train_grpo.sh do, with one opensloth command.
# Environment: SFT_MODEL, GRPO_DATASET, GRPO_SAMPLES, GPU_COUNT, MAX_STEPS, OUTPUT as there. More os-train grpo options may follow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v os-train >/dev/null || PATH="$PWD/.venv/bin:$PATH"

dataset="${GRPO_DATASET:-open-r1/DAPO-Math-17k-Processed}"
[ "$dataset" != open-r1/DAPO-Math-17k-Processed ] || set -- --subset en "$@"

os-train grpo "$dataset" \
    --task math \
    --model "${SFT_MODEL:-outputs/sft_qwen_reasoning_model}" \
    --chat-template reasoning \
    --output "${OUTPUT:-outputs/grpo_final_model}" \
    --gpus "${GPU_COUNT:-auto}" \
    ${GRPO_SAMPLES:+--samples "$GRPO_SAMPLES"} \
    ${MAX_STEPS:+--max-steps "$MAX_STEPS"} \
    "$@"
