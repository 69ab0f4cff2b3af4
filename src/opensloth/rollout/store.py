"""Where keys and values of a batch of completions lie while it is written: at addresses that never change.

`OwnRows` gives each completion a row with its prompt in front, and masks what is not there: any attention serves. It
copies a prompt for each completion, and attention costs what a bucket of positions holds. `SharedPrompts` keeps each
prompt once and what was written apart from it, for the kernel of rollout/kernel.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from opensloth.engine.memory import head_size
from opensloth.hardware import TRITON
from opensloth.rollout import grouped

BUCKET = 64  # positions of the cache; attention costs what the bucket holds
LARGEST_HEAD = 256
OLDEST = (8, 0)  # compute capability


class Store(Protocol):
    """What a decoder asks of either kind.

    Attributes:
        attention: the implementation that a step runs with, by its name in transformers.
        prompts, rows, longest, new: how many distinct prompts and completions it holds, and their most tokens.
    """

    attention: str
    prompts: int
    rows: int
    longest: int
    new: int

    def begin(self, cache: Cache, mask: torch.Tensor, source: torch.Tensor) -> None:
        """Take over the prompts.

        Args:
            cache: of the distinct prompts, padded on the left as `mask` (distinct prompts, longest) says.
            source: (completions,) the prompt of each row.
        """

    def span(self, positions: int) -> int:
        """What a step over so many positions differs by from one over others, and needs a recording of its own."""

    def inputs(self, count: int, span: int) -> dict[str, Any]:
        """What the model is given to compute the first `count` rows."""

    def step_done(self) -> None:
        """One more position is there."""

    def move(self, rows: torch.Tensor, positions: int) -> None:
        """Row i becomes what row `rows[i]` was, so many positions of it."""


Make = Callable[[Cache, int, int, int, int, torch.device], Store]
"""Room for so many prompts and rows, of so many tokens, in the shapes and types of the layers of a cache."""


def move(layers: Sequence[DynamicLayer], rows: torch.Tensor, positions: int) -> None:
    """Row i of the keys and values becomes what row `rows[i]` was, so many positions of it."""
    for layer in layers:
        for mine in (layer.keys, layer.values):
            mine[: len(rows), :, :positions] = mine[rows, :, :positions]


class OwnLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values (rows, heads, positions, head size).

    Attributes:
        slot: (1,), where the next position is written; shared by all layers.
        count, visible: rows, and positions of each, that attention looks at.
    """

    def __init__(self, like: DynamicLayer, rows: int, length: int, slot: torch.Tensor) -> None:
        super().__init__()
        shape = (rows, like.keys.shape[1], length, like.keys.shape[3])
        self.keys, self.values = like.keys.new_zeros(shape), like.values.new_zeros(shape)
        self.is_initialized = True
        self.slot = slot
        self.count, self.visible = rows, length

    def fill(self, prompt: DynamicLayer, source: torch.Tensor) -> None:
        """Row i begins with what row `source[i]` of the prompts' cache holds."""
        for mine, theirs in ((self.keys, prompt.keys), (self.values, prompt.values)):
            mine[: len(source), :, : theirs.shape[2]] = theirs[source]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[: self.count], self.values[: self.count]
        keys.index_copy_(2, self.slot, key_states)
        values.index_copy_(2, self.slot, value_states)
        return keys[:, :, : self.visible], values[:, :, : self.visible]


class OwnRows:
    """A row for each completion, its prompt in front."""

    attention = grouped.NAME

    def __init__(self, like: Cache, prompts: int, rows: int, longest: int, new: int, device: torch.device) -> None:
        self.prompts, self.rows, self.longest, self.new = prompts, rows, longest, new
        length = bucket(longest + new)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = [OwnLayer(layer, rows, length, self.slot) for layer in like.layers]
        self.cache = Cache(layers=self.layers)
        self.seen = torch.zeros((rows, 1, 1, length), dtype=torch.bool, device=device)

    def begin(self, cache: Cache, mask: torch.Tensor, source: torch.Tensor) -> None:
        for layer, prompt in zip(self.layers, cache.layers, strict=True):
            layer.fill(prompt, source)
        self.seen.zero_()
        self.seen[:, 0, 0, 0] = True  # a row that sees nothing would be one of NaN
        self.seen[: len(source), 0, 0, : mask.shape[1]] = mask[source].bool()
        self.slot.fill_(mask.shape[1])

    def span(self, positions: int) -> int:
        return bucket(positions)

    def inputs(self, count: int, span: int) -> dict[str, Any]:
        self.seen.index_fill_(3, self.slot, True)
        for layer in self.layers:
            layer.count, layer.visible = count, span
        return {"attention_mask": self.seen[:count, ..., :span], "past_key_values": self.cache}

    def step_done(self) -> None:
        self.slot.add_(1)

    def move(self, rows: torch.Tensor, positions: int) -> None:
        move(self.layers, rows, positions)
        self.seen[: len(rows)] = self.seen[rows]


class SharedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: of prompts (prompts, heads, positions, head size), and of what was written."""

    def __init__(self, like: DynamicLayer, prompts: int, rows: int, longest: int, new: int) -> None:
        super().__init__()
        heads, size = like.keys.shape[1], like.keys.shape[3]
        self.prompt_keys, self.prompt_values = (
            x.new_zeros(prompts, heads, longest, size) for x in (like.keys, like.values)
        )
        self.keys, self.values = (x.new_zeros(rows, heads, new, size) for x in (like.keys, like.values))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new position alone: attention writes it to its place."""
        return key_states, value_states


class SharedPrompts:
    """Each prompt once, and a row for what was written of each completion.

    Attributes:
        source: (rows,) the prompt of each row.
        starts, end: prompt i is at positions `starts[i]` to `end` (1,) of its buffer.
        own: (1,) positions that were written.
        padded: `end`, as the host knows it.
    """

    def __init__(self, like: Cache, prompts: int, rows: int, longest: int, new: int, device: torch.device) -> None:
        from opensloth.rollout import kernel

        self.attention = kernel.NAME
        self.prompts, self.rows, self.longest, self.new = prompts, rows, longest, new
        self.layers = [SharedLayer(layer, prompts, rows, longest, new) for layer in like.layers]
        self.cache = Cache(layers=self.layers)
        self.source = torch.zeros(rows, dtype=torch.long, device=device)
        self.starts = torch.zeros(prompts, dtype=torch.long, device=device)
        self.padded = 0
        self.end, self.own = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))

    def begin(self, cache: Cache, mask: torch.Tensor, source: torch.Tensor) -> None:
        count, longest = mask.shape
        for layer, prompt in zip(self.layers, cache.layers, strict=True):
            layer.prompt_keys[:count, :, :longest] = prompt.keys
            layer.prompt_values[:count, :, :longest] = prompt.values
        self.starts[:count] = longest - mask.sum(1)
        self.source.zero_()
        self.source[: len(source)] = source
        self.padded = longest
        self.end.fill_(longest)
        self.own.zero_()

    def span(self, positions: int) -> int:
        return 0  # lengths are read on the card

    def inputs(self, count: int, span: int) -> dict[str, Any]:
        return {"attention_mask": None, "past_key_values": self.cache, "buffers": self}

    def step_done(self) -> None:
        self.own.add_(1)

    def move(self, rows: torch.Tensor, positions: int) -> None:
        move(self.layers, rows, positions - self.padded)
        self.source[: len(rows)] = self.source[rows]


def why_not_shared(config: PretrainedConfig, device: torch.device) -> str:
    """Why completions cannot share their prompts' keys, or an empty string."""
    if device.type != "cuda":
        return "the kernel runs on CUDA alone"
    if not TRITON:
        return "triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST:
        return "the card is older than the kernel's matrix products"
    size = head_size(config)
    return "" if size <= LARGEST_HEAD else f"its heads have {size} numbers, more than {LARGEST_HEAD}"


def positions_of_row(prompt: int, new: int, share: float, device: torch.device, config: PretrainedConfig) -> float:
    """Positions that a completion keeps of each layer, with its share of what the prompts' own pass leaves.

    Args:
        prompt, new: tokens of the longest prompt and completion.
        share: distinct prompts for each completion.
    """
    if why_not_shared(config, device):
        return bucket(bucket(prompt) + new) + share * prompt
    return new + share * (bucket(prompt) + prompt)


def bucket(length: int) -> int:
    """`length` rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET
