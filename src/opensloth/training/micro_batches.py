"""A batch of completions, cut into what goes through the model at once; and what each part's loss weighs."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from opensloth.data.plan.schedule import padded_batches
from opensloth.data.plan.shards import deal_step

Micro = tuple[list[int], float]  # places of completions, and the weight of their loss


def cut(lengths: NDArray[np.int64], *, pack_tokens: int, batch_size: int | None, packs: bool) -> list[list[int]]:
    """Micro-batches of whole completions, by their places in `lengths`.

    Args:
        lengths: tokens of each prompt with its completion.
        pack_tokens, batch_size: the size of a micro-batch, in tokens, or in completions where that is set.
        packs: False where rows are padded to the longest of a micro-batch.
    """
    if batch_size is not None:
        return [
            list(range(start, min(start + batch_size, len(lengths)))) for start in range(0, len(lengths), batch_size)
        ]
    if packs:
        return deal_step(range(len(lengths)), lengths, pack_tokens, 1)[0]
    return padded_batches(np.arange(len(lengths)), lengths, pack_tokens)


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
    if dist.is_initialized():
        counts = [0] * dist.get_world_size()
        dist.all_gather_object(counts, len(micro))
        micro += [([0], 0.0)] * (max(counts) - len(micro))
    return micro


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
