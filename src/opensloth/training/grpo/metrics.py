"""What a GRPO run tells of its steps."""

from pathlib import Path
from typing import Any

import torch

from opensloth.data.plan.batches import Batches
from opensloth.training.callbacks import Metrics


class BatchesMetrics(Metrics):
    """Completion tokens a second, everything that a step does counted."""

    def __init__(self, run_dir: Path, plan: Batches, group_size: int, device: torch.device, tensorboard: bool) -> None:
        super().__init__(run_dir, plan.epoch, device, tensorboard)
        self.plan = plan
        self.group_size = group_size

    def add_speed(self, logs: dict[str, Any], steps: range, seconds: float) -> None:
        batches = {self.plan.at(step) for step in steps}
        completions = sum(len(self.plan.batches[batch]) for batch in batches) * self.group_size
        if "seconds/train" in logs:
            known = sum(logs.get(f"seconds/{part}", 0.0) for part in ("rollout", "wait", "rewards", "train"))
            logs["seconds/other"] = round(max(0.0, logs["seconds/step"] - known), 4)
        if "completions/mean_length" in logs:
            logs["tokens_per_second"] = round(logs["completions/mean_length"] * completions / seconds, 1)

    def line(self, logs: dict[str, Any]) -> str:
        if "reward" not in logs:  # one more step on completions that were logged before
            return f"loss {logs['loss']:.4f}  {logs['seconds/step']:.1f} s"
        parts = [f"reward {logs['reward']:.3f}"]
        if "pass_rate" in logs:
            parts.append(f"right {logs['pass_rate']:.1%}")
        parts.append(f"length {logs['completions/mean_length']:.0f}")
        return "  ".join([*parts, f"{logs['seconds/step']:.1f} s"])

    def eval_line(self, logs: dict[str, Any]) -> str:
        if "eval_pass_at_1" not in logs:
            return f"held out: reward {logs['eval_reward']:.3f}"
        right, form = logs["eval_pass_at_1"], logs["eval_format_rate"]
        return f"held out: {right:.1%} right, {form:.1%} in the format, reward {logs['eval_reward']:.3f}"
