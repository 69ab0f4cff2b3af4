"""SFT on TRL's trainer, with our steps: the rank's own packs, the token mean over all processes, atomic checkpoints."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from opensloth.engine.compiled import eager
from opensloth.engine.model import Loss
from opensloth.errors import WorkerFailed
from opensloth.training.costs import Costs
from opensloth.training.laps import FirstLap, Laps
from opensloth.training.sft.late_log import LogsLate
from opensloth.training.sft.loader import Batcher, Step, Steps
from opensloth.training.stopping import StopOnSignal
from opensloth.training.trainer import Fault, KeepsRun, RunFiles, finite, kept_weights


@dataclass(frozen=True)
class Run:
    """What the trainer needs to know beyond TRL's arguments.

    Attributes:
        steps: the training data of this process.
        loss: the engine's loss of a micro-batch.
        held_out: this process's share of the held-out rows, in micro-batches; empty lists where nothing is held out.
        held_out_targets: trained tokens of the held-out rows of all processes.
        native: whether the engine is.
        recorded: whether passes are (engine/graphed.py): gradients then come beside autograd, where DDP does not see
            them.
    """

    files: RunFiles
    steps: Steps
    loss: Loss
    batcher: Batcher
    held_out: list[list[int]]
    held_out_targets: int
    native: bool
    recorded: bool = False


def trainer_class() -> type[Any]:
    """Made on request, because `import unsloth` replaces `trl.SFTTrainer` by its own class."""
    from trl import SFTTrainer

    class PackTrainer(LogsLate, KeepsRun, SFTTrainer):
        """TRL's trainer; each batch of its loader is one optimizer step (`training.loader.Step`)."""

        control: Any  # transformers' TrainerControl
        stop: StopOnSignal | None = None

        def __init__(self, run: Run, **arguments: Any) -> None:
            self.run, self.files = run, run.files
            self.since_log = []
            self.laps = Laps(arguments["args"].device)
            self.costs = Costs(arguments["args"].device, self.laps)
            self.best_loss = self.best_so_far("eval_loss", float("inf"))
            put_back = kept_weights(arguments["model"])
            super().__init__(**arguments)
            put_back()
            self.add_callback(FirstLap(self.laps))

        def get_train_dataloader(self) -> Any:
            # as it is: accelerate would divide the rank's own steps among the ranks once more
            return self.run.steps.loader(pinned=self.args.device.type == "cuda")

        def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch: Any = None) -> torch.Tensor:
            """Forward and backward of one optimizer step. Returns this process's part of the loss, times processes."""
            self.ready(model, native=self.run.native)
            self.costs.sync.watch(model)
            # DDP averages gradients over processes; the loss is a mean over the tokens of all of them
            scale = self.accelerator.num_processes / inputs["targets"]
            total = torch.zeros((), device=self.args.device)
            last = len(inputs["packs"]) - 1
            for number, pack in enumerate(inputs["packs"]):
                by_ddp = number == last and not self.run.recorded
                with contextlib.nullcontext() if by_ddp else self.accelerator.no_sync(model):
                    loss = self.compute_loss(model, self._prepare_inputs(pack)) * scale
                    self.accelerator.backward(loss)
                self.costs.sync.backward_done()
                self.since_log.append(((inputs["number"], number), loss.detach()))
                total += loss.detach()
            if self.run.recorded:
                self.costs.sync.mean(self.trained)
            self.costs.step_done(inputs["tokens"])
            return total

        def compute_loss(
            self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            """The summed loss of a micro-batch, without TRL's metrics, which wait for the card several times a step."""
            with self.compute_loss_context_manager():
                return self.run.loss(model, inputs)

        def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
            """A micro-batch on the device. The host does not wait for it, nor for all that the card still has to do."""
            device = self.args.device
            return {
                name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Log the loss of the held-out rows, and keep the best weights. Raises as `held_out_loss`."""
            with self.laps.pause():
                loss = self.held_out_loss()
                self.log({"eval_loss": loss})
                if loss < self.best_loss:
                    self.best_loss = loss
                    self.save_best({"eval_loss": loss})
            metrics = {"eval_loss": loss}
            # without this the trainer would evaluate the last step twice
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        @torch.no_grad()
        def held_out_loss(self) -> float:
            """The token-weighted mean loss of the held-out rows; equal for any number of processes.

            Raises Dropped on all processes, once each is through, where any of them was asked to stop meanwhile.
            """
            self.model.eval()
            total = torch.zeros((), device=self.args.device, dtype=torch.float64)
            with eager():
                for rows in self.run.held_out:
                    if self.stop and self.stop.asked():
                        break
                    total += self.compute_loss(self.model, self._prepare_inputs(self.run.batcher(rows))).double()
            self.model.train()
            if self.stop:
                self.stop.drop_if_asked()
            if dist.is_initialized():
                dist.all_reduce(total)
            loss = float(total) / max(1, self.run.held_out_targets)
            if not finite(loss):
                raise WorkerFailed(
                    f"The eval loss is {loss} after step {self.state.global_step}.",
                    "Lower --lr, or look at the held-out rows. The last checkpoint is kept.",
                )
            return loss

        def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
            with self.laps.pause():
                super()._save_checkpoint(model, trial)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.check_finite(logs)
            Trainer.log(self, logs | self.costs.a_step() if "loss" in logs else logs, start_time)

        def rows_of(self, step: int) -> list[int]:
            return [row for rows in self.run.steps.rows(step) for row in self.run.steps.row_ids(rows)]

        def describe_fault(self, micro_batch: tuple[int, int], loss: float) -> Fault:
            number, place = micro_batch
            return Fault(number + 1, loss, self.run.steps.row_ids(self.run.steps.rows(number)[place]))

    return PackTrainer


def figures(trainer: Any, run: Run, seconds: float) -> dict[str, Any]:
    """What result.json says of the run."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    plan = run.steps.plan
    return {
        "steps": trainer.state.global_step,
        "loss": history[-1]["loss"] if history else None,
        "eval_loss": evals[-1] if evals else None,
        "best_eval_loss": trainer.best_loss if evals else None,
        "tokens": sum(plan.step_tokens[: trainer.state.global_step]),
        "seconds": round(seconds, 1),
    }
