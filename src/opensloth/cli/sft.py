"""`os-sft DIR`: train an adapter on prepared data."""

from opensloth.cli.options import Request, add_command, elsewhere, new_app
from opensloth.cli.prepared import ELSEWHERE, open_for
from opensloth.cli.program import leave, run
from opensloth.cli.result import report
from opensloth.config.jobs import DataJob, SftJob
from opensloth.launch import ahead
from opensloth.launch.world import plan_world

HELP = "Train an adapter on prepared data (the directory that os-data left)."
app = new_app(HELP)


def sft(request: Request[SftJob]) -> None:
    resolved, prepared = open_for(request, "sft")
    world = plan_world(resolved.job)
    if request.dry_run:
        from opensloth.cli.dry_run import plan_sft

        plan_sft(resolved, prepared, world, request.as_json)
        return
    from opensloth.launch.run_directory import start

    with ahead.begun(world, "sft", resolved.job.engine):
        result = start(resolved.job, resolved.origins, prepared, world)
    report(result, request.as_json)


add_command(app, "sft", SftJob, sft, help=HELP, beside=DataJob)


def main() -> None:
    leave(run(app, elsewhere=elsewhere(SftJob, DataJob, ELSEWHERE)))


if __name__ == "__main__":
    main()
