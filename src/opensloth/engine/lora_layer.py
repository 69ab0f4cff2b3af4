"""LoRA's linear layer without passes of its own over the activations: y = x W' + s (x A') B' in matmuls alone.

PEFT adds and scales the adapter's share in passes over all activations, and casts them to fp32 where the adapter is
kept so. Here the share is added by the matmul that makes it, in the base's type, with a copy of A and B in that type;
weights, gradients and optimizer state of the adapter stay fp32. The layer is PEFT's in every other respect: what it
saves, merges and disables.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer with another forward where that is the same: one adapter, no dropout, a frozen unquantized base."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        if args or kwargs or self.disable_adapters or self.merged or not self.is_plain(name):
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if base.weight.dtype != dtype or base.weight.requires_grad:
            return super().forward(x)
        out: torch.Tensor = Adapted.apply(x.to(dtype), base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return out

    def is_plain(self, name: str) -> bool:
        """Whether the adapter is LoRA as first described (arXiv 2106.09685), without a variant or dropout in use."""
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        dropout = self.lora_dropout[name]
        return type(self.get_base_layer()) is nn.Linear and (isinstance(dropout, nn.Identity) or not self.training)


class Adapted(torch.autograd.Function):
    """x (..., in) -> (..., out). The base is frozen: it takes no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = rows @ a.T
        out = F.linear(rows, weight, bias).addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        out = upstream[0].reshape(-1, weight.shape[0])
        slopes = (out @ b).mul_(ctx.scaling)  # of `low`: a few columns
        to_a = to_b = to_x = None
        if ctx.needs_input_grad[3]:
            to_a = slopes.T @ rows
        if ctx.needs_input_grad[4]:
            to_b = (out.T @ low).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            to_x = (out @ weight).addmm_(slopes, a).view(*upstream[0].shape[:-1], -1)
        return to_x, None, None, *(None if x is None else x.float() for x in (to_a, to_b)), None
