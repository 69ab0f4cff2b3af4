"""The first code of every worker: `python -m opensloth.launch.child MODULE RUN_DIR` runs MODULE as a program.

With `--wait LIBRARIES METHOD` instead it begins before that is known, and is told later (`ahead.py`).

It sends all output to the worker's log, ties the worker's life to its launcher's, and turns what MODULE raises into
the report that the launcher reads. Not for processes of a plain torchrun, which has its own logs.
"""

import atexit
import contextlib
import faulthandler
import importlib
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from opensloth.errors import STOPPED, RunStopped
from opensloth.launch import ahead, failure, pulse, stop

PARENT_POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher(launcher: int) -> None:
    """End this process when the launcher is gone, also when that was killed without a chance to say so."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it went before it could be watched
        os._exit(failure.BUG)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(failure.BUG)


def run(module: str, run_dir: str) -> int:
    """Run `module` with `run_dir` as its argument; its failure becomes a report. Returns the exit code."""
    sys.argv = [module, run_dir]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            sys.stderr.write(exit_.code + "\n")
        if code == STOPPED and failure.read_own() is None:
            failure.report(RunStopped("The run was stopped.", "The same command resumes it."))
        return code
    except BaseException as error:
        return failure.report(error)
    return 0


def hear_launcher() -> None:
    """Signals that were ignored or held back where the launcher was started are so here too: its own must arrive."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop.sent())
    for number in stop.sent():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def begin_early(libraries: str, method: str) -> list[str]:
    """Import, and wait for the run. An import that fails does so again in the run, which can report it."""
    waiting = ahead.Waiting(sys.stdin)
    with contextlib.suppress(Exception, SystemExit):
        importlib.import_module(libraries).load(method)
    return waiting.become_worker()


def main() -> None:
    faulthandler.enable()
    hear_launcher()
    die_with_launcher(int(os.environ[stop.LAUNCHER]))
    arguments = sys.argv[1:]
    if arguments[0] == ahead.WAIT:
        _, libraries, method = arguments
        arguments = begin_early(libraries, method)
    module, run_dir = arguments
    # The launcher gave stdout a file; stderr joins it there, so that the log holds both in their order.
    os.dup2(1, 2)
    watch = pulse.Watch(Path(run_dir) / "logs", int(os.environ["RANK"]), int(os.environ["OPENSLOTH_TIMEOUT"]))
    watch.start()
    code = run(module, run_dir)
    if code in (0, STOPPED):
        watch.finish()
        # torch elastic would end the other processes, which may still be writing the checkpoint, after a code over 0;
        # the report tells the launcher that this was a stop.
        code = 0
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # A normal exit waits for a communicator that lost its peers, for minutes. And now and then it aborts a process that
    # had done all it had to: where a thread of gloo's lets go of a Python object while Python goes away.
    os._exit(code)


if __name__ == "__main__":
    main()
