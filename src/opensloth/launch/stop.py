"""How a worker learns that it should save a checkpoint and end.

Schedulers' SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP all ask for it, whichever process they reach. A worker whose
peer is gone gets another signal from our launcher, which ends it at once instead of leaving it to wait.
"""

import signal
from types import FrameType

LAUNCHER = "OPENSLOTH_LAUNCHER"  # the process id of our launcher, in its workers' environment
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
ASKING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def signals() -> list[signal.Signals]:
    """What asks a run to stop, on this platform. Those that are ignored (nohup) stay so."""
    return [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]


def forwarded() -> signal.Signals:
    """What our launcher sends to its workers to ask for a checkpoint and an end."""
    return getattr(signal, "SIGUSR1", signal.SIGTERM)


def peer_lost() -> signal.Signals:
    """What our launcher sends to the workers that are left when one failed. It has no handler: they end at once."""
    return getattr(signal, "SIGUSR2", signal.SIGTERM)


def sent() -> tuple[signal.Signals, ...]:
    """What our launcher sends to its workers. Where these were ignored or held back when the launcher itself was
    started, they would be so in the workers too, and a run could neither be stopped nor ended."""
    return forwarded(), peer_lost()


def is_request(number: int) -> bool:
    """Whether a process that this signal ended was asked to stop: by a person or a scheduler, before it could save."""
    return number in ASKING and number != peer_lost()


class StopRequest:
    """Set by a signal, read by the training loop between steps: `name` is the signal's, or None."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> "StopRequest":
        """Catch the signals (main thread only). A second one has its usual effect."""
        for number in signals():
            signal.signal(number, self._caught)
        return self

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
