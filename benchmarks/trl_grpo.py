"""TRL's own GRPO trainer on the job of an `os-grpo` run: its rewards, prompts in their order, seed, steps and settings.

usage: python benchmarks/trl_grpo.py RUN OUTPUT STEPS    (RUN is the directory of the os-grpo run)

Nothing of ours takes part but the rewards and the prompts: TRL renders them with the adapter's chat template,
generates, pads and trains as it does for anybody. Stopped (SIGTERM), it goes on from its last checkpoint.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from opensloth import rewards
from opensloth.config.jobs import GrpoJob
from opensloth.data.plan.batches import lay_out
from opensloth.data.prepared.directory import open_prepared
from opensloth.training.trl_args import scale_rewards

MICRO_BATCH = 64  # completions


def main() -> None:
    run, output, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    record = json.loads((run / "job.json").read_text())
    job = GrpoJob.model_validate({name: entry["value"] for name, entry in record["settings"].items()})
    prepared = open_prepared(Path(record["data"]["directory"]))
    seed = int(prepared.manifest.options["seed"] if job.seed is None else job.seed)
    plan = lay_out(prepared, job, seed=seed, processes=1)
    rows = [prepared.rows.prompt(int(row)) for batch in plan.batches[:steps] for row in batch]
    data = Dataset.from_list([{"prompt": row.messages, "answer": row.answer} for row in rows])
    adapter = record["model"]["adapter"]
    on_gpu = torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(
        record["model"]["base"], dtype=torch.bfloat16, device_map={"": "cuda:0" if on_gpu else "cpu"}
    )
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    completions = job.prompts_per_step * job.group_size
    micro = min(MICRO_BATCH, completions)
    judges = rewards.task(job.task, tags=prepared.contract.tags, print_every=0)
    settings = GRPOConfig(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=completions // micro,
        num_generations=job.group_size,
        max_completion_length=job.max_new,
        temperature=job.temperature,
        beta=job.beta,
        epsilon=job.clip,
        loss_type=job.loss,
        scale_rewards=scale_rewards(job),
        learning_rate=job.lr,
        lr_scheduler_type=job.lr_scheduler,
        warmup_steps=int(job.warmup_steps),
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=False,  # the weights are bfloat16 already, the adapter float32, as in our run
        gradient_checkpointing=False,
        shuffle_dataset=False,
        seed=seed,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_steps=10,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[judge.function for judge in judges],
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(adapter, padding_side="left"),
    )
    begun = any((output / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun or None)
    model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)
    prepared.contract.save(output / "prompt.json")


if __name__ == "__main__":
    main()
