"""`os-data`: source rows to a directory of prepared data.

The directory appears complete or not at all. The same input and options find it and use it again; a change in either
makes it anew. Nothing is ever asked on the terminal.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import opensloth
from opensloth import log, paths
from opensloth.config.data import DataOptions
from opensloth.config.jobs import DataJob, PromptOptions, part
from opensloth.data.messages.examples import NO_MARK, detect_format, parse_mapping
from opensloth.data.models.resolve import ModelRef, load_tokenizer, resolve_model, tokenizer_digest
from opensloth.data.prepared.build import Recipe, build_all
from opensloth.data.prepared.directory import Prepared, open_prepared, plan_for, reshard, write_plan
from opensloth.data.prepared.manifest import CONTRACT, DROPPED, LAYOUT, ROWS, Manifest, SourceInfo, file_sizes
from opensloth.data.prepared.output import check_output, default_output, digest_of, reuse
from opensloth.data.prepared.row_files import RowWriter
from opensloth.data.prompt.choose import contract_for
from opensloth.data.prompt.contract import NO_WORKING, PromptContract
from opensloth.data.sources.open import Source, open_source
from opensloth.data.tokens.prompts import TOO_LONG, check_overlong
from opensloth.errors import UserError
from opensloth.hardware import cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prepared", "default_output", "open_prepared", "prepare", "reshard"]

LINES_NAMED = 3  # of each reason, in the error about bad rows
REASONS_COUNTED = 100  # a template may put words of a row into its reason; the manifest must stay small


def prepare(job: DataJob, check: Callable[[PromptContract], object] = lambda contract: None) -> Prepared:
    """Do what the job says, or find it done.

    Args:
        check: is shown the contract before any row is read, and raises where it is not what comes after can use.
    Raises:
        UserError: a wrong input, model or option, no usable row (or with `strict` any bad row), an output directory
            that holds something else, a full disk.
        WorkerFailed: a worker process died.
    """
    output = (job.output or default_output(job)).expanduser()
    check_output(output, job)
    source = open_source(job.input, split=job.split, subset=job.subset, revision=job.data_revision, samples=job.samples)
    model = resolve_model(job.model, job.revision)
    tokenizer = load_tokenizer(model, job.trust_remote_code)
    recipe = recipe_for(job, source, model, tokenizer)
    check(recipe.contract)
    inputs = describe(job, source, recipe, tokenizer_digest(tokenizer))
    with paths.one_at_a_time(output):  # several runs may start on the same data at once
        if not job.force and (ready := reuse(output, inputs, job.gpus)) is not None:
            return ready
        log.say(f"Rows are read as {recipe.row_format.name}; {template_in_words(recipe.contract, model)}.")
        with paths.new_directory(output) as directory:
            write(directory, job, source, recipe, tokenizer, inputs)
        return open_prepared(output)


def recipe_for(job: DataJob, source: Source, model: ModelRef, tokenizer: "PreTrainedTokenizerBase") -> Recipe:
    """How the job turns the rows of `source` into prepared ones. Raises UserError where that cannot be."""
    grpo = job.method == "grpo"
    if grpo:
        check_overlong(job.overlong)
    row_format = detect_format(source.columns, parse_mapping(list(job.map)), job.method)
    contract = contract_for(
        tokenizer, job.chat_template, job.system, model.adapter, text_only=row_format.name == "text"
    )
    return Recipe(
        model=model,
        trust_remote_code=job.trust_remote_code,
        contract=contract,
        row_format=row_format,
        target_only=job.target_only,
        max_seq_length=job.max_seq_length,
        overlong=job.overlong,
        max_prompt_len=job.max_prompt_len if grpo else None,
    )


def describe(job: DataJob, source: Source, recipe: Recipe, tokenizer: str) -> dict[str, Any]:
    """The manifest's fields that are known before a row is read, and the digest of those that decide the result."""
    fields: dict[str, Any] = {
        "layout": LAYOUT,
        "method": job.method,
        "source": SourceInfo(
            spec=source.spec,
            kind=source.kind,
            split=source.split,
            subset=source.subset,
            revision=source.revision,
            digest=source.digest,
        ).model_dump(),
        "model": model_spec(recipe.model),
        "model_revision": recipe.model.revision,
        "tokenizer_digest": tokenizer,
        "contract_hash": recipe.contract.hash,
        "row_format": recipe.row_format.name,
        "options": {name: value for name, value in job_options(job).items() if name != "workers"},
        "code_version": opensloth.__version__,
    }
    return {**fields, "digest": digest_of(fields)}


def job_options(job: DataJob) -> dict[str, Any]:
    options = {**part(job, DataOptions), "map": list(job.map), "gpus": job.gpus}
    return options if job.method == "sft" else {**options, **part(job, PromptOptions)}


def way_out(dropped: Counter[str]) -> str:
    """What helps against the reason that most rows were dropped for."""
    reason = dropped.most_common(1)[0][0]
    if reason == "too long":
        return "Raise --max-seq-length, or cut them with --overlong truncate."
    if reason == TOO_LONG:
        return "Raise --max-prompt-len."
    if reason == "assistant turn without the contract's tags":
        return "Give working and answer in columns of their own, which get the tags, or choose another --chat-template."
    if reason == NO_MARK:
        return "If answers stand there alone, --map problem=question reads them so."
    if reason == NO_WORKING:
        return "Name the column that has it, --map solution=COLUMN, or prepare problems alone, --method grpo."
    return "docs/data.md tells which rows are read."


def template_in_words(contract: PromptContract, model: ModelRef) -> str:
    """Which template renders the rows; one that nobody chose must not go unsaid."""
    if contract.name == "inferred" and model.adapter is not None and (model.adapter / CONTRACT).is_file():
        return f"prompts follow the prompt.json of {model.name}"
    if contract.name == "inferred":
        return f"prompts follow the chat template of {model.name}'s tokenizer"
    return f"prompts follow the contract {contract.name}"


def model_spec(model: ModelRef) -> str:
    """What finds the model again from another working directory."""
    place = Path(model.spec).expanduser()
    return str(place.absolute()) if place.is_dir() else model.spec


@dataclass
class Tally:
    """What is counted while rows pass by."""

    rows_in: int = 0
    cut: int = 0
    lengths: list[np.ndarray[Any, Any]] = field(default_factory=list)
    trained: list[np.ndarray[Any, Any]] = field(default_factory=list)
    hashes: list[np.ndarray[Any, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, line: int, reason: str) -> None:
        if reason not in self.dropped and len(self.dropped) >= REASONS_COUNTED:
            reason = "other reasons"
        self.dropped[reason] += 1
        lines = self.first_lines.setdefault(reason, [])
        if len(lines) < LINES_NAMED:
            lines.append(line)

    def reasons(self) -> str:
        """`2 x no assistant turn (lines 3, 9); 1 x not JSON (line 4)`, the most frequent first."""
        parts = []
        for reason, count in self.dropped.most_common():
            lines = self.first_lines[reason]
            named = ", ".join(str(line) for line in lines) + (", ..." if count > len(lines) else "")
            parts.append(f"{count:,} x {reason} (line{'s' if count > 1 else ''} {named})")
        return "; ".join(parts)


def write(
    directory: Path,
    job: DataJob,
    source: Source,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict[str, Any],
) -> None:
    """Fill the new directory: rows, dropped rows, contract, plan, and the manifest last."""
    tally = write_rows(directory, job.method, source, recipe, tokenizer, job.workers or cores())
    kept = sum(len(part) for part in tally.lengths)
    if not tally.rows_in:
        raise UserError(f"{source.spec} holds no rows.")
    if not kept:
        message = f"None of the {tally.rows_in:,} rows of {source.spec} can be used: {tally.reasons()}."
        raise UserError(message, way_out(tally.dropped))
    if job.strict and tally.dropped:
        bad = tally.dropped.total()
        message = f"{bad:,} of {tally.rows_in:,} rows of {source.spec} are bad: {tally.reasons()}."
        raise UserError(message, "Mend them, or leave out --strict to drop and count them.")
    recipe.contract.save(directory / CONTRACT)
    lengths, trained = np.concatenate(tally.lengths), np.concatenate(tally.trained)
    shape = write_plan(directory, plan_for(lengths, trained, inputs["options"], job.method), inputs["digest"], job.gpus)
    known: dict[str, Any] = {**inputs, **shape}
    Manifest(
        **known,
        rows_in=tally.rows_in,
        rows_kept=kept,
        dropped=dict(tally.dropped.most_common()),
        truncated=tally.cut,
        duplicates=kept - len(np.unique(np.concatenate(tally.hashes))),
        tokens=int(lengths.sum(dtype=np.int64)),
        trained_tokens=int(trained.sum(dtype=np.int64)),
        files=file_sizes(directory),
    ).save(directory)


def write_rows(
    directory: Path,
    method: str,
    source: Source,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    workers: int,
) -> Tally:
    """Stream the source through the builder into rows/ and dropped.jsonl."""
    tally = Tally()
    with (
        RowWriter(directory / ROWS, method) as writer,
        (directory / DROPPED).open("w", encoding="utf-8") as dropped,
        log.progress("Preparing", source.size, "rows") as report,
    ):
        for built in build_all(source.rows(), recipe, tokenizer, workers):
            tally.rows_in += built.rows_in
            for row in built.dropped:
                reason = log.printable(row.reason)
                tally.drop(row.line, reason)
                dropped.write(json.dumps({"line": row.line, "reason": reason}, ensure_ascii=False) + "\n")
            if len(built.rows.lengths):
                writer.write(built.rows)
                tally.lengths.append(built.rows.lengths)
                tally.trained.append(built.rows.trained)
                tally.hashes.append(built.rows.hashes)
                tally.cut += built.rows.cut
            report(tally.rows_in)
    return tally
