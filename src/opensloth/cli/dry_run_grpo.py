"""`--dry-run` of GRPO: prompts, batches, rewards, context, reference and memory. It changes nothing on disk."""

import math
from typing import TYPE_CHECKING

from opensloth.cli import grpo_checks
from opensloth.cli.dry_run import Figures, data_figures, local_model, memory_figures, show
from opensloth.cli.model_facts import config_of, context_length, rank_and_alpha
from opensloth.cli.options import Request
from opensloth.config.base import Resolved
from opensloth.config.jobs import DataJob, GrpoJob, TrainGrpoJob
from opensloth.rewards.choose import chosen, in_words
from opensloth.rewards.registry import default_tags

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.world import World


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
    model = local_model(job.model or prepared.manifest.model, job.revision)
    longest = int(prepared.lengths.max())
    if isinstance(model, str):
        figures["context"] = f"not checked: {model}"
    else:
        figures |= grpo_checks.check_model(job, prepared, model)
        if (adapter := rank_and_alpha(model)) is not None:
            job = job.model_copy(update={"lora_r": adapter[0]})
    spec = job.model or prepared.manifest.model
    figures |= memory_figures(job, spec, job.revision, world, longest=longest + job.max_new)
    show(resolved, figures, as_json)


def plan_train_grpo(request: Request[TrainGrpoJob], data: DataJob, world: "World") -> None:
    from opensloth.data.prepared.prepare import default_output

    job = request.job
    grpo_checks.check_batch(job, world.processes)
    rewards = chosen(job, default_tags())
    figures, rows, _ = data_figures(data)
    figures["prepared data"] = str(data.output or default_output(data))
    figures |= grpo_checks.batch_figures(job, world.processes)
    if rows:
        steps = job.max_steps or math.ceil(job.epochs * rows / job.prompts_per_step) * job.updates_per_batch
        epochs = steps / job.updates_per_batch * job.prompts_per_step / rows
        figures["steps"] = f"about {steps:,}, {epochs:.4g} epochs of {rows:,} prompts"
    figures["rewards"] = in_words(rewards)
    model = local_model(job.model, job.revision)
    if not isinstance(model, str):
        context = context_length(config_of(model, job.trust_remote_code))
        figures["context"] = grpo_checks.check_context(job, data.max_prompt_len, context)
        figures |= grpo_checks.model_figures(job, model)
    figures |= memory_figures(job, job.model, job.revision, world, longest=data.max_prompt_len + job.max_new)
    show(request.resolved, figures, request.as_json)
