"""One training process: `python -m opensloth.training.worker RUN_DIR`, started by the launcher or by torchrun.

It reads RUN_DIR/job.json and its place among the processes from the environment, and nothing else.
"""

import importlib
import importlib.util
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth import log, paths
from opensloth.config.jobs import SftJob
from opensloth.data.models import ModelRef
from opensloth.errors import RunStopped
from opensloth.launch.device import claim_device

if TYPE_CHECKING:
    import torch


def main() -> None:
    run(Path(sys.argv[1]))  # whoever starts this module reports what it raises


def run(run_dir: Path) -> None:
    """Train the job of a run directory, as one of its processes."""
    log.quiet_libraries()
    device_name = claim_device()  # before torch is imported: it may hide the other cards
    record = paths.read_json(run_dir / "job.json", "a run directory")
    job = SftJob.model_validate({name: entry["value"] for name, entry in record["settings"].items()})
    adapter = record["model"]["adapter"]
    ref = ModelRef(
        spec=record["model"]["base"],
        base=record["model"]["base"],
        revision=record["model"]["revision"],
        adapter=Path(adapter) if adapter else None,
        name="",
    )
    if job.engine == "unsloth" and device_name.startswith("cuda") and importlib.util.find_spec("unsloth"):
        import_unsloth()
    device, backend = join(device_name)
    train(run_dir, job, ref, Path(record["data"]["directory"]), device, backend)


def import_unsloth() -> None:
    """Before torch's libraries: unsloth replaces parts of transformers, peft and trl as it is imported.

    What it compiles goes to our cache, not to the working directory.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(paths.cache_dir() / "unsloth_compiled"))
    importlib.import_module("unsloth")


def join(device_name: str) -> "tuple[torch.device, str]":
    """Meet the other processes. The group is made here because accelerate ignores a time-out on the CPU."""
    import torch
    import torch.distributed as dist

    device = torch.device(device_name)
    backend = os.environ.get("OPENSLOTH_BACKEND", "nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # else accelerate makes a group of one
    else:
        timeout = timedelta(seconds=int(os.environ.get("OPENSLOTH_TIMEOUT", "600")))
        dist.init_process_group(backend, timeout=timeout)
    return device, backend


def train(run_dir: Path, job: SftJob, ref: ModelRef, data: Path, device: "torch.device", backend: str) -> None:
    import torch.distributed as dist
    from datasets import Dataset

    from opensloth.data.prepared import open_prepared
    from opensloth.data.schedule import schedule
    from opensloth.engine import load
    from opensloth.training import checkpoint, plan, sft
    from opensloth.training.callbacks import Metrics, StopOnSignal
    from opensloth.training.loader import Batcher, Steps, eval_packs
    from opensloth.training.trl_args import sft_args

    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    leads = rank == 0
    prepared = open_prepared(data)
    seed = prepared.manifest.options["seed"] if job.seed is None else job.seed
    packing, longest = bool(prepared.manifest.options["packing"]), int(prepared.lengths.max())
    engine = load(job, ref, seed=seed, device=device, packing=packing, longest=longest)
    laid_out = schedule(prepared, job, seed=seed, processes=processes, packing=engine.packs)
    memory = plan.choose(engine, job, device, longest=longest)
    if leads:
        for line in [*engine.notes, *plan.describe(laid_out, memory, processes)]:
            log.say(line)

    batcher = Batcher(prepared, engine.packs, engine.pad_id)
    steps = Steps(laid_out, batcher, memory.pack_tokens, rank, processes)
    contract = prepared.contract
    engine.tokenizer.chat_template = contract.chat_template  # whoever loads it with the adapter renders as we did

    def save_extra(directory: Path) -> None:
        engine.tokenizer.save_pretrained(directory)
        contract.save(directory / "prompt.json")

    this_run = sft.Run(
        directory=run_dir,
        steps=steps,
        loss=engine.loss,
        batcher=batcher,
        held_out=eval_packs(prepared, batcher, memory.pack_tokens, rank, processes),
        held_out_targets=int(prepared.trained[prepared.is_eval].sum()),
        keep_checkpoints=job.save_total_limit,
        base=ref.base,
        base_revision=ref.revision,
        save_extra=save_extra,
    )
    from transformers import PrinterCallback
    from trl import SFTConfig

    evaluates = bool(prepared.is_eval.any())
    arguments = sft_args(
        job,
        run_dir=run_dir,
        steps=len(laid_out.steps),
        seed=seed,
        device=device,
        engine=engine,
        checkpointing=memory.checkpointing != "none",
        evaluates=evaluates,
        backend=backend,
        processes=processes,
    )
    rows = Dataset.from_file(str(prepared.rows.path))
    stop = StopOnSignal()
    trainer = sft.trainer_class()(
        run=this_run,
        model=engine.model,
        args=SFTConfig(**arguments),
        train_dataset=rows,  # TRL looks at its first row; the steps come from our loader
        eval_dataset=rows if evaluates else None,
        processing_class=engine.tokenizer,
        data_collator=lambda batch: batch,
        callbacks=[stop],
    )
    trainer.remove_callback(PrinterCallback)  # our own line says it better
    if leads:
        trainer.add_callback(Metrics(run_dir, laid_out, device, "tensorboard" in job.report_to))
    restarted = int(os.environ.get("OPENSLOTH_ATTEMPT", "0")) > 0
    resume = checkpoint.to_resume("auto" if restarted else job.resume, run_dir / "checkpoints")
    if resume and leads:
        log.say(f"going on from {resume}")
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.stopped:
        raise RunStopped(
            f"Stopped by {stop.request.name or 'a signal'} after step {trainer.state.global_step}, which is saved.",
            "The same command goes on from there.",
        )
    figures = sft.finish(trainer, this_run, time.monotonic() - begin)
    if leads:
        paths.write_json(run_dir / "result.json", result(figures, engine.model))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def result(figures: dict[str, Any], model: Any) -> dict[str, Any]:
    from opensloth.engine.lora import weights_hash

    return {**figures, "weights_sha256": weights_hash(model)}


if __name__ == "__main__":
    main()
