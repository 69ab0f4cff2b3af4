"""How a worker learns that it should save a checkpoint and end.

Schedulers' SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP all ask for it, whichever process they reach. A worker whose
peer is gone gets another signal from our launcher, which ends it at once instead of leaving it to wait.
"""

import os
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
    started, they are so in the workers too until those see to it: else a run could neither be stopped nor ended."""
    return forwarded(), peer_lost()


def is_request(number: int) -> bool:
    """Whether a process that this signal ended was asked to stop: by a person or a scheduler, before it could save."""
    return number in ASKING and number != peer_lost()


class StopRequest:
    """Set by a signal, read by the training loop between steps: `name` is the signal's, or None.

    Libraries take signals over: LLVM, once Triton has compiled a kernel, has handlers of its own for all of these, and
    lets SIGUSR1 go (llvm/lib/Support/Unix/Signals.inc). So each reading takes them back, and our launcher says it again
    until a worker has ended.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._armed: list[signal.Signals] = []

    def install(self) -> "StopRequest":
        """Catch the signals (main thread only). A second one has its usual effect, unless our launcher repeats it."""
        self._armed = signals()
        self._arm()
        return self

    def asked(self) -> bool:
        """Whether a signal came (main thread only)."""
        self._arm()
        return self.name is not None

    def _arm(self) -> None:
        for number in tuple(self._armed):
            signal.signal(number, self._caught)  # which first hands over a signal that is waiting
            if number not in self._armed:
                signal.signal(number, signal.SIG_DFL)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != forwarded() or LAUNCHER not in os.environ:
            self._armed = [armed for armed in self._armed if armed != number]
            signal.signal(number, signal.SIG_DFL)
