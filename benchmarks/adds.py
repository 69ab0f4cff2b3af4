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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import machine
import tables

SMALL = 2e-4  # the share beside a product of about 1, whose last digit in bf16 is 4e-3
SHAPES = ((576, 1536), (1024, 3072), (3072, 1024), (2560, 9728))  # in and out of layers of SmolLM2 and of two Qwen3
REPEATS = 20
Add = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_fp32(share: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product = torch.mm(x, weight, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float()
    return product.add_(share).to(share.dtype)


WAYS: dict[str, tuple[float, Add]] = {  # what the share is divided by as it is written, and how it is added
    "product rounded, then added": (1, lambda share, x, weight: share.add_(x @ weight)),
    "added in place": (1, lambda share, x, weight: share.addmm_(x, weight)),
    "twice a half added in place": (2, lambda share, x, weight: share.addmm_(x, weight, beta=2)),
    "added out of place": (1, torch.addmm),
    "added in fp32": (1, in_fp32),
}


def kept(part: float, add: Add, share: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Of the share, on average over all numbers: 1 where nothing is lost."""
    without, found = (add(one, x, weight).float() for one in (torch.zeros_like(share), share / part))
    return float(((found - without) * share).sum() / share.float().square().sum())


def milliseconds(add: Add, share: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    out = share.clone()
    add(out, x, weight)
    settle()
    begin = time.perf_counter()
    for _ in range(REPEATS):
        add(out, x, weight)
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
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for width, out in SHAPES:
        x = torch.randn(arguments.rows, width, device=device, dtype=torch.bfloat16)
        weight = (torch.randn(out, width, device=device) / width**0.5).to(x.dtype).T  # as a layer has it
        share = (SMALL * torch.randn(arguments.rows, out, device=device)).to(x.dtype)
        for name, (part, add) in WAYS.items():
            measured = kept(part, add, share, x, weight), milliseconds(add, share, x, weight)
            found = dict(zip(("kept", "ms"), (round(one, 3) for one in measured), strict=True))
            rows.append({"in": width, "out": out, "rows": arguments.rows, "way": name, **found})
    output = arguments.output or Path(f"benchmarks/results/adds-{machine.kind()}.json")
    output.write_text(json.dumps(machine.describe() | {"rows": rows}, indent=1) + "\n")
    print(tables.table(rows, ("in", "out", "rows", "way", "kept", "ms")))


if __name__ == "__main__":
    main()
