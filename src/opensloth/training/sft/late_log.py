"""Logs that never make a card wait: what a step has to tell is told when the card has been given the next one.

transformers' trainer reads the loss at the end of each step that is logged. The host waits for the card in it, and then
the card for the host, which writes the log and launches the next step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import nested_gather


@dataclass(frozen=True)
class Held:
    """What the log of a step is made of.

    Attributes:
        steps: how many steps it tells of.
        numbers: the sum of their losses, and the last gradient's norm, on their way to the host.
        arrived: when they are there; None where they are already.
        losses: `since_log` of these steps.
    """

    step: int
    steps: int
    epoch: float | None
    learning_rate: float | None
    has_norm: bool
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None
    losses: list[Any]


class LogsLate:
    """A mixin before KeepsRun. Steps that end in an evaluation, a checkpoint or the run's end are told at once."""

    held: Held | None = None
    args: Any
    state: Any
    control: Any
    since_log: list[Any]
    _globalstep_last_logged: int
    _total_loss_scalar: float

    @property
    def late(self) -> bool:
        """Whether a host could be ahead of its device."""
        return bool(self.args.device.type == "cuda")

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        control, step = self.control, int(self.state.global_step)
        due = control.should_log and step > self._globalstep_last_logged
        ends = control.should_evaluate or control.should_save or control.should_training_stop
        before, self.held = self.held, None
        if due and self.late and not ends and step < self.state.max_steps:
            self.held = self.hold(tr_loss, grad_norm, learning_rate)
            control.should_log = False
        if before is not None:
            now = control.should_log
            self.tell(before, start_time)
            self.control.should_log = now  # a log takes it back, and that of this step may be still to come
        super()._maybe_log_save_evaluate(  # type: ignore[misc]
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def hold(self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float | None) -> Held:
        """As transformers' trainer begins its log: the loss counts anew from here."""
        step = int(self.state.global_step)
        loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=loss.dtype, device=loss.device)
        numbers = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        tr_loss -= tr_loss
        arrived = None
        if loss.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        steps, self._globalstep_last_logged = step - self._globalstep_last_logged, step
        losses, self.since_log = self.since_log, []
        return Held(step, steps, self.state.epoch, learning_rate, grad_norm is not None, numbers, arrived, losses)

    def tell(self: Any, held: Held, start_time: float) -> None:
        """Log a step that was held, as if it were the last one.

        Raises:
            WorkerFailed: its loss is not a number.
        """
        if held.arrived is not None:
            held.arrived.synchronize()
        loss, norm = held.numbers.tolist()
        logs = {"loss": loss / held.steps, **({"grad_norm": norm} if held.has_norm else {})}
        logs["learning_rate"] = self._get_learning_rate() if held.learning_rate is None else held.learning_rate
        self._total_loss_scalar += loss
        self.store_flos()
        state = self.state
        there = (state.global_step, state.epoch, self.since_log)
        state.global_step, state.epoch, self.since_log = held.step, held.epoch, held.losses
        try:
            self.log(logs, start_time)
        finally:
            state.global_step, state.epoch, self.since_log = there
