"""What the steps of a run cost this process: seconds by what they were spent on, tokens, and how even the work was."""

import torch

from opensloth.training.gradient_sync import GradientSync
from opensloth.training.load import Load, evenness


class Costs:
    """Counts from log to log, and over the whole run since it was last started."""

    def __init__(self, device: torch.device) -> None:
        self.sync = GradientSync(device)
        self.seconds: dict[str, float] = {}
        self.loads: list[list[Load]] = []
        self.steps = 0
        self.tokens = 0  # real ones that this process has put through the model

    def spend(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def step_done(self, tokens: int, loads: list[Load] | None = None) -> None:
        """Count a step. `loads` are those of all processes, where no plan tells them."""
        self.steps += 1
        self.tokens += tokens
        if loads is not None:
            self.loads.append(loads)

    def a_step(self) -> dict[str, float]:
        """For the log: the mean of the steps since the last one."""
        sync, steps = self.sync.read(), max(1, self.steps)
        found = {
            "seconds/communication": round(sync.total / max(1, sync.steps), 5),
            "seconds/sync": round(sync.exposed / max(1, sync.steps), 5),
            **{f"seconds/{what}": round(seconds / steps, 5) for what, seconds in self.seconds.items()},
            **evenness(self.loads),
        }
        self.seconds, self.loads, self.steps = {}, [], 0
        return found

    def so_far(self) -> dict[str, float]:
        """For the result: sums over the run."""
        self.sync.read()
        spent = self.sync.so_far
        return {
            "tokens": self.tokens,
            "communication_seconds": round(spent.total, 3),
            "sync_seconds": round(spent.exposed, 3),
        }
