"""`os-train`: from a raw data set to an adapter in one command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from opensloth.cli import verify
from opensloth.cli.options import Request, add_command, new_app
from opensloth.cli.program import leave, run
from opensloth.cli.result import report
from opensloth.cli.two_in_one import data_job, start_grpo, start_sft
from opensloth.config.jobs import TrainGrpoJob, TrainSftJob
from opensloth.launch.world import plan_world

app = new_app("From a raw data set to a trained adapter.")


def train_sft(request: Request[TrainSftJob]) -> None:
    if request.dry_run:
        from opensloth.cli.dry_run import plan_train_sft

        world = plan_world(request.job)
        plan_train_sft(request, data_job(request.job, world.processes), world)
        return
    report(start_sft(request.resolved), request.as_json)


def train_grpo(request: Request[TrainGrpoJob]) -> None:
    if request.dry_run:
        from opensloth.cli.dry_run_grpo import plan_train_grpo

        world = plan_world(request.job)
        plan_train_grpo(request, data_job(request.job, world.processes), world)
        return
    report(start_grpo(request.resolved), request.as_json)


SFT_HELP = "Prepare data and train an adapter on it: os-data and os-sft in one."
GRPO_HELP = "Prepare prompts and train on them with rewards: os-data --method grpo and os-grpo in one."
add_command(app, "sft", TrainSftJob, train_sft, help=SFT_HELP)
add_command(app, "grpo", TrainGrpoJob, train_grpo, help=GRPO_HELP)

app.add_typer(verify.app, name="verify")


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
    leave(run(app, sys.argv[1:] or ["--help"]))


if __name__ == "__main__":
    main()
