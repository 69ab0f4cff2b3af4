"""Norms and rotary positions as one kernel each, where transformers runs seven and five: on a card, in place.

A decoding step is a thousand short kernels, and between the matmuls of training there are passes over memory alone.
Both functions ask the model for what it computes before they put something else in its place; what they do not
recognize stays as it is.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opensloth.hardware import TRITON

MOST_HEADS = 256  # that one program normalizes
TOLERANCE = 0.02  # of the largest value: roundings of 16 bits stand in other places


def fuse(model: nn.Module) -> None:
    """Use the kernels in a model on a card, for as long as the process lasts."""
    for module in model.modules():
        fuse_norm(module)
    if TRITON:
        for name in {type(module).__module__ for module in model.modules()}:
            fuse_rotary(sys.modules[name])


class Normed:
    """Before a norm's own class among the bases: x / rms(x) * (weight + plus), by torch's kernel.

    It rounds once, at the end, where transformers' modules round before they multiply too.
    """

    plus = 0.0

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight + self.plus if self.plus else self.weight
        if apart(hidden_states):
            from opensloth.engine.norm import normalize

            return normalize(hidden_states, weight, epsilon_of(self))
        return F.rms_norm(hidden_states, weight.shape, weight, epsilon_of(self))


def apart(x: torch.Tensor) -> bool:
    """Whether x is on a card, the heads of a token beside each other and tokens apart, so that torch's norm would copy
    it first, and no gradient is wanted."""
    heads = x.dim() > 2 and x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] and x.shape[-2] <= MOST_HEADS
    return (
        x.is_cuda
        and heads
        and not x.is_contiguous()
        and TRITON
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def epsilon_of(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def fuse_norm(module: nn.Module) -> None:
    """Let a norm run on torch's kernel, if it is an RMS norm with a weight, or with one plus its weight (Gemma)."""
    weight = getattr(module, "weight", None)
    if isinstance(module, Normed) or not type(module).__name__.endswith("RMSNorm"):
        return
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or not isinstance(epsilon_of(module), float):
        return
    with torch.no_grad():
        x = torch.linspace(-3, 5, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
        expected = module(x)
        for plus in (0.0, 1.0):
            found = F.rms_norm(x, weight.shape, weight + plus, epsilon_of(module))
            if expected.dtype == found.dtype and same(found, expected):
                kind: Any = type(module)
                module.__class__ = fused_kind(kind, plus)
                return


@functools.cache
def fused_kind(kind: type[nn.Module], plus: float) -> type[nn.Module]:
    """A norm's class with our forward; one for all norms of a class, or the compiler would compile each layer anew."""
    return type(f"Fused{kind.__name__}", (Normed, kind), {"plus": plus})


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def fuse_rotary(modeling: Any) -> None:
    """Let a module of transformers rotate queries and keys in one kernel, if it does so by halves.

    The formula: arXiv 2104.09864, with the two of a pair half a head apart.
    """
    theirs = getattr(modeling, "apply_rotary_pos_emb", None)
    if theirs is None or hasattr(theirs, "theirs"):
        return
    from opensloth.engine.rotary import rotate, serves

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **words: Any) -> Any:
        # the compiler makes one kernel of theirs, with what stands around it
        if more or words or torch.compiler.is_compiling() or not serves(q, k, cos):
            return theirs(q, k, cos, sin, *more, **words)
        return rotate(q, k, cos, sin)

    ours.theirs = theirs  # type: ignore[attr-defined]
    q, k, cos, sin = (torch.linspace(-1, 2, n * 32).view(1, n, 1, 32) for n in (2, 1, 1, 1))
    try:
        expected = theirs(q, k, cos[0], sin[0] + 0.5)
    except (TypeError, ValueError, RuntimeError):  # it wants something else
        return
    half = torch.cat((-q[..., 16:], q[..., :16]), -1)
    if same(q * cos + half * (sin + 0.5), expected[0]):
        modeling.apply_rotary_pos_emb = ours
