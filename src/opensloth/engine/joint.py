"""Adapted layers that are computed together: attention's projections, and all of a gated MLP.

A module gets another class, its own behind ours among the bases, so that what it is asked for beyond plain training
goes on as before. An MLP is tried first: one that does not compute the same stays as it is. Attention needs no trial:
what its projections were given is theirs for the very tensor that it was made of, and for no other.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opensloth.config.run import TrainOptions
from opensloth.engine.lora_layer import TOGETHER, OneMatmul, Together, is_plain, state_of, will_be_plain
from opensloth.engine.mlp import LAYERS, Gated, act

KINDS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu"}
TOLERANCE = 0.02  # of the largest value: roundings of 16 bits stand in other places
SPREAD = 30.0  # what g and u reach in the second half of a trial: some models cap them at 7 or 10


def join(model: nn.Module) -> None:
    """Let the adapted modules of a model compute what they can at once, for as long as it lives."""
    for module in list(model.modules()):
        theirs: Any = type(module)
        if adapted(module, TOGETHER):
            module.__class__ = joint_kind(theirs, Together)
        elif (kind := gate_of(module)) and adapted(module, LAYERS) and gates(module, kind):
            module.__class__ = joint_kind(theirs, Gated, kind)


def gate_of(module: nn.Module) -> str | None:
    """The activation of a module that has the layers of a gated MLP and no others; None of other modules."""
    if {name for name, _ in module.named_children()} != {*LAYERS, "act_fn"}:
        return None
    return KINDS.get(type(module.act_fn).__name__)


def will_be_gated(bare: Callable[[], nn.Module], options: TrainOptions) -> bool:
    """As `gated`, of a model that is not loaded yet and gets a new adapter: by the names of its parts, untried.

    Args:
        bare: makes the model without its weights; it is not asked where the options rule it out.
    """
    return will_be_plain(options) and {*LAYERS} <= {*options.lora_targets} and any(map(gate_of, bare().modules()))


def gated(model: nn.Module) -> bool:
    """Whether the MLPs of a model that trains are one function each."""
    found = [module for module in model.modules() if isinstance(module, Gated)]
    layers = [getattr(module, name) for module in found for name in LAYERS]
    return bool(found) and all(is_plain(layer, layer.active_adapters[0], trains=True) for layer in layers)


def adapted(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module has these layers, each of them ours, with one input."""
    layers = [getattr(module, name, None) for name in names]
    return not isinstance(module, Together | Gated) and all(isinstance(layer, OneMatmul) for layer in layers)


@functools.cache
def joint_kind(kind: type[nn.Module], ours: type[Any], act: str = "silu") -> type[nn.Module]:
    """A module's class with our forward; one for all modules of a class, or the compiler would compile each anew."""
    return type(f"{ours.__name__}{kind.__name__}", (ours, kind), {"kind": act})


@torch.no_grad()
def gates(mlp: Any, kind: str) -> bool:
    """Whether an MLP is D(act(G x) U x) and nothing else, as far as a trial with small and with large values shows.

    Its own flag says that it trains meanwhile, for a dropout that is no module; those of its layers do not.
    """
    base = mlp.gate_proj.get_base_layer()
    dtype = base.weight.dtype if state_of(base) is None else base.compute_dtype
    x = torch.linspace(-2, 2, 2 * base.in_features, device=base.weight.device, dtype=dtype).view(2, -1)
    small = min(part(x).abs().max().item() for part in (mlp.gate_proj, mlp.up_proj))
    trained, mlp.training = mlp.training, True
    try:
        return all(computes(mlp, kind, factor * x) for factor in (1.0, SPREAD / max(small, 1e-6)))
    except (TypeError, AttributeError):  # it wants or gives something else
        return False
    finally:
        mlp.training = trained


def computes(mlp: Any, kind: str, x: torch.Tensor) -> bool:
    theirs = mlp(x).float()
    ours = mlp.down_proj(act(mlp.gate_proj(x), kind) * mlp.up_proj(x)).float()
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())
