"""What a run tells while it works: TensorBoard, metrics.jsonl, a line for the person; that processes agree."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from opensloth import log, paths
from opensloth.engine.lora import weights_hash
from opensloth.errors import WorkerFailed
from opensloth.launch import pulse
from opensloth.training.everyone import of_all

LINE_SECONDS = 1.0  # between two lines for the person


class Metrics(TrainerCallback):
    """Rank 0: adds progress, speed and memory to every log, and writes it to metrics.jsonl and TensorBoard.

    Args:
        epochs: passes over the data that are complete after each step.
    """

    def __init__(self, run_dir: Path, epochs: Sequence[float], device: torch.device, tensorboard: bool) -> None:
        self.epochs = epochs
        self.device = device
        self.tensorboard = run_dir / "tensorboard" if tensorboard else None
        self.path = run_dir / "metrics.jsonl"
        self.writer: Any = None

    def add_speed(self, logs: dict[str, Any], steps: range, seconds: float) -> None:
        """Put into `logs` how fast `steps` (numbers from 0) were."""
        raise NotImplementedError

    def line(self, logs: dict[str, Any]) -> str:
        """What a person reads of a training log."""
        raise NotImplementedError

    def eval_line(self, logs: dict[str, Any]) -> str:
        """What a person reads of an evaluation."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.keep_before(self.first_logged(state))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a cut-off run logged after the checkpoint that this one resumes from
            self.writer = SummaryWriter(str(self.tensorboard), purge_step=self.first_logged(state), flush_secs=5)
        self.step, self.at, self.shown = state.global_step, time.monotonic(), 0.0
        self.begin = (self.step, self.at)

    @staticmethod
    def first_logged(state: TrainerState) -> int:
        """The first step that this call of the run logs. Before step 1 what it starts from is logged, as step 0."""
        return int(state.global_step) + 1 if state.global_step else 0

    def keep_before(self, step: int) -> None:
        """Drop what was logged from `step` on: a resumed run logs it again."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []  # a killed run's last is half
        kept = [line for line in lines if json.loads(line)["step"] < step]
        paths.write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        logs.pop("total_flos", None)
        step = state.global_step
        if step:
            logs["epoch"] = round(self.epochs[step - 1], 4)
        if "loss" in logs:
            now, steps = time.monotonic(), range(self.step, step)
            timed = "seconds/step" in logs  # by the device; a log that comes late finds the host at another step
            seconds = logs["seconds/step"] * len(steps) if timed else max(now - self.at, 1e-9)
            logs["seconds/step"] = round(seconds / max(1, len(steps)), 4)
            self.add_speed(logs, steps, seconds)
            logs["memory_gib"] = round(peak_memory(self.device) / 2**30, 3)
            self.step, self.at = step, now
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **logs}) + "\n")
        if self.writer:
            for name, value in logs.items():
                group, short = ("eval", name.removeprefix("eval_")) if name.startswith("eval_") else ("train", name)
                self.writer.add_scalar(f"{group}/{short}", value, step)
            self.writer.flush()
        self.show(logs, step)

    def show(self, logs: dict[str, Any], step: int) -> None:
        total, now = len(self.epochs), time.monotonic()
        if any(name.startswith("eval_") for name in logs):
            log.say(f"step {step}/{total}  {self.eval_line(logs)}")
        elif "loss" in logs and (now - self.shown >= LINE_SECONDS or step in (1, total)):
            self.shown = now
            done, since = step - self.begin[0], now - self.begin[1]
            eta = (total - step) * since / max(done, 1)
            log.say(f"step {step}/{total}  {self.line(logs)}  lr {logs['learning_rate']:.2e}  {duration(eta)} left")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.writer:
            self.writer.close()


class Alive(TrainerCallback):
    """Tells the watcher of this process that a step is complete (launch/pulse.py)."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        pulse.mark(state.global_step)


class SameAdapter(TrainerCallback):
    """Every `every` steps all processes compare their adapters, which must be equal to the bit.

    Args:
        rows: the ids of the rows that this process trains on in a step (from 0).
    """

    def __init__(self, every: int, rows: Callable[[int], list[int]]) -> None:
        self.every = every
        self.rows = rows
        self.sound = 0  # the last step after which they were equal

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sound = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        step = state.global_step
        if step % self.every:
            return
        hashes = of_all(weights_hash(model))
        if len(set(hashes)) > 1:
            rows = of_all(sorted({row for one in range(self.sound, step) for row in self.rows(one)}))
            check_equal(hashes, rows, self.sound, step)
        self.sound = step


def check_equal(hashes: list[str], rows: list[list[int]], sound: int, step: int) -> None:
    """Raise WorkerFailed, naming the processes and their rows, where weights differ after `step`.

    Args:
        rows: of each process, what it trained on since `sound`, the last step after which all were equal.
    """
    common = max(hashes, key=hashes.count)  # of two that differ nobody knows which is right
    strays = [rank for rank, found in enumerate(hashes) if found != common]
    if strays:
        named = "; ".join(f"process {rank} trained on rows {some(rows[rank])}" for rank in strays)
        raise WorkerFailed(
            f"After step {step} the adapter of process {', '.join(map(str, strays))} is not that of the others; "
            f"after step {sound} it was. Since then {named}.",
            "A card or a connection is faulty, or those rows make it compute otherwise. "
            f"Checkpoints up to step {sound} are sound.",
        )


def some(row_ids: list[int], shown: int = 20) -> str:
    return ", ".join(map(str, row_ids[:shown])) + (", ..." if len(row_ids) > shown else "")


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
