"""Several models on the same problems, under the same prompts: what `os-eval` and the demo do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opensloth import log
from opensloth.config.jobs import EvalJob
from opensloth.data.messages.examples import BadRow, Example, detect_format, parse_mapping
from opensloth.data.models.resolve import ModelRef, load_tokenizer, resolve_model
from opensloth.data.prepared.prepare import Tally, way_out
from opensloth.data.prompt.choose import CONTRACT_FILE, contract_for
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.sources.open import open_source
from opensloth.engine import choose
from opensloth.errors import UserError, WorkerFailed
from opensloth.evaluation.generate import complete, load_for_inference
from opensloth.evaluation.score import Interval, Judged, judge, paired_difference, pass_at, share


@dataclass(frozen=True)
class Report:
    """One model's answers: a greedy one to each problem, and `group_size` sampled ones where pass@K was asked for."""

    model: str
    greedy: list[Judged]
    sampled: list[list[Judged]]

    @property
    def pass_at_1(self) -> Interval:
        return share([one.right for one in self.greedy])

    @property
    def pass_at_k(self) -> float | None:
        return (
            pass_at(len(self.sampled[0]), [[o.right for o in group] for group in self.sampled])
            if self.sampled
            else None
        )

    @property
    def format_rate(self) -> float:
        return sum(one.in_format for one in self.greedy) / len(self.greedy)

    @property
    def mean_tokens(self) -> float:
        return sum(one.tokens for one in self.greedy) / len(self.greedy)

    def against(self, first: "Report") -> Interval:
        return paired_difference([one.right for one in first.greedy], [one.right for one in self.greedy])


@dataclass(frozen=True)
class Comparison:
    problems: list[Example]
    contract: PromptContract
    reports: list[Report]


class Asked(NamedTuple):
    """Who is asked what, and how."""

    refs: list[ModelRef]
    contract: PromptContract
    problems: list[Example]


def asked(job: EvalJob) -> Asked:
    """What is settled before any model is loaded.

    Raises UserError: an input without answers, a contract without tags, a model that is not there.
    """
    problems = read_problems(job)
    refs = [resolve_model(model) for model in job.model]
    contract = contract_of(job, refs)
    if contract.tags is None:
        raise UserError(
            f"--task {job.task} finds answers between tags, and the prompts of {refs[0].name} ask for none.",
            "Evaluate an adapter that was trained with --chat-template reasoning, or give that option.",
        )
    return Asked(refs, contract, problems)


def compare(job: EvalJob) -> Comparison:
    """Let every model answer every problem.

    Raises:
        UserError: as `asked`; a model that cannot be loaded.
        WorkerFailed: a model whose logits are not numbers.
    """
    refs, contract, problems = asked(job)
    return Comparison(problems, contract, [report(job, ref, contract, problems) for ref in refs])


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


def report(job: EvalJob, ref: ModelRef, contract: PromptContract, problems: Sequence[Example]) -> Report:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or choose.cpu_has_bfloat16() else torch.float32
    model = load_for_inference(ref, device, dtype, job.trust_remote_code)
    tokenizer = load_tokenizer(ref, job.trust_remote_code)
    conversations = [contract.prompt_messages(example) for example in problems]

    def answers(title: str, asked: Sequence[Any], golds: Sequence[str], temperature: float) -> list[Judged]:
        with log.progress(f"{title} of {ref.name}", len(asked), "answers") as progress:
            try:
                written = complete(
                    model, tokenizer, contract, asked,
                    max_new=job.max_new, temperature=temperature, seed=job.seed, done=progress,
                )  # fmt: skip
            except FloatingPointError as error:
                raise WorkerFailed(
                    f"{ref.spec} cannot be scored: {error}.",
                    "Look for the step at which its training went wrong; an earlier checkpoint may be sound.",
                ) from error
        return [judge(contract, one, gold) for one, gold in zip(written, golds, strict=True)]

    golds = [example.answer or "" for example in problems]
    greedy = answers("answers", conversations, golds, 0.0)
    sampled: list[list[Judged]] = []
    if job.group_size > 1:
        size = job.group_size
        many = [messages for messages in conversations for _ in range(size)]
        flat = answers("samples", many, [gold for gold in golds for _ in range(size)], job.temperature)
        sampled = [flat[start : start + size] for start in range(0, len(flat), size)]
    return Report(ref.spec, greedy, sampled)
