"""`--dry-run`: the resolved job, its batch arithmetic, and the memory and disk it needs. It changes nothing on disk.

Here are os-data, SFT, and what all dry runs share. Prepared data is counted exactly.
"""

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opensloth import log, paths
from opensloth.cli.dry_run_data import Figures, judge, size
from opensloth.cli.model_facts import config_of, local_model, without_weights
from opensloth.cli.options import Request
from opensloth.config.base import Resolved, Settings
from opensloth.config.jobs import DataJob, SftJob, TrainSftJob
from opensloth.config.run import SEVEN_LINEARS, SftOptions, TrainOptions
from opensloth.errors import UserError
from opensloth.launch.world import speaks

if TYPE_CHECKING:
    import torch

    from opensloth.data.models.resolve import ModelRef
    from opensloth.data.prepared.directory import Prepared
    from opensloth.engine.memory import Means
    from opensloth.launch.world import World


def plan_data(request: Request[DataJob]) -> None:
    from opensloth.data.prepared.prepare import default_output

    job = request.job
    show(request.resolved, {**judge(job).figures, "output": str(job.output or default_output(job))}, request.as_json)


def plan_train_sft(request: Request[TrainSftJob], data: DataJob, world: "World") -> None:
    from opensloth.data.prepared.prepare import default_output

    judged = judge(data)
    figures = {**judged.figures, "prepared data": str(data.output or default_output(data))}
    if judged.tokens:
        figures |= estimated_steps(request.job, judged.rows, judged.tokens, world.processes)
    figures |= memory_figures(request.job, request.job.model, request.job.revision, world)
    show(request.resolved, figures, request.as_json)


def plan_sft(resolved: Resolved[SftJob], prepared: "Prepared", world: "World", as_json: bool) -> None:
    from opensloth.data.plan.schedule import schedule
    from opensloth.data.prepared.summary import summarize

    job = resolved.job
    figures: Figures = {}
    for name, text in summarize(prepared).lines():  # there may be several reasons under `dropped`
        figures[name] = f"{figures[name]}; {text}" if name in figures else text
    seed = job.seed if job.seed is not None else int(prepared.manifest.options["seed"])
    plan = schedule(prepared, job, seed=seed, processes=world.processes)
    tokens = plan.step_tokens
    rows = [len(step) for step in plan.steps]
    figures["steps"] = f"{len(tokens):,}, {plan.epoch[-1]:.4g} epochs" if tokens else "0"
    if tokens:
        figures["a step"] = f"{sum(tokens) // len(tokens):,} tokens in {sum(rows) / len(rows):.1f} rows on average"
    figures |= processes_figures(job, world.processes)
    model = job.model or prepared.manifest.model
    figures |= memory_figures(job, model, job.revision, world, longest=int(prepared.lengths.max()))
    show(resolved, figures, as_json)


def estimated_steps(job: SftOptions, rows: int, tokens: int, processes: int) -> Figures:
    from opensloth.data.plan.schedule import rows_per_step
    from opensloth.data.plan.shards import auto_tokens_per_step

    if job.batch_size is not None:
        wanted = rows_per_step(job, processes)
        per_epoch, a_step = math.ceil(rows / wanted), f"{wanted:,} rows"
    else:
        auto = isinstance(job.tokens_per_step, str)
        each = auto_tokens_per_step(tokens) if auto else int(job.tokens_per_step)
        per_epoch, a_step = math.ceil(tokens / each), f"{each:,} tokens" + (" (auto)" if auto else "")
    steps = job.max_steps or max(math.ceil(per_epoch * job.epochs), 1)
    figures = {"steps": f"about {steps:,}, {steps / per_epoch:.4g} epochs", "a step": a_step}
    return figures | processes_figures(job, processes)


def processes_figures(job: TrainOptions, processes: int) -> Figures:
    if job.batch_size is not None:
        text = f"{job.batch_size:,} rows x {job.grad_accum or 1} micro-batches x {processes} processes make a step"
    else:
        auto = job.pack_tokens == "auto"
        packs = "packs as large as free memory allows" if auto else f"packs of at most {int(job.pack_tokens):,} tokens"
        text = f"{processes}, each with {packs}; what a step holds does not depend on them"
    return {"processes": text}


def memory_figures(
    job: TrainOptions, spec: str, revision: str | None, world: "World", longest: int | None = None
) -> Figures:
    """Memory of one process and disk of the run, from the sizes in the model's config.

    Raises UserError where the model lacks a layer of --lora-targets, or the engine cannot run here.
    """
    import torch

    from opensloth.engine import choose, memory

    device = torch.device(world.devices[0])
    choose.engine(job, device)
    model = local_model(spec, revision)
    if isinstance(model, str):
        return {"memory": f"not estimated: {model}"}
    dtype = getattr(torch, choose.dtype(job, device).value)
    trusted = bool(getattr(job, "trust_remote_code", False))
    config = config_of(model, trusted)
    if job.lora_targets != SEVEN_LINEARS and model.adapter is None and not job.full_finetuning:
        from opensloth.engine import lora

        lora.targets(without_weights(config, trusted), job.lora_targets)
    means = means_of(job, model, lambda: without_weights(config, trusted), dtype, device)
    need = memory.estimate(config, job, dtype.itemsize, means)
    text = str(need)
    if job.pack_tokens != "auto" or device.type == "cpu":
        pack = memory.plan(config, job, device, longest or 1, dtype, means=means).pack_tokens
        text = f"{size(need.total(pack))} a process with packs of {pack:,} tokens ({text})"
    weights = need.adapter // 4  # fp32 weights, gradients and two moments are equal parts of it
    disk = weights * (3 * job.save_total_limit + 2)
    return {"memory": text, "disk of the run": f"{size(disk)} with {job.save_total_limit} checkpoints, at most"}


def means_of(
    job: TrainOptions, model: "ModelRef", bare: Callable[[], Any], dtype: "torch.dtype", device: "torch.device"
) -> "Means":
    """What the engine will do in order to need less memory, as far as the model's config tells.

    Args:
        bare: makes the model without its weights.
    """
    from opensloth.engine import head, joint, memory

    if job.engine == "unsloth":
        return memory.ALL_LOGITS
    if model.adapter is not None:  # which has targets and a dropout of its own
        kept = paths.read_json(model.adapter / "adapter_config.json", "an adapter")
        targets = kept["target_modules"]
        named = tuple(targets) if isinstance(targets, list) else job.lora_targets
        job = job.model_copy(update={"lora_targets": named, "lora_dropout": kept.get("lora_dropout", 0.0)})
    try:
        gated = joint.will_be_gated(bare, job)
    except UserError:  # no language model by itself: the run will say more
        gated = False
    return memory.Means(in_place=head.in_place(dtype, device), gated=gated)


def show(resolved: Resolved[Any], figures: Figures, as_json: bool) -> None:
    """Print settings and figures: those that were given first, the defaults in one line."""
    if not speaks():
        return
    if as_json:
        print(json.dumps({"job": resolved.record(), "plan": figures}, ensure_ascii=False, default=str))
        return
    lines = ["settings", *settings_lines(resolved), "plan", *(f"  {name:<18}{text}" for name, text in figures.items())]
    print("\n".join(log.printable(line) for line in [*lines, "Nothing was written (--dry-run)."]))


def settings_lines(resolved: Resolved[Settings]) -> list[str]:
    record = resolved.record()
    given = [
        (name, shown(item["value"]), item["origin"]) for name, item in record.items() if item["origin"] != "default"
    ]
    wide = max((len(value) for _, value, _ in given), default=0)
    lines = [f"  {name:<26}{value:<{min(wide, 40)}}  ({origin})" for name, value, origin in given]
    return [*lines, f"  and {len(record) - len(given)} defaults, which docs/options.md lists (--json shows them)"]


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
