"""What more devices bring: `os-train sft` and `os-train grpo` on 1, 2, 4 and 8 devices of one host.

usage: python benchmarks/scaling.py --work DIR --model NAME=DIR [--model NAME2=DIR2] [--methods sft,grpo]

Weak scaling gives each device the same work, strong scaling divides a fixed amount. What packing brings is another
question, and is answered by one device on the same rows, once packed and once padded, 8 rows at a time as they come.
Real tokens count; those of GRPO are tokens of completions. The first steps are left out (compilation, graphs,
connections).

benchmarks/models.py makes models of known shapes. Without a card CPU processes take the place of devices: a rehearsal,
whose figures mean nothing. What was measured is kept in --work, so that a benchmark that was cut off goes
on with the runs that it lacks; --seconds ends it early. Prints a table and writes benchmarks/results/scaling-CARD.json.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
from opensloth.data.models.resolve import load_tokenizer, resolve_model
from opensloth.data.sources.arithmetic import arithmetic
from opensloth.rewards import spread

PARTS = ("rollout", "wait", "rewards", "train", "sync", "other")
GROUP = 8
PADDED = 8  # rows or completions of a padded micro-batch, in the order they come, as most trainers have them
SPREAD = 0.6  # of the logarithm of the rows' lengths
LEAST = 5  # seconds that a run is begun for
GRACE = 60  # seconds that a run has to end itself after its time is over
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much there is to do. Work is real tokens of a step of SFT, or prompts of a batch of GRPO."""

    rows: int
    median: int  # tokens of a row
    work: dict[str, int]  # of one device, by method
    fixed: dict[str, int]  # of all devices together, for strong scaling
    max_new: int
    options: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Tokens of a row on average, but for the cut: of a log-normal distribution."""
        return self.median * math.exp(SPREAD**2 / 2)


ON_CARDS = Sizes(20_480, 490, {"sft": 65_536, "grpo": 8}, {"sft": 131_072, "grpo": 32}, 256)
REHEARSAL = Sizes(128, 60, {"sft": 512, "grpo": 2}, {"sft": 1_024, "grpo": 4}, 8, ("--pack-tokens", "256"))


@dataclass(frozen=True)
class Setting:
    """One run."""

    method: str
    model: str
    devices: int
    work: int
    packing: bool = True

    @property
    def name(self) -> str:
        packed = "packed" if self.packing else "padded"
        return f"{self.method}-{self.model}-{self.devices}-{self.work}-{packed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--methods", default="sft,grpo")
    parser.add_argument("--devices", help="such as 1,2,4; all powers of 2 that are there, unless told")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--skip", type=int, default=4, help="steps that are not measured")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one run")
    parser.add_argument("--seconds", type=float, default=7200, help="of all runs together")
    parser.add_argument("--options", default="", help="more of os-train, for all runs; with a --work of its own")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cards = machine.cards()
    sizes = ON_CARDS if cards else REHEARSAL
    models = dict(word.split("=", 1) for word in arguments.model)
    models = {
        name: place if place.startswith("sample:") else str(Path(place).absolute()) for name, place in models.items()
    }
    devices = [int(word) for word in (arguments.devices or powers(cards or 2)).split(",")]
    asked = plan(arguments.methods.split(","), list(models), devices, sizes)
    rows, failed = run_all(arguments, asked, models, sizes, on_cards=bool(cards))
    report(arguments, sizes, rows, failed)


def powers(most: int) -> str:
    return ",".join(str(2**power) for power in range(most.bit_length()))


def plan(methods: Sequence[str], models: Sequence[str], devices: Sequence[int], sizes: Sizes) -> list[Setting]:
    """All runs, those that tell most first, each once: the largest of weak scaling may be one of strong scaling too."""
    found: list[Setting] = []
    outer_first = sorted(devices, key=lambda count: (count not in (1, max(devices)), count))
    for method in methods:
        for model in models:
            found += [Setting(method, model, count, sizes.work[method] * count) for count in outer_first]
            found.append(Setting(method, model, 1, sizes.work[method], packing=False))
            found += [Setting(method, model, count, sizes.fixed[method]) for count in outer_first]
    return list(dict.fromkeys(found))


def run_all(
    arguments: argparse.Namespace, asked: Sequence[Setting], models: dict[str, str], sizes: Sizes, on_cards: bool
) -> tuple[list[Row], list[Row]]:
    """Rows of the runs that are done, now or before; and those that failed."""
    begin = time.monotonic()
    rows, failed = [], []
    for setting in asked:
        kept = arguments.work / "rows" / f"{setting.name}-{arguments.steps}-{arguments.skip}.json"
        left = min(arguments.limit, begin + arguments.seconds - time.monotonic())
        if not kept.exists():
            if left < LEAST:
                continue
            row = run_one(arguments, setting, models[setting.model], sizes, left, on_cards)
            told = row["failed"] if "failed" in row else f"{row['tokens_per_second']:,.0f} tokens/s"
            print(f"{setting.name}: {told}", flush=True)
            if "failed" in row:
                failed += [row] if left == arguments.limit else []  # else it was cut off, and has another chance
                continue
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(row))
        rows.append(json.loads(kept.read_text()))
    return rows, failed


def run_one(
    arguments: argparse.Namespace, setting: Setting, model: str, sizes: Sizes, seconds: float, on_cards: bool
) -> Row:
    """Train anew, for at most `seconds`, and measure."""
    output = arguments.work / setting.name
    shutil.rmtree(output, ignore_errors=True)
    words = command(arguments, setting, model, sizes, on_cards)
    began = time.monotonic()
    log_file = arguments.work / f"{setting.name}.log"
    with log_file.open("w") as log:
        process = subprocess.Popen([*words, "--output", str(output)], stdout=log, stderr=log, cwd=arguments.work)
        code = ended(process, seconds)
    row = asdict(setting) | {"wall_seconds": round(time.monotonic() - began, 1)}
    if code:
        last = log_file.read_text().strip().splitlines()[-1:]
        reason = f"not done after {seconds:.0f} s" if code == "late" else f"exit code {code}: {' '.join(last)}"
        return row | {"failed": reason}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((output / "result.json").read_text())
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    # per_process counts the whole run, of which the first steps are a part
    return row | measured(lines, arguments.skip) | {"seconds": result["seconds"], "per_process": result["per_process"]}


def ended(process: subprocess.Popen[bytes], seconds: float) -> int | str:
    """The exit code; "late" for a run that had to be stopped."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()  # its workers end with it
        process.wait()
    return "late"


def command(arguments: argparse.Namespace, setting: Setting, model: str, sizes: Sizes, on_cards: bool) -> list[str]:
    method, steps = setting.method, arguments.skip + arguments.steps
    words = [sys.executable, "-m", "opensloth.cli.train", method, data_for(arguments.work, setting, model, sizes)]
    words += ["--model", model, "--gpus" if on_cards else "--processes", str(setting.devices)]
    words += arguments.options.split()
    words += ["--max-steps", str(steps), "--save-steps", str(steps), "--check-every", "0", "--report-to", "none"]
    words += sizes.options if setting.packing else ["--no-packing", "--batch-size", str(PADDED)]
    if method == "grpo":
        words += ["--prompts-per-step", str(setting.work), "--group-size", str(GROUP), "--max-new", str(sizes.max_new)]
        words += ["--rewards", f"{spread.__file__}:spread", "--print-samples-every", "0"]
    elif setting.packing:
        words += ["--tokens-per-step", str(setting.work), "--compile", "off"]  # it depends on the tokens of a run
    else:
        words += ["--grad-accum", str(max(1, round(setting.work / sizes.mean / PADDED)))]
    return words


def data_for(work: Path, setting: Setting, model: str, sizes: Sizes) -> str:
    """Rows of SFT have log-normal lengths, cut at four times the median; GRPO gets problems as they are."""
    if setting.method == "grpo":
        return "sample:arithmetic"
    path = work / f"rows-{setting.model}.jsonl"
    if not path.exists():
        tokenizer = load_tokenizer(resolve_model(model))
        texts = [" ".join(map(str, row.values())) for row in arithmetic("train", 500)]
        pieces = [(text, len(tokenizer(text).input_ids)) for text in texts]
        chance = random.Random(0)
        rows = [conversation(pieces, chance, sizes.median) for _ in range(sizes.rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(pieces: Sequence[tuple[str, int]], chance: random.Random, median: int) -> Row:
    wanted = min(median * chance.lognormvariate(0, SPREAD), 4 * median)
    question, length = chance.choice(pieces)
    answer: list[str] = []
    while not answer or length < wanted:
        text, tokens = chance.choice(pieces)
        answer.append(text)
        length += tokens
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(answer)}]
    return {"messages": turns}


def measured(lines: Sequence[Row], skip: int) -> Row:
    """Speed and shares of the steps after the first `skip`, from metrics.jsonl (a line for each step)."""
    steps = [line for line in lines if "loss" in line and line["step"] > skip]
    seconds = [line["seconds/step"] for line in steps]
    total = sum(seconds)
    shares = {
        part: round(sum(line[f"seconds/{part}"] for line in steps) / total, 4)
        for part in ("communication", *PARTS)
        if all(f"seconds/{part}" in line for line in steps)
    }
    return {
        "steps": len(steps),
        "tokens_per_second": round(sum(line["tokens_per_second"] * line["seconds/step"] for line in steps) / total, 1),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "share_of_time": shares,
        **{
            name: round(statistics.mean(line[name] for line in steps), 4)
            for name in ("padding", "unfilled", "imbalance")
        },
    }


def scaling(rows: Sequence[Row], sizes: Sizes) -> list[Row]:
    """Speed beside one device's, weak (the same work for each) and strong (the same work for all)."""
    found = []
    for kind in ("weak", "strong"):
        mine = [row for row in rows if row["packing"] and row["work"] == work_of(kind, row, sizes)]
        alone = {(row["method"], row["model"]): row["tokens_per_second"] for row in mine if row["devices"] == 1}
        for row in sorted(mine, key=lambda row: (row["method"], row["model"], row["devices"])):
            base = alone.get((row["method"], row["model"]))
            if base:
                speedup = row["tokens_per_second"] / base
                what = {"kind": kind, "method": row["method"], "model": row["model"], "devices": row["devices"]}
                found.append(what | {"speedup": round(speedup, 3), "efficiency": round(speedup / row["devices"], 4)})
    return found


def work_of(kind: str, row: Row, sizes: Sizes) -> int:
    return sizes.work[row["method"]] * row["devices"] if kind == "weak" else sizes.fixed[row["method"]]


def packing(rows: Sequence[Row]) -> list[Row]:
    """What packing brings on one device, on the same rows."""
    by = {(row["method"], row["model"], row["work"], row["packing"]): row for row in rows if row["devices"] == 1}
    found = []
    for (method, model, work, packed), row in by.items():
        padded = by.get((method, model, work, False))
        if packed and padded:
            factor = row["tokens_per_second"] / padded["tokens_per_second"]
            what = {"method": method, "model": model, "padding_without": padded["padding"]}
            found.append(what | {"factor": round(factor, 3)})
    return found


def report(arguments: argparse.Namespace, sizes: Sizes, rows: list[Row], failed: list[Row]) -> None:
    found = scaling(rows, sizes)
    record = machine.describe() | {
        "devices": machine.cards() or "CPU processes",
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "sizes": asdict(sizes) | {"group_size": GROUP, "steps": arguments.steps, "left_out": arguments.skip},
        "rows": rows,
        "options": arguments.options,
        "failed": failed,
        "scaling": found,
        "packing": packing(rows),
    }
    output = arguments.output or Path(f"benchmarks/results/scaling-{machine.kind()}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    head = ("method", "model", "devices", "work", "", "tokens/s", "sync", "padding", "imbalance", "GiB")
    print(("{:7}{:14}{:>8}{:>9}  {:7}{:>10}{:>8}{:>9}{:>11}{:>8}").format(*head))
    for row in rows:
        packed, memory = "packed" if row["packing"] else "padded", max(row["per_process"]["memory_gib"])
        print(
            f"{row['method']:7}{row['model']:14}{row['devices']:>8}{row['work']:>9,}  {packed:7}"
            f"{row['tokens_per_second']:>10,.0f}{row['share_of_time']['sync']:>8.1%}{row['padding']:>9.1%}"
            f"{row['imbalance']:>11.3f}{memory:>8.1f}"
        )
    for one in found:
        print("{kind:7}{method:7}{model:14}{devices:>3}  {speedup:.2f} x, {efficiency:.1%}".format(**one))
    for one in record["packing"]:
        print("packing {method} {model}: {factor:.2f} x (padded: {padding_without:.1%} padding)".format(**one))
    for row in failed:
        print(f"failed: {row['method']} {row['model']} on {row['devices']}: {row['failed']}")


if __name__ == "__main__":
    main()
