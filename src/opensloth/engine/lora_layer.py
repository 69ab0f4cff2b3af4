"""LoRA's linear layer without passes of its own over the activations: y = x W' + (s x A') B' in matmuls alone.

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


class OneMatmul:
    """Before a layer of PEFT's among the bases: another forward where that is the same. One adapter, no
    dropout, a frozen base that computes in the type of its input; all else is left to PEFT."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        base = self.get_base_layer()
        kind = base.compute_dtype if self.quantized else base.weight.dtype
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        ours = is_plain(self, name) and kind == dtype and not base.weight.requires_grad
        if args or kwargs or self.disable_adapters or self.merged or not ours:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        adapter = (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
        if self.quantized:
            return Added.apply(base(x), x.to(dtype), *adapter)  # type: ignore[no-untyped-call]
        return Adapted.apply(x.to(dtype), base.weight, base.bias, *adapter)  # type: ignore[no-untyped-call]


def is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter is LoRA as first described (arXiv 2106.09685), without a variant or dropout in use."""
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    return isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training


class LoraLinear(OneMatmul, Linear):  # type: ignore[misc]
    quantized = False


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
        low = scaled(rows, a.T, scaling)
        out = linear_plus(rows, weight, bias, low, b)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        out = upstream[0].reshape(-1, weight.shape[0])
        slopes, to_a, to_b = of_adapter(ctx, out, rows, low, b, ctx.needs_input_grad[3:5])
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = linear_plus(out, weight.T, None, slopes, a.T).view(*upstream[0].shape[:-1], -1)
        return to_x, None, None, to_a, to_b, None


class Added(torch.autograd.Function):
    """The adapter's share of x, added to what a quantized base gave. Not in place: that may be a view, which autograd
    lets nobody change."""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = scaled(rows, a.T, scaling)
        found = torch.addmm(out.reshape(-1, out.shape[-1]), low, b.T)
        ctx.save_for_backward(rows, low, a, b)
        ctx.scaling = scaling
        return found.view(out.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        out = upstream[0].reshape(-1, len(b))
        slopes, to_a, to_b = of_adapter(ctx, out, rows, low, b, ctx.needs_input_grad[2:4])
        to_x = (slopes @ a).view(*upstream[0].shape[:-1], -1) if ctx.needs_input_grad[1] else None
        return upstream[0], to_x, to_a, to_b, None


def of_adapter(
    ctx: Any, out: torch.Tensor, rows: torch.Tensor, low: torch.Tensor, b: torch.Tensor, needs: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `low` / s (tokens, rank), and of A and B in fp32, by that of the output: (tokens, out)."""
    slopes = scaled(out, b, ctx.scaling)
    to_a = in_float32(slopes.T, rows) if needs[0] else None
    to_b = in_float32(out.T, low) if needs[1] else None
    return slopes, to_a, to_b


def scaled(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """s left right: the matmul scales as it writes. The compiler puts the factor where it costs nothing by itself."""
    if scaling == 1:
        return left @ right
    if torch.compiler.is_compiling():
        return left @ right * scaling
    nothing = left.new_empty(1, 1).expand(left.shape[0], right.shape[1])  # times 0: it is not read
    return torch.addmm(nothing, left, right, beta=0, alpha=scaling)


def in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right, rounded once. On a card the matmul writes fp32 itself; elsewhere torch has none that does."""
    if left.is_cuda and left.dtype != torch.float32 and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def linear_plus(*operands: Any) -> torch.Tensor:
    """As `plus_in_place`, also where the compiler looks on.

    It makes everything functional, and would copy all activations before each sum: for it this is one operator that it
    does not look into.
    """
    found: torch.Tensor = (plus_as_one if torch.compiler.is_compiling() else plus_in_place)(*operands)
    return found


def plus_in_place(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    """x (tokens, in) W' + bias + low (tokens, rank) up': what the second matmul adds, it adds in place."""
    return F.linear(x, weight, bias).addmm_(low, up.T)


plus_as_one = torch.library.custom_op(
    "opensloth::linear_plus",
    plus_in_place,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor low, Tensor up) -> Tensor",
)
plus_as_one.register_fake(lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]))


def layers_for(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Which of our layers stand for which linear ones, as PEFT wants to be told; none where we have none for a kind.

    PEFT goes by isinstance, in this order, and quantized layers are linear ones too.
    """
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)} - {nn.Linear}
    if not kinds:
        return {nn.Linear: LoraLinear}
    if {kind.__name__ for kind in kinds} != {"Linear4bit"}:
        return {}
    from peft.tuners.lora.bnb import Linear4bit

    class LoraLinear4bit(OneMatmul, Linear4bit):  # type: ignore[misc]
        quantized = True

    return {kinds.pop(): LoraLinear4bit, nn.Linear: LoraLinear}
