"""The last layer of a model, applied to some tokens at a time: logits of a whole pack never exist at once.

The model runs as it always does, through DDP and whatever else wraps it, but its head only takes note of what reaches
it. Loss (engine/loss.py) and log-probabilities (engine/policy.py) then make logits for a chunk of tokens, use them, and
let them go.

Why not Liger's fused loss: it has nothing for a CPU, knows no log-probabilities of a policy, and its chunks follow the
ratio of hidden size to vocabulary, 256 tokens of a pack of 32,768 for a 0.6B model, which leaves a card idle between
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from opensloth.engine.graphed import Graphed
from opensloth.engine.lora import base_of
from opensloth.hardware import TRITON

CHUNK_BYTES = 2**29  # of a chunk's logits in fp32: large enough for matmuls at full speed, small beside activations

SPREAD = 60.0  # the largest logit that a model is asked about: twice what Gemma 2 lets pass


@dataclass
class Head:
    """A linear head over the last hidden state: logits = hidden @ weight.T + bias, with or without a cap.

    Attributes:
        cap: logits become cap * tanh(logits / cap) (Gemma 2); None without one.
        graphed: computes what reaches the head in place of the model itself, where packs have few shapes.
    """

    linear: nn.Linear
    cap: float | None = None
    graphed: Graphed | None = None

    def of(self, model: nn.Module) -> "Head":
        """The same of another model of the kind: the reference has weights of its own where all of them train."""
        bare: Any = base_of(getattr(model, "module", model))  # DDP's
        linear = bare.get_output_embeddings()
        return self if linear is self.linear else Head(linear, self.cap)

    def hidden(self, model: nn.Module, **inputs: Any) -> torch.Tensor:
        """What reaches the head in a forward of `model`: (rows, tokens, hidden size). No logits are made."""
        if self.graphed is not None:
            return self.graphed.hidden(partial(self.reach, getattr(model, "module", model)), inputs)
        return self.reach(model, **inputs)

    def reach(self, model: nn.Module, **inputs: Any) -> torch.Tensor:
        """`hidden`, by the model itself."""
        seen: list[torch.Tensor] = []

        def take_note(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden

        # an attribute of the instance goes before the class's method, and the model's own code stays as it is
        self.linear.forward = take_note  # type: ignore[method-assign,assignment]
        try:
            model(**inputs, use_cache=False)
        finally:
            del self.linear.forward
        return seen[0]

    def operands(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`hidden`, weight and bias in the type that the head computes in."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.linear.weight.dtype
        bias = self.linear.bias
        return hidden.to(dtype), self.linear.weight.to(dtype), None if bias is None else bias.to(dtype)


def chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of `count` tokens, each with at most CHUNK_BYTES of logits in fp32."""
    size = max(CHUNK_BYTES // (4 * vocabulary), 1)
    if size > 128:
        size = size // 128 * 128  # whole tiles of a matmul
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def by_kernel(hidden: torch.Tensor) -> bool:
    """Whether engine/softmax.py takes the logits of `hidden`, which are of its type."""
    return in_place(hidden.dtype, hidden.device)


def in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether what is made of logits is written over them: on a card that has Triton."""
    return device.type == "cuda" and TRITON and dtype in (torch.bfloat16, torch.float16, torch.float32)


def logits_of(raw: torch.Tensor, cap: float | None) -> torch.Tensor:
    """What the head gave, in fp32 and with its cap."""
    return raw.float() if cap is None else cap * torch.tanh(raw.float() / cap)


def before_cap(slopes: torch.Tensor, logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Gradients of capped logits as those of what was capped: d cap tanh(z / cap) / dz = 1 - tanh^2."""
    return slopes if cap is None else slopes * (1 - (logits / cap).square())


class Gradients:
    """What the slopes of chunks (gradients of what the head gives, in its type) give hidden states, weight and bias.

    Sums over chunks are in fp32.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.of, self.by = hidden, weight
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None

    def add(self, part: slice, slopes: torch.Tensor) -> None:
        if self.hidden is not None:
            torch.mm(slopes, self.by, out=self.hidden[part])
        if self.weight is not None:
            self.weight += slopes.T @ self.of[part]
        if self.bias is not None:
            self.bias += slopes.float().sum(0)


def find(model: PreTrainedModel) -> tuple[Head | None, str]:
    """The model's head, or None and why the model has to make its logits itself.

    What lies behind the last linear layer differs between architectures, so the model is asked: four tokens go through
    it, and its logits are compared with those of what reached the head.
    """
    linear: Any = model.get_output_embeddings()
    if type(linear) is not nn.Linear or not linear.weight.dtype.is_floating_point:
        return None, "its head is not a plain linear layer"
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head = Head(linear, float(cap) if cap else None)
    ids = torch.arange(4, device=linear.weight.device)[None]
    seen: list[torch.Tensor] = []

    def spread(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Small logits would hide a cap."""
        hidden = arguments[0].detach()
        seen.append(hidden * (SPREAD / F.linear(hidden, linear.weight).abs().max()))
        return (seen[-1],)

    watch = linear.register_forward_pre_hook(spread)
    try:
        expected = model(input_ids=ids, use_cache=False).logits.detach().float()
    finally:
        watch.remove()
    if len(seen) != 1 or seen[0].shape[:2] != expected.shape[:2]:
        return None, "its head does not see the last hidden state of every token"
    with torch.no_grad():
        found = logits_of(F.linear(*head.operands(seen[0])), head.cap)
    if not bool((found - expected).abs().max() < 0.01 * expected.abs().max()):  # as far as 16 bits go
        return None, "it changes the logits that its head gives"
    return head, ""
