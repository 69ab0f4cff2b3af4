"""How a request to stop, on any process, becomes one step after which all of them end.

It is heeded after a step; and in what may take minutes: an evaluation, or completions that are being written. Those are
dropped, and made up for by the run that goes on.
"""

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from opensloth.launch.stop import StopRequest


class Dropped(Exception):
    """Completions or an evaluation were dropped on all processes because one of them was asked to stop."""


class StopOnSignal(TrainerCallback):
    """A request to stop, on any process: all save the step they have just completed, and end.

    Args:
        every: steps after which they may end: each batch of completions is trained on so often.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.request = StopRequest().install()
        self.stopped = False
        # A group on the CPU: to ask the others never makes the host wait for its card.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def asked(self) -> bool:
        """Whether this process was asked."""
        return self.request.asked()

    def anyone_asked(self) -> bool:
        """Whether any process was. All call it at once."""
        flag = torch.tensor(int(self.asked()))
        if self.group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def may_end(self, state: TrainerState) -> bool:
        """Whether a run can go on exactly from the step that is complete."""
        step = int(state.global_step)
        return step % self.every == 0 or step == state.max_steps

    def drop_if_asked(self) -> None:
        """Raise Dropped, on all processes or on none. All call it at once."""
        if self.anyone_asked():
            raise Dropped

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.anyone_asked() and self.may_end(state) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
