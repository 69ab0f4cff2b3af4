"""An SFT job from its start to its result, as one of its processes: model, schedule, trainer, adapter."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import SFTConfig

from opensloth import log
from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import ModelRef
from opensloth.data.plan.schedule import Schedule, schedule
from opensloth.data.prepared.directory import Prepared
from opensloth.engine import Engine, choose, load, matmul
from opensloth.engine.memory import MemoryPlan, Shape
from opensloth.training import plan
from opensloth.training.everyone import of_all
from opensloth.training.place import Place
from opensloth.training.rehearsal import Attempt, rehearse
from opensloth.training.run import DueEvaluation, run_files, seed_of, train_to_the_end
from opensloth.training.sft import pack_trainer
from opensloth.training.sft.loader import Batcher, Steps, eval_packs
from opensloth.training.sft.metrics import StepsMetrics
from opensloth.training.trainer import RunFiles
from opensloth.training.trl_args import Frame, sft_args


def train(run_dir: Path, job: SftJob, ref: ModelRef, prepared: Prepared, place: Place) -> None:
    """Train, or go on, until the last step. Rank 0 leaves the adapter and result.json.

    Raises:
        UserError: the model or the data cannot be trained as asked.
        WorkerFailed: a loss that is not a number.
        RunStopped: a signal; the last step is saved.
    """
    seed = seed_of(job, prepared)
    packing, longest = bool(prepared.manifest.options["packing"]), int(prepared.lengths.max())
    engine = load(job, ref, seed=seed, device=place.device, packing=packing, longest=longest)
    laid_out = schedule(prepared, job, seed=seed, processes=place.processes, packing=engine.packs)
    batcher = Batcher(prepared, engine.packs, engine.pad_id)
    memory, graphs = fitted(engine, job, laid_out, batcher, longest, place)
    if place.leads:
        for line in [*engine.notes, *plan.describe(laid_out, memory, place.processes)]:
            log.say(line)
    files = run_files(run_dir, job, ref, prepared, engine)
    pack_tokens = memory.pack_tokens
    if engine.packs and job.batch_size is None:
        attempt = largest_pack(prepared, batcher, engine, place.device)
        pack_tokens = rehearse(engine, memory, longest, place.device, attempt)
    run = describe_run(files, prepared, engine, batcher, laid_out, pack_tokens, place)
    run = with_one_shape(run, engine, job, longest, graphs, place)
    trainer = build_trainer(run, job, prepared, engine, memory.checkpointing, seed, place)
    train_to_the_end(trainer, job, run_dir, place, lambda seconds: pack_trainer.figures(trainer, run, seconds))


def fitted(
    engine: Engine, job: SftJob, laid_out: Schedule, batcher: Batcher, longest: int, place: Place
) -> tuple[MemoryPlan, choose.Choice]:
    """What goes through the model at once, and whether that is recorded: recorded packs may be smaller, but not all
    packs are worth it. The same on every process."""
    share = laid_out.largest_share(place.processes)
    planned = partial(plan.choose, engine, job, place.device, longest=longest, step=share)
    graphs = choose.may_record(job, place.device, all(of_all(engine.packs_natively and engine.recordable)))
    if graphs.value == "off":
        return planned(), graphs
    memory = planned(may_record=True)
    steps = Steps(laid_out, batcher, memory.pack_tokens, place.rank, place.processes)
    packs, slower = steps.shape(longest), any(of_all(matmul.times != 1))
    shape = Shape.of(engine.model.config)
    graphs = choose.worth_recording(shape, packs.tokens, steps.filled(packs), slower)
    return memory if graphs.value == "on" else planned(), graphs


def with_one_shape(
    run: pack_trainer.Run, engine: Engine, job: SftJob, longest: int, graphs: choose.Choice, place: Place
) -> pack_trainer.Run:
    """The run with its layers compiled and its passes recorded, where that pays: all packs then have one shape."""
    compiling = choose.compilation(job, place.device, engine.packs_natively, sum(run.steps.plan.step_tokens))
    if place.leads:
        log.say(f"compiled layers: {compiling.value}, {compiling.why}")
        log.say(f"CUDA graphs: {graphs.value}, {graphs.why}")
    if "on" in (compiling.value, graphs.value):
        shape = run.steps.shape(longest)
        run.steps.fill_up(shape)
        if place.leads:
            log.say(f"packs are filled up to {shape.tokens:,} tokens")
    if compiling.value == "on":
        engine.compile(dynamic=False)
    if graphs.value == "on":
        engine.record(run.batcher([]), place.say)
    return replace(run, recorded=graphs.value == "on")


def largest_pack(prepared: Prepared, batcher: Batcher, engine: Engine, device: torch.device) -> Attempt:
    """A pack of the rows with the most trained tokens: they make the most logits."""
    order = np.argsort(-prepared.trained, kind="stable")

    def attempt(tokens: int) -> torch.Tensor:
        rows, room = [], tokens
        for row in order.tolist():
            if prepared.lengths[row] <= room:
                rows.append(row)
                room -= int(prepared.lengths[row])
        batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batcher(rows).items()}
        return engine.loss(engine.model, batch)

    return attempt


def describe_run(
    files: RunFiles,
    prepared: Prepared,
    engine: Engine,
    batcher: Batcher,
    laid_out: Schedule,
    pack_tokens: int,
    place: Place,
) -> pack_trainer.Run:
    return pack_trainer.Run(
        files=files,
        steps=Steps(laid_out, batcher, pack_tokens, place.rank, place.processes),
        loss=engine.loss,
        batcher=batcher,
        held_out=eval_packs(prepared, batcher, pack_tokens, place.rank, place.processes),
        held_out_targets=int(prepared.trained[prepared.is_eval].sum()),
        native=engine.name == "native",
    )


def build_trainer(
    run: pack_trainer.Run, job: SftJob, prepared: Prepared, engine: Engine, checkpointing: str, seed: int, place: Place
) -> Any:
    evaluates = bool(prepared.is_eval.any())
    frame = Frame(
        run_dir=run.files.directory,
        steps=len(run.steps),
        seed=seed,
        device=place.device,
        engine=engine,
        checkpointing=checkpointing,
        evaluates=evaluates,
        backend=place.backend,
        processes=place.processes,
        recorded=run.recorded,
    )
    rows = Dataset.from_file(str(prepared.rows.path))
    trainer = pack_trainer.trainer_class()(
        run=run,
        model=engine.model,
        args=SFTConfig(**sft_args(job, frame)),
        train_dataset=rows,  # TRL looks at its first row; the steps come from our loader
        eval_dataset=rows if evaluates else None,
        processing_class=engine.tokenizer,
        data_collator=lambda batch: batch,
    )
    if place.leads:
        trainer.add_callback(StepsMetrics(run.files.directory, run.steps, place.device, "tensorboard" in job.report_to))
    if evaluates:
        trainer.add_callback(DueEvaluation(trainer, first=False))
    return trainer
