"""The gate of an MLP in one Triton kernel each way: h = act(g) u, with what adapters add to g and u made in passing.

g and u are as wide as nothing else in a model. A matmul that adds the adapter's share to them reads and writes them
once more, as does each of the gate's own operations; here a small matmul in the kernel makes the share of the numbers
that are there anyway. It is imported on a card alone: only CUDA builds of torch have Triton.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LEAST = 16  # of each side of a matmul on a tensor core
ROWS, COLUMNS, WARPS = 32, 64, 4  # of a program; of seven that were tried on an H200, for 3,072 and 9,728 columns
ALONE = 1024  # columns of a program that has one row and no adapters: decoding steps have few rows


class Shares(NamedTuple):
    """What adapters add to g and u: low (rows, 2 ranks) times gate' and up', each (width, rank)."""

    low: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor


def gated(gate: torch.Tensor, up: torch.Tensor, shares: Shares | None = None, kind: str = "silu") -> torch.Tensor:
    """act(gate) * up (arXiv 2002.05202), computed in fp32 and rounded once.

    Args:
        gate, up: (rows, width) or (rows, 1, width); the numbers of a row lie beside each other, rows may lie apart.
        kind: "silu", or "gelu" with its tanh.
    Returns:
        As gate, contiguous.
    """
    rows, width = gate.shape[0], gate.shape[-1]
    out = gate.new_empty(gate.shape)
    of_rows, columns, warps = (1, ALONE, WARPS) if shares is None else (ROWS, COLUMNS, WARPS)
    _gate[(triton.cdiv(rows, of_rows), triton.cdiv(width, columns))](
        gate, up, *given(shares, gate), out, rows, width, gate.stride(0), up.stride(0), *sizes(shares),
        SILU=kind == "silu", ROWS=of_rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return out


def gated_back(
    gate: torch.Tensor,
    up: torch.Tensor,
    slopes: torch.Tensor,
    shares: Shares | None = None,
    back: tuple[torch.Tensor, torch.Tensor] | None = None,
    kind: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of g and u, and h itself once more, which need not be kept: each (rows, width).

    Args:
        gate, up, slopes: (rows, width); `slopes` are gradients of h, without the share of `back`.
        back: (rows, rank) and (rank, width), whose product is to be added to `slopes`; with `shares` alone.
    """
    rows, width = gate.shape
    outs = [torch.empty_like(gate) for _ in range(3)]
    low, down = back or (gate, gate)  # what stands for what is not there is not read
    _gate_back[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
        gate, up, slopes, *given(shares, gate), low, down, *outs, rows, width,
        gate.stride(0), up.stride(0), slopes.stride(0), *sizes(shares), low.stride(0),
        DOWN_RANK=down.shape[0] if back else 0,
        DOWN_BLOCK=max(triton.next_power_of_2(down.shape[0]), LEAST) if back else LEAST,
        SILU=kind == "silu", ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


def given(shares: Shares | None, instead: torch.Tensor) -> tuple[Any, ...]:
    return tuple(shares) if shares is not None else (instead,) * 3


def sizes(shares: Shares | None) -> tuple[int, int, int]:
    """The stride of `low`, the rank (0: no shares) and the block that holds it."""
    if shares is None:
        return 0, 0, LEAST
    rank = shares.gate.shape[1]
    return shares.low.stride(0), rank, max(triton.next_power_of_2(rank), LEAST)


@triton.jit
def _share(low, factor, row, column, rows, width, stride, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """low factor' of some rows and columns, in fp32."""
    at = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (at[None, :] < RANK)
    left = tl.load(low + row[:, None] * stride + at[None, :], mask=inside, other=0.0)
    right = tl.load(
        factor + column[None, :].to(tl.int64) * RANK + at[:, None],
        mask=(column[None, :] < width) & (at[:, None] < RANK),
        other=0.0,
    )
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _act(x, SILU: tl.constexpr):
    """The activation, and its slope."""
    if SILU:
        chance = tl.sigmoid(x)
        found = x * chance
        slope = chance * (1 + x * (1 - chance))
    else:  # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), arXiv 1606.08415
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2 * tl.sigmoid(2 * inner) - 1
        found = 0.5 * x * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    return found, slope


@triton.jit
def _gate(
    gate, up, low, of_gate, of_up, out, rows, width, gate_stride, up_stride, low_stride,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for some columns of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(gate + row[:, None] * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row[:, None] * up_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RANK:
        x += _share(low, of_gate, row, column, rows, width, low_stride, RANK, RANK_BLOCK)
        value += _share(low + RANK, of_up, row, column, rows, width, low_stride, RANK, RANK_BLOCK)
    found, _ = _act(x, SILU)
    tl.store(out + row[:, None] * width + column[None, :], (found * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_back(
    gate, up, slopes, low, of_gate, of_up, low_slopes, down, to_gate, to_up, out, rows, width,
    gate_stride, up_stride, slopes_stride, low_stride,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, low_slopes_stride,
    DOWN_RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for some columns of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(gate + row[:, None] * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row[:, None] * up_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(slopes + row[:, None] * slopes_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RANK:
        x += _share(low, of_gate, row, column, rows, width, low_stride, RANK, RANK_BLOCK)
        value += _share(low + RANK, of_up, row, column, rows, width, low_stride, RANK, RANK_BLOCK)
    if DOWN_RANK:
        at = tl.arange(0, DOWN_BLOCK)
        left = tl.load(
            low_slopes + row[:, None] * low_slopes_stride + at[None, :],
            mask=(row[:, None] < rows) & (at[None, :] < DOWN_RANK),
            other=0.0,
        )
        right = tl.load(
            down + at[:, None].to(tl.int64) * width + column[None, :],
            mask=(at[:, None] < DOWN_RANK) & (column[None, :] < width),
            other=0.0,
        )
        slope += tl.dot(left, right, input_precision="ieee")
    found, of_act = _act(x, SILU)
    place = row[:, None] * width + column[None, :]
    tl.store(to_gate + place, (slope * value * of_act).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + place, (slope * found).to(to_up.dtype.element_ty), mask=inside)
    tl.store(out + place, (found * value).to(out.dtype.element_ty), mask=inside)
