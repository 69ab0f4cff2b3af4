"""What a person reads while a command works, all on stderr: stdout carries results only.

Progress is a live bar when stderr is a terminal and one plain line every few seconds otherwise.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape

PLAIN_LINE_SECONDS = 5.0


def console() -> Console:
    """The stderr console. Made on each call, so that redirected streams (tests, workers' logs) are honoured."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person at the terminal. Control characters of untrusted data are made visible."""
    console().print(escape(printable(text)), markup=True)


def warn(text: str) -> None:
    console().print(f"[yellow]warning:[/] {escape(printable(text))}")


def fail(message: str, hint: str = "") -> None:
    """The one line (and hint) of an error."""
    console().print(f"[bold red]error:[/] {escape(printable(message))}")
    if hint:
        console().print(f"  {escape(printable(hint))}")


def printable(text: str) -> str:
    """`text` with terminal escapes and other control characters shown as `\\x1b` instead of being obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def quiet_libraries() -> None:
    """Silence the libraries' telemetry and chatter. Call before any of them is imported.

    trl reports usage at every trainer's construction unless the first variable is set before huggingface_hub loads.
    """
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "DISABLE_TELEMETRY",
        "UNSLOTH_DISABLE_STATISTICS",
        "VLLM_NO_USAGE_STATS",
        "TRL_EXPERIMENTAL_SILENCE",
    ):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("httpx", "filelock", "datasets", "torch.distributed.elastic", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Progress(Protocol):
    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` units are complete, in all."""


@contextmanager
def progress(title: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Report long work: a bar on a terminal, else a line at most every five seconds (none for quick work)."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bar(*columns, console=console(), transient=True) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=printable(note))
        return

    last = time.monotonic()

    def plain(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            say(f"{title}: {done:,}{f' of {total:,}' if total else ''} {unit}{f', {note}' if note else ''}")

    yield plain
