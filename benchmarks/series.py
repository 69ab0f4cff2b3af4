"""Measurements one after the other, each job a process of its own with a time limit; what is found is kept at once.

A job makes one or several measurements. Its process reads what to do from a JSON file and appends a line for each of
them to `found.jsonl` of the work folder: `{"name": ..., "row": {...}}` or `{"name": ..., "failed": "the reason"}`. The
same command goes on after what is there already.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from processes import end, ended, environment, in_time, started, why

HERE = Path(__file__).resolve().parent
LEAST_SECONDS = 20  # with less time than this left, nothing is begun
PATIENCE = 300  # seconds for a model or data to be made
MOST_IDLE = 2  # processes of a job that measure nothing, before the rest of it is given up
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
        early: whether its process is started while the job before is measured, to import its libraries, which takes a
            minute; it then waits for its turn (`await_turn`).
    """

    name: str
    points: Sequence[Point]
    command: Sequence[str]
    told: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 300
    before: Callable[[], object] = lambda: None
    collect: Callable[[], Outcome] | None = None
    early: bool = False


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
        self.started: dict[str, subprocess.Popen[bytes]] = {}  # early, by the names of their jobs
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
        try:
            for place, job in enumerate(jobs):
                self.run_one(job, jobs[place + 1 :])
        finally:
            for process in self.started.values():
                end(process)

    def missing(self, job: Job) -> list[Point]:
        done = self.found().keys() - self.earlier
        return [point for point in job.points if point.name not in done]

    def run_one(self, job: Job, later: Sequence[Job]) -> None:
        missing = self.missing(job)
        try:
            if missing and self.left() > LEAST_SECONDS:
                job.before()
        except NotMade as error:
            for point in missing:
                self.keep(point.name, failed=str(error))
            return
        idle = 0  # processes in a row that measured nothing
        while missing and idle < MOST_IDLE and self.left() > LEAST_SECONDS:
            done = self.measure(job, missing, later)
            idle = 0 if any("row" in outcome for outcome in done.values()) else idle + 1
            self.earlier -= done.keys()
            missing = [point for point in missing if point.name not in done]
            if idle == MOST_IDLE:
                for point in missing:
                    self.keep(point.name, **next(reversed(done.values()), {"failed": "nothing was measured"}))

    def measure(self, job: Job, points: Sequence[Point], later: Sequence[Job] = ()) -> dict[str, Outcome]:
        """One process of a job. Returns what came of it, by name: a fault of a process is that of its next point."""
        log = log_of(self.work, job.name)
        limit = min(job.seconds, self.left())
        print(f"{job.name}: {len(points)} to measure, at most {limit:.0f} s", flush=True)
        begin, before = time.monotonic(), len(self.lines())
        process = self.started.pop(job.name, None) or self.start(job, points)
        self.turn(job).touch()
        following = next((one for one in later if self.missing(one)), None)
        if following and following.early and following.name not in self.started:
            self.started[following.name] = self.start(following, self.missing(following))
        code = ended(process, limit)
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

    def start(self, job: Job, points: Sequence[Point]) -> subprocess.Popen[bytes]:
        file, turn = self.work / "jobs" / f"{as_file(job.name)}.json", self.turn(job)
        turn.unlink(missing_ok=True)
        told = {"found": str(self.path), "points": [{"name": p.name, **p.facts, **p.settings} for p in points]}
        file.write_text(json.dumps({**job.told, **told, "turn": str(turn)}, indent=1))
        words = [*job.command] if job.collect else [*job.command, str(file)]
        return started(words, log_of(self.work, job.name), environment(self.work))

    def turn(self, job: Job) -> Path:
        """The file that says that a job's process may go on."""
        return self.work / "jobs" / f"{as_file(job.name)}.turn"

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


def keep_profile(profile: Path, work: Path, name: str) -> None:
    """Put the profile of a run, where it has one, into the folder of profiles under the name of its measurement."""
    if profile.exists():
        (work / "profiles").mkdir(exist_ok=True)
        shutil.copy(profile, work / "profiles" / f"{as_file(name)}.txt")


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


def await_turn(job: Mapping[str, Any]) -> None:
    """Return once the jobs before this one are through. Called by a process that was started early, before it uses the
    card."""
    while not Path(job["turn"]).exists():
        time.sleep(0.05)


class NotMade(Exception):
    """What a job needs could not be made."""


def prepare(words: Sequence[str], work: Path, name: str) -> None:
    """Run a command that makes a model or data. Raises NotMade with its reason."""
    log = log_of(work, f"make {name}")
    code = in_time(words, log, PATIENCE, environment(work))
    if code != 0:
        reason = f"not within {PATIENCE} s" if code is None else why(log, code)
        raise NotMade(f"{name} could not be made: {reason}")


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
