"""A job in the words of TRL: the one place where our settings become its arguments."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from opensloth.config.run import TrainOptions
from opensloth.engine import Engine
from opensloth.errors import UserError

OPTIMIZERS = {"auto": "adamw_torch", "adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}
SCHEDULERS = {"constant": "constant_with_warmup"}  # transformers' own "constant" passes over the warm-up
# "selective" recomputes every second layer; reentrant checkpointing does not work with DDP on adapters
CHECKPOINTING = {
    "selective": {"use_reentrant": False, "every_n_layers": 2},
    "full": {"use_reentrant": False},
}


def sft_args(
    options: TrainOptions,
    *,
    run_dir: Path,
    steps: int,
    seed: int,
    device: torch.device,
    engine: Engine,
    checkpointing: str,
    evaluates: bool,
    backend: str,
    processes: int,
) -> dict[str, Any]:
    """Keyword arguments of `trl.SFTConfig`. One batch of the loader is a whole optimizer step, so nothing accumulates.

    Args:
        steps: optimizer steps of the run.
        engine: says which type to compute in. Frozen weights are stored in it already, so that autocast (slow on a CPU)
            is only for engines that ask for it; float16 always needs the trainer's loss scaler.
        evaluates: whether there are held-out rows.
    Raises:
        UserError: an option needs a package that is not installed.
    """
    check_installed(options)
    on_gpu = device.type == "cuda"
    fused = "adamw_torch_fused" if on_gpu else "adamw_torch"
    optimizer = OPTIMIZERS[options.optim]
    return {
        "output_dir": str(run_dir / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": options.lr,
        "lr_scheduler_type": SCHEDULERS.get(options.lr_scheduler, options.lr_scheduler),
        "warmup_steps": warmup(options, steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": fused if optimizer == "adamw_torch" else optimizer,
        "bf16": engine.autocast and engine.dtype is torch.bfloat16,
        "fp16": engine.dtype is torch.float16,
        "gradient_checkpointing": checkpointing != "none",
        "gradient_checkpointing_kwargs": CHECKPOINTING.get(checkpointing),
        "logging_steps": options.logging_steps,
        "logging_first_step": True,
        # the filter hides NaN and makes the host wait for the card at every micro-batch
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": (options.eval_steps or steps) if evaluates else None,
        "report_to": [word for word in options.report_to if word == "wandb"],
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": not on_gpu,
        "ddp_backend": backend if processes > 1 else None,
        # transformers would search for unused parameters for every PEFT model: slow, and none are unused
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "max_length": None,
        "packing": False,
        "loss_type": "nll",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def check_installed(options: TrainOptions) -> None:
    needed = {"bitsandbytes": ("--optim adamw_8bit", options.optim == "adamw_8bit", "gpu")}
    needed["wandb"] = ("--report-to wandb", "wandb" in options.report_to, "wandb")
    for package, (option, asked, extra) in needed.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{option}: {package} is not installed.", f'Install it: pip install "openslothai[{extra}]".'
            )


def warmup(options: TrainOptions, steps: int) -> int:
    """Warm-up in optimizer steps: as given, or a share of the run, rounded down.

    The first step of a warm-up has a learning rate of 0, which a run of a few steps cannot spare.
    """
    if options.warmup_steps >= 1 or options.warmup_steps == 0:
        return int(options.warmup_steps)
    return int(options.warmup_steps * steps)
