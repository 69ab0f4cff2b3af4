"""Which rows every optimizer step of a run holds, and how a step is divided among processes and micro-batches.

The steps follow from the data and the settings alone. Only the division of a step depends on the hardware, so another
number of processes or another pack size trains on the same rows in the same steps.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from opensloth.config.run import SftOptions
from opensloth.data.plan.shards import auto_tokens_per_step, deal_step, optimizer_steps
from opensloth.data.prepared.prepare import Prepared
from opensloth.errors import UserError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """All optimizer steps of a run.

    Attributes:
        steps: the row numbers of each step.
        epoch: passes over the data that are complete after each step.
        lengths, trained: tokens and trained tokens of every row of the data.
        tokens_per_step: the wanted real tokens of a step; None where --batch-size counts rows instead.
        batch_size: rows of a micro-batch, or None where micro-batches are filled by tokens.
        packing: False where the rows of a micro-batch are padded instead of concatenated.
    """

    steps: list[Rows]
    epoch: list[float]
    lengths: Rows
    trained: Rows
    tokens_per_step: int | None
    batch_size: int | None
    packing: bool

    def tokens(self, step: int) -> int:
        """Real tokens of a step over all processes."""
        return self.step_tokens[step]

    @cached_property
    def step_tokens(self) -> list[int]:
        """Real tokens of each step over all processes."""
        return [int(self.lengths[rows].sum()) for rows in self.steps]

    def targets(self, step: int) -> int:
        """Trained tokens of a step over all processes: what its loss is averaged over."""
        return int(self.trained[self.steps[step]].sum())

    def largest_share(self, processes: int) -> int | None:
        """Tokens of a process's share of the largest step; None where micro-batches are not packs."""
        if self.batch_size is not None or not self.packing:
            return None
        return math.ceil(max(self.step_tokens) / processes)

    def micro_batches(self, step: int, pack_tokens: int, processes: int) -> list[list[list[int]]]:
        """The rows of a step as [process][micro-batch][row]; every process gets the same number of micro-batches.

        A micro-batch without rows is an empty pack of zero weight: the process takes part in the synchronization.
        """
        rows = self.steps[step]
        if self.batch_size is None and self.packing:
            return deal_step(rows, self.lengths, pack_tokens, processes)
        if self.batch_size is None:
            batches = padded_batches(rows, self.lengths, pack_tokens)
        else:
            size = self.batch_size
            batches = [[int(row) for row in rows[i : i + size]] for i in range(0, len(rows), size)]
        rounds = math.ceil(len(batches) / processes)
        batches += [[] for _ in range(rounds * processes - len(batches))]
        return [batches[process::processes] for process in range(processes)]


def padded_batches(rows: Rows, lengths: Rows, capacity: int) -> list[list[int]]:
    """Rows of similar length together, so that rows times longest row stays within `capacity` tokens."""
    batches: list[list[int]] = []
    longest = 0
    for row in sorted((int(row) for row in rows), key=lambda row: (-lengths[row], row)):
        if not batches or (len(batches[-1]) + 1) * longest > capacity:
            batches.append([])
            longest = int(lengths[row])
        batches[-1].append(row)
    return batches


def schedule(
    prepared: Prepared, options: SftOptions, *, seed: int, processes: int, packing: bool | None = None
) -> Schedule:
    """Lay out a run.

    Args:
        processes: of the whole run; it matters only with --batch-size, which counts rows per process.
        packing: whether the engine packs; unless told, as the data was prepared. It changes no step.
    Raises:
        UserError: the data has no training rows.
    """
    train = np.flatnonzero(~prepared.is_eval)
    if len(train) == 0:
        raise UserError(f"{prepared.directory} holds no training rows.", "Lower --eval-fraction or add data.")
    lengths = prepared.lengths[train]
    if packing is None:
        packing = bool(prepared.manifest.options["packing"])
    if options.batch_size is None:
        total = int(lengths.sum())
        wanted = options.tokens_per_step
        tokens_per_step = auto_tokens_per_step(total) if isinstance(wanted, str) else wanted
    else:
        tokens_per_step = None

    steps: list[Rows] = []
    epoch: list[float] = []
    limit = options.max_steps or math.inf
    # --max-steps goes round as often as it needs to, whatever --epochs says
    passes = math.inf if options.max_steps else options.epochs
    done = 0
    while done < passes and len(steps) < limit:
        if tokens_per_step is not None:
            cut = optimizer_steps(lengths, tokens_per_step, seed, done)
        else:
            cut = cut_by_rows(len(lengths), rows_per_step(options, processes), seed, done)
        share = min(1.0, passes - done)
        for number, rows in enumerate(cut[: math.ceil(share * len(cut))], start=1):
            steps.append(train[rows])
            epoch.append(done + number / len(cut))
        done += 1
    if options.max_steps:
        steps, epoch = steps[: options.max_steps], epoch[: options.max_steps]
    return Schedule(steps, epoch, prepared.lengths, prepared.trained, tokens_per_step, options.batch_size, packing)


def rows_per_step(options: SftOptions, processes: int) -> int:
    """The rows of a step over all processes, with --batch-size."""
    return (options.batch_size or 1) * (options.grad_accum or 1) * processes


def cut_by_rows(rows: int, per_step: int, seed: int, epoch: int) -> list[Rows]:
    """The (seed, epoch) order of the rows in steps of `per_step`; the last step of an epoch may be smaller."""
    ones = np.ones(rows, dtype=np.int64)
    return optimizer_steps(ones, per_step, seed, epoch)
