"""From a schedule to tensors: each item of the loader is one whole optimizer step, as this process sees it."""

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from opensloth.data.plan.schedule import Schedule, padded_batches
from opensloth.data.plan.shards import deal_step
from opensloth.data.prepared.prepare import Prepared
from opensloth.engine.loss import IGNORED
from opensloth.training.load import Load

NOTHING = 2  # tokens of an empty pack
LOOKED_AT = 50  # steps by which the shape of packs is chosen, the largest ones
ROWS = 1.5  # room for rows of a pack, over the most that were seen: one with more has a shape of its own


class Step(TypedDict):
    """One process's share of an optimizer step.

    `packs` are micro-batches ready for the model, with `tokens` real tokens; `targets` counts the trained tokens of all
    processes, which the loss of the step is averaged over.
    """

    number: int
    packs: list[dict[str, Any]]
    targets: int
    tokens: int


class Shape(NamedTuple):
    """What every pack is filled up to, in tokens and in rows, and what it says of its longest row."""

    tokens: int
    rows: int
    longest: int


class Batcher:
    """Makes micro-batches of rows: packs (rows one behind the other) or padded batches.

    Attributes:
        shape: of packs, where they shall all have one, so that compiled layers are made once; padding fills them up.
    """

    def __init__(self, prepared: Prepared, packing: bool, pad_id: int) -> None:
        self.prepared = prepared
        self.packing = packing
        self.pad_id = pad_id
        self.shape: Shape | None = None

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        return self.pack(rows) if self.packing else self.pad(rows)

    def pack(self, rows: list[int]) -> dict[str, Any]:
        """`input_ids`, `position_ids`, `labels` of shape (1, tokens), and the boundaries that attention needs.

        `predictors` are the places before trained tokens: on a card, to find them there would make the host wait.
        No row pays for its first token: nothing in the row comes before it, and the row ahead must not teach it.
        """
        parts = self.read(rows)
        if self.shape is not None:
            parts += self.filling(self.shape, sum(len(ids) for ids, _ in parts))
        lengths = np.array([len(ids) for ids, _ in parts])
        ids = np.concatenate([ids for ids, _ in parts])
        labels = np.concatenate([labels for _, labels in parts])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        labels[starts[:-1]] = IGNORED
        positions = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
        longest, empty = int(lengths.max()), 0
        if self.shape is not None:  # rows without a token stand behind the last one
            longest, empty = max(longest, self.shape.longest), max(self.shape.rows - len(lengths), 0)
        boundaries = torch.from_numpy(np.pad(starts, (0, empty), mode="edge").astype(np.int32))
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
            "labels": torch.from_numpy(labels.astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "predictors": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED)),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def pad(self, rows: list[int]) -> dict[str, Any]:
        """`input_ids`, `labels` and `attention_mask` of shape (rows, longest), padded on the right."""
        parts = self.read(rows)
        shape = (len(parts), max(len(ids) for ids, _ in parts))
        ids, labels = np.full(shape, self.pad_id), np.full(shape, IGNORED)
        mask = np.zeros(shape, dtype=np.int64)
        for at, (row_ids, row_labels) in enumerate(parts):
            length = len(row_ids)
            ids[at, :length], labels[at, :length], mask[at, :length] = row_ids, row_labels, 1
        labels[:, 0] = IGNORED
        tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in tensors.items()}

    def read(self, rows: list[int]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Ids and labels of each row; without rows a masked one, so that every process runs as many passes."""
        if not rows:
            return [self.blank(NOTHING)]
        found = [self.prepared.rows.row(row) for row in rows]
        return [(row.input_ids, row.labels) for row in found]

    def blank(self, tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """A row that teaches nothing."""
        return np.full(tokens, self.pad_id, np.int32), np.full(tokens, IGNORED, np.int32)

    def filling(self, shape: Shape, tokens: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Masked rows, none above the longest, that bring a pack of so many tokens to its shape."""
        missing = range(tokens, shape.tokens, shape.longest)
        return [self.blank(min(shape.longest, shape.tokens - start)) for start in missing]


class Steps(Dataset[Step]):
    """All optimizer steps of a run, as process `rank` of `processes` sees them. Item n is step n.

    While one trains, a thread makes the next.
    """

    def __init__(self, plan: Schedule, batcher: Batcher, pack_tokens: int, rank: int, processes: int) -> None:
        self.plan = plan
        self.batcher = batcher
        self.pack_tokens = pack_tokens
        self.rank = rank
        self.processes = processes
        self.maker = ThreadPoolExecutor(1, thread_name_prefix="packs")
        self.coming: tuple[int, Future[Step]] | None = None

    def __len__(self) -> int:
        return len(self.plan.steps)

    def rows(self, number: int) -> list[list[int]]:
        """The rows of this process's micro-batches in a step."""
        return self.plan.micro_batches(number, self.pack_tokens, self.processes)[self.rank]

    def loads(self, number: int) -> list[Load]:
        """What each process puts through the model in a step."""
        return [self.load(rows) for rows in self.plan.micro_batches(number, self.pack_tokens, self.processes)]

    def load(self, micro_batches: list[list[int]]) -> Load:
        lengths = self.plan.lengths
        tokens = [int(lengths[rows].sum()) for rows in micro_batches]
        if self.batcher.packing:
            least = self.batcher.shape.tokens if self.batcher.shape else 0
            slots = [max(size or NOTHING, least) for size in tokens]
        else:
            slots = [len(rows) * int(lengths[rows].max()) if rows else NOTHING for rows in micro_batches]
        by_rows = self.plan.batch_size is not None
        room = slots if by_rows else [max(size, self.pack_tokens) for size in slots]
        return Load(sum(tokens), sum(slots), sum(room))

    def shape(self, longest: int) -> Shape:
        """A shape for the packs of all processes: that of the largest in the largest steps, or of a row that is longer.

        Args:
            longest: tokens of the longest row, be it held out.
        """
        largest = sorted(range(len(self)), key=self.plan.tokens, reverse=True)[:LOOKED_AT]
        packs = self.packs(largest, self.pack_tokens)
        most = max(int(self.plan.lengths[rows].sum()) for rows in packs)
        alone = int(self.plan.lengths[np.concatenate(self.plan.steps)].max())  # a row above all packs gets its own
        return Shape(max(most, alone), math.ceil(ROWS * max(map(len, packs))) + 1, longest)

    def fill_up(self, shape: Shape) -> None:
        """Fill packs up to this shape. Those that are cut by tokens are dealt anew to hold no more: a step that just
        went into one pack has more tokens than the halves of one that did not."""
        self.batcher.shape, self.pack_tokens = shape, shape.tokens

    def filled(self, shape: Shape) -> float:
        """The share of real tokens where all packs have a shape: in the first steps, as they come to be trained."""
        packs = self.packs(range(min(len(self), LOOKED_AT)), shape.tokens)
        real = sum(int(self.plan.lengths[rows].sum()) for rows in packs)
        return real / (len(packs) * shape.tokens)

    def packs(self, numbers: Iterable[int], pack_tokens: int) -> list[list[int]]:
        """The rows of each pack of some steps, of all processes."""
        steps = (self.plan.micro_batches(number, pack_tokens, self.processes) for number in numbers)
        return [rows for step in steps for process in step for rows in process]

    def row_ids(self, rows: list[int]) -> list[int]:
        """The numbers of stored rows in the source, as `os-data show` names them."""
        return [self.batcher.prepared.rows.row(row).row_id for row in rows]

    def __getitem__(self, number: int) -> Step:
        if number >= len(self):
            raise IndexError(number)
        coming, self.coming = self.coming, None
        step = coming[1].result() if coming is not None and coming[0] == number else self.make(number)
        if number + 1 < len(self):
            self.coming = number + 1, self.maker.submit(self.make, number + 1)
        return step

    def make(self, number: int) -> Step:
        rows = self.rows(number)
        packs = [self.batcher(some) for some in rows]
        return Step(
            number=number, packs=packs, targets=max(1, self.plan.targets(number)), tokens=self.load(rows).tokens
        )

    def loader(self, pinned: bool) -> DataLoader[Step]:
        """In order, one step an item. Resuming skips indices, so that no tensor of a past step is made again."""
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=lambda steps: steps[0], pin_memory=pinned)


def eval_packs(prepared: Prepared, batcher: Batcher, pack_tokens: int, rank: int, processes: int) -> list[list[int]]:
    """The held-out rows of this process, in micro-batches; no process waits for another in between."""
    rows = np.flatnonzero(prepared.is_eval)
    if not batcher.packing:
        return padded_batches(rows, prepared.lengths, pack_tokens)[rank::processes]
    return [rows for rows in deal_step(rows, prepared.lengths, pack_tokens, processes)[rank] if rows]
