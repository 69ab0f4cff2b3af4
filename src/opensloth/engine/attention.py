"""Attention over packs: rows that lie one behind the other never see each other, and no mask is built.

One implementation is registered with transformers under `NAME`. On a CUDA card (sm80 or newer, 16-bit) it is torch's
own variable-length flash attention; everywhere else it is scaled-dot-product attention, row by row. Both are exact.
The boundaries come with each batch as `cu_seq_lens_q` (cumulative row lengths, int32, shape (rows + 1,)).
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig

# "flash" in the name would make transformers treat it as FlashAttention; an unregistered mask makes it build none.
NAME = "opensloth_varlen"


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a pack.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads (grouped queries).
        sliding_window: a token sees itself and `sliding_window - 1` tokens before it, as transformers counts.
    Returns:
        (1, tokens, heads, head size), None.
    Raises:
        ValueError: a batch without boundaries, or with a padding mask, which this implementation cannot honour.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention needs cu_seq_lens_q and max_length_q, one pack a batch, and no mask")
    if dropout:
        raise ValueError("packed attention has no dropout")
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    if has_kernel(q):
        out = flash_varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        out = row_by_row(q, k, v, cu_seq_lens_q, scaling, sliding_window)
    return out[None], None


def has_kernel(q: torch.Tensor) -> bool:
    """Whether torch's varlen kernel takes these tensors: CUDA sm80+, 16-bit, head size a multiple of 8 up to 256."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    extra: dict[str, Any] = {}
    # torch 2.11 takes grouped queries as they are, 2.12 and newer want to be told (varlen.py checks the head counts)
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        extra["enable_gqa"] = True
    # the window must be a tuple: torch recognizes causal attention by comparing it with (-1, 0)
    window_size = (window - 1, 0) if window else (-1, 0)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), boundaries, boundaries, longest, longest,
        scale=scaling, window_size=window_size, **extra,
    )  # fmt: skip
    return out if isinstance(out, torch.Tensor) else out[0]


def row_by_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    lengths = [n for n in boundaries.diff().tolist() if n]  # padding entries repeat the last boundary
    parts = zip(*(torch.split(x, lengths, 1) for x in (q, k, v)), strict=True)
    out = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scaling)
        if not window or a.shape[1] <= window
        else F.scaled_dot_product_attention(a, b, c, attn_mask=band(a.shape[1], window, a.device), scale=scaling)
        for a, b, c in parts
    ]
    return torch.cat(out, 1).transpose(0, 1)


def band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """The causal mask of a sliding window: True where a token (first index) sees another (second index)."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    return (behind >= 0) & (behind < window)


def why_not(config: PretrainedConfig) -> str:
    """Why a model cannot use packed attention, or an empty string. The words end up in one line for the user."""
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None):
        return "it caps attention logits, which the packed kernel cannot"
    if getattr(text, "attention_dropout", 0):
        return "it uses attention dropout"
    return ""


AttentionInterface.register(NAME, varlen)
