"""What stands between the matmuls of a decoding step's layers: their sums are added by the matmuls before them, and the
gate of the MLP is one kernel. Three launches a layer fewer, each of which took as long as a norm.

It is for layers of the common form, x + attention(norm(x)) and then x + mlp(norm(x)), whose attention is turned already
(rollout/turn.py); `GraphDecoder` tries it on its first batch, and keeps it if the logits come out the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opensloth.engine.lora import base_of
from opensloth.rollout.merge import projected
from opensloth.rollout.turn import Forwards

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
SILU = {"SiLU", "SiLUActivation"}


def forwards(policy: nn.Module) -> Forwards:
    """For each layer of a model, and its MLP; none where one of them has another form."""
    base: Any = base_of(policy)
    layers = list(base.get_decoder().layers)
    if not all(map(serves, layers)):
        return {}
    return {layer: layer_forward(layer) for layer in layers} | {layer.mlp: mlp_forward(layer.mlp) for layer in layers}


def serves(layer: Any) -> bool:
    if {name for name, _ in layer.named_children()} != PARTS:
        return False
    return {name for name, _ in layer.mlp.named_children()} == GATED and type(layer.mlp.act_fn).__name__ in SILU


def layer_forward(layer: Any) -> Callable[..., torch.Tensor]:
    """hidden_states (rows, 1, hidden size) -> the same of the next layer."""

    def forward(hidden_states: torch.Tensor, **words: Any) -> torch.Tensor:
        normed = layer.input_layernorm(hidden_states)
        attended, _ = layer.self_attn(hidden_states=normed, residual=hidden_states, **words)
        out: torch.Tensor = layer.mlp(layer.post_attention_layernorm(attended), residual=attended)
        return out

    return forward


def mlp_forward(mlp: Any) -> Callable[..., torch.Tensor]:
    from opensloth.engine.gate import gated

    def forward(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return projected(mlp.down_proj, gated(mlp.gate_proj(x), mlp.up_proj(x)), residual)

    return forward
