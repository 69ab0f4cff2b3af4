"""`os-train demo`: the tutorial's first stage on a real small model and built-in problems, with no GPU and no hub."""

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from opensloth import log
from opensloth.config.base import resolve
from opensloth.config.jobs import TrainSftJob

if TYPE_CHECKING:
    from opensloth.data.messages.examples import Example
    from opensloth.evaluation.score import Score

MODEL, DATA, TEMPLATE = "sample:smollm2", "sample:arithmetic", "reasoning"
HELD_OUT = 50  # problems
MAX_NEW = 80  # tokens of an answer; a solution of the training data has at most 75

# A learning rate that is high for a small model and a short run: the format is there after about twenty steps.
RECIPE = {"tokens_per_step": 1024, "max_steps": 60, "lr": 1e-3, "lr_scheduler": "cosine", "max_seq_length": 256}


def run(output: Path, samples: int | None, max_steps: int | None, processes: int | None) -> None:
    """Score the base model, train an adapter, score it, and show both."""
    from opensloth.cli.two_in_one import start_sft
    from opensloth.data.models.resolve import load_tokenizer, resolve_model
    from opensloth.data.prompt.choose import contract_for
    from opensloth.evaluation.score import score_model

    adapter = output / "sft"
    asked = {"samples": samples, "max_steps": max_steps, "processes": processes}
    job = {"input": DATA, "model": MODEL, "chat_template": TEMPLATE, "output": adapter, "save_steps": 20, **RECIPE}
    contract = contract_for(load_tokenizer(resolve_model(MODEL)), TEMPLATE)
    examples = held_out()
    log.say(f"1/3  {HELD_OUT} held-out problems to {MODEL} as it is")
    scores = {"base": score_model(MODEL, contract, examples, max_new=MAX_NEW)}
    log.say(f"2/3  SFT on {DATA}: the model learns the form of an answer")
    start_sft(resolve(TrainSftJob, job | {name: value for name, value in asked.items() if value is not None}))
    log.say("3/3  the same problems to the adapter")
    scores["SFT"] = score_model(str(adapter), contract, examples, max_new=MAX_NEW)
    show(scores, adapter)


def held_out() -> "list[Example]":
    from opensloth.data.messages.examples import detect_format
    from opensloth.data.sources.arithmetic import arithmetic

    rows = list(islice(arithmetic("test"), HELD_OUT))
    row_format = detect_format(list(rows[0]), {})
    return [row_format.example(row) for row in rows]


def show(scores: "dict[str, Score]", adapter: Path) -> None:
    table = Table(title=f"{HELD_OUT} held-out problems", title_justify="left")
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    table.add_row("answers in the format", *(f"{score.format_rate:.0%}" for score in scores.values()))
    table.add_row("right answers", *(f"{score.accuracy:.0%}" for score in scores.values()))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"adapter      {os.path.relpath(adapter)}")
    console.print(f"TensorBoard  tensorboard --logdir {os.path.relpath(adapter / 'tensorboard')}")
