"""The attention kernel of decoding alone, with blocks of several sizes: microseconds a layer, and bytes read a second.

usage: python benchmarks/decode_attention.py [--output FILE.json]

Heads as in Qwen3-0.6B (16 for queries, 8 for keys, 128 numbers each, bfloat16), groups of 8 completions with a prompt
of 70 tokens, 128 tokens written. Four layers' buffers take turns, so that the card's cache does not hold them; calls
are recorded, as they are in a run. "distinct" counts a prompt once for its group, "all" once for each completion: what
lies between is served by the cache. Needs a CUDA card.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import machine
from opensloth.rollout import kernel

HEADS, KEY_HEADS, SIZE = 16, 8, 128
GROUP, PROMPT, WRITTEN, ROOM = 8, 70, 128, 256
LAYERS, REPLAYS = 4, 20
ROWS = (64, 256, 1024)
VARIANTS = ((16, 1, 4), (32, 1, 4), (32, 2, 3), (32, 4, 3), (64, 2, 3), (64, 4, 3), (128, 4, 2))  # block, warps, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the result file")
    output = parser.parse_args().output or Path(f"benchmarks/results/decode-attention-{machine.kind()}.json")
    rows = []
    for count in ROWS:
        for variant in VARIANTS:
            rows.append(measure(count, *variant))
            print(json.dumps(rows[-1]), flush=True)
    output.write_text(json.dumps({**machine.describe(), "rows": rows}, indent=1) + "\n")


def measure(rows: int, block: int, warps: int, stages: int) -> dict[str, Any]:
    kernel.BLOCK, kernel.BLOCK_BYTES, kernel.WARPS, kernel.STAGES = block, block * SIZE * 2, warps, stages
    layers = [buffers(rows) for _ in range(LAYERS)]
    query, key, value = numbers(rows, HEADS, SIZE), numbers(rows, KEY_HEADS, SIZE), numbers(rows, KEY_HEADS, SIZE)
    source = torch.arange(rows, device="cuda") // GROUP
    starts = torch.zeros(rows // GROUP, dtype=torch.long, device="cuda")
    end, own = torch.tensor([PROMPT], device="cuda"), torch.tensor([WRITTEN], device="cuda")

    def run() -> None:
        for layer in layers:
            kernel.attend(query, key, value, *layer, source, starts, end, own, SIZE**-0.5)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    done.record()
    torch.cuda.synchronize()
    microseconds = begin.elapsed_time(done) * 1000 / REPLAYS / LAYERS
    of_position = KEY_HEADS * SIZE * 2 * 2  # a key and a value, 16 bits each
    distinct = (rows * WRITTEN + rows // GROUP * PROMPT) * of_position
    return {
        **{"rows": rows, "block": block, "warps": warps, "stages": stages},
        "microseconds": round(microseconds, 1),
        "tb_per_second_distinct": round(distinct / microseconds / 1e6, 2),
        "tb_per_second_all": round(rows * (WRITTEN + PROMPT) * of_position / microseconds / 1e6, 2),
    }


def buffers(rows: int) -> list[torch.Tensor]:
    """Keys and values of what was written, and of the prompts."""
    own, shared = (rows, KEY_HEADS, ROOM, SIZE), (rows // GROUP, KEY_HEADS, PROMPT, SIZE)
    return [numbers(*own), numbers(*own), numbers(*shared), numbers(*shared)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
