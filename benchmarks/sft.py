"""SFT beside Unsloth and TRL: the same rows, the same model, the same limit of memory, one process after the other.

usage: python benchmarks/sft.py --tokenizer M --work FOLDER [--minutes 9.5] [--only WORD ...] [--ablations]

M is a model directory whose tokenizer is taken over, or sample:smollm2; the models have random weights (models.py).
What was measured is kept in FOLDER at once: where the time of a call is over, the same command goes on (of all that
lies there, found.jsonl is enough). Prints a table and writes benchmarks/results/sft-<card>.json.

The rows have log-normal lengths (median about 490 tokens, cut at 2048); every token is trained. `os-data` prepares them
once, and all train on those ids. Ours is the command `os-sft` in its own process, with its defaults, and its speed is
that of its metrics.jsonl after WARM_UP steps; once with compiled layers, as it runs in trainings that are longer than
these, and once without. Unsloth and TRL run as their documents show (peers/train_sft.py): a
process for each case goes through a grid of settings, with the model loaded anew for each, and a setting counts its
real tokens, padding left out, after WARM_UP steps too; it imports its libraries while the one before is measured. In a
case with a limit every process tells torch before it loads anything how much of the card it may have (limited.py).
Peaks are those of torch's allocator.

    --rehearse    a tiny model on a CPU, in a minute. Unsloth is listed as failed where it is not installed.
    --ablations   ours with single options changed, for the table of docs/performance.md
    --profile     ours goes on for some steps in the profiler; FOLDER/profiles has where their time went
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import models
import profiled
import series
import tables
from processes import end_on_signal
from random_rows import SMALL, Rows, write_rows
from series import HERE, Job, Outcome, Point, Series

WARM_UP = 3  # steps that do not count: kernels are chosen, layers compiled
COLUMNS = ("case", "impl", "setting", "tokens_per_second", "rows_per_second", "peak_gib", "share_of_limit")
Setting = tuple[bool, int, bool, str]  # packed, rows of the batch, checkpointing, optimizer


@dataclass(frozen=True)
class Case:
    """A model and what it may use. `grid` is Unsloth's, the best guess first."""

    name: str
    model: str
    memory_limit_gib: float | None = None
    bits: int = 16
    tokens_per_step: int = 65_536  # what os-sft chooses itself for data of more than 6.5 million tokens
    steps: int = 9
    grid: tuple[Setting, ...] = ()
    seconds: float = 240  # of a process


def grid(*settings: tuple[bool, int, bool]) -> tuple[Setting, ...]:
    """With the optimizer that Unsloth's documents use, and the first setting with fused AdamW too."""
    return (*((*setting, "adamw_8bit") for setting in settings), (*settings[0], "adamw_torch_fused"))


CASES = (
    Case("0.6b", "qwen3-0.6b", grid=grid((True, 16, False), (True, 32, False), (True, 16, True), (False, 32, False))),
    Case("4b", "qwen3-4b", grid=grid((True, 4, False), (True, 8, False), (True, 16, True), (False, 16, False))),
    Case("4b-24gib", "qwen3-4b", 24, grid=grid((True, 8, True), (True, 4, True), (True, 16, True), (False, 8, True))),
    Case(
        "4b-4bit-16gib",
        "qwen3-4b",
        16,
        4,
        tokens_per_step=32_768,
        grid=grid((True, 8, True), (True, 4, True), (True, 2, False), (False, 8, True)),
    ),
    Case(
        "8b-4bit-16gib",
        "qwen3-8b",
        16,
        4,
        tokens_per_step=16_384,
        grid=grid((True, 4, True), (True, 2, True), (False, 4, True)),
    ),
)
TINY = Case("tiny", "tiny-qwen3", 16, tokens_per_step=512, steps=6, grid=((True, 4, False, "adamw_torch"),))
# what TRL does unless told otherwise: padded rows, 8 of them, with checkpointing
TRL: tuple[Setting, ...] = ((False, 8, True, "adamw_torch_fused"),)
TRL_CASES = ("0.6b", "4b", "tiny")
NO_PACKING = "no packing"  # an option of os-data; rows are padded, up to as many slots
SETTINGS = {
    "compiled": "on",
    "not compiled": "off",
}  # of ours; the first is what `--compile auto` chooses for a long run
ABLATIONS: dict[str, tuple[str, ...]] = {  # of what is not compiled, which needs no minute each to begin
    "no CUDA graphs": ("--cuda-graphs", "off"),
    "checkpointing none": ("--gradient-checkpointing", "none"),
    "checkpointing selective": ("--gradient-checkpointing", "selective"),
    "checkpointing full": ("--gradient-checkpointing", "full"),
    "packs of 16384": ("--pack-tokens", "16384"),
    "packs of 8192": ("--pack-tokens", "8192"),
    "packs of 2048": ("--pack-tokens", "2048"),
    "optim adamw_8bit": ("--optim", "adamw_8bit"),
    NO_PACKING: ("--pack-tokens", "8192"),
}
ABLATED = ("0.6b", "4b", "4b-24gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    series.options(parser)
    parser.add_argument("--ablations", action="store_true", help="ours with single options changed, too")
    parser.add_argument("--profile", action="store_true", help="ours goes on into a profile; FOLDER/profiles")
    arguments = parser.parse_args()
    end_on_signal()
    found = Series(arguments.work, arguments.minutes, arguments.again)
    data = Data(found.work, models.tokenizer_directory(arguments.tokenizer), SMALL if arguments.rehearse else Rows())
    data.profile = arguments.profile
    cases = (TINY,) if arguments.rehearse else CASES
    jobs = [
        job
        for case in cases
        for job in (*(ours(case, data, name) for name in SETTINGS), peer(case, "unsloth", case.grid, data))
    ]
    jobs += [peer(case, "trl", trl_grid(case), data) for case in cases if case.name in TRL_CASES]
    if arguments.ablations:
        ablated = (TINY,) if arguments.rehearse else [case for case in CASES if case.name in ABLATED]
        jobs += [ours(case, data, name) for case in ablated for name in ABLATIONS]
    found.run(series.chosen(jobs, arguments.only))
    report = found.report(arguments.output, "sft", divided)
    print(tables.table([*report["rows"], *report["ablations"]], COLUMNS))
    print(tables.told(report["best"]))
    for failed in report["failed"]:
        print(f"failed: {failed['case']} {failed['impl']}, {failed['setting']}: {failed['reason']}")


def divided(rows: list[Outcome]) -> Mapping[str, Any]:
    """What is compared, the best of each library, and apart from it ours with options changed."""
    ablations = [row for row in rows if row.get("ablation")]
    rows = [row for row in rows if not row.get("ablation")]
    return {"rows": rows, "best": tables.best(rows, lambda row: row["case"]), "ablations": ablations}


class Data:
    """The rows, prepared when they are first asked for."""

    def __init__(self, work: Path, tokenizer: Path, rows: Rows) -> None:
        self.work, self.tokenizer, self.rows = work, tokenizer, rows
        self.profile = False  # whether runs of ours are profiled, too

    def model(self, case: Case) -> Path:
        return series.made_model(case.model, self.tokenizer, self.work)

    def directory(self, packing: bool = True) -> Path:
        return self.work / ("data" if packing else "data-padded")

    def make(self, case: Case, packing: bool = True) -> None:
        """The model of a case and the data, where they are not there yet."""
        model, directory = self.model(case), self.directory(packing)
        if directory.exists():
            return
        source = self.work / "rows.jsonl"
        write_rows(self.tokenizer / "tokenizer.json", source, self.rows)
        command = [*(sys.executable, "-m", "opensloth.cli.data", str(source), "--model", str(model))]
        command += ["--output", str(directory), "--max-seq-length", str(self.rows.longest)]
        command += [] if packing else ["--no-packing"]
        series.prepare(command, self.work, directory.name)

    def mean_length(self) -> float:
        manifest = json.loads((self.directory() / "manifest.json").read_text())
        return float(manifest["tokens"] / manifest["rows_kept"])


def facts(case: Case, impl: str, setting: str) -> dict[str, Any]:
    """The columns of a measurement that are known before it."""
    return {
        "impl": impl,
        "model": case.model,
        "setting": setting,
        "case": case.name,
        "bits": case.bits,
        "memory_limit_gib": case.memory_limit_gib,
    }


def ours(case: Case, data: Data, setting: str) -> Job:
    """`os-sft`, in a setting or in an ablation."""
    name, ablated = f"{case.name}/opensloth/{setting}", setting in ABLATIONS
    packing = setting != NO_PACKING
    run = data.work / "runs" / series.as_file(name)
    limit = case.memory_limit_gib
    profile = data.profile and not ablated
    steps = case.steps + (profiled.STEPS if profile else 0)
    behind = f":{case.steps}" if profile else ""
    program = ["-m", "opensloth.cli.sft"]
    if limit is not None:
        program = [str(HERE / "limited.py"), f"{limit}{behind}"]
    elif profile:
        program = [str(HERE / "profiled.py"), f"sft{behind}"]
    command = [sys.executable, *program, str(data.directory(packing))]
    command += ["--model", str(data.work / "models" / case.model), "--output", str(run), "--force"]
    command += ["--max-steps", str(steps), "--tokens-per-step", str(case.tokens_per_step)]
    command += ["--load-in-4bit"] if case.bits == 4 else []
    command += ["--compile", SETTINGS.get(setting, "off"), *ABLATIONS.get(setting, ())]
    known = facts(case, "opensloth", setting) | ({"ablation": True} if ablated else {})
    return Job(
        name=name,
        points=[Point(name, known)],
        command=command,
        seconds=case.seconds,
        before=partial(data.make, case, packing),
        collect=partial(read_run, run, case, data, name),
    )


def read_run(run: Path, case: Case, data: Data, name: str) -> Outcome:
    """What a finished run of ours says of itself."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if WARM_UP < line["step"] <= case.steps and "tokens_per_second" in line]
    record = json.loads((run / "job.json").read_text())
    optim, on_card = record["settings"]["optim"]["value"], record["world"]["devices"] != ["cpu"]
    said = series.log_of(data.work, name).read_text(errors="replace")
    series.keep_profile(run / profiled.PROFILE, data.work, name)
    # steps have nearly equal tokens: their harmonic mean is tokens over seconds
    speed = statistics.harmonic_mean([line["tokens_per_second"] for line in steps])
    return {
        "adapter_dtype": adapter_dtype(run / "adapter_model.safetensors"),
        "optimizer": ("adamw_torch_fused" if on_card else "adamw_torch") if optim == "auto" else optim,
        "tokens_per_second": round(speed, 1),
        "rows_per_second": round(speed / data.mean_length(), 3),
        "share_of_limit": models.share_of_limit(data.model(case), speed),
        "peak_gib": max(line["memory_gib"] for line in logged if "memory_gib" in line),
        "steps": len(steps),
        "tokens_per_step": case.tokens_per_step,
        "plan": next(iter(re.findall(r"a step is .*", said)), ""),
        "attention": next(iter(re.findall(r"attention over packs: (.*)", said)), ""),
    }


def adapter_dtype(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no mapping)
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(min(kinds), min(kinds))


def trl_grid(case: Case) -> tuple[Setting, ...]:
    return ((False, 8, False, "adamw_torch"),) if case is TINY else TRL


def peer(case: Case, impl: str, settings: tuple[Setting, ...], data: Data) -> Job:
    """A process of Unsloth or TRL that goes through settings."""
    points = []
    for packed, batch, checkpointing, optimizer in settings:
        words = ["packed" if packed else "not packed", f"{batch} x {data.rows.longest}" if packed else f"{batch} rows"]
        words += ["checkpointing" if checkpointing else "no checkpointing", optimizer]
        setting = ", ".join(words)
        told = {"packed": packed, "batch": batch, "checkpointing": checkpointing, "optimizer": optimizer}
        points.append(Point(f"{case.name}/{impl}/{setting}", facts(case, impl, setting), told))
    told = {
        "data": str(data.directory() / "rows"),
        "model_directory": str(data.work / "models" / case.model),
        "longest": data.rows.longest,
        "warm_up": WARM_UP,
        "steps": case.steps,
    }
    return Job(
        name=f"{case.name}/{impl}",
        points=points,
        command=[sys.executable, str(HERE / "peers" / "train_sft.py")],
        early=True,
        told=told,
        seconds=case.seconds,
        before=partial(data.make, case),
    )


if __name__ == "__main__":
    main()
