"""`os-grpo DIR`: train a policy on prompts and rewards."""

from opensloth.cli.options import Request, Shows, add_command, elsewhere, new_app
from opensloth.cli.prepared import ELSEWHERE, open_for
from opensloth.cli.program import leave, run
from opensloth.cli.result import report
from opensloth.config.jobs import DataJob, GrpoJob
from opensloth.launch import ahead
from opensloth.launch.world import plan_world

HELP = "Train on prompts whose completions are scored by rewards (the directory that os-data --method grpo left)."
OWN_REWARD = "your own: def FUNCTION(prompts, completions, **columns) returns a score or None for each completion"
app = new_app(HELP)


def grpo(request: Request[GrpoJob]) -> None:
    resolved, prepared = open_for(request, "grpo")
    world = plan_world(resolved.job)
    if request.dry_run:
        from opensloth.cli.dry_run_grpo import plan_grpo

        plan_grpo(resolved, prepared, world, request.as_json)
        return
    from opensloth.cli.grpo_checks import start_grpo

    with ahead.begun(world, "grpo", resolved.job.engine):
        result = start_grpo(resolved, prepared, world)
    report(result, request.as_json)


def list_rewards() -> None:
    """Print the rewards and the presets of --task."""
    from opensloth.rewards.registry import REWARDS, TASKS

    print("rewards")
    for name, meaning in {**REWARDS, "FILE.py:FUNCTION": OWN_REWARD}.items():
        print(f"  {name:<18}{meaning}")
    print("tasks")
    for name, rewards in TASKS.items():
        print(f"  {name:<18}{', '.join(rewards)}")
    print("docs/rewards.md has every score.")


SHOWS = Shows("--list-rewards", "List the rewards and the presets of --task; needs no DIR.", list_rewards)
add_command(app, "grpo", GrpoJob, grpo, help=HELP, beside=DataJob, shows=SHOWS)


def main() -> None:
    leave(run(app, elsewhere=elsewhere(GrpoJob, DataJob, ELSEWHERE)))


if __name__ == "__main__":
    main()
