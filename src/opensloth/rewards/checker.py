"""Asks the verifier child whether two expressions are equal, and never waits for it longer than a limit.

The child starts at the first question and is killed when it hangs; the next question starts another. One child serves
all threads of a process in turn; a forked process gets its own.
"""

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from opensloth.errors import WorkerFailed

LIMIT_SECONDS = 2.0
START_SECONDS = 120.0  # the child imports sympy: a second on a free machine, much more on a loaded one
MODULE = "opensloth.rewards.verifier"


class Checker:
    """See the module. `unjudged` counts the questions that ended with None."""

    def __init__(self, limit: float = LIMIT_SECONDS) -> None:
        self.limit = limit
        self.unjudged = 0
        self._lock = threading.Lock()
        self._child: _Child | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def equal(self, answer: str, gold: str) -> bool | None:
        """Whether math-verify finds the two equal; None where it took longer than `limit` seconds or died.

        Raises:
            WorkerFailed: the child cannot start at all.
        """
        with self._lock:
            if self._child is None:
                self._child = _Child()
            result = None
            try:
                result = self._child.ask(answer, gold, self.limit)
            finally:
                if result is None:  # also after Ctrl-C: the next question must not get the answer to this one
                    self._child.close()
                    self._child = None
                    self.unjudged += 1
            return result

    def close(self) -> None:
        """End the child, if there is one; a later question starts another."""
        with self._lock:
            if self._child is not None:
                self._child.close()
                self._child = None

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return None if self._child is None else self._child.process.pid

    def _forget(self) -> None:
        """In a forked process: the child is the parent's, and a lock held by one of its threads is never released."""
        self._lock = threading.Lock()
        self._child = None


class _Child:
    """One process of the verifier, ready for questions."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[2])  # a notebook may have found this package through sys.path alone
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # -P: a file of the user's folder, say math.py, must not stand for a module of the library
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # a thread, not select: pipes cannot be waited for on every platform
        self._reader = threading.Thread(target=self._read, name="verifier", daemon=True)
        self._reader.start()
        if self._line(START_SECONDS) != "ready":
            self.close()
            raise WorkerFailed(
                "The process that compares answers does not start.", f"Run `{sys.executable} -m {MODULE}` to see why."
            )

    def ask(self, answer: str, gold: str, limit: float) -> bool | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"answer": answer, "gold": gold, "limit": limit}) + "\n")
            self.process.stdin.flush()
        except OSError:  # it died between two questions
            return None
        line = self._line(limit)
        return line if isinstance(line, bool) else None

    def close(self) -> None:
        """Kill the process and collect it, so that no zombie stays."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:  # half a question was still buffered
            return

    def _line(self, limit: float) -> object:
        """The next line as JSON; None at a time-out or at the end."""
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")


CHECKER = Checker()
atexit.register(CHECKER.close)
