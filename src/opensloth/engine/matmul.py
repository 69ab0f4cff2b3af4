"""Matmuls of frozen bases and small adapters: sums that are added as they are written, weights that are made anew."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from opensloth.hardware import TRITON

TOLERANCE = 0.01  # of the largest weight: one rounding in 16 bits


def by_bitsandbytes(weight: Any, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    found: torch.Tensor = dequantize_4bit(weight.data, state)
    return found


from_four_bits: Callable[[Any, Any], torch.Tensor] = by_bitsandbytes
"""What makes numbers of weights in 4 bits: bitsandbytes, or what `use_kernel` has put in its place for the process."""


def use_kernel(model: nn.Module) -> str:
    """Use our own kernel (engine/nf4.py) for a base in 4 bits on a card, if it makes the same numbers of the first
    layer. Returns the choice and its reason, in words."""
    global from_four_bits
    from_four_bits = by_bitsandbytes
    weights = (getattr(module, "weight", None) for module in model.modules())
    first = next((one for one in weights if getattr(one, "quant_state", None) is not None), None)
    if first is None or not (first.is_cuda and TRITON):
        return "bitsandbytes': ours runs on a card with Triton"
    from opensloth.engine import nf4

    if not nf4.serves(first.quant_state):
        return "bitsandbytes': ours is for nf4"
    theirs = by_bitsandbytes(first, first.quant_state).float()
    apart = (nf4.numbers(first, first.quant_state).float() - theirs).abs().max()
    if not bool(apart <= TOLERANCE * theirs.abs().max()):
        return f"bitsandbytes': ours is {float(apart):.3g} off in a trial"
    from_four_bits = nf4.numbers
    return "ours, which makes the same numbers as bitsandbytes in a trial"


def dense(weight: Any, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A layer's frozen weights (out, in) as numbers: of a base in 4 bits made anew whenever they are wanted.

    Args:
        state: bitsandbytes' account of how they are quantized; None where they are numbers already.
    """
    if state is None:
        found: torch.Tensor = weight
        return found
    return from_four_bits(weight, state).to(dtype)


def in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right, rounded once. On a card the matmul writes fp32 itself; elsewhere torch has none that does."""
    if left.is_cuda and left.dtype != torch.float32 and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def products(
    lefts: Iterable[torch.Tensor], rights: Iterable[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of left right and the bias: what one matmul made, the next adds to before it rounds. What is small comes
    first: it would be rounded away from what is large.

    The compiler makes everything functional, and would copy all activations before each sum: for it this is one
    operator that it does not look into. Elsewhere a generator's next matrix is made once the one before was used.
    """
    if torch.compiler.is_compiling():
        found: torch.Tensor = products_as_one(list(lefts), list(rights), bias)
        return found
    return products_in_place(lefts, rights, bias)


def products_in_place(
    lefts: Iterable[torch.Tensor], rights: Iterable[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    out: torch.Tensor | None = None
    for left, right in zip(lefts, rights, strict=True):
        out = left @ right if out is None else out.addmm_(left, right)
    assert out is not None, "a sum of nothing"
    return out if bias is None else out.add_(bias)


products_as_one = torch.library.custom_op(
    "opensloth::products",
    products_in_place,
    mutates_args=(),
    schema="(Tensor[] lefts, Tensor[] rights, Tensor? bias) -> Tensor",
)
products_as_one.register_fake(lambda lefts, rights, _: lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1]))
