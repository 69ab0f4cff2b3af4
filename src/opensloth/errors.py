"""The outcomes of a command that are not bugs, each with its exit code.

Anything else that is raised is a bug: it keeps its traceback and exits 1.
"""

import difflib
from collections.abc import Iterable

DONE = 0
USER_ERROR = 2
WORKER_FAILED = 3
BEYOND_TOLERANCE = 4
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again and it goes on


class OpenSlothError(Exception):
    """An expected way to fail: `message` names the cause, `hint` the way out, `exit_code` the process's status."""

    exit_code = USER_ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UserError(OpenSlothError):
    """The user's mistake, wherever it was found (exit code 2)."""


class WorkerFailed(OpenSlothError):
    """A training process failed: NaN loss, a reward that raises, out of memory, killed (exit code 3)."""

    exit_code = WORKER_FAILED


class RunStopped(OpenSlothError):
    """A signal ended the run after a checkpoint; the same command resumes it (exit code 75)."""

    exit_code = STOPPED


class Unequal(OpenSlothError):
    """Two runs that should be the same training are not (exit code 4)."""

    exit_code = BEYOND_TOLERANCE


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint `Did you mean X?` for a misspelt name, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else ""
