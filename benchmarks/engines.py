"""Both engines on real data: train with each, in bf16 and 4-bit, and read every adapter with PEFT and with unsloth.

usage: python benchmarks/engines.py DATA --model M [--steps 60] [--rows 50] [--output FILE.json]

Needs a CUDA card. An adapter is good when PEFT and unsloth agree on it: share of equal argmax tokens, teacher-forced
on the answers of `--rows` rows, and the mean absolute difference of their log-probabilities.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import machine

MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="keep the runs here")
    parser.add_argument("--engines", default="native,unsloth")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        rows = []
        for engine in arguments.engines.split(","):
            for bits in (16, 4):
                row = measure(arguments, work, engine, bits)
                print(json.dumps(row), flush=True)
                rows.append(row)
    report = machine.describe() | {"rows": rows}
    output = arguments.output or Path(f"benchmarks/results/engines-{short_card()}.json")
    output.write_text(json.dumps(report, indent=2) + "\n")


def measure(arguments: argparse.Namespace, work: Path, engine: str, bits: int) -> dict[str, Any]:
    """Train one adapter through the command and compare its two readers."""
    run = work / f"{engine}-{bits}bit"
    command = [
        *(sys.executable, "-m", "opensloth.cli.train", "sft", arguments.data, "--model", arguments.model),
        *("--engine", engine, "--max-steps", str(arguments.steps), "--output", str(run), "--json"),
        *("--max-seq-length", str(MAX_LENGTH), "--eval-fraction", "0.05"),
        *(["--load-in-4bit"] if bits == 4 else []),
    ]
    trained = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if trained.returncode:
        return {"engine": engine, "bits": bits, "failed": f"exit code {trained.returncode}"}
    figures = json.loads(trained.stdout.splitlines()[-1])["metrics"]
    speeds = [json.loads(line).get("tokens_per_second") for line in (run / "metrics.jsonl").read_text().splitlines()]
    answers = {reader: read_back(reader, run, bits, arguments.rows) for reader in ("peft", "unsloth")}
    same = answers["peft"]["argmax"] == answers["unsloth"]["argmax"]
    difference = np.abs(answers["peft"]["logprob"] - answers["unsloth"]["logprob"])
    return {
        "engine": engine,
        "bits": bits,
        "steps": figures["steps"],
        "loss": figures["loss"],
        "eval_loss": figures["eval_loss"],
        "tokens_per_second": float(np.median([speed for speed in speeds if speed][5:])),
        "argmax_equal": float(same.mean()),
        "mean_logprob_difference": float(difference.mean()),
        "tokens_compared": int(same.size),
    }


def read_back(reader: str, run: Path, bits: int, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    """Score the answers in a process of its own: unsloth changes the libraries that it is imported with."""
    target = run / f"{reader}.npz"
    command = [sys.executable, __file__, "--score", reader, str(run), str(bits), str(rows), str(target)]
    # unsloth would compile its layers anew for the length of every row
    subprocess.run(command, check=True, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"})
    with np.load(target) as scores:
        return {name: scores[name] for name in scores.files}


def score(reader: str, run: Path, bits: int, rows: int, target: Path) -> None:
    """Write argmax tokens and log-probabilities of the trained tokens of the first `rows` rows."""
    if reader == "unsloth":
        from unsloth import FastLanguageModel

        os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
        model, _ = FastLanguageModel.from_pretrained(
            str(run), max_seq_length=MAX_LENGTH, load_in_4bit=bits == 4, use_exact_model_name=True
        )
    else:
        model = load_with_peft(run, bits)
    import torch

    from opensloth.data.prepared.directory import open_prepared

    prepared = open_prepared(Path(json.loads((run / "job.json").read_text())["data"]["directory"]))
    model.eval()
    argmax, logprob = [], []
    with torch.no_grad():
        for index in range(rows):
            row = prepared.rows.row(index)
            ids = torch.tensor(row.input_ids, dtype=torch.long, device=model.device)[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
            kept = torch.tensor(row.labels[1:] != -100, device=model.device)
            targets = ids[0, 1:][kept]
            argmax.append(logits[kept].argmax(-1).cpu().numpy())
            logprob.append(logits[kept].log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().numpy())
    np.savez(target, argmax=np.concatenate(argmax), logprob=np.concatenate(logprob))


def load_with_peft(run: Path, bits: int) -> Any:
    """As anyone would who has never heard of this project."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    extra = {"quantization_config": quantized} if bits == 4 else {}
    return AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16, device_map={"": 0}, **extra)


def short_card() -> str:
    return "h100" if "H100" in machine.card() else "h200" if "H200" in machine.card() else "card"


if __name__ == "__main__":
    if "--score" in sys.argv:
        reader, run, bits, rows, target = sys.argv[sys.argv.index("--score") + 1 :]
        score(reader, Path(run), int(bits), int(rows), Path(target))
    else:
        main()
