"""Packs of completions, filled up to one of a few sizes, so that their passes can be recorded (engine/graphed.py).

How long completions are is known when they are written, and each batch has others. A pack takes the smallest of PARTS
sizes that holds it. What fills it up forms rows of its own, whose hidden states nothing reads.

Rows that share a prompt all see its tokens: such a pack has more keys than tokens. How many keys there are for each
token, and how many tokens for each row, are properties of a batch: there is room for what came lately.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from opensloth.engine.attention import Boundaries

PARTS = 12
KEYS_PER_TOKEN = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
TOKENS_PER_ROW = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
LATELY = 16  # batches by which the room for keys and rows goes
LONG = 1024  # positions of a row that fills up, if real ones may not be longer: so it takes few such rows


class Need(NamedTuple):
    """What rows take of a pack: tokens, rows, and keys beyond the tokens."""

    tokens: int
    rows: int
    extra: int

    def plus(self, other: "Need") -> "Need":
        return Need(*(one + more for one, more in zip(self, other, strict=True)))

    def within(self, room: "Need") -> bool:
        return all(one <= most for one, most in zip(self, room, strict=True))


class Pack(NamedTuple):
    """Rows one behind the other, on the host: `tokens` and their `positions`, both (tokens,), where rows end, and
    `key_places` as attention.varlen has them."""

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: Boundaries
    key_places: torch.Tensor | None

    @property
    def need(self) -> Need:
        return Need(len(self.tokens), len(self.rows.queries) - 1, int(self.rows.keys[-1]) - len(self.tokens))


class Size(NamedTuple):
    """A pack that is filled up: its tokens, keys and rows, each of which sees `longest` positions at most."""

    tokens: int
    keys: int
    rows: int
    longest: int

    @property
    def fillers(self) -> int:
        """Rows that it may take to fill the pack up. Each has a token at least."""
        return -(-self.keys // self.longest)

    @property
    def room(self) -> Need:
        """What there is for rows that are real."""
        return Need(self.tokens - self.fillers, self.rows - self.fillers, self.keys - self.tokens)

    def fill(self, rows: Boundaries) -> Boundaries:
        """Where rows and what fills the pack up behind them begin and end; on the host."""
        tokens, keys = self.tokens - int(rows.queries[-1]), self.keys - int(rows.keys[-1])
        seen = torch.full((-(-keys // self.longest),), self.longest)
        seen[-1] = keys - self.longest * (len(seen) - 1)
        spare = (seen - 1).cumsum(0) - (seen - 1)  # what the rows before could have beyond their first token
        own = 1 + (tokens - len(seen) - spare).clamp(min=0).minimum(seen - 1)
        return Boundaries(self.ends(rows.queries, own), self.ends(rows.keys, seen), self.longest, self.longest)

    def ends(self, real: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        found = torch.cat([real, lengths.cumsum(0).to(real.dtype) + real[-1]])
        return F.pad(found, (0, self.rows + 1 - len(found)), value=int(found[-1]))  # and rows without tokens


def tokens_of(largest: int) -> list[int]:
    """Tokens of packs of all sizes, from the smallest on."""
    return [-(-largest * part // PARTS) for part in range(1, PARTS + 1)]


class Sizes:
    """The sizes of the packs of a run.

    Args:
        largest: tokens of a pack at most.
        longest: tokens of a prompt and its completion at most.
        completions: of a batch, on this process.
        pad: any id.
        most_keys: for each token of a pack that there is memory for.
    """

    def __init__(self, largest: int, longest: int, completions: int, pad: int, most_keys: float = math.inf) -> None:
        self.largest, self.longest, self.completions, self.pad = largest, longest, completions, pad
        self.most_keys = most_keys
        self.keys_per_token, self.tokens_per_row = KEYS_PER_TOKEN[0], TOKENS_PER_ROW[0]
        self.lately: deque[tuple[float, int]] = deque(maxlen=LATELY)  # those two as batches needed them
        self.all = self.made()  # from the smallest on

    def made(self) -> list[Size]:
        longest = max(self.longest, LONG)
        bare = [
            Size(
                tokens,
                int(tokens * self.keys_per_token),
                min(self.completions, max(tokens // self.tokens_per_row, 1)),
                longest,
            )
            for tokens in tokens_of(self.largest)
        ]
        return [size._replace(rows=size.rows + size.fillers) for size in bare]

    def smallest(self, need: Need) -> Size | None:
        return next((size for size in self.all if need.within(size.room)), None)

    def expect(self, packs: Sequence[Need]) -> None:
        """Make room for the keys and rows of a batch's packs, and for those of the batches before it. What was recorded
        for other sizes is of no use then.

        A pack that is not even half as full as the fullest may take a larger size instead.
        """
        fullest = max(pack.tokens for pack in packs)
        full = [pack for pack in packs if 2 * pack.tokens >= fullest]
        keys, tokens = max(1 + pack.extra / pack.tokens for pack in full), min(pack.tokens / pack.rows for pack in full)
        self.lately.append(
            (
                next((some for some in KEYS_PER_TOKEN if some >= keys), keys),
                next((some for some in TOKENS_PER_ROW if some <= tokens), TOKENS_PER_ROW[-1]),
            )
        )
        keys_per_token = min(max(keys for keys, _ in self.lately), self.most_keys)
        tokens_per_row = min(tokens for _, tokens in self.lately)
        if (keys_per_token, tokens_per_row) != (self.keys_per_token, self.tokens_per_row):
            self.keys_per_token, self.tokens_per_row = keys_per_token, tokens_per_row
            self.all = self.made()

    def fill(self, pack: Pack) -> Pack:
        """A pack, filled up; as it is, where no size holds it."""
        size = self.smallest(pack.need)
        if size is None:
            return pack
        real, seen = len(pack.tokens), int(pack.rows.keys[-1])
        places = pack.key_places
        if size.keys > size.tokens:
            places = torch.arange(real) if places is None else places
            # each to another token: their gradients, all 0 here, are summed place by place
            places = torch.cat([places, torch.arange(size.keys - seen) % size.tokens])
        more = (0, size.tokens - real)
        return Pack(F.pad(pack.tokens, more, value=self.pad), F.pad(pack.positions, more), size.fill(pack.rows), places)

    def has(self, shapes: Mapping[str, Any]) -> bool:
        """Whether inputs of the model, of these shapes, are those of a pack that is filled up."""
        tokens, places = shapes["input_ids"][1], shapes["key_places"]
        keys = tokens if places is None else places[0]
        return Size(tokens, keys, shapes["cu_seq_lens_q"][0] - 1, shapes["max_length_q"]) in self.all
