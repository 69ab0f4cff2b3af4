"""Decoding steps in which the attention kernel normalizes and rotates the heads itself: one kernel instead of four.

While it lasts, the model's attention layers have another forward. It is for layers that do nothing else between their
projections than norms of heads, if any, and rotary positions by halves; `GraphDecoder` tries it on its first batch, and
keeps it if the logits come out the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from opensloth.engine.fused import Normed, epsilon_of
from opensloth.engine.lora import base_of
from opensloth.rollout.merge import projected

Forwards = dict[Any, Callable[..., Any]]
"""Modules (attention layers here, whole layers and MLPs in rollout/block.py), each with another forward for decoding
steps. It is made once: what recorded steps read must outlive the recording."""

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}


def forwards(policy: torch.nn.Module) -> Forwards:
    """For the attention of each layer of a model; none where one of them has other parts."""
    base: Any = base_of(policy)
    found = [getattr(layer, "self_attn", None) for layer in base.get_decoder().layers]
    return {layer: forward_of(layer) for layer in found} if all(map(serves, found)) else {}


def serves(layer: Any) -> bool:
    if layer is None or not all(hasattr(layer, name) for name in ("head_dim", "scaling", "layer_idx")):
        return False
    config = getattr(layer, "config", None)
    if getattr(config, "clip_qkv", None) or "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        return False  # values are cut, or scaled by their position: one trial need not show it
    parts = {name for name, _ in layer.named_children()}
    if parts - NORMS != PROJECTIONS or len(parts & NORMS) == 1:
        return False
    norms: list[Any] = [getattr(layer, name) for name in parts & NORMS]
    if not all(isinstance(norm, Normed) for norm in norms):
        return False
    return all(norm.weight.shape == (layer.head_dim,) for norm in norms)


@contextmanager
def turning(forwards: Forwards) -> Iterator[None]:
    """Decoding steps over shared prompts by the other forwards."""
    try:
        for layer, forward in forwards.items():
            layer.forward = forward  # of the instance: it goes before the class's method
        yield
    finally:
        for layer in forwards:
            layer.__dict__.pop("forward", None)


def forward_of(layer: Any) -> Callable[..., Any]:
    """As the layer's own, which still does what is no decoding step over shared prompts."""
    from opensloth.rollout.kernel import Norm, Turn, attend

    theirs, norms = layer.forward, None
    if hasattr(layer, "q_norm"):
        of_query, of_key = (
            Norm(norm.weight + norm.plus if norm.plus else norm.weight, epsilon_of(norm))
            for norm in (layer.q_norm, layer.k_norm)
        )
        norms = (of_query, of_key)

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        buffers: Any = None,
        residual: torch.Tensor | None = None,
        **words: Any,
    ) -> Any:
        if buffers is None or position_embeddings is None or position_embeddings[0].shape[-1] != layer.head_dim:
            found, shares = theirs(hidden_states, position_embeddings=position_embeddings, buffers=buffers, **words)
            return (found if residual is None else residual + found), shares
        cos, sin = (x.contiguous() for x in position_embeddings)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, layer.head_dim))[:, 0]
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        kept = buffers.layers[layer.layer_idx]
        out = attend(
            query, key, value, kept.keys, kept.values, kept.prompt_keys, kept.prompt_values, buffers.source,
            buffers.starts, buffers.end, buffers.own, layer.scaling, Turn(cos, sin, norms),
        )  # fmt: skip
        return projected(layer.o_proj, out.flatten(1)[:, None], residual), None

    return forward
