"""How a run ended: the reports of its workers, the error that the user sees for them, and the end of their logs."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from opensloth.errors import OpenSlothError, RunStopped, UserError, WorkerFailed
from opensloth.launch import elastic, failure, pulse, stop
from opensloth.launch.failure import Report
from opensloth.launch.world import World

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult

LAST_LINES = 15
FULL = 2**20  # bytes: a disk with less has no room for a last word


def reports(world: World, run_dir: Path, started: float, result: "RunResult | None") -> list[Report]:
    """The reports of all ranks (other machines' too, where the directory is shared), and of those that left none."""
    found = {}
    for rank in range(world.processes):
        report = failure.read(elastic.report_path(run_dir, rank))
        if report is not None and report.when >= started - 1:
            found[rank] = report
    for rank, dead in (result.failures if result else {}).items():
        if rank in found:
            continue
        if dead.exitcode < 0 and stop.is_request(-dead.exitcode):
            message = f"Process {rank} was stopped by {dead.signal_name()} before a new checkpoint was complete."
            code, when = RunStopped.exit_code, dead.timestamp
            found[rank] = Report(rank, RunStopped.__name__, message, failure.GOES_ON, code, "", when)
            continue
        if dead.exitcode < 0:
            kind = failure.ENDED if dead.exitcode == -stop.peer_lost() else failure.DEAD
            message = f"was killed by {dead.signal_name()}."
        else:
            kind, message = failure.DEAD, f"ended with exit code {dead.exitcode} and no word."
        found[rank] = Report(rank, kind, message, "", WorkerFailed.exit_code, "", dead.timestamp)
    if result is None and not found:
        message = "left the rendezvous: the other machines had ended already."
        found[0] = Report(0, failure.DEAD, message, "", WorkerFailed.exit_code, "", time.time())
    return list(found.values())


def as_error(report: Report, world: World, run_dir: Path | None) -> OpenSlothError:
    """The error that the user sees for a run that ended with `report`. Without `run_dir` no log is named."""
    if report.stopped:
        return RunStopped(report.message, report.hint)
    if report.kind == UserError.__name__:
        return UserError(report.message, report.hint)
    path = elastic.log_path(run_dir, report.rank) if run_dir else None
    where = f"Log: {path}" if path else ""
    if report.expected:
        return WorkerFailed(report.message, f"{report.hint}\n{where}".strip())
    hang = pulse.autopsy(path.parent, world.processes, report.when) if path else []
    if report.kind == failure.LOST:
        return WorkerFailed(report.message, "\n".join([report.hint, *hang, where]))
    if path and hang:
        return WorkerFailed(f"The run hung. {hang[0]}", "\n".join([*hang[1:], f"Logs: {path.parent}"]))
    name = f"Process {report.rank}"
    local = report.rank - world.node_rank * len(world.devices)
    if 0 <= local < len(world.devices):
        name += f" ({world.devices[local]})"
    if not report.wordless:
        lost = " It lost another process, whose log may say why." if report.lost_peer else ""
        told = filter(None, (report.traceback.rstrip(), report.hint, where))
        return WorkerFailed(f"{name} failed: {report.message}{lost}", "\n".join(told))
    hints = ["The system kills what takes too much memory."] if "SIGKILL" in report.message else []
    if path and path.parent.is_dir() and shutil.disk_usage(path.parent).free < FULL:
        hints.append(f"The disk of {run_dir} is full.")
    hints.append(f"{failure.GOES_ON} With --max-restarts it does so by itself.")
    if path and (lines := _last_lines(path)):
        hints.append("Its last lines:\n" + "\n".join(f"  {line}" for line in lines))
    return WorkerFailed(f"{name} {report.message}", "\n".join([*hints, where]))


def _last_lines(path: Path) -> list[str]:
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return file.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
    return []


def append_to_log(run_dir: Path, report: Report) -> None:
    """The log ends with the error. Written here, because what a worker writes is shown at once, and this will be."""
    path = elastic.log_path(run_dir, report.rank)
    if path.exists() and not report.stopped:
        with suppress(OSError), path.open("a", encoding="utf-8") as file:  # a full disk
            who = f"process {report.rank} " if report.wordless else ""
            file.write(f"{report.traceback}error: {who}{report.message} {report.hint}".rstrip() + "\n")


def no_meeting(world: World, error: BaseException) -> OpenSlothError:
    """The processes never started: the machines did not find each other, or the system refused."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if world.nnodes == 1:
        return WorkerFailed(f"The worker processes could not be started: {text}")
    message = f"The {world.nnodes} machines did not meet at {world.rdzv_endpoint}: {text}"
    return UserError(message, "Start all within --timeout seconds, with machine 0's address and a free, open port.")


def lost_machine(world: World, cause: Report, left: int | None, timeout: int) -> Report:
    """The cause, or a report that names the machine that was lost where the cause says no more than that.

    Args:
        left: the machine that is known to have left the run.
        timeout: seconds after which processes give each other up.
    """
    if world.nnodes == 1:
        return cause
    if not cause.lost_peer and (left is None or not cause.wordless):
        return cause
    hint = "The same command, started on all machines, goes on from the last checkpoint."
    if left is not None:
        message = f"Machine {left} left the run. Its own output says why."
    elif world.nnodes == 2:
        message = (
            f"No answer from machine {1 - world.node_rank} for {timeout} s (--timeout): it is down, cut off, or hangs."
        )
    else:
        message = f"No answer from one of the other {world.nnodes - 1} machines for {timeout} s (--timeout)."
    return Report(cause.rank, failure.LOST, message, hint, WorkerFailed.exit_code, cause.traceback, cause.when)


def not_back(world: World, error: BaseException) -> Report:
    """The machines did meet once, but not after a restart."""
    message = f"The {world.nnodes} machines did not meet again at {world.rdzv_endpoint}: {error}."
    hint = "The same command, started on all machines, goes on from the last checkpoint."
    rank = world.node_rank * len(world.devices)
    return Report(rank, failure.LOST, message, hint, WorkerFailed.exit_code, "", time.time())
