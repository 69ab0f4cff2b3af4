"""`--dry-run` of GRPO: prompts, batches, rewards, context, reference and memory. It changes nothing on disk."""

import math
from typing import TYPE_CHECKING, TypeVar

from opensloth.cli import grpo_checks
from opensloth.cli.dry_run import memory_figures, show
from opensloth.cli.dry_run_data import Figures, judge
from opensloth.cli.model_facts import config_of, context_length, local_model, rank_and_alpha
from opensloth.cli.options import Request
from opensloth.config.base import Resolved
from opensloth.config.jobs import DataJob, GrpoJob, TrainGrpoJob
from opensloth.config.run import GrpoOptions
from opensloth.rewards.choose import chosen, in_words
from opensloth.rewards.registry import default_tags

if TYPE_CHECKING:
    from opensloth.data.models.resolve import ModelRef
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.world import World

Options = TypeVar("Options", bound=GrpoOptions)


def plan_grpo(resolved: Resolved[GrpoJob], prepared: "Prepared", world: "World", as_json: bool) -> None:
    from opensloth.data.prepared.summary import summarize

    job = resolved.job
    rewards = grpo_checks.check_data(job, prepared, world.processes)
    figures: Figures = {}
    for name, text in summarize(prepared).lines():  # there may be several reasons under `dropped`
        figures[name] = f"{figures[name]}; {text}" if name in figures else text
    figures |= grpo_checks.batch_figures(job, world.processes)
    figures |= grpo_checks.steps_figure(job, prepared, world.processes)
    figures["rewards"] = in_words(rewards)
    spec = job.model or prepared.manifest.model
    model = local_model(spec, job.revision)
    longest = int(prepared.lengths.max())
    if isinstance(model, str):
        figures["context"] = f"not checked: {model}"
    else:
        figures |= grpo_checks.check_model(job, prepared, model)
    figures |= memory_figures(with_rank(job, model), spec, job.revision, world, longest=longest + job.max_new)
    show(resolved, figures, as_json)


def plan_train_grpo(request: Request[TrainGrpoJob], data: DataJob, world: "World") -> None:
    from opensloth.data.plan.batches import too_few
    from opensloth.data.prepared.prepare import default_output

    job = request.job
    grpo_checks.check_before_data(job, world.processes)
    judged = judge(data)
    rewards = chosen(job, default_tags() if judged.contract is None else judged.contract.tags)
    figures = {**judged.figures, "prepared data": str(data.output or default_output(data))}
    figures |= grpo_checks.batch_figures(job, world.processes)
    if judged.rows:
        if judged.whole and judged.rows < job.prompts_per_step:  # those that are held out are not counted
            raise too_few(data.input, judged.rows, job.prompts_per_step)
        batches = math.ceil(job.epochs * judged.rows / job.prompts_per_step)
        steps = job.max_steps or batches * job.updates_per_batch
        epochs = steps / job.updates_per_batch * job.prompts_per_step / judged.rows
        figures["steps"] = f"about {steps:,}, {epochs:.4g} epochs of {judged.rows:,} prompts"
    figures["rewards"] = in_words(rewards)
    model, longest = local_model(job.model, job.revision), judged.longest or data.max_prompt_len
    if not isinstance(model, str):
        if judged.longest:
            context = context_length(config_of(model, job.trust_remote_code))
            figures["context"] = grpo_checks.check_context(job, longest, context)
        figures |= grpo_checks.model_figures(job, model)
    figures |= memory_figures(with_rank(job, model), job.model, job.revision, world, longest=longest + job.max_new)
    show(request.resolved, figures, request.as_json)


def with_rank(job: Options, model: "ModelRef | str") -> Options:
    """The job with the rank of the adapter that it goes on from, which memory depends on."""
    adapter = None if isinstance(model, str) else rank_and_alpha(model)
    return job if adapter is None else job.model_copy(update={"lora_r": adapter[0]})
