"""How a worker learns that it should save a checkpoint and end.

Under our launcher that is SIGUSR1 alone: SIGTERM then means that another process failed, and ends this one at once
instead of leaving it to wait for a peer that is gone. Under torchrun or alone, schedulers' SIGTERM, SIGINT (Ctrl-C)
and SIGUSR1 all ask for it.
"""

import os
import signal
from types import FrameType

LAUNCHER = "OPENSLOTH_LAUNCHER"  # the process id of our launcher, in its workers' environment


def launcher_signals() -> list[signal.Signals]:
    """What asks a whole run to stop, on this platform. Those that are ignored (nohup) stay so."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def forwarded() -> signal.Signals:
    """What our launcher sends to its workers to ask for a checkpoint and an end."""
    return getattr(signal, "SIGUSR1", signal.SIGTERM)


def worker_signals() -> list[signal.Signals]:
    """What asks this process, a worker, for a checkpoint and an end."""
    return [forwarded()] if LAUNCHER in os.environ else launcher_signals()


class StopRequest:
    """Set by a signal, read by the training loop between steps: `name` is the signal's, or None."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> "StopRequest":
        """Catch the signals (main thread only). A second one has its usual effect."""
        for number in worker_signals():
            signal.signal(number, self._caught)
        return self

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
