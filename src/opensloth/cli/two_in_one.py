"""`os-train sft` as what it is: one job that becomes a preparation of data and a training run on it."""

from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.config.base import Resolved
from opensloth.config.jobs import DataJob, SftJob, TrainSftJob, part
from opensloth.launch.world import plan_world

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.run_directory import Result


def start_sft(resolved: Resolved[TrainSftJob]) -> "Result":
    """Prepare the data of a job and train on it."""
    from opensloth.data.prepared.prepare import prepare
    from opensloth.launch.run_directory import check_output, start
    from opensloth.launch.torchrun import leader_first

    world = plan_world(resolved.job)
    if resolved.job.output is not None:  # before the data, which may take hours
        check_output(resolved.job.output)
    job = data_job(resolved.job, world.processes)
    prepared = leader_first("data", lambda: prepare(job))
    dropped = sum(prepared.manifest.dropped.values())
    log.say(
        f"data: {prepared.manifest.rows_kept:,} rows, {prepared.manifest.tokens:,} tokens in {prepared.directory}"
        + (f"; {dropped:,} dropped, see dropped.jsonl there" if dropped else "")
    )
    training = sft_job(resolved, prepared)
    return start(training.job, training.origins, prepared, world)


def data_job(job: TrainSftJob, processes: int) -> DataJob:
    """The preparation's part of the job. Its directory has the default name; --output and --force are the run's."""
    shared: dict[str, Any] = part(job, DataJob)
    return DataJob.model_validate(shared | {"output": None, "force": False, "gpus": processes})


def sft_job(resolved: Resolved[TrainSftJob], prepared: "Prepared") -> Resolved[SftJob]:
    """The training's part of the job, with the origins that its settings have there.

    A hub model is pinned to the commit whose tokenizer the data was prepared with.
    """
    shared: dict[str, Any] = part(resolved.job, SftJob)
    fixed = {"data": prepared.directory, "revision": prepared.manifest.model_revision}
    origins = {name: resolved.origins.get(name, "data") for name in SftJob.model_fields}
    return Resolved(SftJob.model_validate(shared | fixed), origins)
