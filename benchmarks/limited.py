"""`os-sft` on a card that seems smaller: `python benchmarks/limited.py GIB[:FROM] DIR [options of os-sft]`.

The command itself, with one difference: its worker first tells torch how much of the card it may have
(`torch.cuda.set_per_process_memory_fraction`), as the other processes of the benchmark do. On a CPU it changes nothing.
With FROM the steps after that one are profiled (profiled.py).
"""

import os
import sys

import own_worker
import profiled

GIB = "BENCHMARK_MEMORY_GIB"  # in the environment of the worker


def limit(gib: float) -> None:
    """From here on this process has at most `gib` GiB of its card."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def command() -> None:
    from opensloth.cli import sft

    os.environ[GIB], _, first = sys.argv.pop(1).partition(":")
    if first:
        os.environ[profiled.ASKED] = first
    own_worker.use("limited")
    sft.main()


def work() -> None:
    from opensloth.launch.device import claim_device

    if claim_device().startswith("cuda"):  # before torch is imported, as in the worker
        limit(float(os.environ[GIB]))
    from opensloth.training import worker

    if profiled.ASKED in os.environ:
        profiled.watch()
    worker.main()


if __name__ == "__main__":
    work() if GIB in os.environ else command()
