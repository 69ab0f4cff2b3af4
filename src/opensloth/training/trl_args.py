"""A job in the words of TRL: the one place where our settings become its arguments."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensloth.config.run import GrpoOptions, TrainOptions
from opensloth.engine import Engine
from opensloth.errors import UserError

OPTIMIZERS = {"auto": "adamw_torch", "adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "sgd": "sgd"}
SCHEDULERS = {"constant": "constant_with_warmup"}  # transformers' own "constant" passes over the warm-up
# "selective" recomputes every second layer; reentrant checkpointing does not work with DDP on adapters
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "selective": {"use_reentrant": False, "every_n_layers": 2},
    "full": {"use_reentrant": False},
}


@dataclass(frozen=True)
class Frame:
    """What TRL needs to know that is no option of the job.

    Attributes:
        steps: optimizer steps of the run.
        engine: says which type to compute in. Frozen weights are stored in it already, so that autocast (slow on a CPU)
            is only for engines that ask for it; float16 always needs the trainer's loss scaler.
        evaluates: whether there are held-out rows.
        recorded: whether passes are (engine/graphed.py), which is for models that draw no random numbers.
    """

    run_dir: Path
    steps: int
    seed: int
    device: torch.device
    engine: Engine
    checkpointing: str
    evaluates: bool
    backend: str
    processes: int
    recorded: bool = False


def sft_args(options: TrainOptions, frame: Frame) -> dict[str, Any]:
    """Keyword arguments of `trl.SFTConfig`. Raises UserError as `shared`."""
    return {
        **shared(options, frame),
        "per_device_train_batch_size": 1,
        "max_length": None,
        "packing": False,
        "loss_type": "nll",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def grpo_args(options: GrpoOptions, frame: Frame, reward_weights: list[float]) -> dict[str, Any]:
    """Keyword arguments of `trl.GRPOConfig`. Raises UserError as `shared`.

    Without an adapter TRL would load its reference from the hub by name, so the caller makes it (beta 0 here).
    """
    return {
        **shared(options, frame),
        # in completions: TRL checks that whole groups fit
        "per_device_train_batch_size": options.prompts_per_step * options.group_size // frame.processes,
        "steps_per_generation": 1,
        # of its own further updates TRL would ask the old policy in a pass of its own; our first update remembers it
        "num_iterations": 1,
        "num_generations": options.group_size,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 1,
        "max_completion_length": options.max_new,
        "temperature": options.temperature,
        "beta": 0.0 if options.full_finetuning else options.beta,
        "epsilon": options.clip,
        "loss_type": options.loss,
        "scale_rewards": scale_rewards(options),
        "reward_weights": reward_weights,
        "use_vllm": False,
        "log_completions": False,
        "shuffle_dataset": False,
    }


def scale_rewards(options: GrpoOptions) -> str:
    """What advantages are divided by; Dr. GRPO divides by nothing (arXiv 2503.20783, section 3.2)."""
    if options.scale_rewards != "auto":
        return options.scale_rewards
    return "none" if options.loss == "dr_grpo" else "group"


def recomputed(frame: Frame) -> dict[str, Any] | None:
    """What transformers is told of the layers that it computes again. To read the state of the random numbers, which is
    the default, takes the host longer than to launch a layer, and no CUDA graph can."""
    told = CHECKPOINTING.get(frame.checkpointing)
    return told | {"preserve_rng_state": False} if told and frame.recorded else told


def shared(options: TrainOptions, frame: Frame) -> dict[str, Any]:
    """What both have. One batch of the loader is a whole optimizer step, so nothing accumulates.

    Raises UserError where an option needs a package that is not installed.
    """
    check_installed(options)
    on_gpu = frame.device.type == "cuda"
    optimizer = OPTIMIZERS[options.optim]
    return {
        "output_dir": str(frame.run_dir / "checkpoints"),
        "max_steps": frame.steps,
        "gradient_accumulation_steps": 1,
        "learning_rate": options.lr,
        "lr_scheduler_type": SCHEDULERS.get(options.lr_scheduler, options.lr_scheduler),
        "warmup_steps": warmup(options, frame.steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": "adamw_torch_fused" if on_gpu and optimizer == "adamw_torch" else optimizer,
        "bf16": frame.engine.autocast and frame.engine.dtype is torch.bfloat16,
        "fp16": frame.engine.dtype is torch.float16,
        "gradient_checkpointing": frame.checkpointing != "none",
        "gradient_checkpointing_kwargs": recomputed(frame),
        "logging_steps": options.logging_steps,
        "logging_first_step": True,
        # the filter hides NaN and makes the host wait for the card at every micro-batch
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "eval_strategy": "steps" if frame.evaluates else "no",
        "eval_steps": (options.eval_steps or frame.steps) if frame.evaluates else None,
        "report_to": [word for word in options.report_to if word == "wandb"],
        "disable_tqdm": True,
        "seed": frame.seed,
        "use_cpu": not on_gpu,
        "ddp_backend": frame.backend if frame.processes > 1 else None,
        # transformers would search for unused parameters for every PEFT model: slow, and none are unused
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
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
