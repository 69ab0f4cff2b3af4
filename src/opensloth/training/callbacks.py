"""What a run tells while it works: TensorBoard, metrics.jsonl, a line for the person; and how it stops on a signal."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from opensloth import log, paths
from opensloth.engine.lora import weights_hash
from opensloth.errors import WorkerFailed
from opensloth.launch.stop import StopRequest
from opensloth.training.loader import Steps

LINE_SECONDS = 1.0  # between two lines for the person


class Metrics(TrainerCallback):
    """Rank 0: adds speed, padding, progress and memory to every log, and writes it to metrics.jsonl and TensorBoard."""

    def __init__(self, run_dir: Path, steps: Steps, device: torch.device, tensorboard: bool) -> None:
        self.steps = steps
        self.plan = steps.plan
        self.device = device
        self.tensorboard = run_dir / "tensorboard" if tensorboard else None
        self.path = run_dir / "metrics.jsonl"
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.keep_until(state.global_step)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a cut-off run logged after the checkpoint that this one resumes from
            self.writer = SummaryWriter(str(self.tensorboard), purge_step=state.global_step + 1, flush_secs=5)
        self.step, self.at, self.shown = state.global_step, time.monotonic(), 0.0
        self.begin = (self.step, self.at)

    def keep_until(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run logs it again."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []  # a killed run's last is half
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        paths.write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        logs.pop("total_flos", None)
        step = state.global_step
        if step:
            logs["epoch"] = round(self.plan.epoch[step - 1], 4)
        if "loss" in logs:
            self.add_speed(logs, step)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **logs}) + "\n")
        if self.writer:
            for name, value in logs.items():
                group, short = ("eval", name.removeprefix("eval_")) if name.startswith("eval_") else ("train", name)
                self.writer.add_scalar(f"{group}/{short}", value, step)
            self.writer.flush()
        self.show(logs, step)

    def add_speed(self, logs: dict[str, Any], step: int) -> None:
        now = time.monotonic()
        tokens = sum(self.plan.tokens(number) for number in range(self.step, step))
        logs["tokens_per_second"] = round(tokens / max(now - self.at, 1e-9), 1)
        slots = sum(self.steps.slots(number) for number in range(self.step, step))
        logs["padding"] = round(1 - tokens / slots, 4) if slots else 0.0
        logs["memory_gib"] = round(peak_memory(self.device) / 2**30, 3)
        self.step, self.at = step, now

    def show(self, logs: dict[str, Any], step: int) -> None:
        total, now = len(self.plan.steps), time.monotonic()
        if "eval_loss" in logs:
            log.say(f"step {step}/{total}  eval loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and (now - self.shown >= LINE_SECONDS or step in (1, total)):
            self.shown = now
            done, since = step - self.begin[0], now - self.begin[1]
            eta = (total - step) * since / max(done, 1)
            log.say(
                f"step {step}/{total}  loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s  "
                f"lr {logs['learning_rate']:.2e}  {duration(eta)} left"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.writer:
            self.writer.close()


class StopOnSignal(TrainerCallback):
    """A request to stop, on any process: all save the step they have just completed, and end."""

    def __init__(self) -> None:
        self.request = StopRequest().install()
        self.stopped = False
        # A group on the CPU: to ask the others never makes the host wait for its card.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stop = self.request.name is not None
        if self.group is not None:
            flag = torch.tensor(int(stop))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            stop = bool(flag)
        if stop and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class SameAdapter(TrainerCallback):
    """Every `every` steps all processes compare their adapters, which must be equal to the bit."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            hashes = [""] * dist.get_world_size()
            dist.all_gather_object(hashes, weights_hash(model))
            check_equal(hashes, state.global_step)


def check_equal(hashes: list[str], step: int) -> None:
    """Raise WorkerFailed, naming the processes, where their weights differ after `step`."""
    strays = [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]
    if strays:
        raise WorkerFailed(
            f"After step {step} the adapter of process 0 is not that of process {', '.join(strays)}.",
            "A card or a connection is faulty. Checkpoints up to the comparison before (--check-every) are sound.",
        )


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that this process has used so far: of the card, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def duration(seconds: float) -> str:
    """As people read a clock: 0:07, 12:05, 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
