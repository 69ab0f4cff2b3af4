"""How far the sampler is from the policy that trains, and what corrects for it.

A rollout computes the same probabilities as the trainer with other kernels, in other batches, with the adapter merged
perhaps: in 16 bits they differ. Each token's loss is weighed by the ratio of both, at most CAP (truncated importance
sampling, doi 10.1198/106186008X320456); a gap below ALIKE is rounding of 32 bits, and weighs 1. So the rule asks for no
switch: what is computed alike is left alone. It costs nothing, for the trainer's side is the forward pass that trains.
"""

import torch
import torch.distributed as dist

CAP = 2.0
ALIKE = 1e-4  # nats

Batch = dict[str, torch.Tensor]


def weights(policy: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
    """p(policy) / p(sampler), at most CAP, from log-probabilities of any shape. 1 where both are padding (0)."""
    gap = policy - sampler
    return gap.exp().clamp(max=CAP).masked_fill(gap.abs() < ALIKE, 1.0)


def corrected(part: Batch, policy: torch.Tensor) -> torch.Tensor:
    """The advantages of a micro-batch for each token, (completions, tokens), times its importance weight.

    Args:
        policy: log-probabilities by the policy that the completions were asked of, without a gradient.
    """
    return part["advantages"][:, None] * weights(policy, part["sampling_per_token_logps"])


class Gaps:
    """|log p(policy) - log p(sampler)| of the tokens of one batch, over all processes. 0 but for rounding."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device, dtype=torch.float64)  # of tokens, gaps, weights, weights at the cap
        self.most = torch.zeros(1, device=device, dtype=torch.float64)

    def add(self, policy: torch.Tensor, part: Batch) -> None:
        """Of the tokens that count in a micro-batch, which may be none; without the host waiting for the card."""
        mask = part["completion_mask"].bool()
        here, there = (x.double().where(mask, 0.0) for x in (policy, part["sampling_per_token_logps"]))
        gap, weight = (here - there).abs(), weights(here, there).where(mask, 0.0)
        self.sums += torch.stack([mask.sum(), gap.sum(), weight.sum(), (weight >= CAP).sum()])
        self.most = torch.maximum(self.most, gap.amax())

    def figures(self) -> dict[str, float]:
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.most, op=dist.ReduceOp.MAX)
        tokens, gap, weight, capped, most = torch.cat([self.sums, self.most]).tolist()
        tokens = max(tokens, 1)
        return {
            "logp_gap/mean": gap / tokens,
            "logp_gap/max": most,
            "importance/mean": weight / tokens,
            "importance/capped": capped / tokens,
        }
