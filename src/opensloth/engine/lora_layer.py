"""LoRA's linear layers without passes of their own over the activations: y = x W' + (x A') (s B)' in matmuls alone. A
bias, which few models have, is a pass, so that it comes last.

PEFT adds and scales the adapter's share in passes over all activations, and casts them to fp32 where the adapter is
kept so. Here the share is written first, and the base's matmul adds to it before it rounds, with copies of A and B in
the base's type; weights, gradients and optimizer state of the adapter stay fp32. The other way round, which is PEFT's,
a share below the last digit of what the base gives is rounded away, and that of a young adapter is.

Layers that read the same input (queries, keys and values) go through it together: it is read once for all of their A,
and their gradients of it are added by matmuls. The layer is PEFT's in every other respect: what it saves, merges and
disables.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from torch import nn

from opensloth.config.run import TrainOptions
from opensloth.engine.matmul import dense, in_float32, products, with_share

TOGETHER = ("q_proj", "k_proj", "v_proj")  # layers of a module that read its input


class OneMatmul:
    """Before a layer of PEFT's among the bases: another forward where that is the same. All else is left to PEFT."""

    given: tuple[torch.Tensor, torch.Tensor] | None = None  # an input, and what was computed of it with its neighbours
    active_adapters: Sequence[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], Any]

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given, self.given = self.given, None
        if given is not None and given[0] is x:
            return given[1]
        if args or kwargs or not serves(self, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if has_own_kernel(self, x):
            return added(self, x)
        return together(x, [self])[0]


class LoraLinear(OneMatmul, Linear):  # type: ignore[misc]
    pass


class Together:
    """Before an attention module's own class among the bases: its projections read their input together."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        layers = [getattr(self, name) for name in TOGETHER]
        if x is None or not jointly(layers, x):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        for layer, found in zip(layers, together(x, layers), strict=True):
            layer.given = x, found
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:  # where memory ran out in between, they would hold on to all activations of the layers before
            for layer in layers:
                layer.given = None


def jointly(layers: Sequence[Any], x: torch.Tensor) -> bool:
    """Whether layers are computed together for x: with or without a gradient, so that both round alike, but for a base
    in 4 bits in a decoding step."""
    if any("forward" in vars(layer) for layer in layers):  # merged for a rollout
        return False
    if not all(serves(layer, x) for layer in layers):
        return False
    return not any(has_own_kernel(layer, x) for layer in layers)


def has_own_kernel(layer: Any, x: torch.Tensor) -> bool:
    """Whether a base is in 4 bits and x (..., positions, in) one new position of each row: a decoding step."""
    decodes = not torch.is_grad_enabled() and x.dim() > 2 and x.shape[-2] == 1
    return decodes and state_of(layer.get_base_layer()) is not None


def serves(layer: Any, x: torch.Tensor) -> bool:
    """Whether a layer is, for x and as it is now, a frozen base that computes in x's type, and one plain adapter."""
    if not isinstance(layer, OneMatmul):
        return False
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
    if layer.disable_adapters or layer.merged or not is_plain(layer, name):
        return False
    base = layer.get_base_layer()
    state = state_of(base)
    kind = base.weight.dtype if state is None else base.compute_dtype
    return bool(kind == type_of(x) and not base.weight.requires_grad)


def is_plain(layer: Any, name: str, trains: bool = False) -> bool:
    """Whether an adapter is LoRA as first described (arXiv 2106.09685), without a variant or dropout in use.

    Args:
        trains: as if the layer trained already.
    """
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    return isinstance(layer.lora_dropout[name], nn.Identity) or not (layer.training or trains)


def will_be_plain(options: TrainOptions) -> bool:
    """As `is_plain` of layers that train, on bases that ours serve, by what a job asks for."""
    return not (options.full_finetuning or options.load_in_8bit or options.lora_dropout)


def state_of(base: Any) -> Any:
    """How the weights of a layer are quantized; None where they are plain numbers."""
    return getattr(base.weight, "quant_state", None)


class Parts(NamedTuple):
    """Of some layers: what an autograd function is given of them. `scalings` and `states` have one entry a layer,
    `tensors` four: weight, bias or None, A and B."""

    scalings: tuple[float, ...]
    states: tuple[Any, ...]
    tensors: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, layers: Sequence[Any]) -> "Parts":
        scalings, states, tensors = [], [], []
        for layer in layers:
            name, base = layer.active_adapters[0], layer.get_base_layer()
            scalings.append(layer.scaling[name])
            states.append(state_of(base))
            tensors += [base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight]
        return cls(tuple(scalings), tuple(states), tuple(tensors))


def together(x: torch.Tensor, layers: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """What each of some layers makes of x (..., in): (..., out)."""
    scalings, states, tensors = Parts.of(layers)
    found: tuple[torch.Tensor, ...] = Adapted.apply(x.to(type_of(x)), scalings, states, *tensors)  # type: ignore[no-untyped-call]
    return found


def added(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a layer on a quantized base makes of x in a decoding step: its own kernel reads few rows best, and rounds
    before the adapter's share is added. That much a rollout is behind a young adapter; importance weights correct it.
    """
    scalings, states, tensors = Parts.of([layer])
    (ours,) = layers_of(tensors, scalings, states, type_of(x))
    rows = x.reshape(-1, x.shape[-1]).to(ours.down.dtype)
    found: torch.Tensor = layer.get_base_layer()(x)
    return torch.addmm(found.reshape(-1, found.shape[-1]), rows @ ours.down.T, ours.up.T).view(found.shape)


def type_of(x: torch.Tensor) -> torch.dtype:
    """What a layer computes in, given x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Layer(NamedTuple):
    """A frozen base, and its adapter in the type of the computation: y = x matrix' + bias + (x down') up'.

    Attributes:
        weight: (out, in) as it is stored, quantized as `state` tells.
        down: A, (rank, in).
        up: s B, (out, rank). The factor on a small matrix costs nothing beside the large ones.
    """

    weight: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    state: Any
    bias: torch.Tensor | None = None

    @property
    def matrix(self) -> torch.Tensor:
        return dense(self.weight, self.state, self.down.dtype)


def layers_of(
    tensors: Sequence[Any], scalings: Sequence[float], states: Sequence[Any], dtype: torch.dtype
) -> list[Layer]:
    """Layers by their `Parts`."""
    fours = zip(*(tensors[kind::4] for kind in range(4)), scalings, states, strict=True)
    return [
        Layer(weight, a.to(dtype), (b if scaling == 1 else b * scaling).to(dtype), state, bias)
        for weight, bias, a, b, scaling, state in fours
    ]


def kept(layers: Sequence[Layer]) -> list[torch.Tensor]:
    """What `again` needs of layers."""
    return [tensor for layer in layers for tensor in (layer.weight, layer.down, layer.up)]


def again(tensors: Sequence[torch.Tensor], states: Sequence[Any]) -> list[Layer]:
    """The layers of `kept`, without their biases."""
    of_each = zip(tensors[::3], tensors[1::3], tensors[2::3], states, strict=True)
    return [Layer(weight, down, up, state) for weight, down, up, state in of_each]


def down_of(layers: Sequence[Layer]) -> torch.Tensor:
    """The A of some layers, one below the other: (sum of ranks, in)."""
    return joined([layer.down for layer in layers], 0)


def joined(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def divided(low: torch.Tensor, layers: Sequence[Layer], dim: int = 1) -> tuple[torch.Tensor, ...]:
    """What `joined` has joined, by the ranks of layers."""
    return (low,) if len(layers) == 1 else torch.split(low, [len(layer.down) for layer in layers], dim)


class Adapted(torch.autograd.Function):
    """x (..., in) -> (..., out) of each layer. The bases are frozen: they take no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scalings: tuple[float, ...],
        states: tuple[Any, ...],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        layers = layers_of(tensors, scalings, states, rows.dtype)
        low = rows @ down_of(layers).T
        outs = tuple(
            with_share((part, layer.up.T), (rows, layer.matrix.T), layer.bias)
            for layer, part in zip(layers, divided(low, layers), strict=True)
        )
        ctx.save_for_backward(rows, low, *kept(layers))
        ctx.scalings, ctx.states = scalings, states
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, *tensors = ctx.saved_tensors
        layers = again(tensors, ctx.states)
        outs = [slopes.reshape(-1, slopes.shape[-1]) for slopes in upstream]
        to_low = joined([out @ layer.up for out, layer in zip(outs, layers, strict=True)])
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = products([to_low, *outs], chain([down_of(layers)], (layer.matrix for layer in layers)))
            to_x = to_x.view(*upstream[0].shape[:-1], -1)
        to_downs = divided(in_float32(to_low.T, rows), layers, 0)
        return to_x, None, None, *of_layers(to_downs, outs, divided(low, layers), ctx.scalings)


def of_layers(
    to_downs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    lows: Sequence[torch.Tensor],
    scalings: Sequence[float],
) -> list[torch.Tensor | None]:
    """Gradients in the order of `Parts.tensors`, those of each B made of what its layer gave and was given."""
    found: list[torch.Tensor | None] = []
    for to_down, out, low, scaling in zip(to_downs, outs, lows, scalings, strict=True):
        to_up = in_float32(out.T, low)
        found += [None, None, to_down, to_up if scaling == 1 else to_up * scaling]
    return found


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
        pass

    return {kinds.pop(): LoraLinear4bit, nn.Linear: LoraLinear}
