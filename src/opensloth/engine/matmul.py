"""Matmuls of frozen bases and small adapters: sums that are added as they are written, weights that are made anew."""

from collections.abc import Iterable
from typing import Any

import torch


def dense(weight: Any, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A layer's frozen weights (out, in) as numbers: of a base in 4 bits made anew whenever they are wanted.

    Args:
        state: bitsandbytes' account of how they are quantized; None where they are numbers already.
    """
    if state is None:
        found: torch.Tensor = weight
        return found
    from bitsandbytes.functional import dequantize_4bit

    found = dequantize_4bit(weight.data, state).to(dtype)
    return found


def in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right, rounded once. On a card the matmul writes fp32 itself; elsewhere torch has none that does."""
    if left.is_cuda and left.dtype != torch.float32 and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def products(
    lefts: Iterable[torch.Tensor], rights: Iterable[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of left right and the bias: what one matmul made, the next adds to as it writes.

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
        if out is None:
            out = left @ right if bias is None else torch.addmm(bias, left, right)
        else:
            out.addmm_(left, right)
    assert out is not None, "a sum of nothing"
    return out


products_as_one = torch.library.custom_op(
    "opensloth::products",
    products_in_place,
    mutates_args=(),
    schema="(Tensor[] lefts, Tensor[] rights, Tensor? bias) -> Tensor",
)
products_as_one.register_fake(lambda lefts, rights, _: lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1]))
