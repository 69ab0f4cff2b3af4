"""Does a matmul that adds to what is there round once? What it keeps of a small addend, and what it costs.

usage: python benchmarks/adds.py [--rows 33792] [--output FILE]

The share of a young adapter is smaller than the last digit of what the base gives in 16 bits. Where the product is
rounded before the share is added, it is lost: 1 is kept on average of what is added in fp32, and about nothing of what
is added to a rounded product. Which of the two a library's kernel does is not written down; it may differ by shape.
Prints a table and writes benchmarks/results/adds-<card>.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import machine
import tables
from opensloth.engine.matmul import Add, Trial, in_float32

SHAPES = ((1536, 576), (3072, 1024), (1024, 3072), (9728, 2560))  # out and in of layers of SmolLM2 and of two Qwen3
REPEATS = 20


def in_fp32(share: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product = in_float32(x, weight) if x.is_cuda else x.float() @ weight.float()  # on a CPU it would round
    return product.add_(share).to(share.dtype)


WAYS: dict[str, tuple[float, Add]] = {  # what the share is divided by as it is written, and how it is added
    "product rounded, then added": (1, lambda share, x, weight: share.add_(x @ weight)),
    "added in place": (1, lambda share, x, weight: share.addmm_(x, weight)),
    "twice a half added in place": (2, lambda share, x, weight: share.addmm_(x, weight, beta=2)),
    "added out of place": (1, torch.addmm),
    "added in fp32": (1, in_fp32),
}


def milliseconds(trial: Trial, add: Add) -> float:
    """By the host's clock, which a CPU has too."""
    out = trial.share.clone()
    add(out, trial.x, trial.weight)
    settle()
    begin = time.perf_counter()
    for _ in range(REPEATS):
        add(out, trial.x, trial.weight)
    settle()
    return 1000 * (time.perf_counter() - begin) / REPEATS


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=33_792)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for out, width in SHAPES:
        trial = Trial(out, width, device, arguments.rows)
        for name, (part, add) in WAYS.items():
            measured = {"kept": round(trial.kept(part, add), 3), "ms": round(milliseconds(trial, add), 3)}
            rows.append({"in": width, "out": out, "rows": arguments.rows, "way": name, **measured})
    output = arguments.output or Path(f"benchmarks/results/adds-{machine.kind()}.json")
    output.write_text(json.dumps(machine.describe() | {"rows": rows}, indent=1) + "\n")
    print(tables.table(rows, ("in", "out", "rows", "way", "kept", "ms")))


if __name__ == "__main__":
    main()
