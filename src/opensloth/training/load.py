"""How full and how even the work of a step is: padding, unfilled packs, and processes that wait for the busiest one."""

from collections.abc import Sequence
from typing import NamedTuple


class Load(NamedTuple):
    """What one process puts through the model in one step.

    Attributes:
        tokens: real ones.
        slots: with padding: what the model computes.
        room: with what its micro-batches could have held besides (--pack-tokens each).
    """

    tokens: int
    slots: int
    room: int


def evenness(steps: Sequence[Sequence[Load]]) -> dict[str, float]:
    """Figures of `steps`, each the loads of all processes; none without steps.

    `padding` is the share of the computed tokens that are none, `unfilled` the share of the room that holds none.
    `imbalance` is the tokens of the busiest process over the mean, step by step: nobody leaves a step before it.
    """
    loads = [load for step in steps for load in step]
    tokens, slots, room = (sum(sizes) for sizes in zip(*loads, strict=True)) if loads else (0, 0, 0)
    if not tokens:
        return {}
    mean = sum(sum(load.tokens for load in step) / len(step) for step in steps)
    busiest = sum(max(load.tokens for load in step) for step in steps)
    return {
        "padding": round(1 - tokens / slots, 4),
        "unfilled": round(1 - tokens / room, 4),
        "imbalance": round(busiest / mean, 4),
    }
