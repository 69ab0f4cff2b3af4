"""Which token comes next: filters, one uniform number, one token.

The number is a hash of (seed, step, slot, position), not the next one of a generator's stream. So the same completion
is drawn whatever the batch it is in, the process that makes it, or the runs that were cut off before.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from opensloth.hardware import TRITON

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 512  # tokens: some hundred blocks of some hundred tokens in a vocabulary of 150,000


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

    @property
    def whole(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_p == 1 and self.top_k == 0 and self.min_p == 0


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
        logits: (rows, vocabulary), of any float type; computed in fp32, and left as they are.
        uniforms: (rows,) float64 in [0, 1); None only for greedy.
    Returns:
        Token ids (rows,) int64 and their log-probabilities (rows,) fp32 under softmax(logits / temperature) over the
        whole vocabulary, whatever the filters left out: this is what the trainer computes. Greedy: temperature 1.
    """
    temperature = 1.0 if sampling.greedy else sampling.temperature
    if uniforms is None and not sampling.greedy:
        raise ValueError("sampling needs a random number for each row")
    numbers = None if uniforms is None or sampling.greedy else uniforms.to(logits.device, torch.float64)
    if logits.is_cuda and TRITON and (sampling.greedy or sampling.whole):
        from opensloth.rollout.draw import choose_whole

        return choose_whole(logits.detach(), temperature, numbers)
    most, chosen = logits.max(-1, keepdim=True)  # the first of several, as argmax
    peak = most.float()
    weights = exponentials(logits, peak, temperature)
    sums = weights.sum(-1)
    if numbers is not None:
        at = numbers[:, None]
        chosen = draw(weights, sums, at) if sampling.whole else draw_filtered(weights, sampling, at)
    above = (logits.gather(-1, chosen).float() - peak) / temperature
    return chosen[:, 0], (above - sums.sum(-1, keepdim=True, dtype=torch.float64).log()).float()[:, 0]


def exponentials(logits: torch.Tensor, peak: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp((logits - peak) / temperature) in fp32, with zeros up to whole blocks: (rows, blocks, BLOCK).

    At 1,024 rows of a large vocabulary each pass over them takes as long as some layers of the model, so the rest of a
    draw needs only these and the sums of their blocks.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    weights = torch.empty(rows, blocks * BLOCK, dtype=torch.float32, device=logits.device)
    weights[:, vocabulary:] = 0
    inside = weights[:, :vocabulary]
    torch.sub(logits.detach(), peak, out=inside)
    if temperature != 1:
        inside.div_(temperature)
    inside.exp_()
    return weights.view(rows, blocks, BLOCK)


def draw(weights: torch.Tensor, sums: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The inverse of the cumulative distribution at `uniforms` (rows, 1): ids (rows, 1). Never one of weight 0.

    First the block, then the token in it: sums in float64 over the whole vocabulary would cost as much as the model.

    Args:
        weights: (rows, blocks, BLOCK) fp32, not normalized.
        sums: those of the blocks (rows, blocks).
    """
    block, rest = place(sums, uniforms)
    one = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    return block * BLOCK + place(one, rest)[0]


def draw_filtered(weights: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    """The same after filters in the order top-k, top-p, min-p, each over what the one before left."""
    ids, weights = None, weights.flatten(1)
    if sampling.top_k > 0:
        weights, ids = weights.topk(min(sampling.top_k, weights.shape[-1]), -1)  # the likeliest first
    elif sampling.top_p < 1:
        weights, ids = weights.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p < 1:
        upto = weights.cumsum(-1, dtype=torch.float64)
        weights = weights.masked_fill(upto - weights >= sampling.top_p * upto[:, -1:], 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0)
    at, _ = place(weights, uniforms)
    return at if ids is None else ids.gather(-1, at)


def place(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative sum of weights (rows, n) passes the share `uniforms` (rows, 1) of their total.

    Returns:
        The place (rows, 1), never one of weight 0, and how far into its weight: (rows, 1) float64 in [0, 1).
    """
    # fp32 sums would lose the tail of a large vocabulary
    upto = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms * upto[:, -1:]
    at = torch.searchsorted(upto, target, right=True).clamp_(max=weights.shape[-1] - 1)
    # a GPU sums in blocks, so its sums may step where the weight is 0
    at = torch.where(weights.gather(-1, at) > 0, at, weights.argmax(-1, keepdim=True))
    weight = weights.gather(-1, at).double()
    into = (target - (upto.gather(-1, at) - weight)) / weight
    return at, into.clamp_(0, 1 - 2.0**-53)
