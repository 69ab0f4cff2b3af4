"""How far two runs of the same job are apart: losses and gradient norms step by step, and the weights at the end."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from opensloth import paths
from opensloth.errors import Unequal
from opensloth.rollout.recorded import load

FIGURES = ("loss", "grad_norm", "eval_loss")


class Difference(NamedTuple):
    """A difference and its place: `step 3`, or the name of a tensor."""

    value: float
    where: str


@dataclass(frozen=True)
class Completions:
    """Of GRPO: completions that the first run drew, those that the other drew for the same places, and how many alike.

    The other run trained on those of the first. `stray` are draws that only one of the runs made, or one made twice.
    """

    drawn: int
    alike: int
    stray: int


@dataclass(frozen=True)
class Equality:
    """What `os-train verify` found.

    Attributes:
        steps: how many steps the first run logged.
        figures: the largest difference of each of FIGURES over the steps. Of losses |a - b| / max(1, |a|), because
            the loss of GRPO is near 0; of gradient norms |a - b| / |a|.
        tensors: |a - b| / |a| in 2-norms, for each trained tensor at the end.
        gradients: the smallest and the largest gradient norm of the first run.
        same_hash: how many processes of the other run ended with the weights of its process 0.
    """

    steps: int
    figures: dict[str, Difference]
    tensors: dict[str, float]
    gradients: tuple[float, float]
    same_hash: int
    processes: int
    completions: Completions | None

    @property
    def adapter(self) -> Difference:
        return largest((value, name) for name, value in self.tensors.items())

    def faults(self, tolerance: float) -> list[str]:
        """What is beyond `tolerance`, each as a sentence; empty for equal runs."""
        worst = {**self.figures, "adapter": self.adapter}
        found = [
            f"{name} differs by {difference.value:.2g} ({difference.where})"
            for name, difference in worst.items()
            if not difference.value <= tolerance
        ]
        if self.same_hash < self.processes:
            found.append(f"only {self.same_hash} of {self.processes} processes ended with the weights of process 0")
        if self.completions and self.completions.stray:
            found.append(f"{self.completions.stray} completions were drawn in one of the runs alone, or twice")
        return found


def compare(first: Path, other: Path, processes: int) -> Equality:
    """Compare two finished run directories; `processes` is how many trained the other.

    Raises:
        Unequal: the first run logged no step, or its gradients are all 0: equal runs would then prove nothing.
    """
    one, two = metrics(first), metrics(other)
    norms = [value for _, value in sorted(one["grad_norm"].items())]
    if not any(norms):
        raise Unequal(
            "Nothing was verified: the gradient norm is 0 in every step.",
            "Rows without trained tokens, or rewards without a spread in any group, teach nothing: choose others.",
        )
    figures = {name: over_steps(one[name], two[name], floor=name != "grad_norm") for name in FIGURES}
    result = paths.read_json(other / "result.json", "a finished run")
    return Equality(
        steps=len(norms),
        figures={name: found for name, found in figures.items() if found is not None},
        tensors=tensors(weights(first), weights(other)),
        gradients=(min(norms), max(norms)),
        same_hash=int(result["processes_with_these_weights"]),
        processes=processes,
        completions=completions(first, other),
    )


def metrics(run_dir: Path) -> dict[str, dict[int, float]]:
    """Each of FIGURES by step, from metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {name: {entry["step"]: entry[name] for entry in entries if name in entry} for name in FIGURES}


def over_steps(one: dict[int, float], two: dict[int, float], floor: bool) -> Difference | None:
    """The largest difference over all steps of either run; None where neither has the figure."""
    if not one and not two:
        return None
    nan = math.nan  # of a step that one of them lacks
    return largest((apart(one.get(step, nan), two.get(step, nan), floor), f"step {step}") for step in {*one, *two})


def apart(one: float, two: float, floor: bool) -> float:
    scale = max(abs(one), 1.0) if floor else abs(one)
    return abs(one - two) / scale if scale else (0.0 if one == two else math.inf)


def largest(found: Iterable[tuple[float, str]]) -> Difference:
    """The largest; what is not a number counts as infinite."""
    return max(Difference(value if value == value else math.inf, where) for value, where in found)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """What was trained: the adapter at the top of a run directory, or the whole model."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(run_dir.glob("*.safetensors")):
        found |= load_file(path)
    return found


def tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, float]:
    """|a - b| / |a| in 2-norms by name; infinite for a tensor that one of them lacks, or that is not finite."""
    found = {}
    for name in sorted({*one, *two}):
        a, b = one.get(name), two.get(name)
        if a is None or b is None or a.shape != b.shape:
            found[name] = math.inf
            continue
        gap, norm = float((a.double() - b.double()).norm()), float(a.double().norm())
        found[name] = gap / norm if norm else (0.0 if gap == 0 else math.inf)
    return found


def completions(first: Path, other: Path) -> Completions | None:
    """How the draws of the other run compare with the recorded ones; None where nothing was recorded."""
    one, two = load(first), load(other)
    if not one:
        return None
    shared = one.keys() & two.keys()
    alike = sum(ids_of(one[draw]) == ids_of(two[draw]) for draw in shared)
    twice = sum(len(found) - 1 for run in (one, two) for found in run.values())
    return Completions(len(one), alike, len(one.keys() ^ two.keys()) + twice)


def ids_of(found: Sequence[tuple[list[int], list[float]]]) -> list[int]:
    return found[0][0]
