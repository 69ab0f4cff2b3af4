"""rollouts/step_N.parquet: every completion that was trained on, with its scores. Written, then renamed."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from opensloth.data.tokens.prompts import PromptRow
from opensloth.evaluation.score import Judged
from opensloth.rollout.generate import Rollout
from opensloth.training.grpo.held_out import gathered
from opensloth.training.grpo.prompts import Asked
from opensloth.training.trainer import RunFiles


@dataclass(frozen=True)
class Written:
    """One completion. `cut`: it reached --max-new. `right` needs the format too."""

    row_id: int
    question: str
    completion: str
    answer: str
    tokens: int
    cut: bool
    in_format: bool
    right: bool

    @classmethod
    def of(cls, prompt: PromptRow, rollout: Rollout, judged: Judged, stops: Sequence[int]) -> "Written":
        return cls(
            row_id=prompt.row_id,
            question=str(prompt.messages[-1].get("content")),
            completion=judged.text,
            answer=prompt.answer,
            tokens=len(rollout.ids),
            cut=rollout.ids[-1] not in stops,
            in_format=judged.in_format,
            right=judged.right,
        )


def write(
    directory: Path,
    step: int,
    completions: Sequence[Written],
    scores: Mapping[str, Sequence[float]],
    advantages: Sequence[float],
) -> None:
    """One table for each batch of completions, named after the first step that trains on it.

    Args:
        scores: of each reward by name, unweighted; NaN where it could not judge.
    """
    directory.mkdir(exist_ok=True)
    columns = {name: [getattr(one, name) for one in completions] for name in Written.__dataclass_fields__}
    columns |= {f"reward_{name}": list(values) for name, values in scores.items()}
    columns["advantage"] = list(advantages)
    path = directory / f"step_{step}.parquet"
    temporary = directory / f".{path.name}.{os.getpid()}"
    pq.write_table(pa.table(columns), temporary)
    os.replace(temporary, path)


class KeepsRollouts:
    """A mixin before TRL's GRPO trainer and `held_out.HeldOut`: completions are judged, counted and written."""

    run: Any
    files: RunFiles
    asked: Asked | None
    rollouts: list[Rollout]
    texts: list[str]  # of the rollouts
    judged: Callable[[Rollout, str, str], Judged]
    num_generations: int
    reward_func_names: list[str]
    reward_weights: torch.Tensor
    state: Any
    accelerator: Any
    _metrics: dict[str, dict[str, list[float]]]
    _logs: dict[str, Any]

    def keep_rollouts(self) -> None:
        """Judge this process's completions, and write those of all processes to rollouts/."""
        assert self.asked is not None
        judged = [
            self.judged(rollout, text, prompt.answer)
            for rollout, text, prompt in zip(self.rollouts, self.texts, self.asked["prompts"], strict=True)
        ]
        mine = [
            Written.of(prompt, rollout, one, self.run.stops)
            for prompt, rollout, one in zip(self.asked["prompts"], self.rollouts, judged, strict=True)
        ]
        found = gathered(mine)
        if self.run.contract.tags and any(one.answer for one in found):
            share = sum(bool(one.right) for one in found) / len(found)
            self._metrics["train"]["pass_rate"].append(share)
        if self.accelerator.is_main_process:
            scores = {name: list(self._logs["rewards"][name]) for name in self.reward_func_names}
            step = self.state.global_step + 1
            write(self.files.directory / "rollouts", step, found, scores, list(self._logs["advantages"]))

    def count_flat_groups(self) -> None:
        """The share of groups without a spread of rewards: TRL counts what the advantages are divided by."""
        scores = torch.tensor([list(self._logs["rewards"][name]) for name in self.reward_func_names])
        totals = (scores * self.reward_weights.cpu()[:, None]).nansum(0).view(-1, self.num_generations)
        flat = torch.isclose(totals, totals[:, :1]).all(1)
        self._metrics["train"]["frac_reward_zero_std"][-1] = float(flat.float().mean())
