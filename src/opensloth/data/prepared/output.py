"""Where prepared data goes, and whether what lies there can be used again or replaced."""

import re
from pathlib import Path
from typing import Any

from opensloth import log, paths
from opensloth.config.jobs import DataJob
from opensloth.data.prepared.directory import Prepared, open_prepared, reshard
from opensloth.data.prepared.manifest import MANIFEST, PLAN, ROWS, Manifest, load_manifest
from opensloth.errors import UserError

NOT_IN_DIGEST = {"gpus", "workers"}  # another number of shards is a new plan only; workers change nothing


def default_output(job: DataJob) -> Path:
    """data/<method>-<data>-<hash>: the same job always finds its own directory. Reads nothing."""
    other = {"max_prompt_len"} if job.method == "sft" else set()
    options = job.model_dump(mode="json", exclude=NOT_IN_DIGEST | {"output", "force"} | other)
    name = Path(job.input).name.removeprefix("sample:")
    name = re.sub(r"\.(jsonl|json|csv|parquet)(\.(gz|zst))?$", "", name)
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"
    return Path("data") / f"{job.method}-{name}-{paths.digest(options)[:8]}"


def digest_of(fields: dict[str, Any]) -> str:
    """The digest of what decides the rows and their order: content and options, not names, workers or shards."""
    source = {key: value for key, value in fields["source"].items() if key != "spec"}
    options = {key: value for key, value in fields["options"].items() if key not in NOT_IN_DIGEST}
    return paths.digest({**fields, "source": source, "options": options})


def check_output(output: Path, job: DataJob) -> None:
    """Raise UserError, before long work, where `output` cannot be written or holds anything but prepared data."""
    here = output.absolute()
    places = [Path.cwd(), Path.home(), Path(job.input).expanduser().absolute()]
    if any(here == place or here in place.parents for place in places):
        raise UserError(f"--output {output} would replace your own files.", "Name a directory for the prepared data.")
    paths.check_writable(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not any((output / part).exists() for part in (MANIFEST, PLAN, ROWS)):  # damaged data may lack one
        raise UserError(f"{output} holds something that is not prepared data.", "Choose another --output.")
    if not job.force:
        load_manifest(output)


def reuse(output: Path, inputs: dict[str, Any], shards: int) -> Prepared | None:
    """The data in `output`, if it was prepared from the same inputs, re-planned where only the shards differ.

    `inputs` are the manifest's fields that are known before preparing. Says why where the data cannot be used.
    """
    if not (output / MANIFEST).is_file():
        return None
    manifest = load_manifest(output)
    if manifest.digest != inputs["digest"]:
        log.say(f"{output} is prepared again, for what changed: {difference(manifest, inputs)}.")
        return None
    try:
        prepared = open_prepared(output)
    except UserError as error:
        log.warn(f"{error.message} Preparing it again.")
        return None
    if prepared.manifest.shards != shards:
        log.say(f"{output} is already prepared; planning it for {shards} shards instead of {prepared.manifest.shards}.")
        return reshard(output, shards)
    log.say(f"{output} is already prepared from the same input with the same options.")
    return prepared


def difference(manifest: Manifest, inputs: dict[str, Any]) -> str:
    """The names of what changed between a manifest and the inputs of now."""
    before = {**manifest.model_dump(include=set(inputs)), **manifest.options}
    now = {**inputs, **inputs["options"]}
    before["source"], now["source"] = before["source"]["digest"], now["source"]["digest"]
    skipped = NOT_IN_DIGEST | {"options", "digest"}
    changed = [name for name in {**now, **before} if name not in skipped and before.get(name) != now.get(name)]
    return ", ".join(name.replace("_", " ") for name in changed) or "source"
