"""What a training process is told through its environment."""

import os

from opensloth.hardware import cores
from opensloth.launch import stop
from opensloth.launch.meeting import interface_to
from opensloth.launch.world import World

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def quiet_torch() -> None:
    """Silence torch's C++ part: what it has to say, our errors say better. It reads this as it is loaded."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def process_environment(world: World, local_rank: int) -> dict[str, str]:
    """What a process on this machine is told before its run is known."""
    values = {
        "OPENSLOTH_DEVICE": world.devices[local_rank],
        stop.LAUNCHER: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        values["OMP_NUM_THREADS"] = str(max(1, cores() // len(world.devices)))
    return values


def worker_environment(world: World, local_rank: int, timeout: int, attempt: int) -> dict[str, str]:
    """All that a worker is told beside torch's own variables."""
    values = process_environment(world, local_rank) | {
        "OPENSLOTH_BACKEND": world.backend,
        "OPENSLOTH_TIMEOUT": str(timeout),
        "OPENSLOTH_ATTEMPT": str(attempt),  # over 0: a restart, which goes on from the newest checkpoint
    }
    if world.nnodes > 1 and GLOO_INTERFACE not in os.environ and (name := interface_to(world.rdzv_endpoint or "")):
        values[GLOO_INTERFACE] = name
    return values
