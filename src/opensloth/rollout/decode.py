"""Our own decoding loop: the same completions as transformers' `generate`, with less work.

Each distinct prompt goes through the model once, whatever the size of its group; keys and values are laid out once, not
copied at every token (here) nor for every head (grouped.py); and what has ended leaves the batch. It serves
transformers' own models with plain attention over everything; `why_not` says which it does not, and these are left to
`generate`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from opensloth.engine import attention
from opensloth.engine.lora import base_of
from opensloth.rollout import grouped
from opensloth.rollout.sampling import Sampling, choose

WORDS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
Halt = Callable[[], bool]
"""Whether completions are no longer wanted. It is asked at every token, and looks at nothing on the card."""

LEAVE = 0.8  # the batch shrinks when no more than this share of it goes on: shrinking copies the memory


class Halted(Exception):
    """Completions that were being written are no longer wanted."""


def never() -> bool:
    return False


def go_on(halt: Halt) -> None:
    """Raise Halted where `halt` says so."""
    if halt():
        raise Halted


def why_not(policy: torch.nn.Module, longest: int) -> str:
    """Why this loop cannot complete prompts with a model, or an empty string. The words end up in one line.

    It keeps keys and values as one tensor each a layer, and lets a token see all positions before it.

    Args:
        longest: tokens of the longest prompt and its completion: within a window, a model that has one sees everything.
    """
    base = base_of(policy)
    if "unsloth" in sys.modules or not isinstance(base, PreTrainedModel):
        return "its forward pass is not transformers' own"  # unsloth puts its own, with their cache, in their place
    config = base.config
    if not type(base).__module__.startswith("transformers."):
        return "its code is not in transformers"
    if config.get_text_config(decoder=True) is not config:
        return "it reads more than text"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention logits"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"its attention is {config._attn_implementation}"
    if not inspect.signature(type(base).forward).parameters.keys() >= WORDS:
        return "its forward pass takes other words"
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "it keeps more than keys and values"
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    if windows and longest > min(windows):
        return f"{longest:,} tokens are more than its window of {min(windows):,}"
    return ""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values (rows, heads, positions, head size), in buffers with room for what is to come."""

    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def spread(self, rows: torch.Tensor, room: int) -> None:
        """Row i becomes what row `rows[i]` was, with room for so many more positions."""
        old = (self.keys, self.values)
        length = self.get_seq_length()
        keys, values = (x.new_empty(len(rows), x.shape[1], length + room, x.shape[3]) for x in old)
        for buffer, x in zip((keys, values), old, strict=True):
            buffer[:, :, :length] = x[rows]
        self.buffers = (keys, values)
        self.show(length)

    def show(self, length: int) -> None:
        if self.buffers is not None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.buffers is None:
            super().update(key_states, value_states, *args, **kwargs)
            return self.keys, self.values
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.show(end)
        return self.keys, self.values


@contextmanager
def attention_by(policy: torch.nn.Module, name: str) -> Iterator[None]:
    """The model with another attention, by its name in transformers."""
    base: Any = base_of(policy)
    before = base.config._attn_implementation
    set_attention(base, name)
    try:
        yield
    finally:
        set_attention(base, before)


def set_attention(base: Any, name: str) -> None:
    if base.config.get_text_config(decoder=True) is base.config:
        base.config._attn_implementation = name  # all its layers have this config; to look through them takes 10 ms
    else:
        base.set_attn_implementation(name)


class Laid(NamedTuple):
    """Each distinct prompt once, padded on the left: `ids` and `mask` (distinct prompts, longest).

    `source` has the row of each prompt, of those that were asked.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    source: list[int]


def lay_out(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Laid:
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: at for at, prompt in enumerate(distinct)}
    return Laid(*left_padded(distinct, pad, device), [place[tuple(prompt)] for prompt in prompts])


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (prompts, longest)."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def decode(
    policy: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    pad: int,
    max_new: int,
    sampling: Sampling,
    uniforms: torch.Tensor | None,
    halt: Halt = never,
) -> tuple[list[list[int]], list[list[float]]]:
    """One batch. `uniforms`: (prompts, max_new), on the model's device.

    Returns:
        For each prompt the tokens up to the first stop token, with it, and their log-probabilities.
    Raises:
        Halted: as soon as `halt` says so.
    """
    device = next(policy.parameters()).device
    ids, mask, places = lay_out(prompts, pad, device)
    source, longest = torch.tensor(places, device=device), ids.shape[1]
    ends = torch.tensor(list(stops), dtype=torch.long, device=device)
    cache = Cache(layers=[RoomyLayer() for _ in DynamicCache(config=policy.config).layers])
    rows = torch.arange(len(prompts), device=device)  # which completions are in the batch
    tokens = torch.full((len(prompts), max_new), pad, device=device)
    logprobs = torch.zeros((len(prompts), max_new), device=device)
    lengths = torch.full((len(prompts),), max_new, device=device)
    open_ = torch.ones(len(prompts), dtype=torch.bool, device=device)
    with attention_by(policy, grouped.NAME):
        logits = step(policy, ids, mask, cache)[source]
        for layer in cache.layers:
            layer.spread(source, max_new)
        mask = torch.cat([mask[source], mask.new_ones(len(prompts), max_new)], 1)
        for at in range(max_new):
            go_on(halt)
            chosen, values = choose(logits, sampling, None if uniforms is None else uniforms[rows, at])
            tokens[rows, at], logprobs[rows, at] = chosen, values
            ended = torch.isin(chosen, ends) & open_
            lengths[rows[ended]] = at + 1
            open_ &= ~ended
            left = int(open_.sum())
            if left == 0 or at + 1 == max_new:
                break
            if left <= LEAVE * len(rows):
                stay = open_.nonzero()[:, 0]
                for layer in cache.layers:
                    layer.spread(stay, max_new - at)
                rows, chosen, mask, open_ = rows[stay], chosen[stay], mask[stay], open_[stay]
            logits = step(policy, chosen[:, None], mask[:, : longest + at + 1], cache)
    ended_at = lengths.tolist()
    return (
        [row[:n] for row, n in zip(tokens.tolist(), ended_at, strict=True)],
        [row[:n] for row, n in zip(logprobs.tolist(), ended_at, strict=True)],
    )


def step(policy: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The logits after the last of `ids` (rows, new positions); `mask` is over the old positions too."""
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
    out = policy(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    logits: torch.Tensor = out.logits[:, -1]
    return logits
