"""What runs of every method have in common: place among the processes, files, checkpoints to go on from, the end."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PrinterCallback, TrainerCallback

from opensloth import log, paths
from opensloth.config.jobs import RunJob
from opensloth.data.models.resolve import ModelRef
from opensloth.data.prepared.directory import Prepared
from opensloth.engine import Engine
from opensloth.engine.lora import weights_hash
from opensloth.errors import RunStopped, UserError
from opensloth.training import checkpoint
from opensloth.training.callbacks import Alive, SameAdapter, peak_memory
from opensloth.training.everyone import of_all
from opensloth.training.place import Place, leave
from opensloth.training.stopping import Dropped, StopOnSignal
from opensloth.training.trainer import RunFiles

# accelerate names the CPU of one of several processes "cpu:0", where transformers has torch load the optimizer's state
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def seed_of(job: RunJob, prepared: Prepared) -> int:
    return int(prepared.manifest.options["seed"] if job.seed is None else job.seed)


def run_files(run_dir: Path, job: RunJob, ref: ModelRef, prepared: Prepared, engine: Engine) -> RunFiles:
    engine.tokenizer.chat_template = prepared.contract.chat_template  # whoever loads it with the adapter renders alike

    def save_extra(directory: Path) -> None:
        engine.tokenizer.save_pretrained(directory)
        prepared.contract.save(directory / "prompt.json")

    return RunFiles(
        directory=run_dir,
        keep_checkpoints=job.save_total_limit,
        base=ref.base,
        base_revision=ref.revision,
        save_extra=save_extra,
    )


def train_to_the_end(
    trainer: Any, job: RunJob, run_dir: Path, place: Place, finish: Callable[[float], dict[str, Any]], every: int = 1
) -> None:
    """Train, or go on, until the last step or a signal. Rank 0 leaves result.json.

    Args:
        finish: saves what was trained and returns the run's figures; it is given the seconds of training.
        every: steps after which the run can end (GRPO's between two batches of completions).
    Raises:
        RunStopped: a signal; the last step is saved.
    """
    trainer.stop = stop = StopOnSignal(every)
    trainer.add_callback(stop)
    trainer.add_callback(Alive())
    trainer.remove_callback(PrinterCallback)  # our own line says it better
    if dist.is_initialized() and job.check_every and not job.full_finetuning:
        trainer.add_callback(SameAdapter(job.check_every, trainer.rows_of))
    resume = checkpoint_to_resume(job, run_dir)
    if resume and place.leads:
        log.say(f"going on from {resume}")
    begin = time.monotonic()
    trainer.saved_step = checkpoint.step_of(resume) if resume else 0
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if not stop.stopped and trainer.eval_dataset is not None and not evaluated(trainer):
            trainer.evaluate()
    except Dropped:
        stop.stopped = True
        if trainer.saved_step != trainer.state.global_step:
            trainer._save_checkpoint(trainer.model, None)
    if stop.stopped:
        raise stopped(stop.request.name or "a signal", trainer.state.global_step)
    figures = finish(time.monotonic() - begin)
    hashes = of_all(weights_hash(trainer.model))
    costs = per_process(trainer, place)
    if place.leads:
        log.say(f"saving what was trained to {run_dir}")
        trainer._save(str(run_dir))
        same = {"weights_sha256": hashes[0], "processes_with_these_weights": hashes.count(hashes[0])}
        paths.write_json(run_dir / "result.json", {**figures, **costs, **same})
    leave()


def stopped(by: str, step: int) -> RunStopped:
    if step == 0:
        return RunStopped(f"Stopped by {by} before the first step was complete.", "The same command begins anew.")
    return RunStopped(f"Stopped by {by} after step {step}, which is saved.", "The same command goes on from there.")


def per_process(trainer: Any, place: Place) -> dict[str, Any]:
    """What every process spent since this run began or went on: lists in the order of ranks."""
    mine = {"memory_gib": round(peak_memory(place.device) / 2**30, 3), **trainer.costs.so_far()}
    spent_by = of_all(mine)
    lists = {name: [one[name] for one in spent_by] for name in mine}
    return {"memory_gib": max(lists["memory_gib"]), "per_process": lists}


def evaluated(trainer: Any) -> bool:
    """Whether the last step was evaluated: it is, if --eval-steps divides it."""
    step = trainer.state.global_step
    return any(e["step"] == step and any(name.startswith("eval_") for name in e) for e in trainer.state.log_history)


class DueEvaluation(TrainerCallback):
    """As training begins: evaluates where a signal ended an evaluation, and before the first step where that is asked.

    Args:
        first: whether what the run starts from is evaluated too.
    """

    def __init__(self, trainer: Any, *, first: bool) -> None:
        self.trainer, self.first = trainer, first

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = state.global_step % args.eval_steps == 0 and (self.first or state.global_step > 0)
        if due and not evaluated(self.trainer):
            self.trainer.evaluate()


def checkpoint_to_resume(job: RunJob, run_dir: Path) -> Path | None:
    """What `--resume` says; a process that the launcher restarts goes on from the newest checkpoint in any case.

    Raises UserError where the processes find different ones: they would train different steps, and wait for ever.
    """
    if os.environ.get("RANK", "0") == "0":
        checkpoint.recover(run_dir / "checkpoints")
    if dist.is_initialized():
        dist.barrier()
    restarted = int(os.environ.get("OPENSLOTH_ATTEMPT", "0")) > 0
    mine = checkpoint.to_resume("auto" if restarted else job.resume, run_dir / "checkpoints")
    check_same_checkpoint(of_all(mine.name if mine else "none"), run_dir)
    return mine


def check_same_checkpoint(found: list[str], run_dir: Path) -> None:
    """Raise UserError where the names of the checkpoints that the processes found are not all the same."""
    for rank, name in enumerate(found):
        if name != found[0]:
            raise UserError(
                f"Process 0 would go on from {found[0]} in {run_dir / 'checkpoints'}, but process {rank} from {name}.",
                "Give all machines the same directory (--output on a shared disk, or a copy of machine 0's).",
            )
