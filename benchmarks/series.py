"""Measurements one after the other, each job a process of its own with a time limit; what is found is kept at once.

A job makes one or several measurements. Its process reads what to do from a JSON file and appends a line for each of
them to `found.jsonl` of the work folder: `{"name": ..., "row": {...}}` or `{"name": ..., "failed": "the reason"}`. The
same command goes on after what is there already.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
LEAST_SECONDS = 20  # with less time than this left, nothing is begun
PATIENCE = 300  # seconds for a model or data to be made
MOST_IDLE = 2  # processes of a job that measure nothing, before the rest of it is given up
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One measurement. `facts` are columns that are known before; `settings` tell the process what to do."""

    name: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A process and what it measures.

    Attributes:
        command: the file of the job is added as its last word, unless there is `collect`.
        told: what the process reads beside its points.
        before: makes what the process needs (models); its time does not count for the job.
        collect: reads the measurement from what a process left that does not write to `found.jsonl` itself.
    """

    name: str
    points: Sequence[Point]
    command: Sequence[str]
    told: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 300
    before: Callable[[], object] = lambda: None
    collect: Callable[[], Outcome] | None = None


class Series:
    """Runs jobs until the time is over, and makes the result file.

    Args:
        minutes: of this call.
        again: whether to try what failed before once more.
    """

    def __init__(self, work: Path, minutes: float, again: bool = False) -> None:
        self.work = work.resolve()
        self.end = time.monotonic() + 60 * minutes
        self.path = self.work / "found.jsonl"
        for folder in ("jobs", "logs"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self.points: dict[str, Point] = {}
        self.earlier = {name for name, outcome in self.found().items() if "failed" in outcome} if again else set()

    def found(self) -> dict[str, Outcome]:
        """By the name of the measurement; the last line of each counts."""
        return {outcome["name"]: outcome for outcome in self.lines()}

    def lines(self) -> list[Outcome]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def keep(self, name: str, **outcome: Any) -> None:
        keep(self.path, name, **outcome)

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, jobs: Sequence[Job]) -> None:
        """Measure what is not there yet."""
        for job in jobs:
            self.points |= {point.name: point for point in job.points}
        for job in jobs:
            done = self.found().keys() - self.earlier
            missing = [point for point in job.points if point.name not in done]
            try:
                if missing and self.left() > LEAST_SECONDS:
                    job.before()
            except NotMade as error:
                for point in missing:
                    self.keep(point.name, failed=str(error))
                continue
            idle = 0  # processes in a row that measured nothing
            while missing and idle < MOST_IDLE and self.left() > LEAST_SECONDS:
                done = self.measure(job, missing)
                idle = 0 if any("row" in outcome for outcome in done.values()) else idle + 1
                self.earlier -= done.keys()
                missing = [point for point in missing if point.name not in done]
                if idle == MOST_IDLE:
                    for point in missing:
                        self.keep(point.name, **next(reversed(done.values()), {"failed": "nothing was measured"}))

    def measure(self, job: Job, points: Sequence[Point]) -> dict[str, Outcome]:
        """One process of a job. Returns what came of it, by name: a fault of a process is that of its next point."""
        file, log = self.work / "jobs" / f"{as_file(job.name)}.json", log_of(self.work, job.name)
        told = {"found": str(self.path), "points": [{"name": p.name, **p.facts, **p.settings} for p in points]}
        file.write_text(json.dumps({**job.told, **told}, indent=1))
        limit = min(job.seconds, self.left())
        print(f"{job.name}: {len(points)} to measure, at most {limit:.0f} s", flush=True)
        begin, before = time.monotonic(), len(self.lines())
        words = [*job.command] if job.collect else [*job.command, str(file)]
        code = in_time(words, log, limit, environment(self.work))
        if job.collect is not None and code == 0:
            try:
                self.keep(points[0].name, row=job.collect())
            except (OSError, LookupError, ValueError) as error:
                self.keep(points[0].name, failed=f"its figures cannot be read: {error!r}")
        measured = {outcome["name"] for outcome in self.lines()[before:]}
        fault = next((point.name for point in points if point.name not in measured), None)
        if fault and code is not None:
            self.keep(fault, failed=why(log, code))
        elif fault and limit == job.seconds:  # else this call is over, and the next one begins here
            self.keep(fault, failed=f"not done within {limit:.0f} s")
        print(f"{job.name}: {len(self.lines()) - before} done after {time.monotonic() - begin:.0f} s", flush=True)
        return {line["name"]: {k: v for k, v in line.items() if k != "name"} for line in self.lines()[before:]}

    def report(self, output: Path | None, kind: str, more: Callable[[list[Outcome]], Mapping[str, Any]]) -> Outcome:
        """Write `rows` and `failed` of all points of this series, and what `more` makes of the rows."""
        found = self.found()
        rows, failed = [], []
        for name, point in self.points.items():
            outcome = found.get(name, {"failed": "not run: the time was over"})
            if "row" in outcome:
                rows.append({**point.facts, **outcome["row"]})
            else:
                failed.append({**point.facts, "reason": outcome["failed"]})
        report = {**machine.describe(), **more(rows), "failed": failed}
        path = output or HERE / "results" / f"{kind}-{machine.kind()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        return report


def as_file(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9.]+", "-", name)


def log_of(work: Path, job: str) -> Path:
    return work / "logs" / f"{as_file(job)}.log"


def keep(path: Path, name: str, **outcome: Any) -> None:
    """Append one measurement; also called by the processes that measure."""
    with path.open("a") as file:
        file.write(json.dumps({"name": name, **outcome}) + "\n")


def keep_measured(path: Path, names: Sequence[str], measure: Callable[[], Sequence[Outcome]]) -> None:
    """Append what a process measures, under these names; of a card that is too small, that it was."""
    import torch

    try:
        outcomes = measure()
    except torch.OutOfMemoryError as error:
        outcomes = [{"failed": f"out of memory: {str(error).splitlines()[0]}"}] * len(names)
    for name, outcome in zip(names, outcomes, strict=True):
        keep(path, name, **outcome)


def in_time(words: Sequence[str], log: Path, seconds: float, settings: Mapping[str, str]) -> int | None:
    """Run a command and return its exit code; None where it was ended after `seconds`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(settings), start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class NotMade(Exception):
    """What a job needs could not be made."""


def prepare(words: Sequence[str], work: Path, name: str) -> None:
    """Run a command that makes a model or data. Raises NotMade with its reason."""
    log = log_of(work, f"make {name}")
    code = in_time(words, log, PATIENCE, environment(work))
    if code != 0:
        reason = f"not within {PATIENCE} s" if code is None else why(log, code)
        raise NotMade(f"{name} could not be made: {reason}")


def environment(work: Path) -> dict[str, str]:
    """Of every process: no network, one card, and no files in the working directory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return QUIET | {"CUDA_VISIBLE_DEVICES": visible, "UNSLOTH_COMPILE_LOCATION": str(work / "unsloth_compiled")}


def why(log: Path, code: int) -> str:
    """The last line of a log that tells of an error, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line]
    return f"exit code {code}: {(told or lines or ['no output'])[-1][:300]}"


def end_on_signal() -> None:
    """SIGTERM ends this process in order, and with it the one that is measured."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def options(parser: argparse.ArgumentParser) -> None:
    """What all series can be told."""
    parser.add_argument("--tokenizer", required=True, metavar="M", help="a model directory, or sample:smollm2")
    parser.add_argument("--work", type=Path, required=True, help="where models, data, runs and what was found are kept")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call; the same command goes on")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="measurements whose names hold one of them"
    )
    parser.add_argument("--again", action="store_true", help="try what failed before once more")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, to see on a CPU that all of it runs")
    parser.add_argument("--output", type=Path, help="the result file")


def chosen(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs, with the measurements alone whose names hold one of the words of `only`."""
    if not only:
        return list(jobs)
    kept = [(job, [point for point in job.points if any(word in point.name for word in only)]) for job in jobs]
    return [Job(**(vars(job) | {"points": points})) for job, points in kept if points]


def made_model(name: str, tokenizer: Path, work: Path) -> Path:
    """The model's directory, made by a process of its own: this one leaves the card alone."""
    model = work.resolve() / "models" / name
    if not model.exists():
        print(f"making {name}", flush=True)
        command = [sys.executable, str(HERE / "models.py"), name, str(model), "--tokenizer", str(tokenizer)]
        prepare(command, work.resolve(), name)
    return model
