"""Rows per second of data preparation: `os-data`, and TRL's own preparation of the same rows in the same run.

usage: python benchmarks/data.py ROWS.jsonl --model M [--rows 100000] [--output benchmarks/results/data-cpu.json]

ROWS.jsonl holds `question` and `answer` as GSM8K does; its rows are repeated with other numbers until there are enough.
Each program runs twice, on all rows and on 100: the difference is the work, the small run the start-up.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

FEW = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data-cpu.json"))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        many, few = Path(folder, "many.jsonl"), Path(folder, "few.jsonl")
        write_rows(arguments.data, many, arguments.rows)
        write_rows(arguments.data, few, FEW)
        for repeat in range(arguments.repeats):  # in turn, so that a machine that slows down slows both
            for name in ("opensloth", "trl"):
                start_up = run(name, few, arguments.model, folder)
                seconds = run(name, many, arguments.model, folder)
                rate = (arguments.rows - FEW) / (seconds - start_up)
                row = {
                    "impl": name,
                    "repeat": repeat,
                    "rows": arguments.rows,
                    "seconds": round(seconds, 2),
                    "start_up_seconds": round(start_up, 2),
                    "rows_per_second": round(rate),
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
    report = machine.describe() | {"rows": rows}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write `count` rows; each round through the source adds to every number, so that no two rows are the same."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            turn, row = divmod(number, len(rows))
            changed = {name: shifted(rows[row][name], turn) for name in ("question", "answer")}
            file.write(json.dumps(changed) + "\n")


def shifted(text: str, by: int) -> str:
    return re.sub(r"\d+", lambda found: str(int(found[0]) + by), text)


def run(name: str, data: Path, model: str, folder: str) -> float:
    """Wall seconds of one whole process."""
    if name == "opensloth":
        target = Path(folder, f"prepared-{time.monotonic_ns()}")
        command = [sys.executable, "-m", "opensloth.cli.data", str(data), "--model", model, "--output", str(target)]
    else:
        command = [sys.executable, __file__, "--trl", str(data), model]
    began = time.monotonic()
    # a cache of datasets' own in a new folder each time, or the second run would read the first one's rows
    home = tempfile.mkdtemp(dir=folder)
    environment = os.environ | {"HF_DATASETS_CACHE": home, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def prepare_with_trl(data: str, model: str) -> None:
    """What TRL does with these rows before its first step: template, tokens and masks, with a process per core."""
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model, num_hidden_layers=1)
    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(as_messages, remove_columns=rows.column_names, num_proc=os.cpu_count())
    with tempfile.TemporaryDirectory() as output:
        arguments: dict[str, Any] = {"output_dir": output, "report_to": "none", "max_length": 2048, "use_cpu": True}
        SFTTrainer(
            model=AutoModelForCausalLM.from_config(config),
            processing_class=tokenizer,
            train_dataset=rows,
            args=SFTConfig(**arguments, dataset_num_proc=os.cpu_count(), packing=True, loss_type="nll", bf16=False),
        )


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        prepare_with_trl(*sys.argv[2:])
    else:
        main()
