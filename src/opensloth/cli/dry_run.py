"""`--dry-run`: the resolved job, its batch arithmetic, and the memory and disk it needs. It changes nothing on disk.

Prepared data is counted exactly. Of a local file or a sample the first rows are tokenized and the rest is estimated;
nothing is fetched from a hub for it.
"""

import json
import math
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.cli.model_facts import config_of
from opensloth.cli.options import Request
from opensloth.config.base import Resolved, Settings
from opensloth.config.jobs import DataJob, SftJob, TrainSftJob
from opensloth.config.run import SftOptions, TrainOptions
from opensloth.errors import UserError
from opensloth.launch.world import speaks

if TYPE_CHECKING:
    from opensloth.data.prepared.directory import Prepared
    from opensloth.launch.world import World

FIRST_ROWS = 1_000
BYTES_PER_TOKEN = 8  # an id and a label, four bytes each
GIB = 2**30

Figures = dict[str, str]


def plan_data(request: Request[DataJob]) -> None:
    from opensloth.data.prepared.prepare import default_output

    job = request.job
    figures = data_figures(job)[0]
    show(request.resolved, {**figures, "output": str(job.output or default_output(job))}, request.as_json)


def plan_train_sft(request: Request[TrainSftJob], data: DataJob, world: "World") -> None:
    from opensloth.data.prepared.prepare import default_output

    figures, rows, tokens = data_figures(data)
    figures["prepared data"] = str(data.output or default_output(data))
    if tokens:
        figures |= estimated_steps(request.job, rows, tokens, world.processes)
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
    tokens = [plan.tokens(step) for step in range(len(plan.steps))]
    rows = [len(step) for step in plan.steps]
    figures["steps"] = f"{len(tokens):,}, {plan.epoch[-1]:.4g} epochs" if tokens else "0"
    if tokens:
        figures["a step"] = f"{sum(tokens) // len(tokens):,} tokens in {sum(rows) / len(rows):.1f} rows on average"
    figures |= processes_figures(job, world.processes)
    model = job.model or prepared.manifest.model
    figures |= memory_figures(job, model, job.revision, world, longest=int(prepared.lengths.max()))
    show(resolved, figures, as_json)


def data_figures(job: DataJob) -> tuple[Figures, int, int]:
    """What preparing `job` would give, judged by its first rows; with the estimated rows and tokens (0: unknown).

    Raises UserError for an input, mapping or template that preparing would refuse too.
    """
    from opensloth.data.messages.examples import detect_format, parse_mapping
    from opensloth.data.models.resolve import load_tokenizer
    from opensloth.data.prepared.prepare import recipe_for
    from opensloth.data.sources.open import is_path, open_source

    if not is_local(job.input) and not is_path(job.input):
        return {"data": "not estimated: that would fetch the data set from the hub"}, 0, 0
    source = open_source(job.input, split=job.split, subset=job.subset, revision=job.data_revision, samples=job.samples)
    detect_format(source.columns, parse_mapping(list(job.map)), job.method)
    model = local_model(job.model, job.revision)
    if isinstance(model, str):
        return {"data": f"not estimated: {model}"}, 0, 0
    tokenizer = load_tokenizer(model, job.trust_remote_code)
    recipe = recipe_for(job, source, model, tokenizer)
    first = list(islice(source.rows(), FIRST_ROWS))
    kept, dropped = recipe.builder(tokenizer).build(first)
    whole = len(first) < FIRST_ROWS
    rows_in = len(first) if whole else estimated_rows(job, source.size, first[-1].line)
    figures = {"judged by": f"all {len(first):,} rows" if whole else f"the first {len(first):,} rows: an estimate"}
    figures["row format"] = recipe.row_format.name
    unit, ids = ("prompts", "prompt tokens") if job.method == "grpo" else ("rows", "tokens")
    if rows_in is None:
        figures[unit] = f"{len(kept):,} of the first {len(first):,}"
        return figures, 0, 0
    share = rows_in / max(len(first), 1)
    rows, tokens = round(len(kept) * share), round(sum(len(row.input_ids) for row in kept) * share)
    about = "" if whole else "about "
    figures[unit] = f"{about}{rows:,} of {rows_in:,}" + (
        f", {round(len(dropped) * share):,} dropped" if dropped else ""
    )
    figures[ids] = f"{about}{tokens:,}"
    if job.method == "grpo":
        longest = max((len(row.input_ids) for row in kept), default=0)
        figures["longest prompt"] = f"{longest:,} tokens" + ("" if whole else " so far")
        return figures, rows, tokens
    packs = max(math.ceil(tokens / job.max_seq_length), 1) if job.packing else rows
    figures["packs"] = f"about {packs:,} of at most {job.max_seq_length:,} tokens, shards: {job.gpus}"
    figures["disk"] = f"{about}{size(tokens * BYTES_PER_TOKEN)} of prepared data"
    return figures, rows, tokens


def is_local(spec: str) -> bool:
    return spec.startswith("sample:") or Path(spec).expanduser().exists()


def local_model(spec: str, revision: str | None) -> Any:
    """The model's ModelRef if it lies on this machine, else a sentence that says why there is nothing to read."""
    from opensloth.data.models.resolve import resolve_model
    from opensloth.data.models.smollm2 import is_converted

    if spec == "sample:smollm2" and not is_converted():
        return "the sample model has not been converted yet, which the first real run does"
    if is_local(spec):
        return resolve_model(spec, revision)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a dry run fetches nothing; the hub client's cache may have it
    try:
        return resolve_model(spec, revision)
    except UserError:
        return f"{spec} is not on this machine yet"


def estimated_rows(job: DataJob, known: int | None, last_line: int) -> int | None:
    """Rows of the whole input: as the source knows, else by the size of a plain text file, else None."""
    path = Path(job.input).expanduser()
    if known is None and path.suffix in (".jsonl", ".csv"):
        with path.open("rb") as file:
            read = sum(len(line) for line in islice(file, last_line))
        known = round(path.stat().st_size / max(read, 1) * FIRST_ROWS)
        known = min(known, job.samples) if job.samples else known
    return known


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
        fits = "as free memory allows" if job.pack_tokens == "auto" else f"at most {int(job.pack_tokens):,} tokens"
        text = f"{processes}, each with packs of {fits}; what a step holds does not depend on them"
    return {"processes": text}


def memory_figures(
    job: TrainOptions, spec: str, revision: str | None, world: "World", longest: int | None = None
) -> Figures:
    """Memory of one process and disk of the run, from the sizes in the model's config."""
    model = local_model(spec, revision)
    if isinstance(model, str):
        return {"memory": f"not estimated: {model}"}
    import torch

    from opensloth.engine import choose, memory

    device = torch.device(world.devices[0])
    dtype = getattr(torch, choose.dtype(job, device).value)
    config = config_of(model, bool(getattr(job, "trust_remote_code", False)))
    need = memory.estimate(config, job, dtype.itemsize)
    text = str(need)
    if job.pack_tokens != "auto" or device.type == "cpu":
        pack = memory.plan(config, job, device, longest or 1, dtype).pack_tokens
        text = f"{size(need.total(pack))} a process with packs of {pack:,} tokens ({text})"
    weights = need.adapter // 4  # fp32 weights, gradients and two moments are equal parts of it
    disk = weights * (3 * job.save_total_limit + 2)
    return {"memory": text, "disk of the run": f"{size(disk)} with {job.save_total_limit} checkpoints, at most"}


def size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


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
