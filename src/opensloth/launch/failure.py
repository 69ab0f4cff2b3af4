"""A worker's last words: the report it leaves, and which of several reports names the cause.

The report is a JSON file in the place that torch elastic names (TORCHELASTIC_ERROR_FILE) and in the form it reads,
so that a plain torchrun shows the message too.
"""

import errno
import json
import os
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from opensloth import paths
from opensloth.errors import OpenSlothError, RunStopped, UserError, WorkerFailed

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
BUG = 1  # the exit code of an unexpected error
LOST = "lost"  # the kind of the parent's report that another machine does not answer
DEAD, ENDED = "dead", "ended"  # kinds of the reports that the parent makes up for workers that left none
# A process that fails takes its peers' connections with it; these are words of the libraries that then complain.
LOST_PEER_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "DistError"}
LOST_PEER_WORDS = (
    "closed by peer",
    "reset by peer",
    "gloo/transport",
    "Gloo connect",
    "ncclRemoteError",
    "Broken pipe",
)
RIGHTS = {errno.EACCES, errno.EPERM}  # also of what is no file
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *RIGHTS}
REFUSAL_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed",
    "inline_container",
)
GOES_ON = "The same command goes on from the last checkpoint, or begins anew where there is none."
OF_THE_CARD = (
    "The card gave up. The same command goes on from the last checkpoint; if this comes again, add --cuda-graphs off, "
    "which launches kernels one by one."
)


@dataclass(frozen=True)
class Report:
    """`kind` is the name of one of our errors, of another exception, or DEAD/ENDED; `when` is in epoch seconds."""

    rank: int
    kind: str
    message: str
    hint: str
    exit_code: int
    traceback: str
    when: float
    lost_peer: bool = False  # the error says no more than that another process is gone
    out_of_memory: bool = False  # of a card: smaller packs may fit

    @property
    def stopped(self) -> bool:
        return self.kind == RunStopped.__name__

    @property
    def expected(self) -> bool:
        return self.kind in {UserError.__name__, WorkerFailed.__name__, RunStopped.__name__}

    @property
    def wordless(self) -> bool:
        """Whether the parent made it up, for a worker that left none."""
        return self.kind in {DEAD, ENDED}


def describe(error: BaseException) -> Report:
    """The report of an error that ended this process."""
    rank = int(os.environ.get("RANK", "0"))
    trace = "".join(traceback.format_exception(error))
    lost = lost_peer(error)
    if isinstance(error, OpenSlothError):
        kinds = (RunStopped, WorkerFailed, UserError)
        kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), UserError.__name__)
        return Report(rank, kind, error.message, error.hint, error.exit_code, trace, time.time(), lost)
    name = type(error).__name__
    text = str(error).strip()
    first_line = text.splitlines()[0] if text else ""
    if isinstance(error, KeyboardInterrupt):  # before training began, which would have saved its step
        message, code = "Stopped by SIGINT.", RunStopped.exit_code
        return Report(rank, RunStopped.__name__, message, GOES_ON, code, trace, time.time())
    if refused := unwritable(error):
        hint = "Free space, or give the run its rights back: the same command goes on from the last checkpoint."
        return Report(rank, WorkerFailed.__name__, refused, hint, WorkerFailed.exit_code, trace, time.time())
    if name == "OutOfMemoryError":
        smaller = "a smaller --pack-tokens, --max-seq-length or --max-new"
        hint = f"Try {smaller}, --gradient-checkpointing full, or --load-in-4bit."
        message, code = f"Out of GPU memory: {first_line}", WorkerFailed.exit_code
        return Report(rank, WorkerFailed.__name__, message, hint, code, trace, time.time(), out_of_memory=True)
    message = f"{name}: {first_line}" if first_line else name
    hint = OF_THE_CARD if "CUDA error" in first_line else ""
    return Report(rank, name, message, hint, BUG, trace, time.time(), lost)


def lost_peer(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, comes from a connection to another process."""
    while error is not None:
        if type(error).__name__ in LOST_PEER_TYPES or isinstance(error, ConnectionError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_WORDS):
            return True
        error = error.__cause__
    return False


def unwritable(error: BaseException | None) -> str:
    """What an error says of a disk that is full or refuses to be written to; nothing where it is about another thing.

    safetensors has the system's words in its text; torch names only its writer.
    """
    while error is not None:
        text = str(error)
        of_a_file = isinstance(error, OSError) and (error.filename or error.errno not in RIGHTS)
        if isinstance(error, OSError) and error.errno in REFUSALS and of_a_file:
            return f"Cannot write {error.filename or 'to a file'}: {error.strerror}."
        if any(words in text for words in REFUSAL_WORDS):
            return f"Cannot write to disk: {text.splitlines()[0]}"
        error = error.__cause__ or error.__context__
    return ""


def report(error: BaseException) -> int:
    """Write the report of `error` where the launcher looks for it (if one does); returns the exit code."""
    result = describe(error)
    if path := os.environ.get(ERROR_FILE):
        # `message` and `timestamp` are torch elastic's fields
        with suppress(OSError):  # a full disk: the exit code must do
            paths.write_json(
                Path(path), {"message": result.message, "timestamp": int(result.when), "report": asdict(result)}
            )
    return result.exit_code


def read(path: Path) -> Report | None:
    """The report in `path`; None where the worker left none (or none of ours)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Report(**value["report"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def read_own() -> Report | None:
    """The report that this process has left so far."""
    path = os.environ.get(ERROR_FILE)
    return read(Path(path)) if path else None


def root_cause(reports: Iterable[Report]) -> Report:
    """The report that explains the others: an error of its own before a silent death, before lost connections."""

    def order(report: Report) -> tuple[int, float]:
        if report.kind == ENDED:
            return 4, report.when
        if report.lost_peer:
            return 3, report.when
        if report.stopped:
            return 2, report.when
        return (1 if report.kind == DEAD else 0), report.when

    return min(reports, key=order)
