"""Prepared data as training sees it: a checked directory, its rows, and the plan of packs and shards over them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opensloth.data.plan.shards import make_plan
from opensloth.data.prepared.manifest import AGAIN, CONTRACT, PLAN, ROWS, Manifest, check_files, load_manifest
from opensloth.data.prepared.row_files import Rows
from opensloth.data.prompt.contract import PromptContract
from opensloth.errors import UserError

PLAN_COLUMNS = ("position", "row", "length", "trained", "pack", "shard", "split")
METADATA = b"opensloth"


@dataclass(frozen=True)
class Prepared:
    """An open directory of prepared data.

    Attributes:
        rows: the rows, memory-mapped: `rows.row(i)` for SFT, `rows.prompt(i)` for GRPO.
        plan: the columns of plan.parquet by name, in the global order; `split` is "train" or "eval".
        lengths, trained: tokens and trained tokens of each row, by its index in `rows`. Of a prompt none is trained.
        is_eval: whether a row belongs to the eval split, by its index in `rows`.
    """

    directory: Path
    manifest: Manifest
    contract: PromptContract
    rows: Rows
    plan: dict[str, NDArray[Any]]
    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]
    is_eval: NDArray[np.bool_]


def open_prepared(directory: Path) -> Prepared:
    """Open what `os-data` left. Raises UserError, naming the file, where something is missing or damaged."""
    manifest = load_manifest(directory)
    check_files(directory, manifest)
    contract = PromptContract.load(directory / CONTRACT)
    if contract.hash != manifest.contract_hash:
        raise UserError(f"{directory / CONTRACT} is not the prompt contract that the rows were rendered with.", AGAIN)
    rows = Rows(directory / ROWS, manifest.method)
    plan, shape = read_plan(directory, manifest)
    if len(rows) != manifest.rows_kept:
        raise UserError(f"{rows.path} holds {len(rows):,} rows instead of {manifest.rows_kept:,}.", AGAIN)
    by_row = np.argsort(plan["row"])
    return Prepared(
        directory=directory,
        manifest=manifest.model_copy(update=shape),  # the plan is written first, so after a crash it is the newer one
        contract=contract,
        rows=rows,
        plan=plan,
        lengths=plan["length"][by_row].astype(np.int64),
        trained=plan["trained"][by_row].astype(np.int64),
        is_eval=(plan["split"] == "eval")[by_row],
    )


def reshard(directory: Path, shards: int) -> Prepared:
    """Plan the same rows for another number of shards. Reads no tokens; the order and the eval split stay.

    Raises UserError where the directory is damaged or has fewer training rows than `shards`.
    """
    prepared = open_prepared(directory)
    if prepared.manifest.shards == shards:
        return prepared
    options = {**prepared.manifest.options, "gpus": shards}
    table = plan_for(prepared.lengths, prepared.trained, options, prepared.manifest.method)
    shape = write_plan(directory, table, prepared.manifest.digest, shards)
    prepared.manifest.model_copy(update={**shape, "options": options}).save(directory)
    return open_prepared(directory)


def plan_for(
    lengths: NDArray[np.integer], trained: NDArray[np.integer], options: dict[str, Any], method: str = "sft"
) -> pa.Table:
    """The plan that the data options ask for (see shards.make_plan). Each prompt for GRPO is a pack of its own."""
    return make_plan(
        lengths,
        trained,
        seed=options["seed"],
        max_seq_length=options["max_seq_length"],
        packing=options["packing"] and method == "sft",
        shards=options["gpus"],
        eval_fraction=options["eval_fraction"],
    )


def write_plan(directory: Path, table: pa.Table, digest: str, shards: int) -> dict[str, int]:
    """Write plan.parquet in one step, and return what the manifest says of it."""
    training = table.filter(pa.compute.equal(table["split"].cast(pa.string()), "train"))
    per_shard = training.group_by("shard").aggregate([("pack", "count_distinct")])["pack_count_distinct"]
    shape = {"shards": shards, "packs_per_shard": max(per_shard.to_pylist())}
    temporary = directory / f".{PLAN}.{os.getpid()}"
    try:
        described = table.replace_schema_metadata({METADATA: json.dumps({"digest": digest, **shape})})
        pq.write_table(described, temporary)
        os.replace(temporary, directory / PLAN)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"Cannot write {directory / PLAN}: {reason}.", "Free space or check its permissions."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return shape


def read_plan(directory: Path, manifest: Manifest) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """The plan's columns, and the manifest's fields that describe it. Raises UserError where it is damaged."""
    path = directory / PLAN
    if not path.is_file():
        raise UserError(f"{path} is missing, so {directory} is not complete.", AGAIN)
    try:
        table = pq.read_table(path, columns=list(PLAN_COLUMNS))
        shape = json.loads((table.schema.metadata or {})[METADATA])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}).", AGAIN) from None
    if shape.pop("digest") != manifest.digest:
        raise UserError(f"{path} belongs to other data than {directory}.", AGAIN)
    numbers = {name: table[name].to_numpy() for name in PLAN_COLUMNS if name != "split"}
    if not np.array_equal(np.sort(numbers["row"]), np.arange(manifest.rows_kept)):
        raise UserError(f"{path} is damaged (it does not hold each of {manifest.rows_kept:,} rows once).", AGAIN)
    return {**numbers, "split": table["split"].cast(pa.string()).to_numpy().astype("U5")}, shape
