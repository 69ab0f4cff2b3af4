"""The global order of rows, the packs and shards over it, and the optimizer steps that training cuts from it.

Everything here follows from row lengths, a seed and a count of processes, so it is made anew whenever one of them
changes, without looking at a token. Nothing here reads or writes files.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opensloth.data.plan.packing import best_fit
from opensloth.errors import UserError

Ints = NDArray[np.integer]
SPLITS = ("train", "eval")
STEPS_PER_EPOCH = 100  # what auto tokens-per-step aims at, so that small data still gets enough updates
TOKENS_PER_STEP = (1_024, 65_536)  # and its bounds


def global_order(n_rows: int, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """A permutation of 0..n_rows-1 that depends on the arguments alone.

    Sorts the raw output of PCG64: numpy promises that stream for all versions, and its own `permutation` not.
    """
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n_rows), kind="stable").astype(np.int64, copy=False)


def make_plan(
    lengths: Ints,
    trained: Ints,
    *,
    seed: int,
    max_seq_length: int,
    packing: bool,
    shards: int,
    eval_fraction: float,
) -> pa.Table:
    """Put all rows in order, into packs of at most `max_seq_length` tokens, and the packs on shards.

    Args:
        lengths, trained: tokens and trained tokens of each row, by row index. No row is longer than `max_seq_length`.
        packing: False makes each row a pack of its own.
        eval_fraction: this share of the rows (rounded, at least one if above 0) is the eval split.
    Returns:
        A table with one line per row, sorted by `position`: `position` (its place in the global order), `row` (its
        index in rows/), `length`, `trained`, `pack`, `shard`, `split` ("train" or "eval"). A pack lies in one split and
        on one shard. Every shard has the same number of packs of a split; where they do not divide, the shards that
        lack one run an empty pack of zero weight, which the table does not list. Tokens per shard differ from their
        mean by at most 1 % from 100 packs a shard on.
    Raises:
        UserError: fewer training rows than shards.
    """
    order = global_order(len(lengths), seed)
    held_out = 0 if eval_fraction <= 0 else min(max(1, round(len(order) * eval_fraction)), len(order) - 1)
    training_rows = len(order) - held_out
    if training_rows < shards:
        raise UserError(f"{training_rows:,} training rows cannot fill {shards:,} shards.", "Lower --gpus.")
    pack, shard = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
    first_pack = 0
    for part in (slice(0, training_rows), slice(training_rows, len(order))):
        sizes = np.asarray(lengths)[order[part]]
        packs = best_fit(sizes, max_seq_length) if packing else [[place] for place in range(len(sizes))]
        packs = split_packs(packs, sizes, shards)
        on_shard = deal(pack_tokens(packs, sizes), shards)
        if packs:
            places = np.concatenate([np.asarray(p) for p in packs])
            pack_of = np.repeat(np.arange(len(packs)), [len(p) for p in packs])
            pack[part][places] = first_pack + pack_of
            shard[part][places] = on_shard[pack_of]
        first_pack += len(packs)
    is_eval = (np.arange(len(order)) >= training_rows).astype(np.int8)
    return pa.table(
        {
            "position": np.arange(len(order)),
            "row": order,
            "length": np.asarray(lengths)[order].astype(np.int32),
            "trained": np.asarray(trained)[order].astype(np.int32),
            "pack": pack,
            "shard": shard,
            "split": pa.DictionaryArray.from_arrays(pa.array(is_eval), list(SPLITS)),
        }
    )


def pack_tokens(packs: Sequence[Sequence[int]], lengths: Ints) -> NDArray[np.int64]:
    """The tokens of each pack."""
    return np.asarray([int(lengths[pack].sum()) for pack in packs], dtype=np.int64)


def split_packs(packs: list[list[int]], lengths: Ints, at_least: int) -> list[list[int]]:
    """Halve the fullest packs until there are `at_least` of them, or every pack is a single row."""
    if len(packs) >= at_least:
        return packs
    done: list[list[int]] = []
    heap = [(-int(lengths[pack].sum()), number, pack) for number, pack in enumerate(packs)]
    heapq.heapify(heap)
    number = len(packs)
    while heap and len(done) + len(heap) < at_least:
        _, _, pack = heapq.heappop(heap)
        if len(pack) == 1:
            done.append(pack)
            continue
        for half in deal_rows(pack, lengths, 2):
            heapq.heappush(heap, (-int(lengths[half].sum()), number, half))
            number += 1
    return done + [pack for _, _, pack in sorted(heap, key=lambda entry: entry[1])]


def deal(tokens: Ints, shards: int) -> NDArray[np.int64]:
    """The shard of each pack: equal counts (but for the last few packs), and nearly equal tokens.

    Packs are dealt in rounds of one to each shard, the fullest first; in a round the shard with the fewest tokens gets
    the fullest pack. Two shards then never differ by more than the packs of one round do.
    """
    if shards == 1:
        return np.zeros(len(tokens), np.int64)
    order = np.argsort(-tokens.astype(np.int64), kind="stable")
    totals = np.zeros(shards, np.int64)
    shard = np.empty(len(tokens), np.int64)
    for start in range(0, len(order), shards):
        packs = order[start : start + shards]
        poorest_first = np.argsort(totals, kind="stable")[: len(packs)]
        shard[packs] = poorest_first
        totals[poorest_first] += tokens[packs]
    return shard


def deal_rows(rows: Sequence[int], lengths: Ints, parts: int) -> list[list[int]]:
    """Divide rows into `parts` of nearly equal tokens: the longest first, each to the part with the fewest tokens."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [(0, part) for part in range(parts)]
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        total, part = totals[0]
        dealt[part].append(row)
        heapq.heapreplace(totals, (total + int(lengths[row]), part))
    return dealt


def optimizer_steps(lengths: Ints, tokens_per_step: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The rows of each optimizer step of an epoch: whole rows of the epoch's order until there are enough tokens.

    Returns arrays of indices into `lengths`; every row is in exactly one step, and only the last step may hold fewer
    than `tokens_per_step` tokens. Depends on nothing but the arguments, so neither pack size nor the number of
    processes changes what a step averages over.
    """
    order = global_order(len(lengths), seed, epoch)
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64)[order])
    steps: list[NDArray[np.int64]] = []
    start, before = 0, 0
    while start < len(order):
        end = min(int(np.searchsorted(ends, before + tokens_per_step)) + 1, len(order))
        steps.append(order[start:end])
        start, before = end, int(ends[end - 1])
    return steps


def auto_tokens_per_step(total_tokens: int) -> int:
    """A hundredth of an epoch's tokens, between 1,024 and 65,536: from the data alone, never from the hardware."""
    low, high = TOKENS_PER_STEP
    return min(max(total_tokens // STEPS_PER_EPOCH, low), high)


def deal_step(rows: Sequence[int] | Ints, lengths: Ints, pack_tokens: int, processes: int) -> list[list[list[int]]]:
    """Cut one optimizer step into micro-batches and give every process the same number of them.

    Args:
        rows: the step's rows, as indices into `lengths`.
        pack_tokens: tokens that go through the model at once. A longer row gets a micro-batch of its own.
        processes: how many share the step.
    Returns:
        For each process its micro-batches, each a list of rows; `[]` is an empty pack of zero weight. Processes get
        nearly the same number of tokens, and so do the micro-batches of a process: a last one with the few rows that
        are left over would cost a pass of its own. Every row is in exactly one micro-batch.
    """
    sizes = np.asarray(lengths)
    dealt: list[list[list[int]]] = []
    for part in deal_rows([int(row) for row in rows], sizes, processes):
        alone = [[row] for row in part if sizes[row] > pack_tokens]
        fitting = [row for row in part if sizes[row] <= pack_tokens]
        dealt.append(alone + even_packs(fitting, sizes, pack_tokens))
    most = max(len(packs) for packs in dealt)
    return [packs + [[] for _ in range(most - len(packs))] for packs in dealt]


def even_packs(rows: Sequence[int], lengths: Ints, capacity: int) -> list[list[int]]:
    """Rows in few packs of nearly equal tokens, none above `capacity`, which no row exceeds."""
    fewest = -(-int(lengths[rows].sum()) // capacity) if rows else 0
    for count in (fewest, fewest + 1):
        packs = deal_rows(rows, lengths, count) if count else []
        if all(pack_tokens(packs, lengths) <= capacity):
            return packs
    return [[rows[place] for place in pack] for pack in best_fit(lengths[rows], capacity)]
