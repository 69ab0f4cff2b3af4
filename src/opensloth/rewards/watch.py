"""Calls a user's reward with its output checked and its time limited, and says where it went wrong.

What the trainer gets is a list of finite floats and Nones of the right length, or the run ends with the file, the line
and the row. Scores that were made up instead would train the model on them.
"""

import functools
import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any

from opensloth.errors import UserError, WorkerFailed
from opensloth.rewards.custom import place

LIMIT_SECONDS = 120.0  # for one call, which scores all completions of a process's batch
ALONE_SECONDS = 5.0  # for one row, when looking for the one that fails


class _TookTooLong(BaseException):
    """Raised in the user's code. No Exception: a reward that catches those would go on."""


def watched(function: Callable[..., Any], limit: float = LIMIT_SECONDS) -> Callable[..., list[float | None]]:
    """`function` as a reward. It gets those columns that it names, or all where it takes `**columns`.

    Raises (at a call):
        WorkerFailed: it raises, takes longer than `limit` seconds, or returns anything but one finite number or None
            for each completion.
        UserError: it asks for a column that the rows do not have.
    """
    file, line = Path(inspect.getsourcefile(function) or "?"), first_line(function)
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    name = getattr(function, "__name__", str(function))

    @functools.wraps(function)
    def reward(**columns: Any) -> list[float | None]:
        check_columns(function, columns)
        given = columns if takes_all else {key: value for key, value in columns.items() if key in names}
        count = len(columns["completions"])
        rows = row_names(columns, count)
        try:
            with time_limit(limit):
                scores = function(**given)
        except _TookTooLong as error:
            raise WorkerFailed(
                f"The reward {name} took longer than {limit:g} seconds: {place(error, file)}, {span(rows)}.",
                "Make it faster, or limit the time of what it calls.",
            ) from None
        except Exception as error:  # anybody's code may raise anything; it ends the run with its place
            row = first_failing(function, given, count)
            raise WorkerFailed(
                f"The reward {name} failed: {place(error, file)}, {span(rows) if row is None else rows[row]}: "
                f"{type(error).__name__}: {error}",
                "A reward that cannot judge a completion returns None for it.",
            ) from error
        return checked(scores, rows, f"The reward {name} ({file}, line {line})")

    return reward


def check_columns(function: Callable[..., Any], columns: Iterable[str]) -> None:
    """Raise UserError where `function` (or what a watched one wraps) asks for a column that is not among `columns`."""
    function = inspect.unwrap(function)
    needed = {
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if missing := sorted(needed.difference(columns)):
        name = getattr(function, "__name__", str(function))
        file, line = inspect.getsourcefile(function) or "?", first_line(function)
        raise UserError(
            f"The reward {name} ({file}, line {line}) needs the column {missing[0]!r}, which the rows lack.",
            f"Columns: {', '.join(sorted(columns))}.",
        )


def checked(scores: Any, rows: Sequence[str], who: str) -> list[float | None]:
    """`scores` as floats and Nones. Raises WorkerFailed, naming the row, for anything else."""
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(scores, (list, tuple)):
        raise WorkerFailed(
            f"{who} returned {type(scores).__name__}, not a list; {span(rows)}.",
            "Return one score for each completion.",
        )
    if len(scores) != len(rows):
        raise WorkerFailed(
            f"{who} returned {len(scores)} scores for {len(rows)} completions; {span(rows)}.",
            "Return one score for each completion.",
        )
    for score, row in zip(scores, rows, strict=True):
        if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
            raise WorkerFailed(
                f"{who} returned {score!r} for {row}, which is no number.",
                "Return a finite number, or None for no score.",
            )
    return [None if score is None else float(score) for score in scores]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise _TookTooLong in this thread after `seconds`.

    In the main thread through the alarm signal, which also ends a regular expression that runs wild; it comes again
    each second, should the code swallow it. Elsewhere (other threads, Windows) Python can raise into a thread only
    between two of its instructions.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        with thread_limit(seconds):
            yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _TookTooLong

    handler = signal.signal(signal.SIGALRM, late)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def thread_limit(seconds: float) -> Iterator[None]:
    import ctypes

    thread = ctypes.c_ulong(threading.get_ident())
    ended = threading.Event()

    def interrupt() -> None:
        if not ended.is_set():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TookTooLong))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        ended.set()
        timer.cancel()


def first_failing(function: Callable[..., Any], columns: dict[str, Any], count: int) -> int | None:
    """The first row for which `function` raises when it gets that row alone; None where no row does."""
    for row in range(count):
        alone = {
            key: value[row : row + 1] if isinstance(value, (list, tuple)) and len(value) == count else value
            for key, value in columns.items()
        }
        try:
            with time_limit(ALONE_SECONDS):
                function(**alone)
        except _TookTooLong:
            return None
        except Exception:  # the caller raises what came first
            return row
    return None


def row_names(columns: dict[str, Any], count: int) -> list[str]:
    """What a person finds the rows by: their row_id, where the data has it, and the place in the batch."""
    ids = columns.get("row_id")
    if isinstance(ids, (list, tuple)) and len(ids) == count:
        return [f"row {row_id} (completion {place} of the batch)" for place, row_id in enumerate(ids)]
    return [f"completion {place} of the batch" for place in range(count)]


def span(rows: Sequence[str]) -> str:
    return f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else (rows[0] if rows else "an empty batch")


def first_line(function: Callable[..., Any]) -> int:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_firstlineno if code is not None else 1
