"""What the steps of a run cost this process: seconds by what they were spent on, tokens, and how even the work was."""

from collections import deque
from dataclasses import dataclass

import torch

from opensloth.training.gradient_sync import GradientSync
from opensloth.training.laps import Lap, Laps
from opensloth.training.load import Load, evenness


@dataclass(frozen=True)
class Account:
    """What the steps that one log tells of cost.

    Attributes:
        synchronized: how many of them have moments in `GradientSync.unread`.
        lap: their time; None where it is not taken.
    """

    steps: int
    seconds: dict[str, float]
    loads: list[list[Load]]
    synchronized: int
    lap: Lap | None


class Costs:
    """Counts from log to log, and over the whole run since it was last started.

    Args:
        laps: takes the time of steps, where logs may come later than what they tell of.
    """

    def __init__(self, device: torch.device, laps: Laps | None = None) -> None:
        self.sync = GradientSync(device)
        self.laps = laps
        self.seconds: dict[str, float] = {}
        self.loads: list[list[Load]] = []
        self.steps = 0
        self.closed: deque[Account] = deque()
        self.tokens = 0  # real ones that this process has put through the model

    def spend(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def step_done(self, tokens: int, loads: list[Load] | None = None) -> None:
        """Count a step. `loads` are those of all processes, where no plan tells them."""
        self.steps += 1
        self.tokens += tokens
        if loads is not None:
            self.loads.append(loads)

    def close(self) -> None:
        """A log will tell of the steps so far, and another one of those to come. The host does not wait for them."""
        synchronized = len(self.sync.unread) - sum(account.synchronized for account in self.closed)
        lap = self.laps.end() if self.laps else None
        self.closed.append(Account(self.steps, self.seconds, self.loads, synchronized, lap))
        self.seconds, self.loads, self.steps = {}, [], 0

    def a_step(self) -> dict[str, float]:
        """For the log: the mean of the steps that were closed first, and of those since the last log if none were."""
        if not self.closed:
            self.close()
        account = self.closed.popleft()
        steps = max(1, account.steps)
        lap = {"seconds/step": round(account.lap.seconds() / steps, 6)} if account.lap else {}
        sync = self.sync.read(account.synchronized)
        return {
            **lap,
            "seconds/communication": round(sync.total / max(1, sync.steps), 5),
            "seconds/sync": round(sync.exposed / max(1, sync.steps), 5),
            **{f"seconds/{what}": round(seconds / steps, 5) for what, seconds in account.seconds.items()},
            **evenness(account.loads),
        }

    def so_far(self) -> dict[str, float]:
        """For the result: sums over the run."""
        self.sync.read()
        spent = self.sync.so_far
        return {
            "tokens": self.tokens,
            "communication_seconds": round(spent.total, 3),
            "sync_seconds": round(spent.exposed, 3),
        }
