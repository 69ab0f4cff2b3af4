"""Logs that never make a card wait: what a step has to tell is told when the card has been given the next one.

transformers' trainer reads the loss at the end of each step that is logged. The host waits for the card in it, and then
the card for the host, which writes the log and launches the next step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import nested_gather

from opensloth.training.costs import Costs
from opensloth.training.moments import Moment, await_moment, now


@dataclass(frozen=True)
class Held:
    """What the log of a step is made of, beside its costs.

    Attributes:
        steps: how many steps it tells of.
        numbers: the sum of their losses, and the last gradient's norm, on their way to the host.
        arrived: when they are there.
        losses: `since_log` of these steps.
    """

    step: int
    steps: int
    epoch: float | None
    learning_rate: float
    has_norm: bool
    numbers: torch.Tensor
    arrived: Moment
    losses: list[Any]


class LogsLate:
    """A mixin before KeepsRun. Steps that end in an evaluation, a checkpoint or the run's end are told at once."""

    held: Held | None = None
    args: Any
    state: Any
    control: Any
    costs: Costs
    since_log: list[Any]
    _globalstep_last_logged: int
    _total_loss_scalar: float

    @property
    def late(self: Any) -> bool:
        """Whether a host could be ahead of its device. unsloth brings a loop of its own, which is left alone."""
        return bool(self.args.device.type == "cuda" and self.run.native)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *rest: Any, **named: Any
    ) -> None:
        if self.late:
            self.hold_or_tell(tr_loss, grad_norm, named.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **named)  # type: ignore[misc]

    @property
    def ends(self) -> bool:
        """Whether this step ends in an evaluation, a checkpoint or the end of the run."""
        control = self.control
        return bool(control.should_evaluate or control.should_save or control.should_training_stop)

    def hold_or_tell(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float | None
    ) -> None:
        """Hold what this step has to tell, or leave it to transformers' trainer; tell what was held before."""
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if due:
            self.costs.close()  # first of all: what the host does next is no part of this step
        before, self.held = self.held, None
        if due and not self.ends:
            self.held = self.hold(tr_loss, grad_norm, learning_rate)
        if before is not None:
            self.tell(before)
        left = due and self.held is None
        if self.held is not None and self.ends:  # somebody who was told has asked for it
            last, self.held = self.held, None
            self.tell(last)
        self.control.should_log = left  # to tell takes it back

    def hold(self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float | None) -> Held:
        """As transformers' trainer begins its log: the loss counts anew from here."""
        step = int(self.state.global_step)
        loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
        # a number that is copied to a card makes the host wait for it; one that the card writes does not
        norm = grad_norm if isinstance(grad_norm, torch.Tensor) else torch.full_like(loss, grad_norm or 0.0)
        numbers = torch.stack([loss, norm.to(loss)]).to("cpu", non_blocking=True)
        tr_loss -= tr_loss
        steps, self._globalstep_last_logged = step - self._globalstep_last_logged, step
        losses, self.since_log = self.since_log, []
        return Held(
            step=step,
            steps=steps,
            epoch=self.state.epoch,
            learning_rate=self._get_learning_rate() if learning_rate is None else learning_rate,  # type: ignore[attr-defined]
            has_norm=grad_norm is not None,
            numbers=numbers,
            arrived=now(self.args.device),
            losses=losses,
        )

    def tell(self: Any, held: Held) -> None:
        """Log a step that was held, as if it were the last one.

        Raises:
            WorkerFailed: its loss is not a number.
        """
        await_moment(held.arrived)
        loss, norm = held.numbers.tolist()
        logs = {"loss": loss / held.steps, **({"grad_norm": norm} if held.has_norm else {})}
        logs["learning_rate"] = held.learning_rate
        self._total_loss_scalar += loss
        state = self.state
        there = (state.global_step, state.epoch, self.since_log)
        state.global_step, state.epoch, self.since_log = held.step, held.epoch, held.losses
        try:
            self.log(logs)
        finally:
            state.global_step, state.epoch, self.since_log = there
