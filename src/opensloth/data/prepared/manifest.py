"""manifest.json: what prepared data was made from, with which options, and what came of it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from opensloth import paths
from opensloth.errors import UserError

LAYOUT = 1  # of the directory; raised when older data cannot be read any more
MANIFEST, PLAN, CONTRACT, DROPPED, ROWS = "manifest.json", "plan.parquet", "prompt.json", "dropped.jsonl", "rows"
AGAIN = "Prepare the data again with --force."


class SourceInfo(BaseModel):
    """Where the rows came from. `digest` is of the content, `revision` the resolved commit of a hub data set."""

    model_config = ConfigDict(frozen=True)

    spec: str
    kind: str
    split: str | None
    subset: str | None
    revision: str | None
    digest: str


class Manifest(BaseModel):
    """What manifest.json holds.

    Attributes:
        model: what `--model` named (a directory as an absolute path), `model_revision` the commit of a hub model.
        row_format: the name of the format that the columns were read as.
        options: the data options, as `os-data` takes them.
        digest: of all inputs and options that the rows and the plan follow from, but for the number of shards.
        dropped: rows left out, by reason; `rows_in == rows_kept + sum(dropped.values())`.
        truncated: kept rows that were too long and lost their ends (`--overlong truncate`).
        duplicates: kept rows whose tokens (for GRPO: and answer) another row before them has too.
        packs_per_shard: of the train split. The shards that lack one run an empty pack instead. A prompt for GRPO
            counts as a pack.
        tokens: of all kept rows; for GRPO of the prompts, and `trained_tokens` is 0.
        files: bytes of each file that never changes, by its path in the directory.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    layout: int = LAYOUT
    method: str
    source: SourceInfo
    model: str
    model_revision: str | None
    tokenizer_digest: str
    contract_hash: str
    row_format: str
    options: dict[str, Any]
    code_version: str
    digest: str
    rows_in: int
    rows_kept: int
    dropped: dict[str, int]
    truncated: int = 0
    duplicates: int
    shards: int
    packs_per_shard: int
    tokens: int
    trained_tokens: int
    files: dict[str, int]

    def save(self, directory: Path) -> None:
        paths.write_json(directory / MANIFEST, self.model_dump(mode="json"))


def load_manifest(directory: Path) -> Manifest:
    """Read DIR/manifest.json. Raises UserError where it is missing, damaged or of another layout."""
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such directory.", "Make prepared data with os-data.")
    path = directory / MANIFEST
    content = paths.read_json(path, "a directory of prepared data")
    layout = content.get("layout") if isinstance(content, dict) else None
    if isinstance(layout, int) and layout != LAYOUT:
        raise UserError(f"{directory} has layout {layout}, and this version reads layout {LAYOUT}.", AGAIN)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path} is damaged ({where}: {first['msg']}).", AGAIN) from None


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of the files that are written once, by path; `reshard` replaces the others."""
    fixed = [directory / CONTRACT, directory / DROPPED, *(directory / ROWS).iterdir()]
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(fixed)}


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise UserError, naming the file, where one is missing or has another size than it was written with."""
    for name, size in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing, so {directory} is not complete.", AGAIN)
        if path.stat().st_size != size:
            raise UserError(f"{path} is damaged ({path.stat().st_size:,} bytes instead of {size:,}).", AGAIN)
