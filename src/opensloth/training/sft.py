"""SFT on TRL's trainer, with our steps: the rank's own packs, the token mean over all processes, atomic checkpoints."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from opensloth import log, paths
from opensloth.engine.lora import name_base, trainable
from opensloth.engine.model import Loss
from opensloth.errors import WorkerFailed
from opensloth.training import checkpoint
from opensloth.training.loader import Batcher, Step, Steps


@dataclass(frozen=True)
class Run:
    """What a trainer needs to know beyond TRL's arguments.

    Attributes:
        steps: the training data of this process.
        loss: the engine's loss of a micro-batch.
        held_out: this process's share of the held-out rows, in micro-batches; empty lists where nothing is held out.
        held_out_targets: trained tokens of the held-out rows of all processes.
        base, base_revision: what a saved adapter names as its base model.
        save_extra: writes what belongs beside every saved adapter (tokenizer, prompt contract) into a directory.
    """

    directory: Path
    steps: Steps
    loss: Loss
    batcher: Batcher
    held_out: list[list[int]]
    held_out_targets: int
    keep_checkpoints: int
    base: str
    base_revision: str | None
    save_extra: Callable[[Path], None]


def trainer_class() -> type[Any]:
    """Made on request, because `import unsloth` replaces `trl.SFTTrainer` by its own class."""
    from trl import SFTTrainer

    class PackTrainer(SFTTrainer):
        """TRL's trainer; each batch of its loader is one optimizer step (`training.loader.Step`)."""

        control: Any  # transformers' TrainerControl

        def __init__(self, run: Run, **arguments: Any) -> None:
            self.run = run
            self.writing = False
            self.since_log: list[tuple[int, int, torch.Tensor]] = []  # step, micro-batch, loss
            self.best_loss = best_loss(run.directory)
            adapter = trainable(arguments["model"]) if hasattr(arguments["model"], "peft_config") else {}
            weights = {name: parameter.detach().clone() for name, parameter in adapter.items()}
            super().__init__(**arguments)
            for name, parameter in adapter.items():
                parameter.data = weights[name]  # TRL casts the adapters of quantized models to bfloat16

        def get_train_dataloader(self) -> Any:
            # as it is: accelerate would divide the rank's own steps among the ranks once more
            return self.run.steps.loader(pinned=self.args.device.type == "cuda")

        def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch: Any = None) -> torch.Tensor:
            """Forward and backward of one optimizer step. Returns this process's part of the loss, times processes."""
            model.train()
            # DDP averages gradients over processes; the loss is a mean over the tokens of all of them
            scale = self.accelerator.num_processes / inputs["targets"]
            total = torch.zeros((), device=self.args.device)
            last = len(inputs["packs"]) - 1
            for number, pack in enumerate(inputs["packs"]):
                sync = contextlib.nullcontext() if number == last else self.accelerator.no_sync(model)
                with sync:
                    loss = self.compute_loss(model, self._prepare_inputs(pack)) * scale
                    self.accelerator.backward(loss)
                self.since_log.append((inputs["number"], number, loss.detach()))
                total += loss.detach()
            return total

        def compute_loss(
            self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            """The summed loss of a micro-batch, without TRL's metrics, which wait for the card several times a step."""
            with self.compute_loss_context_manager():
                return self.run.loss(model, inputs)

        @torch.no_grad()
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """The token-weighted mean loss of the held-out rows; equal for any number of processes."""
            self.model.eval()
            total = torch.zeros((), device=self.args.device, dtype=torch.float64)
            for rows in self.run.held_out:
                total += self.compute_loss(self.model, self._prepare_inputs(self.run.batcher(rows))).double()
            self.model.train()
            if dist.is_initialized():
                dist.all_reduce(total)
            loss = float(total) / max(1, self.run.held_out_targets)
            if not finite(loss):
                raise WorkerFailed(
                    f"The eval loss is {loss} after step {self.state.global_step}.",
                    "Lower --lr, or look at the held-out rows. The last checkpoint is kept.",
                )
            self.log({"eval_loss": loss})
            if loss < self.best_loss:
                self.best_loss = loss
                self.save_best(loss)
            metrics = {"eval_loss": loss}
            # without this the trainer would evaluate the last step twice
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def save_best(self, loss: float) -> None:
            if not self.is_world_process_zero():
                return
            with paths.new_directory(self.run.directory / "best") as directory:
                self._save(str(directory))
                paths.write_json(directory / "best.json", {"step": self.state.global_step, "eval_loss": loss})

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.check_finite(logs)
            Trainer.log(self, logs, start_time)

        def check_finite(self, logs: dict[str, float] | None = None) -> None:
            """Stop at the first micro-batch since the last check whose loss is not a number.

            All processes check at once: what they log is their mean, and before they save there is nothing logged.
            Raises WorkerFailed with the step and the rows.
            """
            if logs is not None and "loss" not in logs:
                return
            losses, self.since_log = self.since_log, []
            norm = logs.get("grad_norm", 0.0) if logs else 0.0
            if logs is not None and finite(logs["loss"]) and finite(norm):
                return
            fault = first_fault(self.run.steps, losses)
            if fault is not None:
                raise WorkerFailed(
                    f"The loss is {fault.loss} at step {fault.step}, rows {some(fault.row_ids)}.",
                    "Look at them with os-data show, or lower --lr. The last checkpoint is kept.",
                )
            if logs is not None and not (self.args.fp16 and finite(logs["loss"])):  # the scaler skips such a step
                raise WorkerFailed(
                    f"The gradient norm is {norm} at step {self.state.global_step}, with a loss of {logs['loss']:.4g}.",
                    "Lower --lr or --max-grad-norm. The last checkpoint is kept.",
                )

        def _get_output_dir(self, trial: Any) -> str:
            """Checkpoints are written into a staging folder and renamed once they are complete."""
            base = Path(self.args.output_dir)
            return str(base / checkpoint.STAGING if self.writing else base)

        def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
            self.check_finite()
            self.writing = True
            try:
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self.writing = False
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                name = f"checkpoint-{self.state.global_step}"
                checkpoint.publish(Path(self.args.output_dir), name, self.run.keep_checkpoints)
            self.accelerator.wait_for_everyone()

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self.accelerator.unwrap_model(self.model).save_pretrained(directory)
            if (directory / "adapter_config.json").exists():
                name_base(directory, self.run.base, self.run.base_revision)
            (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            self.run.save_extra(directory)

        def floating_point_ops(self, inputs: Any) -> int:
            return 0  # transformers would look for input_ids in a step

    return PackTrainer


@dataclass(frozen=True)
class Fault:
    """A micro-batch whose loss is not a number."""

    step: int
    loss: float
    row_ids: list[int]


def first_fault(steps: Steps, losses: list[tuple[int, int, torch.Tensor]]) -> Fault | None:
    """The first faulty micro-batch of all processes, told to all of them; None where every loss is a number."""
    values = torch.stack([loss for _, _, loss in losses]).tolist() if losses else []
    mine = None
    for (number, micro, _), loss in zip(losses, values, strict=True):
        if not finite(loss):
            mine = Fault(number + 1, loss, steps.row_ids(steps.rows(number)[micro]))
            break
    found: list[Fault | None] = [mine]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, mine)
    return min((fault for fault in found if fault is not None), key=lambda fault: fault.step, default=None)


def finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def some(row_ids: list[int], shown: int = 20) -> str:
    return ", ".join(map(str, row_ids[:shown])) + (", ..." if len(row_ids) > shown else "")


def best_loss(run_dir: Path) -> float:
    """The eval loss of the adapter in `best/`, infinite where there is none yet."""
    record = run_dir / "best" / "best.json"
    return float(paths.read_json(record, "a best adapter")["eval_loss"]) if record.exists() else float("inf")


def finish(trainer: Any, run: Run, seconds: float) -> dict[str, Any]:
    """Save the last adapter at the top of the run directory. Returns the run's figures."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    plan = run.steps.plan
    figures = {
        "steps": trainer.state.global_step,
        "loss": history[-1]["loss"] if history else None,
        "eval_loss": evals[-1] if evals else None,
        "best_eval_loss": trainer.best_loss if evals else None,
        "tokens": sum(plan.tokens(step) for step in range(trainer.state.global_step)),
        "seconds": round(seconds, 1),
    }
    if trainer.is_world_process_zero():
        log.say(f"saving what was trained to {run.directory}")
        trainer._save(str(run.directory))
    return figures
