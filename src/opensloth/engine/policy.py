"""Log-probabilities of completions under a model: what GRPO trains, and what it compares with the reference.

Batches come as TRL makes them: prompts padded on the left, completions on the right, one `attention_mask` over both.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class TokenScores(NamedTuple):
    """Of each completion token, shape (rows, completion length), fp32, 0 where there is padding.

    `logps` at the sampling temperature; `entropy` (nats) of the distribution that the token was drawn from, without a
    gradient.
    """

    logps: torch.Tensor
    entropy: torch.Tensor


def packed(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int, temperature: float
) -> TokenScores:
    """One forward over all rows laid one behind the other, without padding; logits for completion tokens alone.

    Args:
        model: with the attention of engine/attention.py; may be wrapped in DDP.
        input_ids, attention_mask: (rows, prompt and completion).
        length: of the completions' part.
    """
    keep = attention_mask.bool()
    lengths = keep.sum(1)
    positions = (attention_mask.cumsum(1) - 1)[keep][None]
    boundaries = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    ids = input_ids[keep][None]
    columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    targets = (columns[keep] >= keep.shape[1] - length).nonzero()[:, 0]
    logits = model(
        input_ids=ids,
        position_ids=positions,
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=longest,
        max_length_k=longest,
        logits_to_keep=targets - 1,  # the token before predicts it
        use_cache=False,  # with a cache, rows would see each other
    ).logits[0]
    logps, entropy = score(logits, ids[0, targets], temperature)
    at = keep[:, -length:]
    empty = torch.zeros(at.shape, dtype=logps.dtype, device=at.device)
    return TokenScores(empty.masked_scatter(at, logps), empty.masked_scatter(at, entropy))


def padded(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int, temperature: float
) -> TokenScores:
    """The same over the padded batch, for models whose rows cannot be packed."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        logits_to_keep=length + 1,
        use_cache=False,
    ).logits[:, -length - 1 : -1]
    logps, entropy = score(logits, input_ids[:, -length:], temperature)
    mask = attention_mask[:, -length:]
    return TokenScores(logps * mask, entropy * mask)


def score(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets` and entropy under softmax(logits / temperature), in fp32.

    Args:
        logits: (..., vocabulary).
        targets: (...).
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)
    logps = scaled.gather(-1, targets[..., None])[..., 0] - total
    with torch.no_grad():
        mean = ((scaled - total[..., None]).exp() * scaled).sum(-1)
    return logps, total.detach() - mean
