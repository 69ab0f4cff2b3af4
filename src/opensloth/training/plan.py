"""The arithmetic of a run, made once and printed once: steps, packs, processes, memory."""

import os
import statistics
from dataclasses import replace

import torch

from opensloth.config.run import GrpoOptions, TrainOptions
from opensloth.data.plan.batches import Batches
from opensloth.data.plan.schedule import Schedule
from opensloth.engine import Engine, memory
from opensloth.engine.memory import MemoryPlan
from opensloth.launch.launcher import HALVINGS
from opensloth.training.everyone import of_all


def choose(
    engine: Engine,
    options: TrainOptions,
    device: torch.device,
    longest: int,
    kept: int = 0,
    step: int | None = None,
    may_record: bool = False,
) -> MemoryPlan:
    """The same plan on every process: the one that needs the least memory of those that they chose.

    `longest`, `kept`, `step` and `may_record` as memory.plan has them. Each time that a card ran out of memory
    halves the packs.
    """
    config, dtype, means = engine.model.config, engine.dtype, engine.means
    mine = memory.plan(config, options, device, longest, dtype, kept, means, step, may_record)
    mine = replace(mine, pack_tokens=max(mine.pack_tokens >> halvings(), longest))
    plans = of_all(mine)
    modes = ("none", "selective", "full")
    return MemoryPlan(min(p.pack_tokens for p in plans), max((p.checkpointing for p in plans), key=modes.index))


def halvings() -> int:
    """How often packs were too large for a card."""
    return int(os.environ.get(HALVINGS, "0"))


def describe(plan: Schedule, chosen: MemoryPlan, processes: int) -> list[str]:
    """The batch arithmetic in two lines."""
    tokens = plan.step_tokens
    rows = [len(step) for step in plan.steps]
    size = f"{chosen.pack_tokens:,} tokens" if plan.batch_size is None else f"{plan.batch_size:,} rows"
    micro = [len(plan.micro_batches(step, chosen.pack_tokens, processes)[0]) for step in range(min(50, len(rows)))]
    return [
        f"{len(tokens):,} optimizer steps of about {statistics.mean(tokens):,.0f} tokens "
        f"({statistics.mean(rows):.1f} rows), {plan.epoch[-1]:.2f} epochs, {sum(tokens):,} tokens in all",
        f"a step is {statistics.mean(micro):.1f} micro-batches of up to {size} "
        f"on each of {processes} process{'es' if processes > 1 else ''}; checkpointing: {chosen.checkpointing}",
    ]


def describe_batches(laid_out: Batches, options: GrpoOptions, chosen: MemoryPlan, processes: int) -> list[str]:
    """The batch arithmetic of GRPO in two lines."""
    prompts, group = options.prompts_per_step, options.group_size
    size = f"{chosen.pack_tokens:,} tokens" if options.batch_size is None else f"{options.batch_size:,} completions"
    updates = f", {laid_out.updates} updates on each batch" if laid_out.updates > 1 else ""
    return [
        f"{laid_out.steps:,} optimizer steps{updates}, {laid_out.epoch[-1]:.2f} epochs; a batch is {prompts} prompts x "
        f"{group} = {prompts * group} completions of at most {options.max_new} tokens",
        f"each of {processes} process{'es' if processes > 1 else ''} completes {prompts // processes} prompts and "
        f"trains on micro-batches of up to {size}; checkpointing: {chosen.checkpointing}",
    ]
