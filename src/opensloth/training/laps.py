"""What steps take: from the end of a logged step to that of the next, without evaluations and checkpoints.

The device's clock tells it. By the host's, a step that is logged late would have the time of another one wherever the
host is the slower of the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from opensloth.training.moments import Moment, await_moment, between, now

LEAST = 1e-6  # seconds, which speeds are divided by


@dataclass(frozen=True)
class Lap:
    """The time of the steps between two logs. `pauses` are what else was done meanwhile: when it began and ended."""

    start: Moment
    end: Moment
    pauses: list[tuple[Moment, Moment]]

    def seconds(self) -> float:
        """Without the pauses. The host waits for the lap's end."""
        await_moment(self.end)
        return max(LEAST, between(self.start, self.end) - sum(between(*pause) for pause in self.pauses))


class Laps:
    """Laps that follow each other from `begin` on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        self.start, self.pauses = now(self.device), list[tuple[Moment, Moment]]()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done meanwhile is no part of a step."""
        begun = now(self.device)
        yield
        self.pauses.append((begun, now(self.device)))

    def end(self) -> Lap:
        """The lap of all that the device was given since the last one. The next begins."""
        lap = Lap(self.start, now(self.device), self.pauses)
        self.start, self.pauses = lap.end, []
        return lap


class FirstLap(TrainerCallback):
    """Begins with training: what comes before it is no part of the first step."""

    def __init__(self, laps: Laps) -> None:
        self.laps = laps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.laps.begin()
