"""The gate of an MLP in one Triton kernel: silu(gate) * up, read where one matmul has written both (rollout/merge.py).

It is imported on a card alone: only CUDA builds of torch have Triton.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024
WARPS = 4


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202), computed in fp32 and rounded once.

    Args:
        gate, up: (rows, 1, width); the numbers of a row lie beside each other, rows may lie apart.
    Returns:
        As gate, contiguous.
    """
    rows, _, width = gate.shape
    out = gate.new_empty(gate.shape)
    _gate[(rows, triton.cdiv(width, BLOCK))](
        gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=BLOCK, num_warps=WARPS
    )
    return out


@triton.jit
def _gate(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    """A program for each part of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    open_ = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    found = open_ * tl.sigmoid(open_) * value
    tl.store(out + row * width + column, found.to(out.dtype.element_ty), mask=inside)
