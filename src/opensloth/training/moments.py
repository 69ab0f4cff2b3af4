"""Moments by a device's own clock, and the seconds between them: where a host is, its card has not come to yet.

On a card they are events in its stream, which the host does not wait for; elsewhere the host is the device.
"""

import time

import torch

Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """When all that the device was given so far is done."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def passed(moment: Moment | None) -> bool:
    return not isinstance(moment, torch.cuda.Event) or bool(moment.query())  # type: ignore[no-untyped-call]


def await_moment(moment: Moment) -> None:
    """Keep the host until the device is there."""
    if isinstance(moment, torch.cuda.Event):
        moment.synchronize()


def between(start: Moment, end: Moment) -> float:
    """Seconds. Both must be past."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start
