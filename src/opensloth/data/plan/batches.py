"""Which prompts every batch of completions of a GRPO run holds. From the data and the settings alone, as for SFT."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opensloth.config.run import GrpoOptions
from opensloth.data.plan.shards import global_order
from opensloth.data.prepared.directory import Prepared
from opensloth.errors import UserError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batches:
    """All batches of a run; each serves `updates` optimizer steps.

    Attributes:
        batches: the row numbers of each batch, in order.
        steps: optimizer steps of the run.
        epoch: passes over the prompts that are complete after each step.
    """

    batches: list[Rows]
    updates: int
    steps: int
    epoch: list[float]

    def at(self, step: int) -> int:
        """The batch that step number `step` (from 0) trains on."""
        return step // self.updates

    def share(self, batch: int, rank: int, processes: int) -> Rows:
        """The prompts of one process: whole groups, in the order of the batch."""
        per_process = len(self.batches[batch]) // processes
        return self.batches[batch][rank * per_process : (rank + 1) * per_process]


def lay_out(
    prepared: Prepared, options: GrpoOptions, *, seed: int, processes: int, left_out: Collection[int] = ()
) -> Batches:
    """Cut the prompts, epoch behind epoch in an order of their own, into batches of `--prompts-per-step`.

    Every prompt comes once an epoch; a batch may begin in one epoch and end in the next.

    Args:
        left_out: row ids that are not trained on.
    Raises:
        UserError: fewer prompts than a batch needs, or groups that do not divide among the processes.
    """
    each = options.prompts_per_step
    if each % processes:
        fits = [n for n in range(max(1, each - processes), each + processes) if n % processes == 0]
        raise UserError(
            f"--prompts-per-step {each} does not divide among {processes} processes: {each} / {processes} = "
            f"{each / processes:.4g} groups for each, and a group is not divided.",
            f"Choose --prompts-per-step {' or '.join(map(str, fits))}.",
        )
    rows = np.flatnonzero(~prepared.is_eval)
    if left_out:
        out = set(left_out)
        rows = rows[[prepared.rows.prompt(int(row)).row_id not in out for row in rows]]
    if len(rows) < each:
        raise UserError(
            f"{prepared.directory} holds {len(rows):,} prompts to train on, fewer than --prompts-per-step {each}.",
            "Lower --prompts-per-step, or prepare more prompts.",
        )
    steps = options.max_steps or math.ceil(options.epochs * len(rows) / each) * options.updates_per_batch
    count = math.ceil(steps / options.updates_per_batch)
    epochs = math.ceil(count * each / len(rows))
    stream = np.concatenate([rows[global_order(len(rows), seed, epoch)] for epoch in range(epochs)])
    batches = [stream[number * each : (number + 1) * each] for number in range(count)]
    epoch = [(step // options.updates_per_batch + 1) * each / len(rows) for step in range(steps)]
    return Batches(batches, options.updates_per_batch, steps, epoch)
