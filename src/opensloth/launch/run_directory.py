"""A run and its directory: which job it belongs to, whether it is finished, and how it is started or gone on with."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opensloth import __version__, log, paths
from opensloth.config.base import Resolved
from opensloth.config.jobs import TRAINING, RunJob, SftJob
from opensloth.config.run import LaunchOptions
from opensloth.data.models.resolve import ModelRef, resolve_model
from opensloth.data.plan.schedule import rows_per_step
from opensloth.data.prepared.directory import Prepared
from opensloth.errors import UserError
from opensloth.launch.launcher import run_workers
from opensloth.launch.torchrun import leader_first
from opensloth.launch.world import World, speaks

JOB, RESULT, CHECKPOINTS = "job.json", "result.json", "checkpoints"
METHOD = {kind: name for name, kind in TRAINING.items()}
NOTHING: Mapping[str, Any] = MappingProxyType({})

# What may differ when a run goes on: the hardware, how much is logged and kept. Everything else makes another model.
MAY_CHANGE = frozenset(LaunchOptions.model_fields) | {
    *("output", "force", "resume", "pack_tokens", "gradient_checkpointing", "compile", "cuda_graphs"),
    *("logging_steps", "save_steps", "save_total_limit", "report_to", "trust_remote_code"),
    *("print_samples_every", "zero_signal"),
}
BY_CONTENT = ("task", "rewards")  # what these stand for comes with `contents`: a file of rewards may be edited


@dataclass(frozen=True)
class Result:
    """`status` is "trained" or "already finished"; `metrics` are those of result.json."""

    output: Path
    status: str
    metrics: dict[str, Any]


def identity(
    job: RunJob, prepared: Prepared, ref: ModelRef, processes: int, contents: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """What makes this job the job it is, by name: two runs with the same identity train the same model.

    Args:
        contents: what settings stand for, where their own text does not say it (the rewards of GRPO).
    """
    values = {name: value for name, value in job.model_dump(mode="json").items() if name not in MAY_CHANGE}
    for name in BY_CONTENT:
        values.pop(name, None)
    if job.batch_size is not None:
        del values["batch_size"], values["grad_accum"]
        if isinstance(job, SftJob):  # it counts rows per process: then the processes do decide what a step holds
            values["rows_per_step"] = rows_per_step(job, processes)
    model = {"base": ref.base, "revision": ref.revision, "adapter": str(ref.adapter or "")}
    # the same rows under another path, or dealt to another number of shards, are the same data
    return {**values, **contents, "data": prepared.manifest.digest, "model": model}


def default_output(method: str, prepared: Prepared, ref: ModelRef, identity: dict[str, Any]) -> Path:
    """`outputs/<method>-<model>-<data>-<hash of the job>`."""
    data = Path(prepared.manifest.source.spec).name.split(".")[0].replace("sample:", "")
    return Path("outputs") / f"{method}-{ref.name}-{data}-{paths.digest(identity)[:8]}"


def start(
    job: RunJob,
    origins: dict[str, str],
    prepared: Prepared,
    world: World,
    *,
    contents: Mapping[str, Any] = NOTHING,
    files: Mapping[str, Callable[[], str]] = NOTHING,
    notes: Mapping[str, str] = NOTHING,
) -> Result:
    """Train, go on with an unfinished run of the same job, or say that it is finished.

    Args:
        contents: see `identity`.
        files: what the run directory holds before the workers start, by name; each text is made once in a run's life.
        notes: what people are told then, by name.
    Raises:
        UserError: the directory holds another job (the settings that differ are named), or something else.
        WorkerFailed, RunStopped: as `launcher.run_workers`.
    """
    method = METHOD[type(job)]
    ref = resolve_model(job.model or prepared.manifest.model, job.revision)
    this = identity(job, prepared, ref, world.processes, contents)
    output = job.output or default_output(method, prepared, ref, this)
    record = {
        "format": 1,
        "method": method,
        "code_version": __version__,
        "settings": Resolved(job, origins).record(),
        "identity": this,
        "data": {"directory": str(prepared.directory.absolute()), "source": prepared.manifest.source.model_dump()},
        "model": {"base": ref.base, "revision": ref.revision, "adapter": ref.adapter and str(ref.adapter)},
        "world": {"processes": world.processes, "devices": list(world.devices), "nodes": world.nnodes},
    }
    with one_command(output, world):
        return run(output, job, record, prepared, world, files, notes)


def one_command(output: Path, world: World) -> AbstractContextManager[None]:
    """Two commands that train in one directory would mix their checkpoints: the second one is told so."""
    if not leads(world):
        return nullcontext()
    return paths.one_at_a_time(output, busy=f"Another command is training in {output}.")


def leads(world: World) -> bool:
    return world.node_rank == 0 and os.environ.get("RANK", "0") == "0"


def run(
    output: Path,
    job: RunJob,
    record: dict[str, Any],
    prepared: Prepared,
    world: World,
    files: Mapping[str, Callable[[], str]],
    notes: Mapping[str, str],
) -> Result:
    finished = leader_first("run directory", lambda: open_run(output, job, record, world, files))
    if finished:
        return Result(output, "already finished", finished)
    log.say(f"run directory: {output}")
    if speaks():
        for name, text in notes.items():
            log.say(f"{name}: {text}")
        if job.eval_steps and not prepared.is_eval.any():
            log.warn("--eval-steps evaluates nothing: no rows are held out (--eval-fraction, where data is prepared).")
    if prepared.manifest.shards != world.processes:
        log.say(
            f"processes: the data was planned for {prepared.manifest.shards}; its rows are dealt to {world.processes}"
        )
    run_workers(world, output, max_restarts=job.max_restarts, timeout=job.timeout)
    if world.node_rank and not (output / RESULT).exists():
        return Result(output, "trained", {})  # machine 0 wrote it, and the machines share no directory
    return Result(output, "trained", paths.read_json(output / RESULT, "a finished run"))


def open_run(
    output: Path, job: RunJob, record: dict[str, Any], world: World, files: Mapping[str, Callable[[], str]]
) -> dict[str, Any]:
    """Make the directory this job's, or find that it is. Returns the figures of a finished run, else nothing.

    What another job left that trained nothing is removed: a mistake that ended it makes another job when it is put
    right.
    """
    check_output(output)
    if job.force and leads(world):  # who comes later would remove the run that has begun
        empty(output)
    if different := settings_apart(output, record["identity"]):
        if holds_trained(output):
            shown = ", ".join(different[:5])
            raise UserError(
                f"{output} holds another job: {shown}.", "Choose another --output, or --force to replace that run."
            )
        empty(output)
    if (output / RESULT).exists():
        figures: dict[str, Any] = paths.read_json(output / RESULT, "a finished run")
        return figures
    check_resume(job, output)
    earlier = processes_of(output)
    if not job.force and earlier not in (0, world.processes):
        log.say(f"processes: {earlier} before, {world.processes} now; steps and rows follow from data and seed alone")
    texts = {name: make() for name, make in files.items() if not (output / name).exists()}
    paths.write_json(output / JOB, record)  # first: a directory with other files alone would be nobody's run
    for name, text in texts.items():
        paths.write_text(output / name, text)
    return {}


def holds_trained(output: Path) -> bool:
    """Whether a run's directory has a result, a checkpoint (be it one that is not complete), or a best adapter that is
    not the one that it began with."""
    if (output / RESULT).exists() or any((output / CHECKPOINTS).rglob("checkpoint-*")):
        return True
    best = output / "best" / "best.json"
    return best.exists() and bool(paths.read_json(best, "a best adapter").get("step"))


def empty(output: Path) -> None:
    """The directory itself stays: it may be somebody's, with rights of its own, or a link."""
    for path in output.iterdir() if output.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def processes_of(output: Path) -> int:
    """How many processes an unfinished run had when it was last called; 0 where none was begun."""
    path = output / JOB
    return int(paths.read_json(path, "a run directory").get("world", {}).get("processes", 0)) if path.exists() else 0


def check_output(output: Path) -> None:
    """Raise UserError where `output` can be no run's directory; --force deletes no such thing either."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file.", "Name a directory.")
    if output.is_dir() and any(output.iterdir()) and not (output / JOB).exists():
        raise UserError(f"--output {output} holds something that is no run.", "Choose another --output.")
    paths.check_writable(output)


def settings_apart(output: Path, this: dict[str, Any]) -> list[str]:
    """What another job in the directory has otherwise; nothing where it is this one, or there is none."""
    if not (output / JOB).exists():
        return []
    other = paths.read_json(output / JOB, "a run directory").get("identity", {})
    told = {"data": "data (other rows, or prepared otherwise)"}  # digests would tell nobody anything
    names = [name for name in sorted({*this, *other}) if this.get(name) != other.get(name)]
    return [told.get(name, f"{name} ({other.get(name)} there, {this.get(name)} now)") for name in names]


def check_resume(job: RunJob, output: Path) -> None:
    begun = output / CHECKPOINTS
    if job.resume == "never" and begun.is_dir() and any(begun.glob("checkpoint-*")):
        raise UserError(f"--resume never, but {begun} holds checkpoints.", "Add --force to start anew without them.")
    if job.resume not in ("auto", "never") and not Path(job.resume).is_dir():
        raise UserError(f"--resume {job.resume}: there is no such directory.", "Name a checkpoint, auto or never.")
