"""What os-sft and os-grpo do alike before they train: open the data, and hold the settings to it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opensloth.cli.options import Request
from opensloth.config.base import Resolved, read_config, resolve
from opensloth.config.jobs import DataJob, RunJob
from opensloth.errors import UserError

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared

Job = TypeVar("Job", bound=RunJob)
ELSEWHERE = "That is settled when the data is prepared: give it to os-data."


def open_for(request: Request[Job], method: str) -> tuple[Resolved[Job], "Prepared"]:
    """The data of a job, and the job with what the data fixes.

    Raises UserError where the data was prepared for another method, or contradicts the config file or the model.
    """
    from opensloth.data.prepared.directory import open_prepared

    prepared = open_prepared(request.job.data)
    check_method(prepared, method)
    if request.config is not None:
        check_config(type(request.job), prepared, request.config)
    return with_data_settings(request.resolved, prepared), prepared


def check_method(prepared: "Prepared", method: str) -> None:
    if prepared.manifest.method != method:
        raise UserError(
            f"{prepared.directory} was prepared with --method {prepared.manifest.method}, not --method {method}.",
            f"Use os-{prepared.manifest.method}, or prepare the data anew.",
        )


def check_config(training: type[RunJob], prepared: "Prepared", config: Path) -> None:
    """A data setting in the config file must be the one that the data was prepared with. Raises UserError else."""
    manifest = prepared.manifest
    others = {"input": "-", "model": "-", "gpus": 1}  # what the file says of these is not the data's business here
    job = resolve(DataJob, others, config, training.model_fields).job.model_dump(mode="json")
    for name, value in read_config(config).items():
        if name not in manifest.options or name in training.model_fields:
            continue
        given, fixed = job[name], manifest.options[name]
        if given != fixed:
            raise UserError(
                f"{config}: {name} {value} contradicts {prepared.directory}, which was prepared with {name} {fixed}.",
                "Change the file, or prepare the data again with os-data.",
            )


def with_data_settings(resolved: Resolved[Job], prepared: "Prepared") -> Resolved[Job]:
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


def check_tokenizer(job: RunJob, prepared: "Prepared") -> None:
    """Another model may be trained on the data if it reads the same tokens, and an adapter if it was trained so too."""
    from opensloth.data.models.resolve import load_tokenizer, resolve_model, tokenizer_digest
    from opensloth.data.prompt.choose import CONTRACT_FILE, PromptContract, check_same

    manifest = prepared.manifest
    ref = resolve_model(str(job.model), job.revision)
    tokenizer = load_tokenizer(ref, job.trust_remote_code)
    if tokenizer_digest(tokenizer) != manifest.tokenizer_digest:
        method = "" if manifest.method == "sft" else f" --method {manifest.method}"
        raise UserError(
            f"--model {job.model} reads other tokens than {manifest.model}, the model of {prepared.directory}.",
            f"Prepare the data for it: os-data {manifest.source.spec} --model {job.model}{method}",
        )
    if ref.adapter is not None and (ref.adapter / CONTRACT_FILE).is_file():
        check_same(PromptContract.load(ref.adapter / CONTRACT_FILE), prepared.contract, tokenizer)
