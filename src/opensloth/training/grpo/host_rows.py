"""A batch of completions as the host has it: what packs are laid out from without waiting for the card."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from opensloth.training.grpo.micro_batches import Lengths

NOTHING = torch.empty(0, 0, dtype=torch.long)


class HostRows(NamedTuple):
    """Tokens and mask of completions behind their prompts, both (rows, prompt and completion)."""

    ids: torch.Tensor = NOTHING
    mask: torch.Tensor = NOTHING

    @classmethod
    def of_batch(cls, batch: Mapping[str, torch.Tensor]) -> "HostRows":
        """Of what TRL made of them: in one transfer."""
        parts = [batch[name] for name in ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")]
        both = torch.cat(parts, 1).cpu()
        width = both.shape[1] // 2
        return cls(both[:, :width], both[:, width:])

    def of(self, rows: list[int]) -> "HostRows":
        at = places(rows, self.ids.device)
        return HostRows(self.ids[at], self.mask[at])

    def lengths(self, width: int) -> tuple[Lengths, Lengths]:
        """The tokens of each prompt and of each completion, of which the last `width` columns are."""
        prompts, completions = self.mask[:, :-width].sum(1), self.mask[:, -width:].sum(1)
        return prompts.numpy(), completions.numpy()


def places(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """What takes these rows of a tensor on `device`: a view where they follow each other, as they do in packs."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)
