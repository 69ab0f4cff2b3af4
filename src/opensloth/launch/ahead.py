"""Processes that are begun before their run is known: they import their libraries while the command prepares the data.

Imports are most of a start: seconds in the command, and then as many again in each process. Here a process of each
device begins early, imports, and waits at its stdin until torch elastic asks for a worker: then it is told what that
worker would have been started with, and becomes it. Where none is waiting, workers are started as usual.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from opensloth.launch.environment import process_environment, quiet_torch
from opensloth.launch.world import World, under_torchrun

LIBRARIES = "opensloth.training.libraries"
WAIT = "--wait"  # the first argument of a process that waits, instead of a worker's module

_waiting: dict[int, subprocess.Popen[bytes]] = {}  # of this command, by local rank


@contextmanager
def begun(world: World, method: str, engine: str, libraries: str = LIBRARIES) -> Iterator[None]:
    """Begin the processes of the run that the block is going to start; those that it does not take are ended.

    Args:
        method: "sft" or "grpo".
        engine: unsloth has to be imported first of all, with the job at hand, so it is not imported ahead.
        libraries: the module whose `load(method)` imports what a worker of the method needs.
    """
    if not under_torchrun() and engine != "unsloth":
        quiet_torch()
        for local_rank in range(len(world.devices)):
            _waiting[local_rank] = _begin(world, local_rank, libraries, method)
    try:
        yield
    finally:
        end()


def _begin(world: World, local_rank: int, libraries: str, method: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "opensloth.launch.child", WAIT, libraries, method],
        env=os.environ | process_environment(world, local_rank),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=os.name != "nt",  # as torch elastic starts workers
    )


def end() -> None:
    """End the processes that still wait."""
    while _waiting:
        _, process = _waiting.popitem()
        process.kill()
        process.communicate()


@contextmanager
def taken() -> Iterator[None]:
    """Within the block torch elastic gets a waiting process instead of a new one, where there is one for the device."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    start = getattr(SubprocessHandler, "_popen", None)
    if not _waiting or start is None:  # torch may rename it
        yield
        return

    def take(handler: Any, arguments: tuple[str, ...], environment: dict[str, str]) -> Any:
        process = _waiting.pop(handler.local_rank_id, None)
        if process is not None and _told(process, arguments[-2:], environment, handler._stdout.name):
            return process
        return start(handler, arguments, environment)

    SubprocessHandler._popen = take  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SubprocessHandler._popen = start  # type: ignore[method-assign]


def _told(process: subprocess.Popen[bytes], arguments: tuple[str, ...], environment: dict[str, str], log: str) -> bool:
    """Tell a waiting process what it is to be; False where it has ended."""
    assert process.stdin is not None
    told = {"arguments": arguments, "environment": environment, "log": log}
    with suppress(OSError):
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.close()
        return process.poll() is None
    process.kill()
    process.wait()
    return False


def wait(told_by: Any, environ: Any = os.environ) -> list[str]:
    """In the process: wait to be told, and become that worker. Returns its arguments; ends where none is needed."""
    line = told_by.readline()
    if not line:
        os._exit(0)
    told = json.loads(line)
    environ.clear()
    environ.update(told["environment"])
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (told["log"], os.O_WRONLY | os.O_APPEND, 1)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    return list(told["arguments"])
