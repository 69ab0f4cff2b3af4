"""The rewards of `--task math`: the form, the answer, the number. docs/rewards.md has every score."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opensloth.errors import UserError
from opensloth.rewards.grade import Grade, grade
from opensloth.rewards.quantities import quantity
from opensloth.rewards.reading import read, text_of

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import Tags

FORMAT_EXACT = 3.0
FORMAT_TAG = 0.25  # for each of the three tags of a completion that is there once, where the form is not exact
FORMAT_FAULT = -0.5  # for each tag that is missing or repeated

ANSWER = {
    Grade.EXACT: 5.0,
    Grade.EQUAL: 4.0,
    Grade.NEAR: 0.5,
    Grade.WRONG: -1.5,
    Grade.GUESSES: -2.0,
    Grade.NO_ANSWER: -3.0,
    Grade.UNJUDGED: None,
}
ANSWER_NOT_MARKED = -3.5  # no complete pair of solution tags

# What math-verify could not finish is no number that anybody can read. None here too would make a time-out pay more
# than an honest wrong answer.
NUMBER = {
    Grade.EXACT: 3.5,
    Grade.EQUAL: 3.5,
    Grade.NEAR: 0.0,
    Grade.WRONG: -0.5,
    Grade.GUESSES: -1.0,
    Grade.NO_ANSWER: -2.5,
    Grade.UNJUDGED: -2.5,
}

Completions = Sequence[str] | Sequence[Sequence[dict[str, Any]]]


def math_format(*, completions: Completions, tags: "Tags", **columns: Any) -> list[float | None]:
    """3 for the exact form, else a little for each tag that is there once."""
    return [format_score(text_of(completion), tags) for completion in completions]


def format_score(text: str, tags: "Tags") -> float:
    reading = read(text, tags)
    if reading.exact:
        return FORMAT_EXACT
    once = sum(text.count(tag) == 1 for tag in (tags.working_end, tags.solution_start, tags.solution_end))
    return once * FORMAT_TAG + reading.missing_or_repeated * FORMAT_FAULT


def math_answer(
    *, completions: Completions, answer: Sequence[Any] | None = None, tags: "Tags", **columns: Any
) -> list[float | None]:
    """5 for the gold answer between the solution tags, 4 for an equal one; None where nobody can say.

    A comparison that does not end in time is None and counted (`log_metric`, where the trainer gives one).

    Raises:
        UserError: there is no column `answer`.
    """
    scores, late = [], 0
    for completion, gold in pairs(completions, answer, "math_answer"):
        found = graded(completion, gold, tags)
        late += found is Grade.UNJUDGED
        scores.append(ANSWER[found] if isinstance(found, Grade) else found)
    if log_metric := columns.get("log_metric"):
        log_metric("math_answer/timeouts", float(late))
    return scores


def graded(completion: Any, gold: str | None, tags: "Tags") -> Grade | float | None:
    """The grade of a marked solution, a score where none is marked, None where the row has no gold answer."""
    if gold is None:
        return None
    reading = read(text_of(completion), tags)
    if reading.several:
        return Grade.GUESSES
    if reading.solution is None or not reading.closed:
        return ANSWER_NOT_MARKED
    return grade(reading.solution, gold)


def math_number(
    *, completions: Completions, answer: Sequence[Any] | None = None, tags: "Tags", **columns: Any
) -> list[float | None]:
    """3.5 for the right value in any form, also where the solution was cut off before its end tag.

    Raises:
        UserError: there is no column `answer`.
    """
    return [number_score(completion, gold, tags) for completion, gold in pairs(completions, answer, "math_number")]


def number_score(completion: Any, gold: str | None, tags: "Tags") -> float | None:
    if gold is None:
        return None
    reading = read(text_of(completion), tags)
    if reading.several:
        return NUMBER[Grade.GUESSES]
    if reading.solution is None or (not reading.closed and quantity(reading.solution) is None):
        return NUMBER[Grade.NO_ANSWER]
    return NUMBER[grade(reading.solution, gold)]


def pairs(completions: Completions, answer: Sequence[Any] | None, reward: str) -> list[tuple[Any, str | None]]:
    """Each completion with its gold answer as text, None for a blank one."""
    if answer is None:
        raise UserError(f"The reward {reward} needs the column answer.", "Name it with --map answer=COLUMN.")
    golds = (None if gold is None or not str(gold).strip() else str(gold) for gold in answer)
    return list(zip(completions, golds, strict=True))
