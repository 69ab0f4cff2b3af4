"""The arithmetic of a run, made once and printed once: steps, packs, processes, memory."""

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opensloth.config.run import TrainOptions
from opensloth.data.schedule import Schedule
from opensloth.engine import Engine, memory


@dataclass(frozen=True)
class MemoryPlan:
    """Tokens that go through the model at once, and what is recomputed in the backward pass."""

    pack_tokens: int
    checkpointing: str


def choose(engine: Engine, options: TrainOptions, device: torch.device, longest: int) -> MemoryPlan:
    """The same plan on every process: the smallest that any of them has memory for."""
    checkpointing = options.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = "none"
    config = engine.model.config
    tokens = memory.pack_tokens(config, options, device, longest, engine.dtype)
    if dist.is_initialized():
        agreed = torch.tensor(tokens, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        tokens = int(agreed)
    return MemoryPlan(max(tokens, longest), checkpointing)


def describe(plan: Schedule, chosen: MemoryPlan, processes: int) -> list[str]:
    """The batch arithmetic in two lines."""
    tokens = [plan.tokens(step) for step in range(len(plan.steps))]
    rows = [len(step) for step in plan.steps]
    micro = [len(plan.micro_batches(step, chosen.pack_tokens, processes)[0]) for step in range(min(50, len(rows)))]
    return [
        f"{len(tokens):,} optimizer steps of about {statistics.mean(tokens):,.0f} tokens "
        f"({statistics.mean(rows):.1f} rows), {plan.epoch[-1]:.2f} epochs, {sum(tokens):,} tokens in all",
        f"a step is {statistics.mean(micro):.1f} micro-batches of up to {chosen.pack_tokens:,} tokens "
        f"on each of {processes} process{'es' if processes > 1 else ''}; checkpointing: {chosen.checkpointing}",
    ]
