"""What a process may use of its machine."""

import importlib.util
import os

TRITON = (
    importlib.util.find_spec("triton") is not None
)  # what our kernels are written in; CUDA builds of torch bring it


def cores() -> int:
    """The cores this process may use: a container's or a scheduler's share, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
