"""GRPO beside Unsloth and TRL: whole steps, and rollouts alone, of the same prompts with the same reward.

usage: python benchmarks/grpo.py --tokenizer M --work FOLDER [--minutes 9.5] [--only WORD ...]

M, FOLDER and the model as in benchmarks/sft.py, whose models are found again. Random weights hardly ever choose a
token that ends a completion, so all completions are as long as they may be; what counts is the tokens really made.

Whole steps of ours are the command `os-grpo` in its own process, measured by its metrics.jsonl after WARM_UP steps,
which record graphs; a row also has how its seconds are divided. Rollouts of ours alone are `opensloth.rollout` called
as the trainer calls it (rollouts.py). Unsloth and TRL run as their documents show (peers/train_grpo.py), and their
rollouts are the generation within their own steps, timed there. Each process has a time limit, and what was measured
is kept in FOLDER at once. Prints a table and writes benchmarks/results/grpo-<card>.json.

    --profile     steps of ours go on for some more in the profiler; FOLDER/profiles has where their time went
    --rehearse    a tiny model on a CPU, in a minute. Unsloth is listed as failed where it is not installed.
"""

import argparse
import json
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
from rollouts import NOT_MERGED
from series import HERE, Job, Outcome, Point, Series

WARM_UP = 2  # steps of ours that do not count
GROUP = 8
REWARD = HERE / "peers" / "reward.py"
COLUMNS = ("what", "completions", "new_tokens", "impl", "setting", "seconds", "tokens_per_second", "peak_gib")
SPLIT = ("rollout", "wait", "rewards", "train", "sync", "other")  # what metrics.jsonl says of a step's seconds


@dataclass(frozen=True)
class Size:
    """A step: completions of at most `new` tokens. `micro` are the batch sizes in which the peers train them."""

    completions: int
    new: int
    micro: tuple[int, ...]
    steps: int = 8
    group: int = GROUP


@dataclass(frozen=True)
class Plan:
    """What is measured. `peers` and `ours` are settings by size; the first ones are measured first."""

    model: str
    ours: tuple[tuple[Size, str], ...]
    rollouts: tuple[tuple[Size, str], ...]
    prompts: int
    peers: tuple[tuple[Size, str, str], ...]  # size, library, setting


STEP, LARGE, MANY = Size(64, 128, (64,)), Size(256, 256, (64, 32), steps=6), Size(1024, 256, (32,))
FULL = Plan(
    "qwen3-0.6b",
    ours=(
        (STEP, "graph"),
        (LARGE, "graph"),
        (STEP, "generate"),
    ),
    rollouts=((LARGE, "graph"), (MANY, "graph"), (STEP, "graph"), (LARGE, NOT_MERGED), (LARGE, "generate")),
    prompts=512,
    peers=(
        (STEP, "unsloth", "generate"),
        (LARGE, "unsloth", "generate"),
        (STEP, "trl", "generate"),
        (LARGE, "trl", "generate"),
        (STEP, "trl", "continuous batching"),
        (LARGE, "trl", "continuous batching"),
    ),
)
SMALL = Size(8, 8, (8,), steps=4, group=4)
TINY = Plan(
    "tiny-qwen3",
    ours=((SMALL, "graph"),),
    rollouts=((SMALL, "graph"), (SMALL, NOT_MERGED), (SMALL, "generate")),
    prompts=32,
    peers=((SMALL, "unsloth", "generate"), (SMALL, "trl", "generate")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    series.options(parser)
    parser.add_argument("--profile", action="store_true", help="ours goes on into a profile; FOLDER/profiles")
    arguments = parser.parse_args()
    end_on_signal()
    found = Series(arguments.work, arguments.minutes, arguments.again)
    data = Data(found.work, models.tokenizer_directory(arguments.tokenizer), TINY if arguments.rehearse else FULL)
    data.profile = arguments.profile
    mine = [ours(data, size, setting) for size, setting in data.plan.ours]
    peers = [peer(data, size, impl, setting) for size, impl, setting in data.plan.peers]
    first = next((place for place, job in enumerate(mine) if "generate" in job.name), len(mine))
    jobs = [*mine[:first], rollouts(data), *peers, *mine[first:]]  # the table's figures first
    found.run(series.chosen(jobs, arguments.only))
    report = found.report(arguments.output, "grpo", compared)
    print(tables.table(report["rows"], COLUMNS))
    print(tables.told(report["best"]))
    for failed in report["failed"]:
        what = f"{failed['what']} of {failed['completions']} x {failed['new_tokens']}"
        print(f"failed: {what} by {failed['impl']}, {failed['setting']}: {failed['reason']}")


def compared(rows: list[Outcome]) -> Mapping[str, Any]:
    """The rows, those that are compared beside each other, and the best of each library."""

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["what"], row["completions"], row["new_tokens"], row["seconds"]

    best = tables.best(rows, lambda row: "{what} {completions} x {new_tokens}".format(**row))
    return {"rows": sorted(rows, key=place), "best": best}


@dataclass
class Data:
    """The model and the prompts, made when they are first asked for; `profile` says whether steps of ours have one."""

    work: Path
    tokenizer: Path
    plan: Plan
    profile: bool = False

    @property
    def directory(self) -> Path:
        return self.work / "prompts"

    @property
    def model(self) -> Path:
        return self.work / "models" / self.plan.model

    def make(self) -> None:
        model = series.made_model(self.plan.model, self.tokenizer, self.work)
        if self.directory.exists():
            return
        command = [*(sys.executable, "-m", "opensloth.cli.data", "sample:arithmetic", "--method", "grpo")]
        command += ["--model", str(model), "--output", str(self.directory), "--chat-template", "reasoning"]
        command += ["--samples", str(self.plan.prompts)]
        series.prepare(command, self.work, self.directory.name)


def point(data: Data, size: Size, impl: str, setting: str, what: str, told: Mapping[str, Any]) -> Point:
    known = {
        "impl": impl,
        "setting": setting,
        "model": data.plan.model,
        "what": what,
        "completions": size.completions,
        "new_tokens": size.new,
    }
    return Point(f"{what} {size.completions}x{size.new}/{impl}/{setting}", known, told)


def ours(data: Data, size: Size, setting: str) -> Job:
    """Whole steps of `os-grpo`."""
    measured = point(data, size, "opensloth", setting, "step", {})
    run = data.work / "runs" / series.as_file(measured.name)
    program, steps = ["-m", "opensloth.cli.grpo"], size.steps
    if data.profile:
        program, steps = [str(HERE / "profiled.py"), f"grpo:{size.steps}"], size.steps + profiled.STEPS
    command = [sys.executable, *program, str(data.directory), "--model", str(data.model)]
    command += ["--output", str(run), "--force", "--rollout", setting, "--rewards", f"{REWARD}:spread"]
    command += ["--prompts-per-step", str(size.completions // size.group), "--group-size", str(size.group)]
    command += ["--max-new", str(size.new), "--max-steps", str(steps), "--print-samples-every", "0"]
    return Job(
        name=measured.name,
        points=[measured],
        command=command,
        seconds=180,
        before=data.make,
        collect=partial(read_run, run, size, data, measured.name),
    )


def read_run(run: Path, size: Size, data: Data, name: str) -> Outcome:
    """What a finished run of ours says of its steps."""
    series.keep_profile(run / profiled.PROFILE, data.work, name)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if WARM_UP < line["step"] <= size.steps and "seconds/step" in line]
    seconds = statistics.fmean(line["seconds/step"] for line in steps)
    tokens = size.completions * statistics.fmean(line["completions/mean_length"] for line in steps)
    split = {
        f"seconds_{name}": round(statistics.fmean(line[f"seconds/{name}"] for line in steps), 4)
        for name in SPLIT
        if all(f"seconds/{name}" in line for line in steps)
    }
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        **split,
        "peak_gib": max(line["memory_gib"] for line in logged if "memory_gib" in line),
        "steps": len(steps),
    }


def rollouts(data: Data) -> Job:
    """All rollouts of ours in one process, which is what a run is too."""
    points = [
        point(data, size, "opensloth", setting, "rollout", {"group": size.group})
        for size, setting in data.plan.rollouts
    ]
    told = {"data": str(data.directory), "model_directory": str(data.model)}
    return Job(
        name="rollouts/opensloth",
        points=points,
        command=[sys.executable, str(HERE / "rollouts.py")],
        told=told,
        seconds=240,
        before=data.make,
    )


def peer(data: Data, size: Size, impl: str, setting: str) -> Job:
    """Whole steps of Unsloth or TRL, with the time of their rollouts.

    The measurements of one process share its steps: those with other batches for training follow each other, and the
    rollouts, which do not depend on them, are those of the first.
    """
    told = {"group": size.group, "steps": size.steps}
    sizes = size.micro if impl == "unsloth" else size.micro[:1]
    named = [(micro, f"{setting}, batches of {micro}" if micro != size.micro[0] else setting) for micro in sizes]
    points = [point(data, size, impl, name, "step", told | {"micro": micro, "by": setting}) for micro, name in named]
    points.append(point(data, size, impl, setting, "rollout", told | {"micro": size.micro[0], "by": setting}))
    return Job(
        name=f"{size.completions}x{size.new}/{impl}/{setting}",
        points=points,
        command=[sys.executable, str(HERE / "peers" / "train_grpo.py")],
        early=True,
        told={"data": str(data.directory), "model_directory": str(data.model), "reward": str(REWARD)},
        seconds=240,
        before=data.make,
    )


if __name__ == "__main__":
    main()
