"""The gated MLP of a layer with its adapters as one function: y = D(h), h = act(G x) U x (arXiv 2002.05202).

Autograd keeps of it what its four operations want: g, u, act(g) and h, the widest activations of a model. Here h is
made anew in the backward pass, by the kernel that reads g and u there anyway, and what adapters add to g, u and the
gradient of h is made in passing (engine/gate.py), where matmuls would read and write them once more.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from opensloth.engine.lora_layer import (
    Layer,
    OneMatmul,
    Parts,
    again,
    divided,
    down_of,
    joined,
    jointly,
    kept,
    layers_of,
    of_layers,
    type_of,
)
from opensloth.engine.matmul import in_float32, products, with_share
from opensloth.hardware import TRITON

LAYERS = ("gate_proj", "up_proj", "down_proj")
MOST_RANK = 64  # of adapters whose share the kernel makes; with more it is no longer small


class Gated:
    """Before an MLP's own class among the bases, which does all that is not plain: merged adapters, dropout. Passes
    without the adapter round as those with it, so that a policy and its reference are equal where they are the same."""

    kind = "silu"

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        layers = [getattr(self, name) for name in LAYERS]
        alone = len(args) == 1 and not kwargs
        if alone and jointly(layers, args[0]):
            scalings, states, tensors = Parts.of(layers)
            x = args[0].to(type_of(args[0]))
            found: torch.Tensor = GatedMlp.apply(x, self.kind, scalings, states, *tensors)  # type: ignore[no-untyped-call]
        elif alone and not torch.is_grad_enabled() and all(is_bare(layer) for layer in layers):
            found = self.down_proj(opened(self.gate_proj(*args), self.up_proj(*args), [], self.kind))
        else:
            found = super().forward(*args, **kwargs)  # type: ignore[misc]
        return found


def is_bare(layer: Any) -> bool:
    """Whether a layer is its base alone at the moment: the reference of a policy that began without an adapter."""
    return isinstance(layer, OneMatmul) and layer.disable_adapters and not layer.merged and "forward" not in vars(layer)


class GatedMlp(torch.autograd.Function):
    """x (..., hidden) -> (..., hidden). The bases are frozen: they take no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kind: str,
        scalings: tuple[float, ...],
        states: tuple[Any, ...],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        layers = layers_of(tensors, scalings, states, rows.dtype)
        pair, last = layers[:2], layers[2]
        low = rows @ down_of(pair).T
        shares = shares_of(low, pair, last)
        if shares:
            g, u = (F.linear(rows, layer.matrix, layer.bias) for layer in pair)
        else:
            lows = zip(pair, divided(low, pair), strict=True)
            g, u = (with_share((part, layer.up.T), (rows, layer.matrix.T), layer.bias) for layer, part in lows)
        h = opened(g, u, shares, kind)
        last_low = h @ last.down.T
        out = with_share((last_low, last.up.T), (h, last.matrix.T), last.bias)
        ctx.save_for_backward(rows, g, u, low, last_low, *kept(layers))
        ctx.kind, ctx.scalings, ctx.states = kind, scalings, states
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, g, u, low, last_low, *tensors = ctx.saved_tensors
        layers = again(tensors, ctx.states)
        pair, last = layers[:2], layers[2]
        out = upstream[0].reshape(-1, upstream[0].shape[-1])
        last_slopes = out @ last.up
        shares = shares_of(low, pair, last)
        if shares:
            to_g, to_u, h = back_through(g, u, out @ last.matrix, [*shares, last_slopes, last.down], ctx.kind)
        else:
            to_h = products([last_slopes, out], [last.down, last.matrix])
            to_g, to_u, h = back_through(g, u, to_h, [], ctx.kind)
        slopes = joined([to_g @ pair[0].up, to_u @ pair[1].up])
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = products([slopes, to_g, to_u], chain([down_of(pair)], (layer.matrix for layer in pair)))
            to_x = to_x.view(upstream[0].shape)
        to_downs = (*divided(in_float32(slopes.T, rows), pair, 0), in_float32(last_slopes.T, h))
        lows = (*divided(low, pair), last_low)
        return to_x, None, None, None, *of_layers(to_downs, (to_g, to_u, out), lows, ctx.scalings)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether engine/gate.py takes x."""
    return x.is_cuda and TRITON


def shares_of(low: torch.Tensor, pair: Sequence[Layer], last: Layer) -> list[torch.Tensor]:
    """What the kernels are given to make the adapters' share themselves; nothing where matmuls make it."""
    ranks = {len(layer.down) for layer in pair}
    if not has_kernel(low) or len(ranks) > 1 or max(*ranks, len(last.down)) > MOST_RANK:
        return []
    return [low, *(layer.up for layer in pair)]


def opened(g: torch.Tensor, u: torch.Tensor, shares: list[torch.Tensor], kind: str) -> torch.Tensor:
    """act(g) u, with what adapters add to both; computed in fp32 and rounded once. All are (tokens, width)."""
    if not has_kernel(g):
        return (act(g.float(), kind) * u.float()).to(g.dtype)
    found: torch.Tensor = (as_one if torch.compiler.is_compiling() else by_kernel)(g, u, shares, kind)
    return found


def back_through(
    g: torch.Tensor, u: torch.Tensor, slopes: torch.Tensor, shares: list[torch.Tensor], kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of g and u by that of h, and h. `shares` end with the two whose product is added to `slopes`."""
    if not has_kernel(g):
        x, value, slope = g.float(), u.float(), slopes.float()
        of_act = slope * value
        to_g = (
            torch.ops.aten.silu_backward(of_act, x)
            if kind == "silu"
            else torch.ops.aten.gelu_backward(of_act, x, approximate="tanh")
        )
        found = act(x, kind)
        return to_g.to(g.dtype), (slope * found).to(g.dtype), (found * value).to(g.dtype)
    back: tuple[torch.Tensor, ...] = (back_as_one if torch.compiler.is_compiling() else back_by_kernel)(
        g, u, slopes, shares, kind
    )
    return back[0], back[1], back[2]


def act(x: torch.Tensor, kind: str) -> torch.Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh")


def by_kernel(g: torch.Tensor, u: torch.Tensor, shares: list[torch.Tensor], kind: str) -> torch.Tensor:
    from opensloth.engine.gate import Shares, gated

    return gated(g, u, Shares(*shares) if shares else None, kind)


def back_by_kernel(
    g: torch.Tensor, u: torch.Tensor, slopes: torch.Tensor, shares: list[torch.Tensor], kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from opensloth.engine.gate import Shares, gated_back

    if not shares:
        return gated_back(g, u, slopes, kind=kind)
    return gated_back(g, u, slopes, Shares(*shares[:3]), (shares[3], shares[4]), kind)


# the compiler looks into neither
as_one = torch.library.custom_op(
    "opensloth::gate", by_kernel, mutates_args=(), schema="(Tensor g, Tensor u, Tensor[] shares, str kind) -> Tensor"
)
as_one.register_fake(lambda g, *_: torch.empty_like(g))
back_as_one = torch.library.custom_op(
    "opensloth::gate_back",
    back_by_kernel,
    mutates_args=(),
    schema="(Tensor g, Tensor u, Tensor slopes, Tensor[] shares, str kind) -> (Tensor, Tensor, Tensor)",
)
back_as_one.register_fake(lambda g, *_: (torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)))
