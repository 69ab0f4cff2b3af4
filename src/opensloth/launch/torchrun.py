"""Under a plain torchrun: every process runs the command, the first ones prepare, then each becomes a worker."""

import os
import runpy
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from opensloth.errors import OpenSlothError
from opensloth.launch import failure, outcome, stop
from opensloth.launch.environment import worker_environment
from opensloth.launch.world import World, under_torchrun

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

MEETING_MINUTES = 10
PREPARATION_HOURS = 48  # how long the others wait for the leader
T = TypeVar("T")


def leader_first(what: str, run: Callable[[], T]) -> T:
    """Rank 0 calls `run` first, then one process of every other machine, then the rest; alone, it is just called.

    What `run` makes (prepared data) is thus made once per file system and found there by those that follow. `what`
    names the stage: the same on all ranks, another one for each stage of a command. Where the leader fails it raises,
    and the others end with its exit code and no words of their own.
    """
    if not under_torchrun():
        return run()
    from torch.distributed.distributed_c10d import PrefixStore

    store, rank = PrefixStore(f"opensloth/{what}", _store()), int(os.environ["RANK"])
    machine, first_here = os.environ.get("GROUP_RANK", "0"), os.environ["LOCAL_RANK"] == "0"
    mine = "leader" if rank == 0 else f"machine-{machine}" if first_here else f"rank-{rank}"
    if rank > 0:
        before = "leader" if first_here or machine == "0" else f"machine-{machine}"
        store.wait([before], timedelta(hours=PREPARATION_HOURS))
        if code := int(store.get(before)):
            store.set(mine, str(code))
            raise SystemExit(code)
    code = failure.BUG
    try:
        result = run()
        code = 0
    except OpenSlothError as error:
        code = failure.report(error)
        raise
    finally:
        store.set(mine, str(code))
    return result


@cache
def _store() -> "Store":
    """torchrun's own key-value store; with other launchers one that rank 0 serves for as long as it lives."""
    from torch.distributed.rendezvous import rendezvous

    store: Store
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=MEETING_MINUTES))))
    return store


def run_in_process(world: World, run_dir: Path, timeout: int, module: str) -> None:
    """This process becomes the worker that run_workers would have started. Raises as run_workers does.

    What ends it is left as a report too, which torchrun shows.
    """
    told = worker_environment(world, int(os.environ["LOCAL_RANK"]), timeout, 0)
    told["OPENSLOTH_ATTEMPT"] = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    del told[stop.LAUNCHER]
    os.environ.update(told)
    sys.argv = [module, str(run_dir)]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except OpenSlothError as error:
        failure.report(error)
        raise
    except SystemExit as end:
        if end.code in (None, 0):
            return
        if report := failure.read_own():
            raise outcome.as_error(report, world, None) from end
        raise
