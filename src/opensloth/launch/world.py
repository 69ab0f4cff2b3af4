"""Which processes a run has: one per visible GPU, or several on the CPU, here and on other machines."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from opensloth.errors import UserError

MASK = "CUDA_VISIBLE_DEVICES"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(Protocol):
    """What is read of config.run.LaunchOptions."""

    @property
    def gpus(self) -> str: ...
    @property
    def processes(self) -> int | None: ...
    @property
    def nnodes(self) -> int: ...
    @property
    def node_rank(self) -> int: ...
    @property
    def rdzv_endpoint(self) -> str | None: ...


@dataclass(frozen=True)
class World:
    """`devices` has one entry per process of this machine; `processes` counts those of all machines."""

    devices: tuple[str, ...]  # "cuda:0" (an index into the visible cards) or "cpu"
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    backend: str = "gloo"  # or "nccl"
    processes: int = 1


def under_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether another launcher (torchrun, or one with its variables) started this process as one of several."""
    return all(name in environ for name in TORCHRUN)


def speaks() -> bool:
    """Whether this process prints what the command says: under torchrun one of them does."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def plan_world(
    launch: Launch, *, environ: Mapping[str, str] = os.environ, count_gpus: Callable[[], int] | None = None
) -> World:
    """The processes that `launch` asks for, or those that torchrun has already started.

    Only visible cards are used or counted: the scheduler's CUDA_VISIBLE_DEVICES stands. Raises UserError where
    options contradict each other, the machine or torchrun.
    """
    if launch.processes is not None and launch.gpus != "auto":
        message = f"--processes {launch.processes} trains on the CPU and --gpus {launch.gpus} on GPUs."
        raise UserError(message, "Give one of the two.")
    local = _positive(environ, "LOCAL_WORLD_SIZE", _positive(environ, "WORLD_SIZE", 1))
    started = local if under_torchrun(environ) else None
    if launch.processes is not None:
        devices = ("cpu",) * launch.processes
    else:
        devices = choose_gpus(launch.gpus, (count_gpus or visible_gpus)(), environ.get(MASK), started)
    if not devices:
        devices = ("cpu",) * (started or 1)
    backend = backend_for(devices)
    if started is None:
        processes = len(devices) * launch.nnodes
        return World(devices, launch.nnodes, launch.node_rank, launch.rdzv_endpoint, backend, processes)
    if len(devices) != started:
        asked = f"--processes {launch.processes}" if launch.processes is not None else f"--gpus {launch.gpus}"
        message = f"{asked} asks for {len(devices)} processes, but torchrun started {started} on this machine."
        raise UserError(message, "Leave the option out, or give torchrun the same --nproc-per-node.")
    nnodes, node_rank = _positive(environ, "GROUP_WORLD_SIZE", 1), int(environ.get("GROUP_RANK", "0"))
    return World(devices, nnodes, node_rank, None, backend, _positive(environ, "WORLD_SIZE", 1))


def _positive(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdigit() and int(text) > 0 else default


def visible_gpus() -> int:
    """How many cards torch sees under the scheduler's mask."""
    import torch

    return torch.cuda.device_count()


def choose_gpus(text: str, visible: int, mask: str | None, started: int | None = None) -> tuple[str, ...]:
    """The devices of `--gpus`: auto (all visible; () where there is none), a number, or a list of visible indices.

    A list may name a card twice: its processes share it. `started` processes of torchrun are as many as auto takes.
    """
    shown = f"{visible} {'is' if visible == 1 else 'are'} visible" + (f" ({MASK}={mask})" if mask is not None else "")
    if text == "auto":
        count = visible if started is None else min(visible, started)
        if started is not None and 0 < visible < started:
            hint = f"Share cards by hand, such as --gpus {','.join(str(i % visible) for i in range(started))}."
            raise UserError(f"torchrun started {started} processes, but {shown}.", hint)
        return tuple(f"cuda:{index}" for index in range(count))
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words if word) or not any(words):
        raise UserError(f"--gpus {text} is none of auto, a number, and a list such as 0,2.")
    numbers = [int(word) for word in words if word]
    if visible == 0:
        hint = "Train on the CPU with --processes N; if there is a card, check the mask, its driver and torch's build."
        raise UserError(f"--gpus {text}: no GPU is visible{f' ({MASK}={mask})' if mask is not None else ''}.", hint)
    if "," in text:
        if absent := [number for number in numbers if number >= visible]:
            message = f"--gpus {text}: there is no GPU {absent[0]}, {shown}."
            raise UserError(message, f"Indices count the visible cards, 0 to {visible - 1}.")
        return tuple(f"cuda:{number}" for number in numbers)
    if numbers[0] == 0:
        raise UserError("--gpus 0 asks for no card.", "For card 0 alone: --gpus 1. For the CPU: --processes 1.")
    if numbers[0] > visible:
        message = f"--gpus {text} asks for {text} GPUs, but {shown}."
        raise UserError(message, f"At most --gpus {visible}; to share cards name them twice, as in --gpus 0,0.")
    return tuple(f"cuda:{index}" for index in range(numbers[0]))


def backend_for(devices: tuple[str, ...]) -> str:
    """nccl between cards of their own; gloo on CPUs, on a shared card (nccl refuses it) and on Windows (no nccl)."""
    own = len(set(devices)) == len(devices) and all(device.startswith("cuda") for device in devices)
    return "nccl" if own and os.name != "nt" else "gloo"
