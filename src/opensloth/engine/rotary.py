"""Rotary positions of queries and keys in one Triton kernel: y = x cos + half(x) sin, half(x1, x2) = (-x2, x1).

The gradient is the same rotation the other way. It is imported on a card alone: only CUDA builds of torch have Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl


def serves(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether the kernel takes these: (rows, heads, positions, size), cos (rows or 1, positions, size), on a card."""
    size = q.shape[-1]
    whole = size == cos.shape[-1] == k.shape[-1] and size % 2 == 0 and cos.dim() == 3
    return q.is_cuda and whole and q.dtype == k.dtype


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (rows, heads, positions, size) and keys, with fewer heads, at the positions of cos and sin."""
    found: tuple[torch.Tensor, torch.Tensor] = Rotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return found


class Rotation(torch.autograd.Function):
    """No gradient reaches the angles."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return launch(q, k, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *launch(upstream[0], upstream[1], cos, sin, back=True), None, None


def launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, positions, size = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    # one position's heads beside each other, as the projections leave them and attention wants them
    out = [x.new_empty(rows, positions, x.shape[1], size).transpose(1, 2) for x in (q, k)]
    _rotate[(rows * positions,)](
        q, k, cos, sin, *out, positions, 0 if len(cos) == 1 else positions,
        *(stride for x in (q, k, *out) for stride in x.stride()[:3]),
        HEADS=heads, KEYS=k.shape[1], HALF=size // 2,
        BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_KEYS=triton.next_power_of_2(k.shape[1]),
        BLOCK=triton.next_power_of_2(size // 2), BACK=back,
    )  # fmt: skip
    return out[0], out[1]


@triton.jit
def _turn(x, to, cos_low, cos_high, sin_low, sin_high, head, HEADS, at, HALF, BACK: tl.constexpr, stride, to_stride):
    mask = (head[:, None] < HEADS) & (at[None, :] < HALF)
    place = head[:, None] * stride + at[None, :]
    low = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + place + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    place = head[:, None] * to_stride + at[None, :]
    tl.store(to + place, new_low.to(to.dtype.element_ty), mask=mask)
    tl.store(to + place + HALF, new_high.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    q, k, cos, sin, to_q, to_k, positions, angle_stride,
    q_row, q_head, q_position, k_row, k_head, k_position,
    to_q_row, to_q_head, to_q_position, to_k_row, to_k_head, to_k_position,
    HEADS: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """A program for each position of each row; all of its heads."""
    program = tl.program_id(0).to(tl.int64)
    row, position = program // positions, program % positions
    at = tl.arange(0, BLOCK)
    angle = (row * angle_stride + position) * 2 * HALF + at
    inside = at < HALF
    cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    _turn(
        q + row * q_row + position * q_position, to_q + row * to_q_row + position * to_q_position,
        cos_low, cos_high, sin_low, sin_high, tl.arange(0, BLOCK_HEADS), HEADS, at, HALF, BACK, q_head, to_q_head,
    )  # fmt: skip
    _turn(
        k + row * k_row + position * k_position, to_k + row * to_k_row + position * to_k_position,
        cos_low, cos_high, sin_low, sin_high, tl.arange(0, BLOCK_KEYS), KEYS, at, HALF, BACK, k_head, to_k_head,
    )  # fmt: skip
