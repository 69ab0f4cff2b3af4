"""The loss of a micro-batch as a sum over trained tokens, so that any division of a step adds up to the same."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100


def pack_loss(model: torch.nn.Module, pack: Mapping[str, Any]) -> torch.Tensor:
    """The summed cross entropy of a pack: `input_ids` of shape (1, tokens), rows one behind the other.

    Logits are made for the tokens before trained ones alone: masked prompts cost nothing in the head.

    Returns:
        A scalar in fp32; 0 (with a graph, so that DDP sees every gradient) for a pack without trained tokens.
    """
    inputs = {name: value for name, value in pack.items() if name != "labels"}
    targets = pack["labels"][0, 1:]
    positions = (targets != IGNORED).nonzero()[:, 0]
    weight = 1.0
    if len(positions) == 0:  # an empty pack of zero weight
        positions, weight = torch.zeros(1, dtype=torch.long, device=targets.device), 0.0
        targets = torch.zeros_like(targets)
    # use_cache=False is what makes packed position ids exact; with a cache, rows would see each other
    logits: torch.Tensor = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return weight * F.cross_entropy(logits[0].float(), targets[positions], reduction="sum")


def padded_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The summed cross entropy of a padded batch: `input_ids` of shape (rows, longest) with an `attention_mask`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    if not bool(kept.any()):
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits[kept].float(), targets[kept], reduction="sum")
