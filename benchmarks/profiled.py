"""Where the time of a step goes: `python benchmarks/profiled.py sft|grpo[:FROM] DIR [options of os-sft or os-grpo]`.

The command itself, with one difference: its worker runs torch's profiler over the STEPS steps after step FROM, and
leaves `profile.txt` in the run directory: the seconds of those steps, how long the card was busy in them, and its
kernels by their share. Steps are optimizer steps, with one to a batch.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import own_worker

FROM, STEPS = 4, 2
KERNELS = 45
PROFILE = "profile.txt"
ASKED = "BENCHMARK_PROFILE"  # in the environment of the worker


def command() -> None:
    from opensloth.cli import grpo, sft

    method, _, first = sys.argv.pop(1).partition(":")
    os.environ[ASKED] = first or str(FROM)
    own_worker.use("profiled")
    {"sft": sft, "grpo": grpo}[method].main()


def work() -> None:
    from opensloth.launch.device import claim_device

    claim_device()  # before torch is imported, as in the worker
    from opensloth.training import worker

    watch()
    worker.main()


def watch() -> None:
    """Profile the run of this worker."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(Window(Path(sys.argv[1]) / PROFILE, int(os.environ[ASKED])).step)


class Window:
    """The profiler, started and ended by the count of optimizer steps."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first, self.count, self.begin = path, first, 0, 0.0
        self.profiler: Any = None

    def step(self, *_: Any) -> None:
        import torch

        self.count += 1
        if self.count not in (self.first, self.first + STEPS):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.count == self.first:
            self.profiler = torch.profiler.profile(acc_events=True)
            self.profiler.start()
            self.begin = time.monotonic()
        else:
            seconds = time.monotonic() - self.begin
            self.profiler.stop()
            self.path.write_text(told(self.profiler, seconds))


def told(profiler: Any, seconds: float) -> str:
    """A table of kernels on a card, of operators on a CPU, and of the host's operators by their own time."""
    import torch

    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    lines = [f"{seconds / STEPS:.4f} s a step, of which the card was busy {busy / STEPS:.4f} s"]
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:KERNELS]:
        share, own = event.self_device_time_total / 1e6 / max(busy, 1e-9), event.self_device_time_total / 1e3 / STEPS
        lines.append(f"{share:7.2%} {own:10.2f} ms {event.count / STEPS:9.1f} x  {event.key[:150]}")
    lines.append("host:")
    hosts = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(hosts, key=lambda event: -event.self_cpu_time_total)[:KERNELS]:
        own = event.self_cpu_time_total / 1e3 / STEPS
        lines.append(f"{own:10.2f} ms {event.count / STEPS:9.1f} x  {event.key[:100]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    work() if ASKED in os.environ else command()
