"""Runs a training job's processes through torch elastic, and raises the cause where one of them fails.

Under a plain torchrun, which has started the processes already, each runs its worker itself.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.errors import RunStopped
from opensloth.launch import elastic, failure, outcome, stop
from opensloth.launch.failure import Report
from opensloth.launch.torchrun import run_in_process
from opensloth.launch.world import World, under_torchrun

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

WORKER = "opensloth.training.worker"
GRACE_SECONDS = 5  # for workers to find out themselves that those of another machine are gone
REPEAT_SECONDS = 2  # between two requests to stop that the same workers get
HALVINGS = "OPENSLOTH_PACK_HALVINGS"  # in the workers' environment: how often packs were too large for a card


def run_workers(world: World, run_dir: Path, *, max_restarts: int, timeout: int, module: str = WORKER) -> None:
    """Run `python -m MODULE RUN_DIR` on each device of `world` and wait. `timeout` (seconds) is theirs for collectives.

    Raises what the failed worker reported: UserError, WorkerFailed, or RunStopped after a signal. Failures that may
    not come again (killed, crashed, an unexpected error) are tried anew up to `max_restarts` times, and with half the
    pack where a card ran out of memory.
    """
    if under_torchrun():
        run_in_process(world, run_dir.absolute(), timeout, module)
        return
    halvings = 0
    for attempt in range(max_restarts + 1):
        os.environ[HALVINGS] = str(halvings)
        cause = _attempt(world, run_dir, timeout, module, attempt)
        if cause is None:
            return
        if attempt == max_restarts or (cause.expected and not cause.out_of_memory):
            raise outcome.as_error(cause, world, run_dir)
        halvings += cause.out_of_memory
        log.warn(f"{outcome.as_error(cause, world, run_dir).message} Restart {attempt + 1} of {max_restarts}.")


def _attempt(world: World, run_dir: Path, timeout: int, module: str, attempt: int) -> Report | None:
    """One life of the processes; returns the root cause of their end, None where they finished."""
    run_dir = run_dir.absolute()
    started = time.time()
    agent = elastic.build_agent(world, run_dir, module, timeout, attempt)
    running = _Running(agent)
    meeting, left_at = elastic.meeting_of(agent), 0.0
    # The workers of machine 0 come first, so that its local rank 0 is the rank 0 that reports progress.
    follow = elastic.followed(elastic.log_path(run_dir, 0)) if world.node_rank == 0 else nullcontext()
    with _signals() as asked, follow:
        running.start()
        try:
            while running.is_alive():
                running.join(0.1)
                if asked.count and world.nnodes > 1 and not running.workers():
                    raise RunStopped(f"Stopped by {asked.name} while waiting for the other machines.")
                running.pass_on(asked)
                if meeting and meeting.left is not None:
                    left_at = left_at or time.monotonic()
                    if time.monotonic() > left_at + GRACE_SECONDS:
                        running.kill()
        finally:
            running.kill()
    if isinstance(running.error, (OSError, RuntimeError)):
        if attempt:
            return outcome.not_back(world, running.error)
        raise outcome.no_meeting(world, running.error) from running.error
    if running.error is not None:
        raise running.error
    reports = outcome.reports(world, run_dir, started, running.result)
    for report in reports:
        outcome.append_to_log(run_dir, report)
    if not reports:
        return None
    cause = failure.root_cause(reports)
    lost = meeting.who_left() if meeting and not cause.stopped else None
    if meeting and not cause.stopped:
        meeting.leave()
    if asked.count and (cause.wordless or cause.lost_peer):
        raise RunStopped(f"Stopped by {asked.name} before a new checkpoint was complete.", failure.GOES_ON)
    if asked.count and cause.stopped:  # the user sent that signal, not the one we passed on
        return replace(cause, message=cause.message.replace(stop.forwarded().name, asked.name))
    return outcome.lost_machine(world, cause, lost, timeout)


class _Running(threading.Thread):
    """The agent at work. In a thread, because torch elastic takes over the signals of the main thread."""

    def __init__(self, agent: "LocalElasticAgent") -> None:
        super().__init__(name="torch-elastic-agent", daemon=True)
        self.agent = agent
        self.result: RunResult | None = None
        self.error: BaseException | None = None
        self._told = 0.0  # when the workers were asked to stop

    def run(self) -> None:
        try:
            self.result = self.agent.run()
        except BaseException as error:
            self.error = error

    def workers(self) -> list[int]:
        """The process ids of the started workers."""
        group = self.agent.get_worker_group()
        return [worker.id for worker in group.workers if isinstance(worker.id, int)]

    def pass_on(self, asked: "_Asked") -> None:
        """Tell the workers to stop, now and then: a library that took the signal over may have let it go.

        A second signal to this process ends them at once.
        """
        if asked.count > 1:
            self.kill()
        elif asked.count and time.monotonic() > self._told + REPEAT_SECONDS:
            for pid in self.workers():
                self._told = time.monotonic()
                with suppress(ProcessLookupError, PermissionError):  # it has ended, and its number may be another's
                    os.kill(pid, stop.forwarded())

    def kill(self) -> None:
        if self.is_alive():
            for pid in self.workers():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


@dataclass
class _Asked:
    """How often, and by which signal, this process was asked to stop the run."""

    count: int = 0
    name: str = ""


@contextmanager
def _signals() -> Iterator[_Asked]:
    asked = _Asked()

    def caught(number: int, frame: FrameType | None) -> None:
        asked.count += 1
        asked.name = signal.Signals(number).name
        what = "waiting for the workers to save" if asked.count == 1 else "ending the workers at once"
        log.say(f"{asked.name}: {what} ...")

    if threading.current_thread() is not threading.main_thread():  # no signals arrive there
        yield asked
        return
    before: dict[int, Any] = {number: signal.signal(number, caught) for number in stop.signals()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
