"""The check before any training: the rewards have to know the data's own answers as right, and others as wrong.

A row whose gold answer cannot earn the top score teaches nothing, however good the model becomes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from opensloth.rewards.quantities import quantity
from opensloth.rewards.registry import TOP, default_tags, get

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import Tags

FAILURES = "gold_failures.jsonl"  # in the run directory: the rows that were found
WORKING = "This is the working."
OTHER = "987654321"


@dataclass(frozen=True)
class GoldFailure:
    """A row that the rewards misjudge. `row` is its row_id, or its place among the rows that were checked."""

    row: Any
    answer: str
    reason: str


def gold_check(
    rows: Iterable[Mapping[str, Any]], *, rewards: Iterable[str] = tuple(TOP), tags: "Tags | None" = None
) -> list[GoldFailure]:
    """The rows whose own answer, in the expected format, does not get the top score, or for which a wrong one does.

    `rows` have a column `answer`, and perhaps `row_id`. Of `rewards`, those with a known top score are asked; the
    user's own and `demo_reward` have none. A wrong answer has to cost `math_answer` and `math_number` their top.
    """
    tags = tags or default_tags()
    asked = [(name, get(name, tags=tags)) for name in rewards if name in TOP]

    @cache
    def fault(gold: str) -> str:
        """What is wrong with an answer, or nothing. Many rows have the same."""
        completions = [tags.turn(WORKING, text).removeprefix(tags.working_start) for text in (gold, other_than(gold))]
        for reward, function in asked:
            right, wrong = function(prompts=["", ""], completions=completions, answer=[gold, gold])
            if right != TOP[reward]:
                return f"{reward} gives its own answer {right}, not {TOP[reward]}"
            if reward != "math_format" and wrong == TOP[reward]:
                return f"{reward} gives {other_than(gold)!r} the top score too"
        return ""

    failures = []
    for place, row in enumerate(rows):
        name, answer = row.get("row_id", place), row.get("answer")
        if answer is None or not str(answer).strip():
            failures.append(GoldFailure(name, "", "there is no answer"))
        elif reason := fault(str(answer)):
            failures.append(GoldFailure(name, str(answer), reason))
    return failures


def other_than(gold: str) -> str:
    """An answer that is wrong beside `gold`: the next number, or a number where no number is expected."""
    number = quantity(gold)
    return str(number.value + 1) if number is not None else OTHER
