"""The loss of a micro-batch as a sum over trained tokens, so that any division of a step adds up to the same."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from opensloth.engine.head import Gradients, Head, before_cap, by_kernel, chunks, logits_of

IGNORED = -100


def pack_loss(model: torch.nn.Module, pack: Mapping[str, Any], head: Head | None = None) -> torch.Tensor:
    """The summed cross entropy of a pack as `training.loader.Batcher` makes it: rows one behind the other.

    Logits are made for the tokens before trained ones alone: masked prompts cost nothing in the head.

    Args:
        head: of the model; without it the model makes all these logits at once.
    Returns:
        A scalar in fp32; 0 (with a graph, so that DDP sees every gradient) for a pack without trained tokens.
    """
    inputs = pack_inputs(pack)
    targets, positions = pack["labels"][0, 1:], pack["predictors"]
    if head is not None:
        hidden = head.hidden(model, **inputs)[0].index_select(0, positions)
        return cross_entropy(head, hidden, targets[positions])
    weight = 1.0
    if len(positions) == 0:  # an empty pack of zero weight
        positions, weight = torch.zeros(1, dtype=torch.long, device=targets.device), 0.0
        targets = torch.zeros_like(targets)
    # use_cache=False is what makes packed position ids exact; with a cache, rows would see each other
    logits: torch.Tensor = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return weight * F.cross_entropy(logits[0].float(), targets[positions], reduction="sum")


def pack_inputs(pack: Mapping[str, Any]) -> dict[str, Any]:
    """What the model reads of a pack."""
    return {name: value for name, value in pack.items() if name not in ("labels", "predictors")}


def padded_loss(model: torch.nn.Module, batch: Mapping[str, Any], head: Head | None = None) -> torch.Tensor:
    """The summed cross entropy of a padded batch: `input_ids` of shape (rows, longest) with an `attention_mask`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    if head is not None:
        hidden = head.hidden(model, **inputs)[:, :-1]
        return cross_entropy(head, hidden[kept], targets[kept])
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[:, :-1]
    if not bool(kept.any()):
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits[kept].float(), targets[kept], reduction="sum")


def cross_entropy(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross entropy of `targets` (tokens,) after `hidden` (tokens, hidden size), in fp32."""
    operands = head.operands(hidden)
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in operands)
    loss: torch.Tensor = CrossEntropy.apply(*operands, targets, head, needs)  # type: ignore[no-untyped-call]
    return loss


def loss_and_slopes(
    raw: torch.Tensor, targets: torch.Tensor, cap: float | None, slopes: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of what the head gave a chunk, (tokens, vocabulary): the summed cross entropy, and its gradient in raw's type."""
    logits, at = logits_of(raw, cap), targets[:, None]
    logps = logits.log_softmax(-1)
    right = logps.gather(1, at)
    total = -right.sum()
    if not slopes:
        return total, None
    # the one of the target apart from the others, in fp32, so that these are never touched twice
    of_right = before_cap(right.exp() - 1, logits.gather(1, at), cap)
    found = before_cap(logps.exp_(), logits, cap).to(raw.dtype)  # in place: a chunk is large
    return total, found.scatter_(1, at, of_right.to(raw.dtype))


class CrossEntropy(torch.autograd.Function):
    """A sum is all that comes of the logits, so their gradients are known but for a factor: made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
        needs: tuple[bool, bool, bool],
    ) -> torch.Tensor:
        made_of = loss_and_slopes
        if by_kernel(hidden):
            from opensloth.engine import softmax

            made_of = softmax.loss_and_slopes
        total = torch.zeros((), device=hidden.device)
        gradients = Gradients(hidden, weight, bias, needs)
        for part in chunks(len(hidden), len(weight)):
            raw = F.linear(hidden[part], weight, bias)
            loss, slopes = made_of(raw, targets[part], head.cap, any(needs))
            total += loss
            if slopes is not None:
                gradients.add(part, slopes)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # in fp32: in the types of the tensors the factor would be rounded too, or, behind a loss scaler, infinite
        found = (None if x is None else (x.float() * upstream[0]).to(ctx.dtype) for x in ctx.saved_tensors)
        return *found, None, None, None
