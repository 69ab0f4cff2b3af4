"""`os-train verify`: the same job on one process and on several, and how far the two trainings are apart."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opensloth import log
from opensloth.cli.options import Request, add_command, new_app
from opensloth.config.base import Resolved
from opensloth.config.jobs import DataJob, GrpoJob, RunJob, SftJob, part
from opensloth.config.run import LaunchOptions
from opensloth.config.verify import VerifyGrpoJob, VerifySftJob
from opensloth.errors import Unequal, UserError
from opensloth.launch.world import World, backend_for, plan_world, under_torchrun
from opensloth.rewards import spread

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared
    from opensloth.evaluation.equality import Equality

VerifyJob = VerifySftJob | VerifyGrpoJob
Job = TypeVar("Job", bound=RunJob)

app = new_app("Prove that N processes train what one would: the same job on 1 and on N, compared step by step.")


def verify_sft(request: Request[VerifySftJob]) -> None:
    world = planned(request)
    if world is None:
        return
    from opensloth.launch.run_directory import start

    with place(request.job.output) as directory:
        prepared = prepare_data(request.job, "sft", directory, world)
        for name, processes in runs(world).items():
            resolved = training_job(request.resolved, SftJob, prepared, directory / name)
            announce(name, processes)
            start(resolved.job, resolved.origins, prepared, processes)
        conclude(request, directory, world)


def verify_grpo(request: Request[VerifyGrpoJob]) -> None:
    world = planned(request)
    if world is None:
        return
    from opensloth.cli.grpo_checks import check_before_data, start_grpo
    from opensloth.rollout.recorded import ASKED

    given = with_rewards(request.resolved)
    check_before_data(given.job, world.processes)
    with place(request.job.output) as directory:
        prepared = prepare_data(request.job, "grpo", directory, world)
        for name, processes in runs(world).items():
            resolved = training_job(given, GrpoJob, prepared, directory / name)
            announce(name, processes)
            replay = None if name == FIRST else str((directory / FIRST).absolute())
            start_grpo(resolved, prepared, processes, {ASKED: json.dumps({"replay": replay})})
        conclude(request, directory, world)


FIRST, OTHER = "one", "several"
ON_THE_CPU, ON_CARDS, IN_16_BITS = 1e-5, 1e-4, 0.02  # tolerances; kernels of cards sum in another order every time


def planned(request: Request[Any]) -> World | None:
    """The processes that are verified; None where a dry run has said all there is to say."""
    job: VerifyJob = request.job
    if under_torchrun():
        raise UserError("os-train verify starts its processes itself.", "Run it without torchrun.")
    processes = 2 if job.processes is None and job.gpus == "auto" else job.processes
    world = plan_world(LaunchOptions(gpus=job.gpus, processes=processes))
    if world.processes == 1:
        raise UserError(
            "One process is compared with several.", "Add --processes 2, or --gpus with more than one card."
        )
    if not request.dry_run:
        return world
    from opensloth.cli.dry_run import show

    plan = {"runs": f"1 process, then {world.processes}, on {', '.join(world.devices)}"}
    show(request.resolved, plan, request.as_json)
    return None


def runs(world: World) -> dict[str, World]:
    """The two runs, by the name of their directory."""
    devices = world.devices[:1]
    return {FIRST: replace(world, devices=devices, processes=1, backend=backend_for(devices)), OTHER: world}


def announce(name: str, world: World) -> None:
    number = "1/2" if name == FIRST else "2/2"
    log.say(f"{number}  training on {world.processes} {'process' if world.processes == 1 else 'processes'}")


@contextmanager
def place(output: Path | None) -> Iterator[Path]:
    """Where both runs lie. Raises UserError where `output` holds something: what is in it would be gone on with."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="opensloth-verify-") as directory:
            yield Path(directory)
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already.", "Name a new directory.")
    yield output


def prepare_data(job: VerifyJob, method: str, directory: Path, world: World) -> "Prepared":
    from opensloth.data.prepared.prepare import prepare

    own: dict[str, Any] = {"method": method, "output": directory / "data", "force": False, "gpus": world.processes}
    shared: dict[str, Any] = part(job, DataJob)
    return prepare(DataJob.model_validate(shared | own))


def with_rewards(resolved: Resolved[VerifyGrpoJob]) -> Resolved[VerifyGrpoJob]:
    """Unless rewards or a task were named, one with a spread: a model that solves nothing has gradients of 0 else."""
    if resolved.job.rewards is not None or resolved.origins["task"] != "default":
        return resolved
    return replace(resolved, job=resolved.job.model_copy(update={"rewards": f"{spread.__file__}:spread"}))


def training_job(resolved: Resolved[Any], kind: type[Job], prepared: "Prepared", output: Path) -> Resolved[Job]:
    """The training's part of the job. The processes' weights are compared at the end, so that both runs get there."""
    shared: dict[str, Any] = part(resolved.job, kind)
    fixed: dict[str, Any] = {"data": prepared.directory, "revision": prepared.manifest.model_revision, "output": output}
    fixed |= {"gpus": "auto", "processes": None, "check_every": 0}
    job = kind.model_validate(shared | fixed)
    return Resolved(job, {name: resolved.origins.get(name, "verify") for name in kind.model_fields})


def conclude(request: Request[Any], directory: Path, world: World) -> None:
    """Print what was found. Raises Unequal where it is beyond the tolerance."""
    from opensloth.evaluation.equality import compare

    found = compare(directory / FIRST, directory / OTHER, world.processes)
    tolerance = tolerance_for(request.job, world)
    faults = found.faults(tolerance)
    if request.as_json:
        print(json.dumps(record(found, tolerance, faults), ensure_ascii=False))
    else:
        for name, text in table(found):
            print(log.printable(f"{name:<22}{text}"))
    if faults:
        kept = f"Both runs are in {directory}." if request.job.output else "--output DIR keeps both runs."
        several = f"{world.processes} processes do not train what one does"
        raise Unequal(f"{several}: {'; '.join(faults)}. The tolerance is {tolerance:g}.", kept)
    if not request.as_json:
        print(f"{world.processes} processes train what one does: no difference is above {tolerance:g}.")


def tolerance_for(job: VerifyJob, world: World) -> float:
    """As asked, or what rounding alone stays below where it computes."""
    if job.tolerance is not None:
        return job.tolerance
    if job.dtype != "float32":  # auto may be either
        return IN_16_BITS
    return ON_CARDS if world.devices[0].startswith("cuda") else ON_THE_CPU


def record(found: "Equality", tolerance: float, faults: list[str]) -> dict[str, Any]:
    """What was found as plain values."""
    return {
        "equal": not faults,
        "faults": faults,
        "tolerance": tolerance,
        "processes": found.processes,
        "steps": found.steps,
        **{name: difference._asdict() for name, difference in found.figures.items()},
        "adapter": found.adapter._asdict() | {"tensors": found.tensors},
        "gradient_norms": found.gradients,
        "processes_with_same_weights": found.same_hash,
        "completions": asdict(found.completions) if found.completions else None,
    }


def table(found: "Equality") -> list[tuple[str, str]]:
    low, high = found.gradients
    lines = [("steps", f"{found.steps}, with gradient norms from {low:.3g} to {high:.3g}")]
    lines += [
        (f"{name.replace('_', ' ')} differs by", f"{one.value:.2g}  ({one.where})")
        for name, one in {**found.figures, "adapter": found.adapter}.items()
    ]
    lines.append(("same weights", f"on {found.same_hash} of {found.processes} processes, to the bit"))
    if found.completions:
        drawn, alike = found.completions.drawn, found.completions.alike
        lines.append(
            ("completions", f"{alike:,} of {drawn:,} were drawn alike; both runs trained on those of the first")
        )
    return lines


SFT_HELP = "SFT on 1 process and on N; by default a small job on a tiny model."
GRPO_HELP = "GRPO on 1 process and on N, with the completions of the first run; by default a small job on a tiny model."
add_command(app, "sft", VerifySftJob, verify_sft, help=SFT_HELP)
add_command(app, "grpo", VerifyGrpoJob, verify_grpo, help=GRPO_HELP)
