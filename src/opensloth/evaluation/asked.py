"""What is settled before any model is loaded: who is asked what, and how. What is not there is told without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opensloth import log
from opensloth.config.jobs import EvalJob
from opensloth.data.messages.examples import BadRow, Example, detect_format, parse_mapping
from opensloth.data.models.resolve import ModelRef, load_tokenizer, resolve_model
from opensloth.data.prepared.prepare import Tally, way_out
from opensloth.data.prompt.choose import CONTRACT_FILE, contract_for
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.sources.open import open_source
from opensloth.errors import UserError


class Asked(NamedTuple):
    """Who is asked what, and how."""

    refs: list[ModelRef]
    contract: PromptContract
    problems: list[Example]


def asked(job: EvalJob) -> Asked:
    """Raises UserError: an input without answers, a model that is not there, a contract without tags."""
    problems = read_problems(job)
    refs = [resolve_model(model) for model in job.model]
    contract = contract_of(job, refs)
    if contract.tags is None:
        raise UserError(
            f"--task {job.task} finds answers between tags, and the prompts of {refs[0].name} ask for none.",
            "Evaluate an adapter that was trained with --chat-template reasoning, or give that option.",
        )
    return Asked(refs, contract, problems)


def read_problems(job: EvalJob) -> list[Example]:
    """The rows of the input that have an answer. Bad rows are left out, and counted in one line."""
    split = job.split or ("test" if job.input.startswith("sample:") else "train")
    source = open_source(job.input, split=split, subset=job.subset, revision=job.data_revision, samples=job.samples)
    row_format = detect_format(source.columns, parse_mapping(list(job.map)), method="grpo")
    problems, tally = [], Tally()
    for row in source.rows():
        tally.rows_in += 1
        try:
            example = row_format.example(row.value) if row.value is not None else None
            why = "no answer" if example is None or example.answer is None else ""
        except BadRow as error:
            example, why = None, str(error)
        why = row.problem or why
        if why:
            tally.drop(row.line, why)
        elif example is not None:
            problems.append(example)
    if not problems:
        raise UserError(f"{job.input} holds no problem with an answer: {tally.reasons()}.", way_out(tally.dropped))
    if bad := tally.dropped.total():
        log.warn(f"{bad:,} rows of {job.input} hold no problem with an answer; they are left out.")
    return problems


def contract_of(job: EvalJob, refs: Sequence[ModelRef]) -> PromptContract:
    """One contract for all: as asked, else that of the first model that brings one, else the first model's template."""
    first = refs[0]
    if job.chat_template == "auto":
        first = next((ref for ref in refs if brings_contract(ref)), first)
    tokenizer = load_tokenizer(first, job.trust_remote_code)
    return contract_for(tokenizer, job.chat_template, job.system, first.adapter)


def brings_contract(ref: ModelRef) -> bool:
    places = [place for place in (ref.adapter, Path(ref.base)) if place is not None]
    return any((place / CONTRACT_FILE).is_file() for place in places)
