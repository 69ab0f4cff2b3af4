"""How a worker learns that it should save a checkpoint and end.

Under our launcher that is SIGUSR1 alone: SIGTERM then means that another process failed, and ends this one at once
instead of leaving it to wait for a peer that is gone. Under torchrun or alone, schedulers' SIGTERM, SIGINT (Ctrl-C)
and SIGUSR1 all ask for it.
"""

import os
import signal

LAUNCHER = "OPENSLOTH_LAUNCHER"  # the process id of our launcher, in its workers' environment


def launcher_signals() -> list[signal.Signals]:
    """What asks a whole run to stop, on this platform."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def forwarded() -> signal.Signals:
    """What our launcher sends to its workers to ask for a checkpoint and an end."""
    return getattr(signal, "SIGUSR1", signal.SIGTERM)


def worker_signals() -> list[signal.Signals]:
    """What asks this process, a worker, for a checkpoint and an end."""
    return [forwarded()] if LAUNCHER in os.environ else launcher_signals()
