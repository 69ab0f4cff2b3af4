"""FlashAttention 4 over the rows of a pack, as one operator that autograd and the compiler know.

The package flash-attn-4 is written in CuTe's Python and compiles a kernel when it is first asked for it, in about ten
seconds, which it keeps on the disk if it is told to. torch's own way to it is open to few pairs of versions: 2.11 has
no way back for rows of a pack, 2.13 understands the betas up to 4.0.0b19. The two functions that are called here have
kept the words and the results that are used since the first betas (read up to 4.0.0b36).
"""

import importlib
import os
from functools import cache
from typing import Any

import torch

from opensloth import paths
from opensloth.engine.attention import Boundaries

MODULE = "flash_attn.cute.interface"
TWO_BLOCKS = 129  # tokens; the backward pass has blocks of up to 128, and a kernel of its own for rows of one block
KEEPS, KEPT_IN = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Boundaries,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """As `attention.flash_varlen`, of the same arguments: (tokens, heads, head size)."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out: torch.Tensor = forward(q.contiguous(), k.contiguous(), v.contiguous(), *rows, scale, window or 0)[0]
    return out


@torch.library.custom_op("opensloth::flash4", mutates_args=())
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    longest_queries: int,
    longest_keys: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values, and the logarithm of each softmax's sum: (heads, tokens), fp32. `window` 0: none."""
    words = causal(queries, keys, longest_queries, longest_keys, scale, window)
    out, lse, *_ = package()._flash_attn_fwd(q, k, v, return_lse=True, **words)
    return out, lse


@torch.library.custom_op("opensloth::flash4_backward", mutates_args=())
def backward(
    upstream: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    longest_queries: int,
    longest_keys: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    longest_queries, longest_keys = max(longest_queries, TWO_BLOCKS), max(longest_keys, TWO_BLOCKS)
    words = causal(queries, keys, longest_queries, longest_keys, scale, window)
    to_q, to_k, to_v, *_ = package()._flash_attn_bwd(q, k, v, out, upstream, lse, **words)
    return to_q, to_k, to_v


def causal(
    queries: torch.Tensor, keys: torch.Tensor, longest_queries: int, longest_keys: int, scale: float, window: int
) -> dict[str, Any]:
    """What both functions are told. A token sees itself and what is before it, or `window` - 1 tokens of that."""
    words = {
        "cu_seqlens_q": queries,
        "cu_seqlens_k": keys,
        "max_seqlen_q": longest_queries,
        "max_seqlen_k": longest_keys,
        "softmax_scale": scale,
    }
    return words | ({"window_size_left": window - 1, "window_size_right": 0} if window else {"causal": True})


@cache
def package() -> Any:
    """flash-attn-4's own module, told to keep what it compiles, to which it listens only while it is imported.

    Raises:
        ImportError: it, or something that it needs, is not installed.
    """
    os.environ.setdefault(KEEPS, "1")
    os.environ.setdefault(KEPT_IN, str(paths.cache_dir() / "flash4"))
    return importlib.import_module(MODULE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, queries, keys, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, queries, keys)


def _backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return (*backward(upstream.contiguous(), *ctx.saved_tensors, *ctx.rest), *(None,) * 6)


forward.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)))
backward.register_fake(lambda _, q, k, v, *__: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
forward.register_autograd(_backward, setup_context=_keep)
