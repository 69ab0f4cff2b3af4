"""`os-sft DIR`: train an adapter on prepared data."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.cli.options import Request, add_command, elsewhere, new_app
from opensloth.cli.program import run
from opensloth.config.base import Resolved, read_config, resolve
from opensloth.config.jobs import DataJob, SftJob
from opensloth.errors import UserError
from opensloth.launch.world import plan_world, speaks

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.run_directory import Result

HELP = "Train an adapter on prepared data (the directory that os-data left)."
METHOD = "sft"
app = new_app(HELP)


def sft(request: Request[SftJob]) -> None:
    from opensloth.data.prepared.directory import open_prepared

    prepared = open_prepared(request.job.data)
    check_method(prepared)
    if request.config is not None:
        check_config(prepared, request.config)
    resolved = with_data_settings(request.resolved, prepared)
    world = plan_world(resolved.job)
    if request.dry_run:
        from opensloth.cli.dry_run import plan_sft

        plan_sft(resolved, prepared, world, request.as_json)
        return
    from opensloth.launch.run_directory import start

    report(start(resolved.job, resolved.origins, prepared, world), request.as_json)


add_command(app, "sft", SftJob, sft, help=HELP, beside=DataJob)


def check_method(prepared: "Prepared") -> None:
    if prepared.manifest.method != METHOD:
        raise UserError(
            f"{prepared.directory} was prepared with --method {prepared.manifest.method}, not --method {METHOD}.",
            f"Use os-{prepared.manifest.method}, or prepare the data anew.",
        )


def check_config(prepared: "Prepared", config: Path) -> None:
    """A data setting in the config file must be the one that the data was prepared with. Raises UserError else."""
    manifest = prepared.manifest
    others = {"input": "-", "model": "-", "gpus": 1}  # what the file says of these is not the data's business here
    job = resolve(DataJob, others, config, SftJob.model_fields).job.model_dump(mode="json")
    for name, value in read_config(config).items():
        if name not in manifest.options or name in SftJob.model_fields:
            continue
        given, fixed = job[name], manifest.options[name]
        if given != fixed:
            raise UserError(
                f"{config}: {name} {value} contradicts {prepared.directory}, which was prepared with {name} {fixed}.",
                "Change the file, or prepare the data again with os-data.",
            )


def with_data_settings(resolved: Resolved[SftJob], prepared: "Prepared") -> Resolved[SftJob]:
    """Fill in what the data fixes, its model and seed, unless others were named.

    Raises UserError where the named model reads other tokens.
    """
    job, manifest = resolved.job, prepared.manifest
    fixed: dict[str, Any] = {}
    if job.model is None:
        fixed["model"] = manifest.model
        if job.revision is None and manifest.model_revision is not None:
            fixed["revision"] = manifest.model_revision
    elif job.model != manifest.model:
        check_tokenizer(job, prepared)
    if job.seed is None:
        fixed["seed"] = manifest.options["seed"]
    origins = resolved.origins | dict.fromkeys(fixed, "data")
    return Resolved(job.model_copy(update=fixed), origins)


def check_tokenizer(job: SftJob, prepared: "Prepared") -> None:
    """Another model may be trained on the data if it reads the same tokens, and an adapter if it was trained so too."""
    from opensloth.data.models.resolve import load_tokenizer, resolve_model, tokenizer_digest
    from opensloth.data.prompt.choose import CONTRACT_FILE, PromptContract, check_same

    manifest = prepared.manifest
    ref = resolve_model(str(job.model), job.revision)
    tokenizer = load_tokenizer(ref, job.trust_remote_code)
    if tokenizer_digest(tokenizer) != manifest.tokenizer_digest:
        raise UserError(
            f"--model {job.model} reads other tokens than {manifest.model}, the model of {prepared.directory}.",
            f"Prepare the data for it: os-data {manifest.source.spec} --model {job.model}",
        )
    if ref.adapter is not None and (ref.adapter / CONTRACT_FILE).is_file():
        check_same(PromptContract.load(ref.adapter / CONTRACT_FILE), prepared.contract, tokenizer)


def report(result: "Result", as_json: bool) -> None:
    """Print where the adapter is, and the last figures of the run; once, however many processes torchrun started."""
    if not speaks():
        return
    if as_json:
        record = {"output": str(result.output), "status": result.status, "metrics": result.metrics}
        print(json.dumps(record, ensure_ascii=False))
        return
    lines = [(result.status, str(result.output))]
    lines += [(name.replace("_", " "), figure(value)) for name, value in result.metrics.items() if value is not None]
    if (board := result.output / "tensorboard").is_dir():
        lines.append(("watch it", f"tensorboard --logdir {shlex.quote(str(board))}"))
    for name, text in lines:
        print(log.printable(f"{name:<18}{text}"))


def figure(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    hint = "That is settled when the data is prepared: give it to os-data."
    sys.exit(run(app, elsewhere=elsewhere(SftJob, DataJob, hint)))


if __name__ == "__main__":
    main()
