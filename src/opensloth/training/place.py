"""Where a process stands among those of the run, and how it joins and leaves them."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from opensloth import log

# Groups are never given back. When DDP's reducer is the last to hold one, it ends gloo's thread while it holds Python's
# lock, which that thread may be waiting for: now and then a run would hang after its last line (pytorch issue 56297).
_groups: list[Any] = []


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run."""

    rank: int
    processes: int
    device: torch.device
    backend: str

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """A line of this process's own."""
        log.say(line if self.leads else f"process {self.rank}: {line}")


def join(device_name: str) -> Place:
    """Meet the other processes. The group is made here because accelerate ignores a time-out on the CPU."""
    device = torch.device(device_name)
    backend = os.environ.get("OPENSLOTH_BACKEND", "nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # else accelerate makes a group of one
        return Place(0, 1, device, backend)
    timeout = timedelta(seconds=int(os.environ.get("OPENSLOTH_TIMEOUT", "600")))
    dist.init_process_group(backend, timeout=timeout)
    _groups.append(dist.group.WORLD)
    return Place(dist.get_rank(), dist.get_world_size(), device, backend)


def leave() -> None:
    """Part from the other processes once all have come this far."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
