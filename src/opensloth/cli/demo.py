"""`os-train demo`: the two stages of the tutorial on a real small model and built-in problems: no GPU, no hub."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from opensloth import log
from opensloth.config.base import resolve
from opensloth.config.jobs import EvalJob, TrainGrpoJob, TrainSftJob

MODEL, DATA, TEMPLATE = "sample:smollm2", "sample:arithmetic", "reasoning"
HELD_OUT = 100  # problems
MAX_NEW = 64  # tokens of an answer; nearly all solutions of the training data have fewer

# A learning rate that is high for a small model and a short run: the format is there after about twenty steps. More
# would make the model surer of what it does, right or wrong, and leave GRPO less to choose from.
SFT: dict[str, Any] = {
    "chat_template": TEMPLATE,
    "tokens_per_step": 1024,
    "max_steps": 28,
    "lr": 1e-3,
    "lr_scheduler": "cosine",
    "max_seq_length": 256,
    "save_steps": 14,
}
GRPO: dict[str, Any] = {
    "samples": 2000,
    "prompts_per_step": 4,
    "group_size": 8,
    "max_steps": 20,
    "max_new": MAX_NEW,
    "lr": 1e-4,
    "save_steps": 10,
    "print_samples_every": 10,
}


def run(output: Path, samples: int | None, max_steps: int | None, processes: int | None) -> None:
    """Train an adapter in two stages, and let the base model and both adapters answer the same problems.

    Args:
        samples, max_steps: of each stage, instead of the recipe's.
    """
    from opensloth.cli.eval import table
    from opensloth.cli.two_in_one import start_grpo, start_sft
    from opensloth.evaluation.asked import asked
    from opensloth.evaluation.compare import compare

    sft, grpo = output / "sft", output / "grpo"
    changed = {"samples": samples, "max_steps": max_steps, "processes": processes}
    given = {"input": DATA} | {name: value for name, value in changed.items() if value is not None}
    log.say(f"1/3  SFT of {MODEL} on {DATA}: the model learns the form of an answer")
    start_sft(resolve(TrainSftJob, SFT | given | {"model": MODEL, "output": sft}))
    log.say("2/3  GRPO from that adapter: the model tries, and what is rewarded becomes likelier")
    start_grpo(resolve(TrainGrpoJob, GRPO | given | {"model": str(sft), "output": grpo}))
    log.say(f"3/3  the base model and both adapters answer {HELD_OUT} problems that none of them has seen")
    models = [MODEL, str(sft), str(grpo)]
    job = resolve(EvalJob, {"input": DATA, "model": models, "samples": HELD_OUT, "max_new": MAX_NEW}).job
    found = compare(job, asked(job))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(found.reports, len(found.problems)))
    console.print(f"adapter      {os.path.relpath(grpo)}")
    console.print(f"TensorBoard  tensorboard --logdir {os.path.relpath(output)}")
