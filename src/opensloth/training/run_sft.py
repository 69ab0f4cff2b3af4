"""An SFT job from its start to its result, as one of its processes: model, schedule, trainer, adapter."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig

from opensloth import log, paths
from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import ModelRef
from opensloth.data.plan.schedule import Schedule, schedule
from opensloth.data.prepared.directory import Prepared
from opensloth.engine import Engine, load
from opensloth.engine.lora import weights_hash
from opensloth.errors import RunStopped, UserError
from opensloth.training import checkpoint, plan, sft
from opensloth.training.callbacks import Metrics, SameAdapter, StopOnSignal
from opensloth.training.loader import Batcher, Steps, eval_packs
from opensloth.training.trl_args import sft_args


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run."""

    rank: int
    processes: int
    device: torch.device
    backend: str

    @property
    def leads(self) -> bool:
        return self.rank == 0


def train(run_dir: Path, job: SftJob, ref: ModelRef, prepared: Prepared, place: Place) -> None:
    """Train, or go on, until the last step. Rank 0 leaves the adapter and result.json.

    Raises:
        UserError: the model or the data cannot be trained as asked.
        WorkerFailed: a loss that is not a number.
        RunStopped: a signal; the last step is saved.
    """
    seed = int(prepared.manifest.options["seed"] if job.seed is None else job.seed)
    packing, longest = bool(prepared.manifest.options["packing"]), int(prepared.lengths.max())
    engine = load(job, ref, seed=seed, device=place.device, packing=packing, longest=longest)
    laid_out = schedule(prepared, job, seed=seed, processes=place.processes, packing=engine.packs)
    memory = plan.choose(engine, job, place.device, longest=longest)
    if place.leads:
        for line in [*engine.notes, *plan.describe(laid_out, memory, place.processes)]:
            log.say(line)
    run = describe_run(run_dir, job, ref, prepared, engine, laid_out, memory.pack_tokens, place)
    stop = StopOnSignal()
    trainer = build_trainer(run, job, prepared, engine, memory.checkpointing, seed, place)
    trainer.add_callback(stop)
    if dist.is_initialized() and job.check_every and not job.full_finetuning:
        trainer.add_callback(SameAdapter(job.check_every))
    resume = checkpoint_to_resume(job, run_dir)
    if resume and place.leads:
        log.say(f"going on from {resume}")
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.stopped:
        raise RunStopped(
            f"Stopped by {stop.request.name or 'a signal'} after step {trainer.state.global_step}, which is saved.",
            "The same command goes on from there.",
        )
    figures = sft.finish(trainer, run, time.monotonic() - begin)
    if place.leads:
        paths.write_json(run_dir / "result.json", {**figures, "weights_sha256": weights_hash(engine.model)})
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def describe_run(
    run_dir: Path,
    job: SftJob,
    ref: ModelRef,
    prepared: Prepared,
    engine: Engine,
    laid_out: Schedule,
    pack_tokens: int,
    place: Place,
) -> sft.Run:
    batcher = Batcher(prepared, engine.packs, engine.pad_id)
    engine.tokenizer.chat_template = prepared.contract.chat_template  # whoever loads it with the adapter renders alike

    def save_extra(directory: Path) -> None:
        engine.tokenizer.save_pretrained(directory)
        prepared.contract.save(directory / "prompt.json")

    return sft.Run(
        directory=run_dir,
        steps=Steps(laid_out, batcher, pack_tokens, place.rank, place.processes),
        loss=engine.loss,
        batcher=batcher,
        held_out=eval_packs(prepared, batcher, pack_tokens, place.rank, place.processes),
        held_out_targets=int(prepared.trained[prepared.is_eval].sum()),
        keep_checkpoints=job.save_total_limit,
        base=ref.base,
        base_revision=ref.revision,
        save_extra=save_extra,
    )


def build_trainer(
    run: sft.Run, job: SftJob, prepared: Prepared, engine: Engine, checkpointing: str, seed: int, place: Place
) -> Any:
    evaluates = bool(prepared.is_eval.any())
    arguments = sft_args(
        job,
        run_dir=run.directory,
        steps=len(run.steps),
        seed=seed,
        device=place.device,
        engine=engine,
        checkpointing=checkpointing,
        evaluates=evaluates,
        backend=place.backend,
        processes=place.processes,
    )
    rows = Dataset.from_file(str(prepared.rows.path))
    trainer = sft.trainer_class()(
        run=run,
        model=engine.model,
        args=SFTConfig(**arguments),
        train_dataset=rows,  # TRL looks at its first row; the steps come from our loader
        eval_dataset=rows if evaluates else None,
        processing_class=engine.tokenizer,
        data_collator=lambda batch: batch,
    )
    trainer.remove_callback(PrinterCallback)  # our own line says it better
    if place.leads:
        trainer.add_callback(Metrics(run.directory, run.steps, place.device, "tensorboard" in job.report_to))
    return trainer


def checkpoint_to_resume(job: SftJob, run_dir: Path) -> Path | None:
    """What `--resume` says; a process that the launcher restarts goes on from the newest checkpoint in any case.

    Raises UserError where the processes find different ones: they would train different steps, and wait for ever.
    """
    restarted = int(os.environ.get("OPENSLOTH_ATTEMPT", "0")) > 0
    mine = checkpoint.to_resume("auto" if restarted else job.resume, run_dir / "checkpoints")
    if dist.is_initialized():
        found = [""] * dist.get_world_size()
        dist.all_gather_object(found, mine.name if mine else "none")
        check_same_checkpoint(found, run_dir)
    return mine


def check_same_checkpoint(found: list[str], run_dir: Path) -> None:
    """Raise UserError where the names of the checkpoints that the processes found are not all the same."""
    for rank, name in enumerate(found):
        if name != found[0]:
            raise UserError(
                f"Process 0 would go on from {found[0]} in {run_dir / 'checkpoints'}, but process {rank} from {name}.",
                "Give all machines the same directory (--output on a shared disk, or a copy of machine 0's).",
            )
