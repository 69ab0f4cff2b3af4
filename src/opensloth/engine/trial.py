"""What recordings of passes (engine/graphed.py) are tried on, and how far they are from the model itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Of the length of each gradient. Attention's backward sums in no fixed order, and in 16 bits a last digit that differs
# becomes another rounding in every layer below. Passes that read another pack's rows are as far apart as the gradients
# are long.
TOLERANCE = 0.25
NOISE = 1e-3  # of the longest gradient: shorter ones may be rounding and nothing else


def is_telling(inputs: Mapping[str, Any]) -> bool:
    """Whether a trial on this pack tells something: one token again and again is attended to alike by all."""
    ids = inputs["input_ids"]
    return bool((ids != ids[0, 0]).any())


def with_other_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of the same shape: the tokens are others, and the boundaries between rows lie one token before."""

    def other(name: str, value: Any) -> Any:
        if name == "input_ids":
            return value.roll(1, 1)
        if name.startswith("cu_seq_lens"):
            return torch.where(value < value[-1], (value - 1).clamp(min=0), value)
        return value

    return {name: other(name, value) for name, value in inputs.items()}


def uneven(like: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Numbers between -1 and 1, other ones for each token, but 0 for what fills a pack up, and for each token of its
    kind: in a model whose padding is embedded as zeros, every norm makes the gradient of it a thousand times larger.

    Random numbers would change those that the run draws.
    """
    numbers = torch.arange(like.numel(), device=like.device, dtype=torch.float32).sin_().view_as(like)
    return (numbers * (ids != ids[0, -1])[..., None]).to(like.dtype)


def farthest(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest length of a difference, over the length of what is wanted. The first of each are hidden states, the
    others gradients, of which one that is short beside the longest counts as long as NOISE makes it."""
    apart = torch.stack([length(one - other) for one, other in zip(found, wanted, strict=True)])
    long = torch.stack([length(one) for one in wanted])
    long[1:] = long[1:].clamp(min=NOISE * float(long[1:].max()))
    return float((apart / long).max())


def length(numbers: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(numbers, dtype=torch.float32)
    return found
