"""`os-train demo`: the tutorial's first stage on a real small model and built-in problems, with no GPU and no hub."""

import os
from pathlib import Path

from rich.console import Console

from opensloth import log
from opensloth.config.base import resolve
from opensloth.config.jobs import EvalJob, TrainSftJob

MODEL, DATA, TEMPLATE = "sample:smollm2", "sample:arithmetic", "reasoning"
HELD_OUT = 50  # problems
MAX_NEW = 80  # tokens of an answer; a solution of the training data has at most 75

# A learning rate that is high for a small model and a short run: the format is there after about twenty steps.
RECIPE = {"tokens_per_step": 1024, "max_steps": 32, "lr": 1e-3, "lr_scheduler": "cosine", "max_seq_length": 256}


def run(output: Path, samples: int | None, max_steps: int | None, processes: int | None) -> None:
    """Train an adapter, and let it and the base model answer the same problems."""
    from opensloth.cli.eval import table
    from opensloth.cli.two_in_one import start_sft
    from opensloth.evaluation.compare import compare

    adapter = output / "sft"
    asked = {"samples": samples, "max_steps": max_steps, "processes": processes}
    job = {"input": DATA, "model": MODEL, "chat_template": TEMPLATE, "output": adapter, "save_steps": 20, **RECIPE}
    log.say(f"1/2  SFT of {MODEL} on {DATA}: the model learns the form of an answer")
    start_sft(resolve(TrainSftJob, job | {name: value for name, value in asked.items() if value is not None}))
    log.say(f"2/2  the base model and the adapter answer {HELD_OUT} problems that neither has seen")
    evaluation = {"input": DATA, "model": [MODEL, str(adapter)], "samples": HELD_OUT, "max_new": MAX_NEW}
    found = compare(resolve(EvalJob, evaluation).job)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(found.reports, len(found.problems)))
    console.print(f"adapter      {os.path.relpath(adapter)}")
    console.print(f"TensorBoard  tensorboard --logdir {os.path.relpath(adapter / 'tensorboard')}")
