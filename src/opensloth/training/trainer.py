"""What our trainers add to transformers' and TRL's: whole checkpoints, adapters that name their base, no NaN."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer

from opensloth import paths
from opensloth.engine.lora import name_base, trainable
from opensloth.errors import WorkerFailed
from opensloth.launch.failure import unwritable
from opensloth.training import checkpoint
from opensloth.training.callbacks import some
from opensloth.training.costs import Costs
from opensloth.training.everyone import of_all


@dataclass(frozen=True)
class RunFiles:
    """The run directory, and what belongs into every adapter that is saved in it.

    Attributes:
        base, base_revision: what a saved adapter names as its base model.
        save_extra: writes what belongs beside every saved adapter (tokenizer, prompt contract) into a directory.
    """

    directory: Path
    keep_checkpoints: int
    base: str
    base_revision: str | None
    save_extra: Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """A micro-batch whose loss is not a number. `step` counts from 1."""

    step: int
    loss: float
    row_ids: list[int]


class KeepsRun:
    """A mixin before TRL's trainers, which need `files`, `since_log` and `costs` before they are made.

    Methods call transformers' Trainer by name where TRL's own version does more than is wanted (model cards, metrics
    that wait for the card).
    """

    files: RunFiles
    since_log: list[tuple[Any, torch.Tensor]]  # what a micro-batch is known by, and its loss
    args: Any
    state: Any
    model: Any
    accelerator: Any
    saved_step = 0  # the last one that has a checkpoint
    costs: Costs
    readied = False
    writing = False  # whether checkpoints go to the staging folder at the moment

    def rows_of(self, step: int) -> list[int]:
        """The ids of the rows that this process trains on in a step (from 0)."""
        raise NotImplementedError

    def describe_fault(self, micro_batch: Any, loss: float) -> Fault:
        """What a person needs to find a micro-batch of `since_log` by."""
        raise NotImplementedError

    @cached_property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that train: a walk over all modules takes the host milliseconds, and a step took several."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def ready(self, model: torch.nn.Module, native: bool) -> None:
        """Bring a model, which may be wrapped in DDP, into the mode of training. A walk over all modules takes the host
        ten milliseconds, so it is made once, and again where somebody else may have been at them.

        Args:
            native: whether nobody but our evaluations and rollouts changes the mode.
        """
        if not self.readied:
            model.__dict__["zero_grad"] = self.drop_gradients
        if not self.readied or not native or not self.model.training:
            model.train()
        self.readied = True

    def drop_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

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
        fault = first_fault([loss for _, loss in losses], lambda at, loss: self.describe_fault(losses[at][0], loss))
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

    def store_flos(self) -> None:
        """Nothing: transformers counts no operations of our batches. It adds their number up over the processes with
        each log, and every host then waits for its card before it gives it the next step."""

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints are written into a staging folder and renamed once they are complete."""
        base = Path(self.args.output_dir)
        return str(base / checkpoint.STAGING if self.writing else base)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()
        directory, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.writing = True
        try:
            Trainer._save_checkpoint(self, model, trial)
            self.accelerator.wait_for_everyone()
            if self.leads:
                checkpoint.publish(directory, name, self.files.keep_checkpoints)
            self.saved_step = self.state.global_step
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (refused := unwritable(error)):
                raise
            checkpoint.clear(directory)  # half of a checkpoint is of no use, and its space is
            raise WorkerFailed(
                f"{name} could not be saved. {refused}",
                "Free space, or give the run its rights back: the same command goes on from the checkpoint before.",
            ) from error
        finally:
            self.writing = False
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        # the reference of GRPO is made anew from where the run began; transformers would load it in place of the rest
        adapters = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
        model.save_pretrained(directory, **adapters)
        if (directory / "adapter_config.json").exists():
            name_base(directory, self.files.base, self.files.base_revision)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        self.files.save_extra(directory)

    def save_best(self, record: dict[str, Any]) -> None:
        """The weights as they are now into best/, with what they reached."""
        if self.leads:
            with paths.new_directory(self.files.directory / "best") as directory:
                self._save(str(directory))
                paths.write_json(directory / "best.json", {"step": self.state.global_step, **record})

    def best_so_far(self, figure: str, default: float) -> float:
        """The figure of the adapter in best/, `default` where there is none yet. One that it lacks cannot be beaten."""
        record = self.files.directory / "best" / "best.json"
        return float(paths.read_json(record, "a best adapter").get(figure, "inf")) if record.exists() else default

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would look for input_ids in a step

    @property
    def leads(self) -> bool:
        return bool(self.accelerator.is_main_process)


def kept_weights(model: Any) -> Callable[[], None]:
    """Remember the adapter's weights; the function that is returned puts them back.

    TRL casts the adapters of quantized models to bfloat16 when a trainer is made.
    """
    adapter = trainable(model) if hasattr(model, "peft_config") else {}
    weights = {name: parameter.detach().clone() for name, parameter in adapter.items()}

    def put_back() -> None:
        for name, parameter in adapter.items():
            parameter.data = weights[name]

    return put_back


def first_fault(losses: Sequence[torch.Tensor], describe: Callable[[int, float], Fault]) -> Fault | None:
    """The first faulty micro-batch of all processes, told to all of them; None where every loss is a number.

    Args:
        losses: this process's losses, oldest first.
        describe: tells the micro-batch of a loss, by its place in `losses`.
    """
    values = torch.stack(list(losses)).tolist() if losses else []
    mine = next((describe(place, loss) for place, loss in enumerate(values) if not finite(loss)), None)
    return min((fault for fault in of_all(mine) if fault is not None), key=lambda fault: fault.step, default=None)


def finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
