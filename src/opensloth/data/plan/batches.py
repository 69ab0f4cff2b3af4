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


def too_few(place: str, prompts: int, each: int) -> UserError:
    return UserError(
        f"{place} holds {prompts:,} prompts to train on, fewer than --prompts-per-step {each}.",
        "Lower --prompts-per-step, or prepare more prompts.",
    )


def lay_out(
    prepared: Prepared, options: GrpoOptions, *, seed: int, processes: int, left_out: Collection[int] = ()
) -> Batches:
    """Cut the prompts, epoch behind epoch in an order of their own, into batches of `--prompts-per-step`.

    Every prompt comes once an epoch; a batch may begin in one epoch and end in the next.

    Args:
        left_out: row ids that are not trained on.
    Raises:
        UserError: fewer prompts than a batch needs, or a batch that cannot be dealt out.
    """
    each = options.prompts_per_step
    check_batch(options, processes)
    rows = np.flatnonzero(~prepared.is_eval)
    if left_out:
        rows = rows[~np.isin(prepared.rows.ids()[rows], list(left_out))]
    if len(rows) < each:
        raise too_few(str(prepared.directory), len(rows), each)
    steps = options.max_steps or math.ceil(options.epochs * len(rows) / each) * options.updates_per_batch
    count = math.ceil(steps / options.updates_per_batch)
    epochs = math.ceil(count * each / len(rows))
    stream = np.concatenate([rows[global_order(len(rows), seed, epoch)] for epoch in range(epochs)])
    batches = [stream[number * each : (number + 1) * each] for number in range(count)]
    epoch = [(step // options.updates_per_batch + 1) * each / len(rows) for step in range(steps)]
    return Batches(batches, options.updates_per_batch, steps, epoch)


def check_batch(job: GrpoOptions, processes: int) -> None:
    """Raise UserError where a batch cannot be dealt out: whole groups lie on one process."""
    prompts, completions = job.prompts_per_step, job.prompts_per_step * job.group_size
    if prompts % processes:
        below, above = prompts // processes * processes, math.ceil(prompts / processes) * processes
        raise UserError(
            f"--prompts-per-step {prompts} over {processes} processes is {prompts / processes:.4g} each, and the "
            "completions of a prompt stay together on one process.",
            f"Take a multiple of {processes}: " + " or ".join(str(count) for count in (below, above) if count) + ".",
        )
    if job.batch_size is not None and job.grad_accum is not None:
        given = job.batch_size * job.grad_accum * processes
        if given != completions:
            raise UserError(
                f"--batch-size {job.batch_size} x --grad-accum {job.grad_accum} x {processes} processes = {given:,} "
                f"completions, but --prompts-per-step {prompts} x --group-size {job.group_size} = {completions:,}.",
                "Leave --grad-accum out: it follows from the others.",
            )
