"""A batch of completions, cut into what goes through the model at once; and what each part's loss weighs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from opensloth.data.plan.schedule import padded_batches
from opensloth.training.load import Load

Sizes = NDArray[np.int64]
Micro = tuple[list[int], float]  # places of completions, and the weight of their loss


def cut(
    prompts: Sizes,
    completions: Sizes,
    *,
    group: int,
    pack_tokens: int,
    batch_size: int | None,
    packs: bool,
) -> list[list[int]]:
    """Micro-batches of whole completions, by their places.

    Args:
        prompts, completions: tokens of each; `group` completions that follow each other have the same prompt.
        pack_tokens, batch_size: the size of a micro-batch, in tokens, or in completions where that is set.
        packs: False where rows are padded to the longest of a micro-batch.
    """
    places = list(range(len(prompts)))
    if batch_size is not None:
        return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    if not packs:
        return padded_batches(np.array(places), prompts + completions, pack_tokens)
    parts: list[list[int]] = []
    room = 0
    for place in places:
        new_prompt = not parts or parts[-1][-1] // group != place // group
        cost = int(completions[place] + (prompts[place] if new_prompt else 0))
        if cost > room:  # a prompt is paid for once in each micro-batch that has completions of it
            parts.append([])
            room, cost = pack_tokens, int(prompts[place] + completions[place])
        parts[-1].append(place)
        room -= cost
    return parts


def weighted(parts: Sequence[list[int]], batch: Mapping[str, torch.Tensor], loss: str, processes: int) -> list[Micro]:
    """The parts with what makes TRL's loss of each its share of the mean over all completions.

    TRL averages over the completions ("grpo", "dr_grpo") or the tokens ("bnpo") of a micro-batch; its "dapo" already
    divides by the tokens of the whole batch. DDP then takes the mean over processes.
    """
    mask = batch["completion_mask"]

    def weight(rows: list[int]) -> float:
        if loss == "dapo":
            return 1.0
        if loss == "bnpo":
            return float(mask[rows].sum() * processes / batch["num_items_in_batch"])
        return len(rows) / len(mask)

    return [(rows, weight(rows)) for rows in parts]


AGAIN: Micro = ([0], 0.0)  # processes that lack a micro-batch run a completion of theirs again, with no weight


class Share(NamedTuple):
    """What one process says of its completions before it trains on them.

    Attributes:
        parts: micro-batches.
        again: tokens of `AGAIN`.
        seconds: how long its completions took.
    """

    parts: int
    load: Load
    again: int
    seconds: float

    def with_as_many_as(self, parts: int) -> Load:
        """Its load where it runs so many micro-batches."""
        more = (parts - self.parts) * self.again
        return self.load._replace(slots=self.load.slots + more, room=self.load.room + more)


def load_of(
    parts: Sequence[list[int]], prompts: Sizes, completions: Sizes, *, group: int, pack_tokens: int | None, packs: bool
) -> Load:
    """What the model computes in these micro-batches. `pack_tokens` is None where they are cut by completions."""
    tokens = slots = room = 0
    for places in parts:
        if packs:  # a prompt lies in a pack once, before the first completion of its group
            heads = [place for at, place in enumerate(places) if not at or places[at - 1] // group != place // group]
            real = width = int(completions[places].sum() + prompts[heads].sum())
        else:
            lengths = prompts[places] + completions[places]
            real, width = int(lengths.sum()), len(places) * int(lengths.max())
        tokens, slots, room = tokens + real, slots + width, room + max(width, pack_tokens or 0)
    return Load(tokens, slots, room)


@contextmanager
def gathers_unequal(accelerator: Any, most: int) -> Iterator[None]:
    """While it lasts, `accelerator.gather` takes up to `most` numbers of each process, and fills up with NaN.

    TRL gathers one number a completion for its figures (which leave NaN out), as if the micro-batches of all processes
    had equally many completions.
    """
    gather = accelerator.gather

    def filled_up(numbers: torch.Tensor) -> Any:
        if numbers.dim() == 0:
            return gather(numbers)
        full = numbers.new_full((most,), float("nan"))
        full[: len(numbers)] = numbers
        return gather(full)

    accelerator.gather = filled_up
    try:
        yield
    finally:
        accelerator.gather = gather


class Gaps:
    """How far the trainer's log-probabilities are from those that the rollout drew with. 0 but for rounding."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)  # of the gaps, and how many
        self.most = torch.zeros(1, device=device, dtype=torch.float64)

    def add(self, logps: torch.Tensor, part: dict[str, torch.Tensor]) -> None:
        mask = part["completion_mask"].bool()
        gap = (logps - part["sampling_per_token_logps"]).abs()[mask].double()
        self.sums += torch.stack([gap.sum(), mask.sum().double()])
        self.most = torch.maximum(self.most, gap.max()[None])

    def figures(self) -> dict[str, float]:
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.most, op=dist.ReduceOp.MAX)
        return {"logp_gap/mean": float(self.sums[0] / self.sums[1].clamp(min=1)), "logp_gap/max": float(self.most)}
