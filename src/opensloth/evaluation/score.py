"""How good completions are, how sure that is, and whether one model is better than another on the same problems."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opensloth.data.prompt.contract import PromptContract
from opensloth.evaluation.generate import Completion
from opensloth.rewards.grade import Grade, grade
from opensloth.rewards.reading import read

RIGHT = (Grade.EXACT, Grade.EQUAL)
Z = 1.959964  # the normal quantile of a 95 % interval


@dataclass(frozen=True)
class Judged:
    """One completion: `right` needs the format too, for nobody can find an answer without it."""

    text: str
    tokens: int
    in_format: bool
    right: bool


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def judge(contract: PromptContract, completion: Completion, answer: str) -> Judged:
    """Judge a completion as it follows the generation prompt.

    It is in the format when it and the generation prompt before it are exactly one assistant turn. Its answer is right
    when it equals the expected one in any form, as the rewards judge it; a comparison without an end is a wrong one.

    Raises:
        ValueError: a contract without tags, which has no format to judge.
    """
    if contract.tags is None:
        raise ValueError(f"the contract {contract.name} has no tags")
    found = read(completion.text, contract.tags)
    right = found.exact and grade(found.solution or "", answer) in RIGHT
    return Judged(completion.text, completion.tokens, found.exact, right)


def share(flags: Sequence[bool]) -> Interval:
    """The share of True, with Wilson's score interval (doi 10.1080/01621459.1927.10502953)."""
    n, p = len(flags), sum(flags) / len(flags)
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(first: Sequence[float], other: Sequence[float]) -> Interval:
    """The mean of `other - first` over the same problems, with the normal interval of paired differences.

    Of each problem True or False, or the share of right answers where it was answered several times.
    """
    differences = [b - a for a, b in zip(first, other, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def pass_at(k: int, groups: Sequence[Sequence[bool]]) -> float:
    """The unbiased estimate of pass@k from groups of n >= k sampled answers (arXiv 2107.03374, equation 1)."""
    total = 0.0
    for group in groups:
        n, right = len(group), sum(group)
        total += 1.0 - math.comb(n - right, k) / math.comb(n, k)
    return total / len(groups)
