"""Attention of one new position where several query heads share a key head, without copying keys for each of them.

transformers repeats keys and values for every query head at every token, which takes most of the time of a step on a
CPU. With a single new position the heads of a group can stand in the place of positions instead: the same products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "opensloth_grouped"


def grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa, as transformers calls it.

    Args:
        query: (rows, heads, new positions, head size); key and value have all positions and may have fewer heads.
        attention_mask: (rows, 1, new positions, positions), True where a position is seen.
    Returns:
        (rows, new positions, heads, head size), None.
    """
    rows, heads, new, size = query.shape
    if new != 1 or more.get("position_bias") is not None:
        out: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)[
            0
        ]
        return out, None
    groups = heads // key.shape[1]
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, groups, -1)
    together = query.reshape(rows, key.shape[1], groups, size)
    out = F.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, out.shape[-1]), None


AttentionInterface.register(NAME, grouped)
AttentionMaskInterface.register(NAME, sdpa_mask)
