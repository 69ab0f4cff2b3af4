"""Best fit decreasing: which rows share a pack of bounded length.

Knows lengths only. Rows are never cut: whoever packs drops or truncates what is longer than a pack before.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Put rows into packs of at most `capacity` tokens, the longest row first, each where the least room is left over.

    Returns the packs as lists of indices into `lengths`, packs in the order they were opened. The same lengths give the
    same packs: equal lengths are taken by index, and among packs with equal room the one used last is filled first.
    At most one pack is half full or less. Raises ValueError where a length is below 1 or above `capacity`.

    Open packs are kept by their free room, and the rooms that occur in a sorted list: a row costs one binary search in
    a list that is never longer than `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if int(sizes.min()) < 1 or int(sizes.max()) > capacity:
        raise ValueError(f"Lengths must be between 1 and the pack's {capacity} tokens: {sizes.min()} to {sizes.max()}.")
    packs: list[list[int]] = []
    rooms: list[int] = []  # free rooms that occur, ascending, each once
    with_room: dict[int, list[list[int]]] = {}
    order = np.argsort(-sizes, kind="stable")
    for row, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack: list[int] = []
            packs.append(pack)
            left = capacity - length
        else:
            room = rooms[at]
            candidates = with_room[room]
            pack = candidates.pop()
            if not candidates:
                del with_room[room]
                del rooms[at]
            left = room - length
        pack.append(row)
        if left:
            if left in with_room:
                with_room[left].append(pack)
            else:
                with_room[left] = [pack]
                insort(rooms, left)
    return packs
