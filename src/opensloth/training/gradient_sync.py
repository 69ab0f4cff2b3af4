"""How long the gradients' way between the processes takes, and how much of it backward passes do not hide.

DDP's own figures (`_get_ddp_logging_data`) make the host wait for the card in every step that they are taken in. Here
moments are marked while a step runs (on a card by events in its stream) and read with a log, once they are past.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from opensloth.training.moments import Moment, between, now, passed


@dataclass
class Buckets:
    """The gradients of one step: when each bucket of them was ready and all-reduced, and when the backward ended."""

    ready: list[Moment] = field(default_factory=list)
    done: list[Moment] = field(default_factory=list)
    end: Moment | None = None


@dataclass(frozen=True)
class SyncSeconds:
    """Of `steps` steps: how long all-reduces ran (`total`), and for how long nothing else did (`exposed`).

    A process that comes first waits in the all-reduce for the others, and this counts.
    """

    steps: int = 0
    total: float = 0.0
    exposed: float = 0.0

    def __add__(self, other: "SyncSeconds") -> "SyncSeconds":
        return SyncSeconds(self.steps + other.steps, self.total + other.total, self.exposed + other.exposed)


class GradientSync:
    """Takes over DDP's all-reduce, which it times. A process that is alone has nothing to time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.watched: DistributedDataParallel | None = None
        self.current = Buckets()
        self.unread: list[Buckets] = []
        self.so_far = SyncSeconds()

    def watch(self, model: torch.nn.Module) -> None:
        """To be called before each step: the trainer wraps the model late."""
        if self.watched is None and isinstance(model, DistributedDataParallel):
            self.watched = model
            model.register_comm_hook(self, mean_over_processes)

    def backward_done(self) -> None:
        """To be called right behind each backward. The last of a step has buckets, and its stream waits for all."""
        if self.current.ready:
            self.current.end = now(self.device)
            self.unread.append(self.current)
            self.current = Buckets()

    def mean(self, trained: Sequence[torch.nn.Parameter]) -> None:
        """The mean over processes of gradients that DDP did not see, in one all-reduce, behind the last backward."""
        if not dist.is_initialized():
            return
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        assert len(gradients) == len(trained), "what trains has a gradient on every process"
        ready = now(self.device)
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(one) for part, one in zip(parts, gradients, strict=True)])
        done = now(self.device)
        self.unread.append(Buckets([ready], [done], done))

    def read(self, first: int | None = None) -> SyncSeconds:
        """Of the first steps that are not read yet (None: of all) those that the card has passed; the others come with
        the next call."""
        found, due = SyncSeconds(), len(self.unread) if first is None else first
        while self.unread and found.steps < due and passed(self.unread[0].end):
            found += seconds_of(self.unread.pop(0))
        self.so_far += found
        return found


def mean_over_processes(
    sync: GradientSync,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: what it does without one, with the moments marked."""
    step, gradients = sync.current, bucket.buffer()
    gradients.div_(dist.get_world_size())
    place = len(step.ready)
    step.ready.append(now(sync.device))
    step.done.append(step.ready[-1])

    def arrived(future: Any) -> torch.Tensor:
        mean: torch.Tensor = future.value()[0]
        step.done[place] = now(sync.device)  # on a card in a stream that waits for this all-reduce
        return mean

    work: Any = dist.all_reduce(gradients, async_op=True)
    reduced: torch.futures.Future[torch.Tensor] = work.get_future().then(arrived)
    return reduced


def seconds_of(step: Buckets) -> SyncSeconds:
    """What one step took. All-reduces may run beside each other, or wait for the one before: their time counts once."""
    assert step.end is not None
    first, last = step.ready[0], step.ready[-1]
    total, until = 0.0, 0.0
    for ready, done in zip(step.ready, step.done, strict=True):
        begin, end = between(first, ready), between(first, done)
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return SyncSeconds(1, total, max(0.0, between(last, step.end)))
