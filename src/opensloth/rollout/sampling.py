"""Which token comes next: filters, one uniform number, one token.

The number is a hash of (seed, step, slot, position), not the next one of a generator's stream. So the same completion
is drawn whatever the batch it is in, the process that makes it, or the runs that were cut off before.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave nothing out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"not a way to sample: {self}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Noise:
    """The random numbers of one batch of completions.

    Attributes:
        step: tells the batches of one run apart.
        slots: the place of each completion in the whole batch, over all processes.
    """

    seed: int
    step: int
    slots: tuple[int, ...]

    def uniforms(self, length: int) -> npt.NDArray[np.float64]:
        """(slots, length) numbers in [0, 1), multiples of 2**-53: one for each position of each completion."""
        state = np.zeros((1, 1), np.uint64)
        words = (self.seed, self.step, np.array(self.slots, np.uint64)[:, None], np.arange(length, dtype=np.uint64))
        for word in words:
            state = mixed((state + GOLDEN) ^ np.asarray(word, np.uint64))
        return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose(
    logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of logits.

    Args:
        logits: (rows, vocabulary), of any float type; computed in fp32.
        uniforms: (rows,) float64 in [0, 1); None only for greedy.
    Returns:
        Token ids (rows,) int64 and their log-probabilities (rows,) fp32 under softmax(logits / temperature) over the
        whole vocabulary, whatever the filters left out: this is what the trainer computes. Greedy: temperature 1.
    """
    scores = logits.float()
    if sampling.greedy:
        chosen = scores.argmax(-1)
    else:
        if uniforms is None:
            raise ValueError("sampling needs a random number for each row")
        scores = scores / sampling.temperature
        chosen = draw(scores, sampling, uniforms)
    return chosen, scores.gather(-1, chosen[:, None])[:, 0] - scores.logsumexp(-1)


def draw(scores: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    """Token ids (rows,): filters in the order top-k, top-p, min-p, each over what the one before left, then the
    inverse of the cumulative distribution at `uniforms`. Never a token of probability 0."""
    ids = None
    if 0 < sampling.top_k < scores.shape[-1]:
        scores, ids = scores.topk(sampling.top_k, -1)  # the likeliest first
    elif sampling.top_p < 1:
        scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    weights = scores.softmax(-1)
    if sampling.top_p < 1:
        before = weights.cumsum(-1, dtype=torch.float64) - weights
        weights = weights.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0)
    # fp32 sums would lose the tail of a large vocabulary
    total = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms.to(total.device, torch.float64)[:, None] * total[:, -1:]
    at = torch.searchsorted(total, target, right=True).clamp_(max=weights.shape[-1] - 1)
    # a GPU sums in blocks, so its sums may step where the weight is 0
    at = torch.where(weights.gather(-1, at) > 0, at, weights.argmax(-1, keepdim=True))
    return (at if ids is None else ids.gather(-1, at))[:, 0]
