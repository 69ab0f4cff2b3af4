"""Both engines on real data: train with each, in bf16 and 4-bit, and read every adapter with PEFT and with unsloth.

usage: python benchmarks/engines.py DATA --model M [--steps 60] [--rows 50] [--together] [--output FILE.json]

An adapter is good when both libraries read the same model from it. Teacher-forced on the answers of `--rows` rows, each
computes the argmax token and the log-probability of every answer token, in float32 (what the adapter holds) and in
bfloat16 (which rounds differently in each library). `--together` trains side by side, to save time on a card: the
speeds are then not those of one run alone, and the file says so. Needs a CUDA card for unsloth.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import machine

MAX_LENGTH = 1024
DTYPES = ("float32", "bfloat16")
Scores = dict[str, np.ndarray[Any, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--engines", default="native,unsloth")
    parser.add_argument("--readers", default="peft,unsloth")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kinds = [(engine, bits) for engine in arguments.engines.split(",") for bits in (16, 4)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(kinds) if arguments.together else 1) as pool:
        rows = list(pool.map(lambda kind: train(arguments, Path(folder), *kind), kinds))
        compare(arguments, Path(folder), [row for row in rows if "failed" not in row])
    report = machine.describe() | {"trained_side_by_side": arguments.together, "rows": rows}
    card = "h100" if "H100" in machine.card() else "h200" if "H200" in machine.card() else "cpu"
    output = arguments.output or Path(f"benchmarks/results/engines-{card}.json")
    output.write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))


def train(arguments: argparse.Namespace, work: Path, engine: str, bits: int) -> dict[str, Any]:
    """Train one adapter through the command, as a user would."""
    run = work / f"{engine}-{bits}bit"
    command = [
        *(sys.executable, "-m", "opensloth.cli.train", "sft", arguments.data, "--model", arguments.model),
        *("--engine", engine, "--max-steps", str(arguments.steps), "--output", str(run), "--json"),
        *("--max-seq-length", str(MAX_LENGTH), "--eval-fraction", "0.05"),
        *(["--load-in-4bit"] if bits == 4 else []),
    ]
    began = time.monotonic()
    trained = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = {"engine": engine, "bits": bits, "seconds": round(time.monotonic() - began, 1)}
    if trained.returncode:
        return row | {"failed": f"exit code {trained.returncode}"}
    figures = json.loads(trained.stdout.splitlines()[-1])["metrics"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [entry["tokens_per_second"] for entry in logged if "tokens_per_second" in entry]
    return row | {
        "run": run.name,
        "steps": figures["steps"],
        "loss": figures["loss"],
        "eval_loss": figures["eval_loss"],
        "tokens_per_second": float(np.median(speeds[5:] or speeds)),
    }


def compare(arguments: argparse.Namespace, work: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row how far its readers agree. All adapters are read at once: nothing here is timed."""
    readers = arguments.readers.split(",")
    jobs = [(reader, dtype, row) for row in rows for dtype in DTYPES for reader in readers]
    with ThreadPoolExecutor(len(jobs) or 1) as pool:
        found = list(pool.map(lambda job: read(job[0], work / job[2]["run"], job[2]["bits"], job[1], arguments), jobs))
    scores = {(reader, dtype, row["run"]): score for (reader, dtype, row), score in zip(jobs, found, strict=True)}
    for row in rows:
        for dtype in DTYPES:
            first, *others = (scores[reader, dtype, row["run"]] for reader in readers)
            for other in others:
                row[dtype] = agreement(first, other) if first and other else {"failed": "see the output"}


def agreement(first: Scores, other: Scores) -> dict[str, Any]:
    difference = first["logprob"] - other["logprob"]
    return {
        "argmax_equal": float((first["argmax"] == other["argmax"]).mean()),
        "mean_absolute_logprob_difference": float(np.abs(difference).mean()),
        "mean_logprob_difference": float(difference.mean()),
        "tokens": int(difference.size),
    }


def read(reader: str, run: Path, bits: int, dtype: str, arguments: argparse.Namespace) -> Scores | None:
    """Score the answers in a process of its own: unsloth changes the libraries that it is imported with."""
    target = run / f"{reader}-{dtype}.npz"
    command = [
        sys.executable,
        __file__,
        "--score",
        reader,
        str(run),
        str(bits),
        dtype,
        str(arguments.rows),
        str(target),
    ]
    # unsloth would compile its layers anew for the length of every row
    if subprocess.run(command, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"}).returncode:
        return None
    with np.load(target) as scores:
        return {name: scores[name] for name in scores.files}


def score(reader: str, run: Path, bits: int, dtype: str, rows: int, target: Path) -> None:
    """Write argmax tokens and log-probabilities of the trained tokens of the first `rows` rows."""
    model = load_with_unsloth(run, bits, dtype) if reader == "unsloth" else load_with_peft(run, bits, dtype)
    import torch

    from opensloth.data.prepared.directory import open_prepared

    prepared = open_prepared(Path(json.loads((run / "job.json").read_text())["data"]["directory"]))
    model.eval()
    argmax, logprob = [], []
    with torch.no_grad():
        for index in range(min(rows, len(prepared.rows))):
            row = prepared.rows.row(index)
            ids = torch.tensor(row.input_ids, dtype=torch.long, device=model.device)[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
            kept = torch.tensor(row.labels[1:] != -100, device=model.device)
            targets = ids[0, 1:][kept]
            argmax.append(logits[kept].argmax(-1).cpu().numpy())
            logprob.append(logits[kept].log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().numpy())
    np.savez(target, argmax=np.concatenate(argmax), logprob=np.concatenate(logprob))


def load_with_unsloth(run: Path, bits: int, dtype: str) -> Any:
    from unsloth import FastLanguageModel  # before torch and transformers, which it changes

    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    import torch

    options = {"max_seq_length": MAX_LENGTH, "load_in_4bit": bits == 4, "use_exact_model_name": True}
    model, _ = FastLanguageModel.from_pretrained(str(run), dtype=getattr(torch, dtype), **options)
    return model


def load_with_peft(run: Path, bits: int, dtype: str) -> Any:
    """As anyone would who has never heard of this project."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, dtype)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    extra = {"quantization_config": quantized} if bits == 4 else {}
    device = 0 if torch.cuda.is_available() else "cpu"
    return AutoPeftModelForCausalLM.from_pretrained(run, dtype=compute, device_map={"": device}, **extra)


if __name__ == "__main__":
    if "--score" in sys.argv:
        reader, run, bits, dtype, rows, target = sys.argv[sys.argv.index("--score") + 1 :]
        score(reader, Path(run), int(bits), dtype, int(rows), Path(target))
    else:
        main()
