"""Does the fast path train as the slow exact one does? Held-out loss over the steps of SFT, beside the spread of seeds.

usage: python benchmarks/loss_curve.py --work DIR [--model sample:smollm2] [--steps 100] [--seeds 3407,3408,3409]

The fast path is `os-sft` as it comes (packs, fused kernels, 16 bits where the machine has them) and with compiled
layers; the slow one has padded rows, eager attention's kind (`--no-packing`), `--compile off` and `--dtype float32`.
`peft` is the fast one with PEFT's own layers, which a dropout of next to nothing brings back. All go over the same rows
in the same order from the same adapter. The runs stand side by side on the device, so their speeds say nothing. Prints
a table and writes benchmarks/results/loss-curve-CARD.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
import tables

DATA = "sample:arithmetic"
ROWS, HELD_OUT, EVERY = 4000, 0.05, 10
PATHS: dict[str, tuple[str, ...]] = {
    "fast": ("--compile", "off"),
    "compiled": ("--compile", "on"),
    "slow": ("--compile", "off", "--dtype", "float32", "--no-packing"),
    "peft": ("--compile", "off", "--lora-dropout", "1e-9"),
}
Curve = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--seeds", default="3407,3408,3409")
    parser.add_argument("--paths", default=",".join(PATHS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    arguments.work.mkdir(parents=True, exist_ok=True)
    first, *others = arguments.seeds.split(",")
    paths = arguments.paths.split(",")
    asked = [(path, first) for path in paths] + [("fast", seed) for seed in others]
    curves = dict(zip(asked, run_all(arguments, asked), strict=True))
    fast = curves["fast", first]
    rows = [{"difference": f"{path} - fast", **distance(curves[path, first], fast)} for path in paths if path != "fast"]
    seeds = [curves["fast", seed] for seed in (first, *others)]
    rows += [{"difference": "one seed - another", **distance(one, other)} for one, other in pairwise(seeds)]
    report = machine.describe() | {
        "differences": rows,
        "eval_loss": {f"{path}, seed {seed}": curve for (path, seed), curve in curves.items()},
    }
    output = arguments.output or Path(f"benchmarks/results/loss-curve-{machine.kind()}.json")
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(tables.table(rows, ("difference", "mean", "largest", "last")))


def run_all(arguments: argparse.Namespace, asked: Sequence[tuple[str, str]]) -> list[Curve]:
    """The held-out loss after every EVERY steps of each run."""
    started = []
    for path, seed in asked:
        output = arguments.work / f"{path}-{seed}"
        command = [*(sys.executable, "-m", "opensloth.cli.train", "sft", DATA, "--model", arguments.model)]
        command += ["--chat-template", "reasoning", "--samples", str(ROWS), "--eval-fraction", str(HELD_OUT)]
        command += ["--max-steps", str(arguments.steps), "--tokens-per-step", str(arguments.tokens_per_step)]
        command += ["--eval-steps", str(EVERY), "--seed", seed, "--pack-tokens", "4096", "--output", str(output)]
        with output.with_suffix(".log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "2"}
            words = [*command, *PATHS[path]]
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=arguments.work)
            started.append((output, process))
    return [curve(output, process.wait()) for output, process in started]


def curve(run: Path, code: int) -> Curve:
    if code:
        sys.exit(f"{run.name} failed: {run.with_suffix('.log').read_text()[-500:]}")
    logged: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in logged if "eval_loss" in line}


def distance(one: Curve, other: Curve) -> dict[str, float]:
    """Of two curves: the mean, the largest and the last absolute difference."""
    apart = [abs(one[step] - other[step]) for step in sorted(one.keys() & other.keys())]
    return {"mean": sum(apart) / len(apart), "largest": max(apart), "last": apart[-1]}


if __name__ == "__main__":
    main()
