"""What an SFT run tells of its steps."""

from pathlib import Path
from typing import Any

import torch

from opensloth.training.callbacks import Metrics
from opensloth.training.load import evenness
from opensloth.training.sft.loader import Steps


class StepsMetrics(Metrics):
    """Real tokens a second, and how full and even the packs of all processes are."""

    def __init__(self, run_dir: Path, steps: Steps, device: torch.device, tensorboard: bool) -> None:
        super().__init__(run_dir, steps.plan.epoch, device, tensorboard)
        self.steps = steps

    def add_speed(self, logs: dict[str, Any], steps: range, seconds: float) -> None:
        logs["tokens_per_second"] = round(sum(map(self.steps.plan.tokens, steps)) / seconds, 1)
        logs |= evenness(list(map(self.steps.loads, steps)))

    def line(self, logs: dict[str, Any]) -> str:
        return f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s"

    def eval_line(self, logs: dict[str, Any]) -> str:
        return f"eval loss {logs['eval_loss']:.4f}"
