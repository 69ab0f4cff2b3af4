"""GRPO steps of Unsloth or TRL on the prompts of benchmarks/grpo.py, and the time of generation within them.

usage: python benchmarks/peers/train_grpo.py JOB.json    (as benchmarks/series.py writes it)

Nothing of ours takes part but the prompts and the reward. A setting is the way of generation and the size of the
batches that train; the rollouts are timed in the steps of the first.
"""

import importlib
import importlib.util
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_sft import go_on_with, lacks_unsloth, load, load_with_unsloth, xformers

import machine
from series import Outcome, await_turn, keep_measured

WARM_UP = 3  # steps that do not count: Unsloth still compiles in its third
ENOUGH_SECONDS = 15  # of measured steps; no more are done then
GENERATION = ("_generate_single_turn", "_generate")  # TRL's method that makes the completions, the inner one first


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if lacks_unsloth(job):
        return
    _ = importlib.import_module("trl").GRPOTrainer  # it loads what it names when it is asked for
    await_turn(job)
    steps = [point for point in job["points"] if point["what"] == "step"]
    rollouts = [point for point in job["points"] if point["what"] == "rollout"]
    tried: set[str] = set()
    for point in steps or rollouts:
        beside = [one for one in rollouts if one["micro"] == point["micro"]]
        together = list({one["name"]: one for one in (point, *beside)}.values())
        names = [one["name"] for one in together]
        tried |= set(names)

        def outcomes(point: dict[str, Any] = point, together: list[dict[str, Any]] = together) -> list[Outcome]:
            step, rollout = measure(job, point)
            generated = {"row": rollout} if rollout["seconds"] else {"failed": "its generation was not seen"}
            return [{"row": step} if one["what"] == "step" else generated for one in together]

        keep_measured(Path(job["found"]), names, outcomes)
        go_on_with(job, [one for one in job["points"] if one["name"] not in tried])


def measure(job: dict[str, Any], point: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds and tokens of a step after the warm-up, and of the generation in it: of the one in the middle, by time.

    A library that compiles once more in one of them does not lose by it.
    """
    import torch

    unsloth, on_card = point["impl"] == "unsloth", torch.cuda.is_available()
    # with checkpointing, as both libraries do unless told otherwise
    asked = {**point, "checkpointing": on_card, "bits": 16}
    told = {**job, "longest": 2048}
    model, tokenizer = load_with_unsloth(told, asked) if unsloth else load(told, asked)
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    trainer, clock = make_trainer(job, point, model, tokenizer)
    trainer.train()
    each = [end - begin for begin, end in pairwise(clock.ends[WARM_UP - 1 :])]
    seconds = statistics.median_low(each)
    place = WARM_UP + each.index(seconds)
    tokens, generation = clock.tokens[place], clock.generation[place]
    common = {
        "peak_gib": machine.peak_gib(),
        "steps": len(each),
        "seconds_of_each": [round(one, 3) for one in each],
        "micro_batch": point["micro"],
        **({"xformers": xformers()} if unsloth else {}),
    }
    step = {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
    rollout = {"seconds": round(generation, 4), "tokens_per_second": round(tokens / (generation or 1.0), 1)}
    return {**step, "seconds_rollout": round(generation, 4), **common}, {**rollout, **common}


def make_trainer(job: dict[str, Any], point: dict[str, Any], model: Any, tokenizer: Any) -> tuple[Any, "Clock"]:
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    on_card = torch.cuda.is_available()
    tokenizer.padding_side = "left"
    paged = {"use_transformers_continuous_batching": True} if point["by"] == "continuous batching" else {}
    settings = GRPOConfig(
        output_dir=str(Path(job["found"]).parent / "runs" / "peer"),
        max_steps=point["steps"],
        per_device_train_batch_size=point["micro"],
        gradient_accumulation_steps=point["completions"] // point["micro"],
        num_generations=point["group"],
        max_completion_length=point["new_tokens"],
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-5,
        optim="adamw_torch_fused" if on_card else "adamw_torch",
        gradient_checkpointing=on_card,
        bf16=on_card,
        use_cpu=not on_card,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **paged,
    )
    clock = Clock()
    spread = load_reward(job["reward"])

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.made += sum(map(len, completion_ids))
        return spread(completions)

    class OnStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= clock.step()

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[reward],
        train_dataset=prompts(Path(job["data"]), tokenizer),
        args=settings,
        callbacks=[OnStep()],
    )
    name = next(name for name in GENERATION if hasattr(trainer, name))
    setattr(trainer, name, clock.timed(getattr(trainer, name)))
    return trainer, clock


def prompts(directory: Path, tokenizer: Any) -> Any:
    """The prompts as texts, which the tokenizer turns into the same ids again."""
    from datasets import Dataset, load_from_disk

    rows = load_from_disk(str(directory / "rows"))["input_ids"]
    texts = [tokenizer.decode(ids) for ids in rows]
    assert tokenizer(texts)["input_ids"] == list(rows), "the tokenizer reads other prompts from its own texts"
    return Dataset.from_dict({"prompt": texts})


def load_reward(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.spread


class Clock:
    """Of each step: when it ended, the tokens that were made in it, the seconds of making them."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.generation: list[float] = []
        self.made = 0
        self.making = 0.0

    def timed(self, generate: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            begin = now()
            made = generate(*arguments, **named)
            self.making += now() - begin
            return made

        return run

    def step(self) -> bool:
        """Note the end of a step. Returns whether enough was measured."""
        self.ends.append(now())
        self.tokens.append(self.made)
        self.generation.append(self.making)
        self.made, self.making = 0, 0.0
        measured = self.ends[WARM_UP - 1 :]
        return len(measured) > 1 and measured[-1] - measured[0] > ENOUGH_SECONDS


def now() -> float:
    """Once the card has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    main()
