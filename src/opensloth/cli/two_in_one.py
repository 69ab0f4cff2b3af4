"""`os-train` as what it is: one job that becomes a preparation of data and a training run on it."""

from typing import TYPE_CHECKING, Any, TypeVar

from opensloth import log
from opensloth.config.base import Resolved
from opensloth.config.jobs import DataJob, GrpoJob, RunJob, SftJob, TrainGrpoJob, TrainSftJob, part
from opensloth.launch import ahead
from opensloth.launch.world import World, plan_world

if TYPE_CHECKING:
    from collections.abc import Callable

    from opensloth.data.prepared.directory import Prepared
    from opensloth.data.prompt.contract import PromptContract
    from opensloth.launch.run_directory import Result

TrainJob = TrainSftJob | TrainGrpoJob
Job = TypeVar("Job", bound=RunJob)


def start_sft(resolved: Resolved[TrainSftJob]) -> "Result":
    """Prepare the data of a job and train on it."""
    from opensloth.launch.run_directory import start

    world = plan_world(resolved.job)
    with ahead.begun(world, "sft", resolved.job.engine):
        prepared = prepare_data(resolved.job, world)
        training = training_job(resolved, SftJob, prepared)
        return start(training.job, training.origins, prepared, world)


def start_grpo(resolved: Resolved[TrainGrpoJob]) -> "Result":
    """Prepare the prompts of a job and train on them. What is wrong with rewards or batch is found before."""
    from opensloth.cli import grpo_checks
    from opensloth.rewards.choose import chosen

    world = plan_world(resolved.job)
    grpo_checks.check_before_data(resolved.job, world.processes)
    with ahead.begun(world, "grpo", resolved.job.engine):
        prepared = prepare_data(resolved.job, world, lambda contract: chosen(resolved.job, contract.tags))
        return grpo_checks.start_grpo(training_job(resolved, GrpoJob, prepared), prepared, world)


def prepare_data(
    job: TrainJob, world: World, check: "Callable[[PromptContract], object]" = lambda contract: None
) -> "Prepared":
    """The prepared data of the job, made or found. `check` as of `prepare`."""
    from opensloth.data.prepared.prepare import prepare
    from opensloth.launch.run_directory import check_output
    from opensloth.launch.torchrun import leader_first

    if job.output is not None:  # before the data, which may take hours
        check_output(job.output)
    wanted = data_job(job, world.processes)
    prepared = leader_first("data", lambda: prepare(wanted, check))
    reasons = prepared.manifest.dropped
    most = "; ".join(f"{count:,} x {reason}" for reason, count in list(reasons.items())[:2])
    dropped = sum(reasons.values())
    log.say(
        f"data: {prepared.manifest.rows_kept:,} rows, {prepared.manifest.tokens:,} tokens in {prepared.directory}"
        + (f"; {dropped:,} dropped, see dropped.jsonl there ({most})" if dropped else "")
    )
    return prepared


def data_job(job: TrainJob, processes: int) -> DataJob:
    """The preparation's part of the job. Its directory has the default name; --output and --force are the run's."""
    shared: dict[str, Any] = part(job, DataJob)
    method = "grpo" if isinstance(job, TrainGrpoJob) else "sft"
    return DataJob.model_validate(shared | {"method": method, "output": None, "force": False, "gpus": processes})


def training_job(resolved: Resolved[Any], kind: type[Job], prepared: "Prepared") -> Resolved[Job]:
    """The training's part of the job, with the origins that its settings have there.

    A hub model is pinned to the commit whose tokenizer the data was prepared with.
    """
    shared: dict[str, Any] = part(resolved.job, kind)
    fixed = {"data": prepared.directory, "revision": prepared.manifest.model_revision}
    origins = {name: resolved.origins.get(name, "data") for name in kind.model_fields}
    return Resolved(kind.model_validate(shared | fixed), origins)
