"""Attention of one new position over a prompt that a group shares and over a completion's own keys: a Triton kernel.

At a decoding step attention does nothing but read keys and values. Here each program reads those of one row and one
key head: only as many as there are, without a mask, once for all query heads that share them, and the prompt's from
where they lie once for the whole group. Programs of a group run beside each other, so that the card's cache serves all
but the first. The new key and value are written in passing. Lengths are read on the card: one recording serves all.
Norms and rotary positions of the new queries and keys are done in passing too, where they are asked for (`Turn`).

It is imported on a card alone: only CUDA builds of torch have Triton.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from transformers import AttentionInterface

# no mask is registered under it: transformers then builds none
NAME = "opensloth_shared"
BLOCK = 64  # positions that are read at once, at most
BLOCK_BYTES = 4_096  # of their keys, and of their values
WARPS, STAGES = 1, 4  # measured with the above on an H100: 3.2 TB/s with 256 rows, 3.9 with 1,024
LEAST = 16  # of each side of a matmul on a tensor core
LOG2_E = 1.4426950408889634  # the card raises 2 to a power


def shared(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    buffers: Any = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, with one new position a row.

    Args:
        query: (rows, heads, 1, size); `key` and `value` of the new position may have fewer heads.
        buffers: the `rollout.store.SharedPrompts` that holds all other keys and values.
    Returns:
        (rows, 1, heads, size), None.
    Raises:
        ValueError: a model that does not hand `buffers` on to its attention, or adds a bias to its scores.
    """
    if buffers is None or attention_mask is not None or more.get("position_bias") is not None:
        raise ValueError(
            "attention over shared prompts needs their buffers, and no mask or bias; --rollout generate does"
        )
    layer = buffers.layers[module.layer_idx]
    out = attend(
        query[:, :, 0], key[:, :, 0], value[:, :, 0], layer.keys, layer.values, layer.prompt_keys, layer.prompt_values,
        buffers.source, buffers.starts, buffers.end, buffers.own, scaling or query.shape[-1] ** -0.5,
    )  # fmt: skip
    return out[:, None], None


class Norm(NamedTuple):
    """Of heads: x / rms(x) * weight, weight (size,)."""

    weight: torch.Tensor
    epsilon: float


class Turn(NamedTuple):
    """What becomes of new queries and keys first: their norms, then the rotation by halves (arXiv 2104.09864).

    Attributes:
        cos, sin: (rows or 1, 1, size).
        norms: of queries and of keys, where a model has them.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    norms: tuple[Norm, Norm] | None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    source: torch.Tensor,
    starts: torch.Tensor,
    prompts_end: torch.Tensor,
    own: torch.Tensor,
    scaling: float,
    turn: Turn | None = None,
) -> torch.Tensor:
    """One new position of each row; its key and value are written to position `own` of `keys` and `values`.

    Args:
        query: (rows, heads, size); key, value: (rows, key heads, size).
        keys, values: (at least rows, key heads, room, size), of which the first `own` (1,) positions are there.
        prompt_keys, prompt_values: (prompts, key heads, room, size), of which prompt i is at `starts[i]` to
            `prompts_end` (1,).
        source: (at least rows,) the prompt of each row.
    Returns:
        (rows, heads, size).
    """
    rows, heads, size = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty(rows, heads, size)
    # what stands for what is not there is not read
    cos, sin, norms = turn or Turn(query, query, None)
    of_query, of_key = norms or (Norm(query, 0.0), Norm(key, 0.0))
    size_block = max(triton.next_power_of_2(size), LEAST)
    _attend[(rows * key.shape[1],)](
        query, key, value, keys, values, prompt_keys, prompt_values, source, starts, prompts_end, own, out,
        cos, sin, of_query.weight, of_key.weight, scaling * LOG2_E, rows, of_query.epsilon, of_key.epsilon,
        0 if len(cos) == 1 else size,
        *(stride for x in (query, key, value) for stride in x.stride()[:2]),
        *keys.stride()[:3], *prompt_keys.stride()[:3],
        HEADS=heads, GROUP=heads // key.shape[1], SIZE=size,
        GROUP_BLOCK=max(triton.next_power_of_2(heads // key.shape[1]), LEAST), SIZE_BLOCK=size_block,
        TURNED=turn is not None, NORMED=norms is not None,
        BLOCK=max(min(BLOCK, BLOCK_BYTES // (size_block * query.element_size())), LEAST),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


@triton.jit
def _more(
    query, most, total, found, keys, values, first, end, stride, scaling,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The running softmax (Milakov and Gimelshein, arXiv 1805.02867) over positions `first` to `end` of some keys."""
    column = tl.arange(0, SIZE_BLOCK)
    for start in range(first, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        there = position < end
        place = position.to(tl.int64)[:, None] * stride + column[None, :]
        inside = there[:, None] & (column[None, :] < SIZE)
        key = tl.load(keys + place, mask=inside, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        score = tl.where(there[None, :], score, -float("inf"))
        new_most = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(values + place, mask=inside, other=0.0)
        found = found * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        most = new_most
    return most, total, found


@triton.jit
def _attend(
    query, key, value, keys, values, prompt_keys, prompt_values, source, starts, prompts_end, own, out,
    cos, sin, query_weight, key_weight, scaling, rows, query_epsilon, key_epsilon, angle_row,
    query_row, query_head, key_row, key_head, value_row, value_head,
    keys_row, keys_head, keys_position, prompt_row, prompt_head, prompt_position,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr, TURNED: tl.constexpr, NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each key head of each row, those of one head beside each other."""
    program = tl.program_id(0)
    row, head = (program % rows).to(tl.int64), (program // rows).to(tl.int64)
    column, member = tl.arange(0, SIZE_BLOCK), tl.arange(0, GROUP_BLOCK)
    wide = column < SIZE
    mine = (member[:, None] < GROUP) & wide[None, :]
    q_heads = query + row * query_row + (head * GROUP + member)[:, None] * query_head
    k_head = key + row * key_row + head * key_head
    q = tl.load(q_heads + column[None, :], mask=mine, other=0.0)
    new_key = tl.load(k_head + column, mask=wide, other=0.0)
    if TURNED:
        partner = (column + SIZE // 2) % SIZE
        q_here, k_here = q.to(tl.float32), new_key.to(tl.float32)
        q_there = tl.load(q_heads + partner[None, :], mask=mine, other=0.0).to(tl.float32)
        k_there = tl.load(k_head + partner, mask=wide, other=0.0).to(tl.float32)
        if NORMED:
            q_share = tl.rsqrt(tl.sum(q_here * q_here, 1) / SIZE + query_epsilon)[:, None]
            k_share = tl.rsqrt(tl.sum(k_here * k_here, 0) / SIZE + key_epsilon)
            q_here *= q_share * tl.load(query_weight + column, mask=wide, other=0.0).to(tl.float32)[None, :]
            q_there *= q_share * tl.load(query_weight + partner, mask=wide, other=0.0).to(tl.float32)[None, :]
            k_here *= k_share * tl.load(key_weight + column, mask=wide, other=0.0).to(tl.float32)
            k_there *= k_share * tl.load(key_weight + partner, mask=wide, other=0.0).to(tl.float32)
        along = tl.load(cos + row * angle_row + column, mask=wide, other=0.0).to(tl.float32)
        across = tl.load(sin + row * angle_row + column, mask=wide, other=0.0).to(tl.float32)
        across = tl.where(column < SIZE // 2, -across, across)
        q = (q_here * along[None, :] + q_there * across[None, :]).to(q.dtype)
        new_key = (k_here * along + k_there * across).to(new_key.dtype)
    new_value = tl.load(value + row * value_row + head * value_head + column, mask=wide, other=0.0)
    count = tl.load(own).to(tl.int32)
    here = row * keys_row + head * keys_head
    tl.store(keys + here + count * keys_position + column, new_key, mask=wide)
    tl.store(values + here + count * keys_position + column, new_value, mask=wide)
    # the new position is the first of the sum: what was just stored need not be read again
    most = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scaling
    total = tl.full((GROUP_BLOCK,), 1.0, tl.float32)
    found = tl.zeros((GROUP_BLOCK, SIZE_BLOCK), tl.float32) + new_value.to(tl.float32)[None, :]
    prompt = tl.load(source + row)
    there = prompt * prompt_row + head * prompt_head
    most, total, found = _more(
        q, most, total, found, prompt_keys + there, prompt_values + there,
        tl.load(starts + prompt).to(tl.int32), tl.load(prompts_end).to(tl.int32), prompt_position,
        scaling, SIZE, SIZE_BLOCK, BLOCK,
    )  # fmt: skip
    most, total, found = _more(
        q, most, total, found, keys + here, values + here, 0, count, keys_position, scaling,
        SIZE, SIZE_BLOCK, BLOCK,
    )  # fmt: skip
    found = found / total[:, None]
    place = (row * HEADS + head * GROUP + member)[:, None] * SIZE + column[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=mine)


AttentionInterface.register(NAME, shared)
