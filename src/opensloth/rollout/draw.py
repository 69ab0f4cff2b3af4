"""One token of each row of logits in two Triton kernels: what `sampling.choose` does where every token may be drawn.

The first reads the logits once and keeps of each block of the vocabulary its largest logit and the sum of its
exponentials (Milakov and Gimelshein, arXiv 1805.02867). The second finds the block that a row's number falls into, and
the token in it. torch would write the exponentials of all logits to memory and read them back, in fifty kernels.

It is imported on a card alone: only CUDA builds of torch have Triton.
"""

import torch
import triton
import triton.language as tl

from opensloth.rollout.sampling import BLOCK

TOGETHER = 8  # blocks that a program of the first kernel reads
WARPS = 4


def choose_whole(
    logits: torch.Tensor, temperature: float, uniforms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sampling.choose` without filters; greedy where `uniforms` is None.

    Args:
        logits: (rows, vocabulary), the numbers of a row beside each other.
        uniforms: (rows,) float64 in [0, 1).
    Returns:
        Token ids (rows,) int64 and their log-probabilities (rows,) fp32.
    """
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    blocks = triton.cdiv(vocabulary, BLOCK)
    most, sums = (logits.new_empty(rows, blocks, dtype=torch.float32) for _ in range(2))
    _summarize[(rows, triton.cdiv(blocks, TOGETHER))](
        logits, most, sums, vocabulary, blocks, logits.stride(0), temperature,
        TOGETHER=TOGETHER, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    chosen = torch.empty(rows, dtype=torch.long, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _draw[(rows,)](
        logits, most, sums, most if uniforms is None else uniforms.contiguous(), chosen, logprobs,
        vocabulary, blocks, logits.stride(0), temperature,
        GREEDY=uniforms is None, BLOCKS=triton.next_power_of_2(blocks), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return chosen, logprobs


@triton.jit
def _summarize(
    logits, most, sums, vocabulary, blocks, stride, temperature, TOGETHER: tl.constexpr, BLOCK: tl.constexpr
):
    """A program for some blocks of a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
    peak = tl.max(x, 1)
    seen = tl.where(peak == -float("inf"), 0.0, peak)  # of a block that cannot be drawn
    total = tl.sum(tl.exp((x - seen[:, None]) / temperature), 1)
    tl.store(most + row * blocks + block, peak, mask=block < blocks)
    tl.store(sums + row * blocks + block, total, mask=block < blocks)


@triton.jit
def _place(weights, at, share, LAST: tl.constexpr):
    """As `sampling.place`, of one row: where the cumulative sum passes a share of the total, and how far into it."""
    upto = tl.cumsum(weights, 0)
    total = tl.sum(weights, 0)
    target = share * total
    found = tl.minimum(tl.sum((upto <= target).to(tl.int32), 0), LAST)
    weight = tl.sum(tl.where(at == found, weights, 0.0), 0)
    # sums are made in another order here and there, so theirs may step where the weight is 0
    found = tl.where(weight > 0, found, tl.argmax(weights, 0))
    weight = tl.sum(tl.where(at == found, weights, 0.0), 0)
    before = tl.sum(tl.where(at < found, weights, 0.0), 0)
    into = tl.minimum(tl.maximum((target - before) / weight, 0.0), 1 - 2.0**-53)
    return found, into


@triton.jit
def _draw(
    logits, most, sums, uniforms, chosen, logprobs, vocabulary, blocks, stride, temperature,
    GREEDY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)
    peaks = tl.load(most + row * blocks + at, mask=at < blocks, other=-float("inf"))
    peak = tl.max(peaks, 0)
    scaled = tl.load(sums + row * blocks + at, mask=at < blocks, other=0.0) * tl.exp((peaks - peak) / temperature)
    weights = scaled.to(tl.float64)
    column = tl.arange(0, BLOCK)
    if GREEDY:
        block = tl.argmax(peaks, 0)
    else:
        block, rest = _place(weights, at, tl.load(uniforms + row), BLOCKS - 1)
    token = block * BLOCK + column
    x = tl.load(logits + row * stride + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    if GREEDY:
        inside = tl.argmax(x, 0)
    else:
        inside, _ = _place(tl.exp((x - peak) / temperature).to(tl.float64), column, rest, BLOCK - 1)
    logit = tl.sum(tl.where(column == inside, x, 0.0), 0)
    # a row of NaN has no place, and what comes next looks its token up
    tl.store(chosen + row, tl.minimum(block * BLOCK + inside, vocabulary - 1).to(tl.int64))
    value = ((logit - peak) / temperature).to(tl.float64) - tl.log(tl.sum(weights, 0))
    tl.store(logprobs + row, value.to(tl.float32))
