"""The RMS norm of numbers that do not lie beside each other, in one Triton kernel: torch's own would copy them first.

Where layers that read the same input are one matmul (rollout/merge.py), queries and keys are parts of its output, and
models such as Qwen3 normalize them head by head. It has no gradient. It is imported on a card alone: only CUDA builds
of torch have Triton.
"""

import torch
import triton
import triton.language as tl

WARPS = 4


def normalize(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / rms(x) * weight (arXiv 1910.07467), computed in fp32 and rounded once.

    Args:
        x: (..., heads, size); the numbers of a head lie beside each other.
        weight: (size,).
    Returns:
        As x, contiguous.
    """
    tokens = x.flatten(0, -3)
    count, heads, size = tokens.shape
    out = x.new_empty(x.shape)
    _normalize[(count,)](
        tokens, weight, out, epsilon, heads, size, tokens.stride(0), tokens.stride(1),
        BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(size), num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _normalize(
    x, weight, out, epsilon, heads, size, token_stride, head_stride, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program for each token."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < size)
    value = tl.load(x + token * token_stride + head * head_stride + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.rsqrt(tl.sum(value * value, 1) / size + epsilon)
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    found = value * share[:, None] * scale
    tl.store(out + token * heads * size + head * size + column, found.to(out.dtype.element_ty), mask=inside)
