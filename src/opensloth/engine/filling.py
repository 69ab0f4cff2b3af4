"""Packs of completions filled up to few shapes, so that their passes can be recorded (engine/graphed.py).

The tokens of a batch of completions are never as many twice. Sizes go up in sixteenths of a power of two: padding is
3 % on average then, and the packs of a run have a handful of shapes. What fills a pack up is rows of its own, which no
real token sees and no gradient reaches.
"""

import math
from typing import NamedTuple

import torch

MOST_TOKENS = 16_384  # larger packs keep a card busy for longer than the host takes to launch them
FINE = 4  # bits of a size: sixteenths


class Rows(NamedTuple):
    """What the model reads of a pack, on the host.

    Attributes:
        ids, positions: (tokens,).
        queries, keys: where rows end, cumulative from 0, (rows + 1,), int32.
        longest_queries, longest_keys: at least those of the longest row.
        places: the place in the pack of each key, (keys,); None where they are the tokens themselves.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int
    places: torch.Tensor | None


def rounded(count: int) -> int:
    """The next size, at most a sixteenth above."""
    unit = 1 << max(count.bit_length() - 1 - FINE, 0)
    return math.ceil(count / unit) * unit


def filled(rows: Rows, shares: bool) -> Rows:
    """A pack with rows of padding behind it.

    Args:
        shares: whether packs may have rows whose keys lie elsewhere: then all name theirs.
    """
    tokens, count = len(rows.ids), int(rows.keys[-1])
    longest = [1 << (most - 1).bit_length() for most in (rows.longest_queries, rows.longest_keys)]
    more, more_keys = missing(tokens, count, longest, shares)
    padding = max(math.ceil(more / longest[0]), math.ceil(more_keys / longest[1]))
    queries, keys = even(more, padding), even(more_keys, padding)
    starts = tokens + queries.cumsum(0) - queries
    places = torch.arange(tokens) if rows.places is None else rows.places
    # the keys of a row that has more of them than queries: its first token, again and again, before its own
    own = [torch.arange(int(k)) - int(k - q) for q, k in zip(queries, keys, strict=True)]
    added = [start + at.clamp(min=0) for start, at in zip(starts, own, strict=True)]
    empty = rounded(len(rows.queries) + padding) - len(rows.queries) - padding
    return Rows(
        torch.cat([rows.ids, rows.ids.new_zeros(more)]),
        torch.cat([rows.positions, *(torch.arange(int(size)) for size in queries)]),
        ends(rows.queries, queries, empty),
        ends(rows.keys, keys, empty),
        longest[0],
        longest[1],
        torch.cat([places, *added]) if shares else None,
    )


def missing(tokens: int, keys: int, longest: list[int], shares: bool) -> tuple[int, int]:
    """Tokens and keys that a pack lacks to its next size: no row of padding has more queries than keys, or none.

    The longest row has two keys at least, else no two sizes might ever fit each other.
    """
    assert longest[1] > 1, "a prompt and a completion"
    size, key_size = rounded(tokens), rounded(keys) if shares else rounded(tokens)
    while True:
        more, more_keys = size - tokens, key_size - keys
        rows = max(math.ceil(more / longest[0]), math.ceil(more_keys / longest[1]))
        if more < rows:
            size = rounded(size + 1)
            key_size = key_size if shares else size
        elif more > more_keys:
            key_size = rounded(key_size + 1)
        else:
            return more, more_keys


def even(count: int, parts: int) -> torch.Tensor:
    """A number as a sum of nearly equal parts, the larger ones first."""
    each, larger = divmod(count, max(parts, 1))
    return torch.tensor([each + (part < larger) for part in range(parts)], dtype=torch.long)


def ends(before: torch.Tensor, sizes: torch.Tensor, empty: int) -> torch.Tensor:
    """Boundaries that go on with rows of these sizes, and with rows without a token."""
    after = before[-1] + sizes.cumsum(0)
    last = (after[-1:] if len(after) else before[-1:]).expand(empty)
    return torch.cat([before, after.to(before.dtype), last.to(before.dtype)])
