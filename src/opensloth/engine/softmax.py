"""What is made of a chunk of logits in one Triton kernel each: the loss of SFT, a policy's scores, and their slopes.

A program passes over a row once for the largest logit and the sums of exponentials (Milakov and Gimelshein, arXiv
1805.02867), and once more where slopes are wanted, which it writes over what it read. torch passes over memory eight to
ten times, with copies in fp32. Its functions in engine/loss.py and engine/policy.py define what is computed here, and
run where there is no card.

It is imported on a card alone: only CUDA builds of torch have Triton.
"""

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # logits of a row that a program reads at once; of five that were tried on an H200
STAGES = tl.constexpr(3)  # blocks of a row on their way from memory or at work
# Where the largest logit begins: below every logit, yet finite, so that of masked ones (-inf) nothing becomes NaN.
FLOOR = tl.constexpr(-1e20)


def loss_and_slopes(
    raw: torch.Tensor, targets: torch.Tensor, cap: float | None, slopes: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `loss.loss_and_slopes`; the slopes are written over `raw`.

    Args:
        raw: (tokens, vocabulary) in 16 bits or fp32, the numbers of a row beside each other; rows may lie apart.
        targets: (tokens,) int64.
    Returns:
        The summed cross entropy in fp32, NaN if a logit of any row is NaN or a target is not in the vocabulary; and
        `raw`, or None without slopes.
    """
    tokens, vocabulary = raw.shape
    losses = raw.new_empty(tokens, dtype=torch.float32)  # summed by torch, always in the same order
    _cross_entropy[(tokens,)](
        raw, targets.contiguous(), losses, vocabulary, raw.stride(0), 0.0 if cap is None else cap,
        CAPPED=cap is not None, SLOPES=slopes, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return losses.sum(), raw if slopes else None


def scores_of(
    raw: torch.Tensor, targets: torch.Tensor, temperature: float, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `policy.scores_of`: log-probabilities of `targets` and entropy (nats), (tokens,) in fp32.

    Args:
        raw, targets: as of `loss_and_slopes`; `raw` is left as it is.
    """
    tokens, vocabulary = raw.shape
    logps, entropy = (raw.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    _score[(tokens,)](
        raw, targets.contiguous(), logps, entropy, vocabulary, raw.stride(0), 1 / temperature,
        0.0 if cap is None else cap, CAPPED=cap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return logps, entropy


def slopes_of(
    raw: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, temperature: float, cap: float | None
) -> torch.Tensor:
    """As `policy.slopes_of`; the slopes are written over `raw`, which is returned.

    Args:
        raw, targets: as of `loss_and_slopes`.
        upstream: (tokens,), gradients of the log-probabilities.
    """
    tokens, vocabulary = raw.shape
    _slope[(tokens,)](
        raw, targets.contiguous(), upstream.contiguous(), vocabulary, raw.stride(0), 1 / temperature,
        0.0 if cap is None else cap, CAPPED=cap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return raw


@triton.jit
def _capped(x, cap):
    """cap * tanh(x / cap) and its slope, 1 - tanh^2; without a tanh, which a card's own instructions lack in fp32."""
    e = tl.exp(tl.abs(x) * (-2 / cap))
    share = 1 / (1 + e)
    size = cap * (1 - e) * share
    return tl.where(x < 0, -size, size), 4 * e * share * share


@triton.jit
def _logits(raw, column, vocabulary, cap, CAPPED: tl.constexpr):
    """Logits of a row in fp32, -inf behind its end, and the slope of each by what the head gave."""
    inside = column < vocabulary
    x = tl.load(raw + column, mask=inside, other=-float("inf")).to(tl.float32)
    slope = 1.0
    if CAPPED:
        x, slope = _capped(x, cap)
        x = tl.where(inside, x, -float("inf"))
    return x, slope


@triton.jit
def _logit(raw, target, vocabulary, cap, CAPPED: tl.constexpr):
    """That of a target; NaN for one that is not in the vocabulary, where another row lies."""
    x = tl.load(raw + target, mask=(target >= 0) & (target < vocabulary), other=float("nan")).to(tl.float32)
    if CAPPED:
        x, _ = _capped(x, cap)
    return x


@triton.jit
def _summed(raw, vocabulary, inverse, cap, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row the largest logit, the sum of exp(y), and that of exp(y) y, where y = (logit - largest) * inverse."""
    at = tl.arange(0, BLOCK)
    most = FLOOR
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        x, _ = _logits(raw, start + at, vocabulary, cap, CAPPED)
        peak = tl.maximum(most, tl.max(x, 0))
        y = (x - peak) * inverse
        weight = tl.exp(y)
        step = (most - peak) * inverse
        fade = tl.exp(step)
        if ENTROPY:
            weighted = fade * (weighted + step * total) + tl.where(y == -float("inf"), 0.0, weight * y)
        total = fade * total + weight
        most = peak
    return most, tl.sum(total, 0), tl.sum(weighted, 0)


@triton.jit
def _overwrite(
    raw, target, vocabulary, most, total, factor, inverse, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of a row, over what the head gave: (p - 1) * factor for the target, p * factor for all others."""
    at, share = tl.arange(0, BLOCK), 1 / total
    last = (tl.cdiv(vocabulary, BLOCK) - 1) * BLOCK
    for before in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        column = last - before + at  # from the end: that is what the card's cache still holds
        x, slope = _logits(raw, column, vocabulary, cap, CAPPED)
        chance = tl.exp((x - most) * inverse) * share
        found = (chance - tl.where(column == target, 1.0, 0.0)) * factor * slope
        tl.store(raw + column, found.to(raw.dtype.element_ty), mask=column < vocabulary)


@triton.jit
def _cross_entropy(
    raw, targets, losses, vocabulary, stride, cap, CAPPED: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program for each token."""
    row = tl.program_id(0).to(tl.int64)
    logits = raw + row * stride
    target = tl.load(targets + row)
    of_target = _logit(logits, target, vocabulary, cap, CAPPED)  # before anything is written
    most, total, _ = _summed(logits, vocabulary, 1.0, cap, CAPPED, False, BLOCK)
    tl.store(losses + row, tl.log(total) + (most - of_target))
    if SLOPES:
        _overwrite(logits, target.to(tl.int32), vocabulary, most, total, 1.0, 1.0, cap, CAPPED, BLOCK)


@triton.jit
def _score(
    raw, targets, logps, entropy, vocabulary, stride, inverse, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program for each token. With y as in `_summed`, the entropy is log(sum of exp(y)) - the mean of y."""
    row = tl.program_id(0).to(tl.int64)
    logits = raw + row * stride
    of_target = _logit(logits, tl.load(targets + row), vocabulary, cap, CAPPED)
    most, total, weighted = _summed(logits, vocabulary, inverse, cap, CAPPED, True, BLOCK)
    tl.store(logps + row, (of_target - most) * inverse - tl.log(total))
    tl.store(entropy + row, tl.log(total) - weighted / total)


@triton.jit
def _slope(
    raw, targets, upstream, vocabulary, stride, inverse, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program for each token."""
    row = tl.program_id(0).to(tl.int64)
    logits = raw + row * stride
    target = tl.load(targets + row).to(tl.int32)
    factor = -tl.load(upstream + row).to(tl.float32) * inverse
    most, total, _ = _summed(logits, vocabulary, inverse, cap, CAPPED, False, BLOCK)
    _overwrite(logits, target, vocabulary, most, total, factor, inverse, cap, CAPPED, BLOCK)
