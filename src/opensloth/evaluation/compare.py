"""Several models on the same problems, under the same prompts: what `os-eval` and the demo do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opensloth import log
from opensloth.config.jobs import EvalJob
from opensloth.data.messages.examples import Example
from opensloth.data.models.resolve import ModelRef, load_tokenizer
from opensloth.data.prompt.contract import PromptContract
from opensloth.engine import choose
from opensloth.errors import WorkerFailed
from opensloth.evaluation.asked import Asked
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


def compare(job: EvalJob, what: Asked) -> Comparison:
    """Let every model answer every problem.

    Raises:
        UserError: a model that cannot be loaded.
        WorkerFailed: a model whose logits are not numbers.
    """
    reports = [report(job, ref, what.contract, what.problems) for ref in what.refs]
    return Comparison(what.problems, what.contract, reports)


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
