"""Attention over packs: rows that lie one behind the other never see each other, and no mask is built.

One implementation is registered with transformers under `NAME`. On a CUDA card (sm80 or newer, 16-bit) it is torch's
own variable-length flash attention; everywhere else it is scaled-dot-product attention, row by row. Both are exact.
The boundaries come with each batch as `cu_seq_lens_q` (cumulative row lengths, int32, shape (rows + 1,)).

Rows may share their beginnings: with `key_places` a row has fewer queries than keys, because the tokens that it begins
with lie in another row. Its queries are the last of its positions.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig

# "flash" in the name would make transformers treat it as FlashAttention; an unregistered mask makes it build none.
NAME = "opensloth_varlen"
SAYS_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # asked once: compiled layers cannot


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
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_places: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a pack.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads (grouped queries).
        sliding_window: a token sees itself and `sliding_window - 1` tokens before it, as transformers counts.
        cu_seq_lens_k, max_length_k: of the keys, where `key_places` (all keys,) says which token of the pack each is.
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
    rows = Boundaries(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    if key_places is not None and cu_seq_lens_k is not None and max_length_k is not None:
        k, v = k[key_places], v[key_places]
        rows = Boundaries(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    attend = flash if has_kernel(q) else row_by_row
    return attend(q, k, v, rows, scaling, sliding_window)[None], None


class Boundaries(NamedTuple):
    """Where rows begin and end among the queries and among the keys (cumulative, int32), and the longest of each."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Boundaries, float | None, int | None], torch.Tensor]
"""Of q, k and v (tokens, heads, head size), the rows among them, a scaling and a window: (tokens, heads, head size)."""


def has_kernel(q: torch.Tensor) -> bool:
    """Whether torch's varlen kernel takes these tensors: CUDA sm80+, 16-bit, head size a multiple of 8 up to 256."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Boundaries,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    extra: dict[str, Any] = {}
    # torch 2.11 takes grouped queries as they are, 2.12 and newer want to be told (varlen.py checks the head counts)
    if q.shape[1] != k.shape[1] and SAYS_GROUPED:
        extra["enable_gqa"] = True
    # the window must be a tuple: torch recognizes causal attention by comparing it with (-1, 0)
    window_size = (window - 1, 0) if window else (-1, 0)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), *rows,
        scale=scaling, window_size=window_size, **extra,
    )  # fmt: skip
    return out if isinstance(out, torch.Tensor) else out[0]


flash: Attention = flash_varlen
"""What computes packs on a card: torch's own, or what engine/flash.py has put in its place for the whole process."""


def row_by_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Boundaries,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    # padding entries repeat the last boundary
    queries, keys = ([n for n in ends.diff().tolist() if n] for ends in (rows.queries, rows.keys))
    parts = zip(torch.split(q, queries, 1), torch.split(k, keys, 1), torch.split(v, keys, 1), strict=True)
    out = []
    for a, b, c in parts:
        new, seen = a.shape[1], b.shape[1]
        square = new == seen and (not window or seen <= window)
        mask = None if square else band(new, seen, window or seen, a.device)
        out.append(F.scaled_dot_product_attention(a, b, c, attn_mask=mask, is_causal=square, scale=scaling))
    return torch.cat(out, 1).transpose(0, 1)


def band(new: int, seen: int, window: int, device: torch.device) -> torch.Tensor:
    """The causal mask of a sliding window over `seen` positions for the last `new` of them: (new, seen), True where a
    position sees another."""
    behind = torch.arange(seen - new, seen, device=device)[:, None] - torch.arange(seen, device=device)[None, :]
    return (behind >= 0) & (behind < window)


@cache
def shares(device: torch.device) -> bool:
    """Whether rows with fewer queries than keys come out right on this device.

    torch does not say where its kernel puts the diagonal then; it is asked once, with numbers.
    """
    if device.type != "cuda":
        return True
    chooser = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64, generator=chooser, device=device).bfloat16() for n in (5, 12, 12))
    if not has_kernel(q):
        return True
    queries, keys = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ((0, 2, 5), (0, 6, 12)))
    rows = Boundaries(queries, keys, 3, 6)
    difference = flash(q, k, v, rows, None, None) - row_by_row(q, k, v, rows, None, None)
    return bool(difference.abs().max() < 0.05)


def why_not(config: PretrainedConfig) -> str:
    """Why a model cannot use packed attention, or an empty string. The words end up in one line for the user."""
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None):
        return "it caps attention logits, which the packed kernel cannot"
    if getattr(text, "attention_dropout", 0):
        return "it uses attention dropout"
    return ""


AttentionInterface.register(NAME, varlen)
