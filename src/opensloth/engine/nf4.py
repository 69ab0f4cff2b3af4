"""Weights in 4 bits made numbers again by one Triton kernel: w = code[i] * scale (QLoRA, arXiv 2305.14314, section 3).

Each weight is the index of one of 16 codes, two to a byte; a block of them has a scale, which may itself be the index
of one of 256 codes, with a scale for each block of those and a mean that was taken off. bitsandbytes makes the scales
and then the weights, each through several layers of Python, for every layer in every pass: with packs of a few thousand
tokens, which is what fits small cards, the card waits for the host.

It is imported on a card alone: only CUDA builds of torch have Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4  # bytes of a program


def serves(state: Any) -> bool:
    """Whether a base is quantized as the kernel takes it: nf4, in 16 or 32 bits before."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return bool(state.quant_type == "nf4" and state.blocksize % 2 == 0 and state.dtype in kinds)


def numbers(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The weights (out, in) in the type that they had, as bitsandbytes' `dequantize_4bit` makes them.

    Args:
        weight: the packed bytes.
        state: bitsandbytes' account of how they are quantized (`QuantState`).
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    count = out.numel()
    scales = state.state2 if state.nested else state  # what stands for what is not there is not read
    _numbers[(triton.cdiv(count, 2 * BLOCK),)](
        weight.data, state.absmax, scales.absmax, scales.code, state.offset if state.nested else state.code,
        state.code, out, count, EACH=state.blocksize, EACH_SCALE=scales.blocksize,
        NESTED=state.nested, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _numbers(
    packed, scales, scales_of_scales, codes_of_scales, mean, codes, out, count,
    EACH: tl.constexpr, EACH_SCALE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for some bytes, each of which is two weights, the first in its upper half."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    inside = 2 * byte < count
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    block = 2 * byte // EACH
    scale = tl.load(scales + block, mask=inside, other=0)
    if NESTED:
        outer = tl.load(scales_of_scales + block // EACH_SCALE, mask=inside, other=0.0)
        scale = tl.load(codes_of_scales + scale.to(tl.int32)) * outer + tl.load(mean)
    first = tl.load(codes + (pair >> 4)) * scale
    second = tl.load(codes + (pair & 15)) * scale
    weight = 2 * start + tl.arange(0, 2 * BLOCK)
    found = tl.interleave(first, second)
    tl.store(out + weight, found.to(out.dtype.element_ty), mask=weight < count)
