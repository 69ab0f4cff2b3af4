"""What is settled before the first completion of a GRPO run: rewards, batch, context, stop tokens, gold answers.

A mistake in any of them would show only after the model was loaded, or not at all.
"""

import importlib.util
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.cli.model_facts import config_of, context_length, rank_and_alpha
from opensloth.config.base import Resolved, declared
from opensloth.config.jobs import GrpoJob
from opensloth.config.run import GrpoOptions
from opensloth.data.plan.batches import Batches, check_batch, lay_out
from opensloth.errors import UserError
from opensloth.rewards.choose import OF_THE_TRAINER, chosen, content, in_words
from opensloth.rewards.gold import FAILURES, gold_check
from opensloth.rewards.registry import TOP, WeightedReward, default_tags
from opensloth.rewards.watch import check_columns

if TYPE_CHECKING:
    from opensloth.data.models.resolve import ModelRef
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.run_directory import Result
    from opensloth.launch.world import World

NAMED = 5  # row ids in a line for people

Figures = dict[str, str]


def start_grpo(
    resolved: Resolved[GrpoJob], prepared: "Prepared", world: "World", more: Mapping[str, str] = MappingProxyType({})
) -> "Result":
    """Check the job, say what it will do, and train. Raises as `check_data`, `check_model` and `start`.

    Args:
        more: other files that the run directory holds before the workers start, with their text.
    """
    from opensloth.data.models.resolve import resolve_model
    from opensloth.launch.run_directory import start

    job = resolved.job
    rewards = check_data(job, prepared, world.processes)
    ref = resolve_model(job.model or prepared.manifest.model, job.revision)
    notes = {"rewards": in_words(rewards)} | check_model(job, prepared, ref)
    contents = {"rewards": content(job, rewards)}
    files: dict[str, Callable[[], str]] = {FAILURES: lambda: gold_failures(job, prepared, rewards)}
    files |= {name: partial(str, text) for name, text in more.items()}
    return start(job, resolved.origins, prepared, world, contents=contents, files=files, notes=notes)


def check_before_data(job: GrpoOptions, processes: int) -> None:
    """What can be known before the data is prepared, which may take hours: batch, rewards and their files, vLLM."""
    check_batch(job, processes)
    check_rollout(job)
    chosen(job, default_tags())  # whether the data's prompts have tags shows when it is there


def check_rollout(job: GrpoOptions) -> None:
    """Raises UserError where completions are to come from a package that is not installed."""
    if job.rollout == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--rollout vllm: vllm is not installed.",
            'Install it: pip install "openslothai[vllm]"; or use --rollout auto.',
        )


def batch_figures(job: GrpoOptions, processes: int) -> Figures:
    """The arithmetic of a batch."""
    prompts, group, updates = job.prompts_per_step, job.group_size, job.updates_per_batch
    completions = prompts * group
    text = f"{prompts} prompts x {group} completions = {completions:,} completions"
    if processes > 1:
        text += f", {completions // processes:,} on each of {processes} processes"
    if updates > 1:
        text += f"; {updates} optimizer steps on each batch"
    return {"a batch": text}


def steps_figure(job: GrpoJob, prepared: "Prepared", processes: int) -> Figures:
    """Optimizer steps and epochs."""
    plan = batches_of(job, prepared, processes)
    rows = int((~prepared.is_eval).sum())
    return {"steps": f"{plan.steps:,}, {plan.epoch[-1]:.4g} epochs of {rows:,} prompts"}


def batches_of(job: GrpoJob, prepared: "Prepared", processes: int, left_out: Collection[int] = ()) -> Batches:
    """All batches of the run. Raises UserError where there are too few rows for one."""
    seed = job.seed if job.seed is not None else int(prepared.manifest.options["seed"])
    return lay_out(prepared, job, seed=seed, processes=processes, left_out=left_out)


def check_data(job: GrpoJob, prepared: "Prepared", processes: int) -> list[WeightedReward]:
    """The rewards of a job. Raises UserError where they, or the batch, do not fit the data."""
    rewards = chosen(job, prepared.contract.tags)
    check_batch(job, processes)
    check_rollout(job)
    batches_of(job, prepared, processes)
    columns = {*OF_THE_TRAINER, "answer", "row_id", *prepared.rows.prompt_columns()}
    for reward in rewards:
        if reward.name not in TOP:
            check_columns(reward.function, columns)
    return rewards


def check_model(job: GrpoJob, prepared: "Prepared", ref: "ModelRef") -> Figures:
    """Context, adapter and reference in words. Raises UserError where prompts or stop tokens do not fit the model."""
    from opensloth.data.models.resolve import load_tokenizer
    from opensloth.data.tokens.stop import stop_ids

    longest = int(prepared.lengths.max())
    figures = {"context": check_context(job, longest, context_length(config_of(ref, job.trust_remote_code)))}
    if job.stop:
        stop_ids(load_tokenizer(ref, job.trust_remote_code), prepared.contract, job.stop)
    return figures | model_figures(job, ref)


def check_context(job: GrpoOptions, longest: int, context: int | None) -> str:
    """The arithmetic of prompt and completion in words. Raises UserError where they are longer than the context."""
    total = longest + job.max_new
    text = f"longest prompt {longest:,} + --max-new {job.max_new:,} = {total:,} tokens"
    if context is None:
        return f"{text}; the model names no limit"
    if total > context:
        room = context - longest
        lower = f"Lower --max-new to {room:,}, or prepare" if room > 0 else "Prepare"
        raise UserError(
            f"{text}, and the model's context is {context:,}.",
            f"{lower} the data with a smaller --max-prompt-len.",
        )
    return f"{text}, of {context:,}"


def model_figures(job: GrpoOptions, ref: "ModelRef") -> Figures:
    """What trains, and what the KL divergence is measured from."""
    figures: Figures = {}
    if (adapter := rank_and_alpha(ref)) is not None:
        figures["adapter"] = f"goes on from {ref.adapter}: r {adapter[0]}, alpha {adapter[1]:g}"
        own = dict(zip(("lora_r", "lora_alpha"), adapter, strict=True))
        given = [
            item for item in declared(GrpoOptions) if item.name in own and getattr(job, item.name) != own[item.name]
        ]
        asked = [item for item in given if getattr(job, item.name) != item.info.default]
        figures["adapter"] += "".join(f"; {item.flag} {getattr(job, item.name)} is not used" for item in asked)
        reference = f"that adapter as it is now, frozen ({ref.adapter})"
    elif job.full_finetuning:
        figures["adapter"], reference = "none: all weights train", f"a frozen copy of {ref.base}"
    else:
        figures["adapter"] = f"new: r {job.lora_r}, alpha {job.lora_alpha}"
        reference = f"the base model {ref.base}, without the new adapter"
    figures["reference"] = f"the KL divergence is measured from {reference}" if job.beta else "none (--beta 0)"
    return figures


def gold_failures(job: GrpoJob, prepared: "Prepared", rewards: list[WeightedReward]) -> str:
    """The rows whose own answer the rewards misjudge, as the lines of gold_failures.jsonl; people are told.

    Raises UserError where no row is left, or too few for a batch.
    """
    count = len(prepared.rows)
    names = [reward.name for reward in rewards]

    with log.progress("Checking the gold answers", count, "rows") as progress:

        def rows() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(prepared.rows.answers(), 1):
                yield row
                progress(number)

        failures = gold_check(rows(), rewards=names, tags=prepared.contract.tags)
    first = "; ".join(f"row {one.row}: {one.answer!r}, {one.reason}" for one in failures[:2])
    if failures and len(failures) == count:
        raise UserError(
            f"The rewards know none of the {count:,} gold answers as right ({first}).",
            "Name the column of the answers when the data is prepared: --map answer=COLUMN.",
        )
    if failures:
        ids = ", ".join(str(one.row) for one in failures[:NAMED]) + (", ..." if len(failures) > NAMED else "")
        log.warn(
            f"{len(failures):,} of {count:,} rows have a gold answer that the rewards misjudge and are left out "
            f"(rows {ids}); {FAILURES} in the run directory says why"
        )
        batches_of(job, prepared, 1, left_out=[one.row for one in failures])
    lines = [{"row_id": one.row, "answer": one.answer, "reason": one.reason} for one in failures]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
