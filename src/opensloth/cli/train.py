"""`os-train`: from a raw data set to an adapter in one command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensloth import log
from opensloth.cli.options import Request, add_command, new_app
from opensloth.cli.program import run
from opensloth.cli.sft import report
from opensloth.config.base import Resolved
from opensloth.config.jobs import DataJob, SftJob, TrainSftJob, part
from opensloth.launch.world import plan_world

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.run_directory import Result

app = new_app("From a raw data set to a trained adapter.")


def train_sft(request: Request[TrainSftJob]) -> None:
    if request.dry_run:
        from opensloth.cli.dry_run import plan_train_sft

        world = plan_world(request.job)
        plan_train_sft(request, data_job(request.job, world.processes), world)
        return
    report(start_sft(request.resolved), request.as_json)


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


HELP = "Prepare data and train an adapter on it: os-data and os-sft in one."
add_command(app, "sft", TrainSftJob, train_sft, help=HELP)


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


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The run directory.", metavar="DIR")] = Path("outputs/demo"),
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Problems to train on.", metavar="N")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after N optimizer steps.", metavar="N")] = None,
    processes: Annotated[int | None, typer.Option(help="Train with N CPU processes.", metavar="N")] = None,
) -> None:
    """The tutorial on a real small model and built-in problems: no GPU, no hub."""
    from opensloth.cli import demo

    demo.run(output=output, samples=samples, max_steps=max_steps, processes=processes)


def main() -> None:
    sys.exit(run(app, sys.argv[1:] or ["--help"]))


if __name__ == "__main__":
    main()
