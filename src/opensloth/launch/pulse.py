"""What each process was last seen at: written while it works, read when a run hung.

A thread looks every few seconds at the stack of the main thread and notes since when it has been the same, and in which
step. When one process waits for another until its time is over, these notes tell who kept it waiting, and where.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from opensloth import paths
from opensloth.errors import OpenSlothError

LOOKS = 10  # how often the stack is looked at within --timeout
QUIET = 0.7  # share of --timeout after which a process that does not move is part of a hang
DEEPEST = 30  # frames that are kept
BACKWARD = "the backward pass, where gradients are averaged"

_step = 0  # of this process; set by `mark`


@dataclass(frozen=True)
class Pulse:
    """One process. `since` and `seen` are epoch seconds; `stack` has the innermost frame last.

    `collective` is what the process waits for others in, None where it does not.
    """

    rank: int
    step: int
    since: float
    seen: float
    timeout: int
    collective: str | None
    where: str
    stack: list[str] = field(default_factory=list)


def mark(step: int) -> None:
    """This process has completed a step."""
    global _step
    _step = step


class Watch(threading.Thread):
    """Notes in `directory` what the main thread of this process does. `timeout`: seconds of a collective."""

    def __init__(self, directory: Path, rank: int, timeout: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self.directory, self.rank, self.timeout = directory, rank, timeout
        self.ended = threading.Event()

    def run(self) -> None:
        main = threading.main_thread().ident or 0
        last, since = None, time.time()
        while not self.ended.wait(max(0.2, self.timeout / LOOKS)):
            frame = sys._current_frames().get(main)
            if frame is None:
                return
            frames = stack_of(frame)
            # not the lines: a loop that leads nowhere runs over several of them
            now = (_step, [(file, name) for file, _, name in frames])
            if now != last:
                last, since = now, time.time()
            shown = [f"{file}:{line} {name}" for file, line, name in frames[-DEEPEST:]]
            found = Pulse(self.rank, _step, since, time.time(), self.timeout, collective(frames), where(frames), shown)
            with suppress(OSError, OpenSlothError):  # a full disk is found by those who need it
                paths.write_json(path(self.directory, self.rank), asdict(found))

    def finish(self) -> None:
        """The process has done its work: nobody will ask what it was at."""
        self.ended.set()
        self.join()
        path(self.directory, self.rank).unlink(missing_ok=True)


Frame = tuple[str, int, str]  # file, line, function


def stack_of(frame: FrameType) -> list[Frame]:
    """The calls that led to `frame`, the innermost last."""
    frames: list[Frame] = []
    current: FrameType | None = frame
    while current is not None:
        frames.append((current.f_code.co_filename, current.f_lineno, current.f_code.co_name))
        current = current.f_back
    return frames[::-1]


def collective(frames: list[Frame]) -> str | None:
    """What the process waits for the others in, if it does: the name of torch's function, or the backward pass."""
    for file, _, name in frames:
        if file.endswith("distributed_c10d.py") and not name.startswith("_") and name != "wrapper":
            return name
    return BACKWARD if any(name == "_engine_run_backward" for _, _, name in frames) else None


def where(frames: list[Frame]) -> str:
    """The innermost call outside of installed libraries and Python itself."""
    libraries = ("site-packages", "dist-packages", os.path.dirname(threading.__file__), "<frozen")
    own = [frame for frame in frames if not any(part in frame[0] for part in libraries)]
    file, line, name = (own or frames)[-1]
    return f"{name} ({file}, line {line})"


def path(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank}.pulse.json"


def autopsy(directory: Path, processes: int, when: float) -> list[str]:
    """Who kept whom waiting, one line a process; nothing where no process had stood still for long.

    Args:
        when: epoch seconds of the failure.
    """
    found = []
    for rank in range(processes):
        try:
            found.append(Pulse(**json.loads(path(directory, rank).read_text(encoding="utf-8"))))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            continue
    if not any(when - one.since > QUIET * one.timeout for one in found):
        return []
    return [line(one, when) for one in sorted(found, key=lambda one: one.collective is not None)]


def line(one: Pulse, when: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(one.since))
    at = f"after step {one.step}, since {clock} ({when - one.since:.0f} s)"
    if one.collective:
        return f"Process {one.rank} waits for the others in {one.collective}, called by {one.where}, {at}."
    return f"Process {one.rank} keeps them waiting in {one.where}, {at}."
