"""Processes that are begun before their run is known: they import their libraries while the command prepares the data.

Imports are most of a start: seconds in the command, and then as many again in each process. Here a process of each
device begins early, imports, and waits at its stdin until torch elastic asks for a worker: then it is told what that
worker would have been started with, and becomes it. Where none is waiting, workers are started as usual.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from opensloth.launch import failure
from opensloth.launch.environment import process_environment, quiet_torch
from opensloth.launch.world import World, under_torchrun

LIBRARIES = "opensloth.training.libraries"
WAIT = "--wait"  # the first argument of a process that waits, instead of a worker's module
OF_THE_HUB = ("HF_", "TRANSFORMERS_", "DATASETS_")  # variables that its clients read as they are imported

_waiting: dict[int, subprocess.Popen[bytes]] = {}  # of this command, by local rank
_begun_with: dict[str, str] = {}  # what they found of OF_THE_HUB


@contextmanager
def begun(world: World, method: str, engine: str, libraries: str = "") -> Iterator[None]:
    """Begin the processes of the run that the block is going to start; those that it does not take are ended.

    Args:
        method: "sft" or "grpo".
        engine: unsloth has to be imported first of all, with the job at hand, so it is not imported ahead.
        libraries: the module whose `load(method)` imports what a worker of the method needs; LIBRARIES unless told.
    """
    try:
        if not under_torchrun() and engine != "unsloth":
            quiet_torch()
            _begun_with.clear()
            _begun_with.update(_of_the_hub())
            with suppress(OSError):  # no more processes now: later some may have ended
                for local_rank in range(len(world.devices)):
                    _waiting[local_rank] = _begin(world, local_rank, libraries or LIBRARIES, method)
        yield
    finally:
        end_waiting()


def _begin(world: World, local_rank: int, libraries: str, method: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "opensloth.launch.child", WAIT, libraries, method],
        env=os.environ | process_environment(world, local_rank),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=os.name != "nt",  # as torch elastic starts workers
    )


def _of_the_hub() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(OF_THE_HUB)}


def end_waiting() -> None:
    while _waiting:
        _, process = _waiting.popitem()
        process.kill()
        process.communicate()


@contextmanager
def taken(log_of: Callable[[Mapping[str, str]], Path]) -> Iterator[None]:
    """Within the block torch elastic gets a waiting process instead of a new one, where there is one for the device.

    Args:
        log_of: the file where a worker with this environment writes its log.
    """
    if _of_the_hub() != _begun_with:  # such as that it cannot be reached: they would try for minutes
        end_waiting()
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    start = getattr(SubprocessHandler, "_popen", None)  # not public; it is there from torch 2.9 to 2.13
    if not _waiting or start is None:
        yield
        return

    def take(handler: Any, arguments: tuple[str, ...], environment: dict[str, str]) -> Any:
        process = _waiting.pop(int(environment["LOCAL_RANK"]), None)
        if process is not None and _hand_over(process, arguments[-2:], environment, log_of(environment)):
            return process
        return start(handler, arguments, environment)

    SubprocessHandler._popen = take  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SubprocessHandler._popen = start  # type: ignore[method-assign]


def _hand_over(
    process: subprocess.Popen[bytes], arguments: tuple[str, ...], environment: Mapping[str, str], log: Path
) -> bool:
    """Tell a waiting process what it is to be; False where it has ended, of which nothing is left then."""
    assert process.stdin is not None
    told = {"arguments": arguments, "environment": dict(environment), "log": str(log)}
    with suppress(OSError):
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.close()
        if process.poll() is None:
            return True
    process.kill()
    process.wait()
    return False


class Waiting:
    """In the process: hears what it is to be while its libraries are still imported, so that its log is there at once.

    Args:
        pipe: where it is told; its end means that no worker is needed.
    """

    def __init__(self, pipe: TextIO) -> None:
        self.began_with = dict(os.environ)
        self.told: dict[str, Any] = {}
        self.thread = threading.Thread(target=self.hear, args=(pipe,), daemon=True)
        self.thread.start()

    def hear(self, pipe: TextIO) -> None:
        """In a thread, whose errors nobody would see: the process ends with them."""
        try:
            line = pipe.readline()
            if not line:
                os._exit(0)
            self.told = json.loads(line)
            put(os.devnull, os.O_RDONLY, 0)
            put(self.told["log"], os.O_WRONLY | os.O_APPEND, 1)
            os.dup2(1, 2)
        except Exception:
            os._exit(failure.BUG)

    def become_worker(self) -> list[str]:
        """Wait to be told. Returns the worker's arguments, and leaves its environment, with what imports have set."""
        self.thread.join()
        wanted = self.told["environment"]
        for name in self.began_with.keys() - wanted.keys():
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in wanted.items() if self.began_with.get(name) != value})
        return list(self.told["arguments"])


def put(path: str, flags: int, number: int) -> None:
    """Have a file in the place of an open one, by its number."""
    opened = os.open(path, flags)
    os.dup2(opened, number)
    os.close(opened)
