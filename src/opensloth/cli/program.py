"""How every program starts and ends: quiet libraries, one line for an expected failure, and the right exit code."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, MappingProxyType
from typing import NoReturn, cast

import typer

from opensloth import __version__, log, paths
from opensloth.errors import DONE, STOPPED, USER_ERROR, OpenSlothError

BUG = 1
INTERRUPTED = 130  # how Typer reports Ctrl-C; ours is 75, because the same command goes on
# The parent of all usage errors. Typer exports only this child, and its own copy of click is private.
UsageFault = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])


def run(
    app: typer.Typer, arguments: list[str] | None = None, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Run a program and return its exit code. A bug is not caught: its traceback is worth more than a code.

    Args:
        elsewhere: options that this program does not have, each with the hint that says where it belongs.
    """
    log.quiet_libraries()
    paths.keep_compiled()
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(__version__)
        return DONE
    try:
        with interruptible():
            status = app(args=arguments, standalone_mode=False)
    except OpenSlothError as error:
        log.fail(error.message, error.hint)
        return error.exit_code
    except UsageFault as error:
        log.fail(error.format_message(), elsewhere.get(unknown_option(error)) or where_to_look(error))
        return USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        log.fail("Interrupted.", "Run the same command again: it goes on from what was saved, if anything was.")
        return STOPPED
    return status if isinstance(status, int) else DONE


def leave(code: int) -> NoReturn:
    """End the process, at once: to take the modules of torch and transformers apart, Python needs another second."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


class Interrupted(KeyboardInterrupt):
    """Of a class of its own: where the very KeyboardInterrupt passes through `exec` of a text, as dataclasses use it,
    Python remembers it, and ends by SIGINT in the end, whatever the exit code, though it was caught."""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, as schedulers send it, ends a program as Ctrl-C does: half-made files are cleared away first."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    ctrl_c = signal.getsignal(signal.SIGINT)  # ignored, where a shell began this in the background

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupt)
    if ctrl_c is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, ctrl_c)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """`os-data show ... | head` has read enough: that is a quiet end, not an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(DONE) from None


def unknown_option(error: typer.BadParameter) -> str:
    return str(getattr(error, "option_name", "")).replace("_", "-")


def where_to_look(error: typer.BadParameter) -> str:
    return f"See {error.ctx.command_path} --help." if error.ctx is not None else ""
