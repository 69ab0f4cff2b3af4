"""Before the first step: does the largest micro-batch fit into the card's memory? If not, half of it, on all processes.

The plan of engine/memory.py goes by rule; kernels, other programs on the card and unusual models may need more. What a
step trains on does not depend on the size of its packs, so a smaller one costs time and changes nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from opensloth import log
from opensloth.engine import Engine
from opensloth.engine.compiled import eager
from opensloth.engine.lora import trainable
from opensloth.engine.memory import MemoryPlan
from opensloth.errors import WorkerFailed
from opensloth.training.everyone import of_all
from opensloth.training.trl_args import CHECKPOINTING

MOMENTS = 8  # bytes for each parameter that trains: two of fp32

Attempt = Callable[[int], torch.Tensor]
"""The loss of a micro-batch of at most so many tokens, the largest there can be, ready for its backward pass."""


def rehearse(
    engine: Engine, plan: MemoryPlan, longest: int, device: torch.device, attempt: Attempt, kept: int = 0
) -> int:
    """Tokens of a pack that fit: those of the plan, or half of them as often as needed. Only cards run out so.

    Args:
        longest: tokens of the longest row, which must fit in any case.
        kept: bytes that something else will take; so will the optimizer's moments. Both are held meanwhile.
    Raises:
        WorkerFailed: not even the longest row fits.
    """
    if device.type != "cuda":
        return plan.pack_tokens
    model: Any = engine.model
    if plan.checkpointing != "none":  # the trainer does so too, later
        model.gradient_checkpointing_enable(CHECKPOINTING[plan.checkpointing])
    model.train()
    kept += MOMENTS * sum(parameter.numel() for parameter in trainable(model).values())

    def fits(tokens: int) -> bool:
        try:
            held = torch.empty(kept, dtype=torch.uint8, device=device)
            with eager(), torch.autocast(device.type, engine.dtype, enabled=engine.autocast):
                loss = attempt(tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            del held
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)

    tokens = largest_that_fits(plan.pack_tokens, longest, fits)
    torch.cuda.empty_cache()
    if tokens < plan.pack_tokens and (not dist.is_initialized() or dist.get_rank() == 0):
        log.say(f"packs of {plan.pack_tokens:,} tokens do not fit into memory: {tokens:,} instead")
    return tokens


def largest_that_fits(tokens: int, smallest: int, fits: Callable[[int], bool]) -> int:
    """`tokens`, its half, its quarter ... until it fits on all processes. Raises WorkerFailed below `smallest`."""
    while not all(of_all(fits(tokens))):
        if tokens <= smallest:
            raise WorkerFailed(
                f"Out of GPU memory: not even one row of {smallest:,} tokens fits.",
                "Try a smaller --max-seq-length or --max-new, --gradient-checkpointing full, or --load-in-4bit.",
            )
        tokens = max(tokens // 2, smallest)
    return tokens
