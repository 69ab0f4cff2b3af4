"""The torch elastic agent that starts this machine's workers: where they meet, their environment and their logs."""

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opensloth import log
from opensloth.launch import ahead, stop
from opensloth.launch.environment import quiet_torch, worker_environment
from opensloth.launch.meeting import Meeting
from opensloth.launch.world import World

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousHandler

FOLLOW_SECONDS = 0.1
END_SECONDS = 5  # what a worker that is told to end may take before it is killed
EXIT_SECONDS = 30  # how long an agent whose workers are done waits for those of other machines
LIVE = "step "  # a log line that begins so replaces the one before on a terminal: the run's live line


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.log"


def report_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.error.json"


def build_agent(world: World, run_dir: Path, module: str, timeout: int, attempt: int) -> "LocalElasticAgent":
    """An agent that runs `python -m opensloth.launch.child MODULE RUN_DIR` once per device of this machine.

    It never restarts workers itself (the launcher knows which failures are worth it). Its handler of signals is not
    used: that one leaves workers 30 s to end, and they have a checkpoint to write.
    """
    quiet_torch()
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = world.nnodes == 1
    spec = WorkerSpec(
        role="worker",
        local_world_size=len(world.devices),
        entrypoint=sys.executable,
        args=("-P", "-m", "opensloth.launch.child", module, str(run_dir)),
        rdzv_handler=_rendezvous(world, timeout, attempt),
        max_restarts=0,
        local_addr="127.0.0.1" if alone else None,  # a host name that does not resolve would block gloo
    )
    logs = _logs(world, run_dir, timeout, attempt)

    class Agent(LocalElasticAgent):
        """Ends the workers that a failed one leaves behind by a signal that no one else sends."""

        def _start_workers(self, worker_group: "WorkerGroup") -> dict[int, Any]:
            with ahead.taken(lambda environment: log_path(run_dir, int(environment["RANK"]))):
                ids: dict[int, Any] = super()._start_workers(worker_group)
            context = self._pcontext
            assert context is not None
            close = context.close

            def end(death_sig: Any = None, timeout: int = END_SECONDS) -> None:
                close(stop.peer_lost(), min(timeout, END_SECONDS))

            context.close = end  # type: ignore[method-assign]
            return ids

    return Agent(spec, logs_specs=logs, exit_barrier_timeout=EXIT_SECONDS)


def meeting_of(agent: "LocalElasticAgent") -> Meeting | None:
    """Where the agent meets those of other machines; None where there are none."""
    handler: object = agent.get_worker_group().spec.rdzv_handler
    return handler if isinstance(handler, Meeting) else None


def _rendezvous(world: World, timeout: int, attempt: int) -> "RendezvousHandler":
    """One machine meets itself at a free port; several meet at machine 0, in the order of their --node-rank."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    if world.nnodes > 1:
        # a machine that was cut off needs as long to notice it as the others did, and then the time to come back
        return cast("RendezvousHandler", Meeting(world, timeout * (2 if attempt else 1)))
    parameters = RendezvousParameters(
        "c10d", "127.0.0.1:0", uuid.uuid4().hex, 1, 1, local_addr="127.0.0.1", is_host=True, timeout=60
    )
    return registry.get_rendezvous_handler(parameters)


def _logs(world: World, run_dir: Path, timeout: int, attempt: int) -> "LogsSpecs":
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest

    class RunDirectoryLogs(DefaultLogsSpecs):
        """Logs and reports by global rank in the run directory; also each worker's own environment."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            stdouts, reports = {}, {}
            for local_rank, env in envs.items():
                rank = int(env["RANK"])
                path, report = log_path(run_dir, rank), report_path(run_dir, rank)
                if path.exists():
                    os.replace(path, path.with_suffix(".previous.log"))
                report.unlink(missing_ok=True)
                stdouts[local_rank], reports[local_rank] = str(path), str(report)
                env |= worker_environment(world, local_rank, timeout, attempt)
                env["TORCHELASTIC_ERROR_FILE"] = str(report)
            return LogsDest(stdouts, dict.fromkeys(envs, ""), {}, {}, reports, "", "")

    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return RunDirectoryLogs(log_dir=str(run_dir / "logs"))


@contextmanager
def followed(path: Path) -> Iterator[None]:
    """Show what is written to the log `path` on stderr while the block runs. `path` may appear later."""
    done = threading.Event()
    old = inode(path)  # of an earlier run's log, until the worker starts a new one
    thread = threading.Thread(target=_follow, args=(path, old, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def inode(path: Path) -> int | None:
    """What tells a file from its successor of the same name; None while there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _follow(path: Path, old: int | None, done: threading.Event) -> None:
    while True:
        ended = done.is_set()  # asked before the look: what came before the end is shown, however short the run was
        if inode(path) not in (None, old):
            break
        if ended:
            return
        done.wait(FOLLOW_SECONDS)
    screen = Screen()
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            last_round = done.is_set()
            while line := file.readline():
                while not line.endswith("\n") and not last_round:  # half a line: wait for its rest
                    time.sleep(FOLLOW_SECONDS)
                    line += file.readline()
                    last_round = done.is_set()
                screen.line(line.rstrip("\n"))
            if last_round:
                screen.close()
                return
            done.wait(FOLLOW_SECONDS)


class Screen:
    """Writes lines to stderr. On a terminal, a live line is replaced by the line that follows it."""

    def __init__(self) -> None:
        self.out = sys.stderr
        self.live = False

    def line(self, text: str) -> None:
        text = log.printable(text)
        if not self.out.isatty():
            self.out.write(text + "\n")
        else:
            live = text.startswith(LIVE)
            clear = "\r\x1b[2K" if self.live and live else "\n" if self.live else ""
            self.out.write(clear + text + ("" if live else "\n"))
            self.live = live
        self.out.flush()

    def close(self) -> None:
        if self.live:
            self.out.write("\n")
            self.live = False
