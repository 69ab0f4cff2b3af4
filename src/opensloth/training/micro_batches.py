"""A batch of completions, cut into what goes through the model at once; and what each part's loss weighs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from opensloth.data.plan.schedule import padded_batches
from opensloth.training.everyone import of_all

Micro = tuple[list[int], float]  # places of completions, and the weight of their loss


def cut(
    prompts: NDArray[np.int64],
    completions: NDArray[np.int64],
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
    divides by the tokens of the whole batch. DDP then takes the mean over processes. Every process gets equally many:
    those that lack one run a completion of theirs again, with no weight.
    """
    mask = batch["completion_mask"]

    def weight(rows: list[int]) -> float:
        if loss == "dapo":
            return 1.0
        if loss == "bnpo":
            return float(mask[rows].sum() * processes / batch["num_items_in_batch"])
        return len(rows) / len(mask)

    micro = [(rows, weight(rows)) for rows in parts]
    return micro + [([0], 0.0)] * (max(of_all(len(micro))) - len(micro))


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
