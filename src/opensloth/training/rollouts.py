"""rollouts/step_N.parquet: every completion that was trained on, with its scores. Written, then renamed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opensloth.data.tokens.prompts import PromptRow
from opensloth.evaluation.score import Judged
from opensloth.rollout.generate import Rollout


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
