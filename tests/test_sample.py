import re
from itertools import islice

import pytest

from opensloth.data.messages.examples import detect_format
from opensloth.data.sources import arithmetic as sample
from opensloth.data.sources.arithmetic import arithmetic
from opensloth.data.sources.open import open_source
from opensloth.errors import UserError

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {split: list(arithmetic(split)) for split in ("train", "test")}


def numbers(row: dict[str, str]) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", row["problem"])]


def test_the_default_sizes_are_2000_and_500(rows: dict[str, list[dict[str, str]]]) -> None:
    assert {split: len(found) for split, found in rows.items()} == {"train": 2000, "test": 500}
    assert (open_source("sample:arithmetic").size, open_source("sample:arithmetic", samples=3).size) == (2000, 3)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_is_right_and_the_last_result_is_the_answer(
    rows: dict[str, list[dict[str, str]]], split: str
) -> None:
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    for row in rows[split]:
        steps = STEP.findall(row["generated_solution"])
        assert len(steps) in (1, 2)
        used = []
        for index, (a, op, b, result) in enumerate(steps):
            assert operations[op](int(a), int(b)) == int(result)
            assert index == 0 or a == steps[index - 1][3], "a step goes on from the one before"
            used += [int(b)] if index else [int(a), int(b)]
        assert sorted(used) == sorted(numbers(row)), "the working uses the problem's numbers, each once"
        assert row["expected_answer"] == steps[-1][3]
        assert int(row["expected_answer"]) >= 0


def test_the_held_out_problems_tell_the_same_stories_with_other_names_things_and_numbers(
    rows: dict[str, list[dict[str, str]]],
) -> None:
    def words(row: dict[str, str]) -> str:
        known = (*sample.NAMES["train"], *sample.NAMES["test"], *sample.THINGS["train"], *sample.THINGS["test"])
        return re.sub("|".join((r"\d+", *known, *sample.PLACES)), "_", row["problem"])

    def operands(row: dict[str, str]) -> tuple[str, str]:
        a, _, b, _ = STEP.findall(row["generated_solution"])[0]
        return a, b

    train, test = rows["train"], rows["test"]
    assert {words(row) for row in train} == {words(row) for row in test}
    assert len({words(row) for row in train}) == len(sample.STORIES)
    assert not {operands(row) for row in train} & {operands(row) for row in test}
    assert not set(sample.NAMES["train"]) & set(sample.NAMES["test"])
    assert not set(sample.THINGS["train"]) & set(sample.THINGS["test"])


def test_no_problem_is_repeated(rows: dict[str, list[dict[str, str]]]) -> None:
    problems = [row["problem"] for found in rows.values() for row in found]
    assert len(set(problems)) == len(problems)


def test_rows_are_short_and_of_the_openmath_format(rows: dict[str, list[dict[str, str]]]) -> None:
    row_format = detect_format(list(rows["train"][0]), {})
    assert row_format.name == "openmath"
    for row in rows["train"] + rows["test"]:
        found = row_format.example(row)
        assert found.answer == row["expected_answer"]
        assert "think>" not in (found.working or "think>")
        assert len(row["problem"]) + len(found.working or "") < 230  # about 75 tokens


def test_the_rows_are_the_same_everywhere_and_always() -> None:
    """A change here changes what everybody's runs saw: raise sample.VERSION with it."""
    assert sample.VERSION == 2
    assert list(islice(arithmetic("train"), 2)) == [
        {
            "problem": "Carla had 18 buttons, lost 13 of them and later found 22. How many buttons does Carla have?",
            "generated_solution": "<think>\nAfter losing: 18 - 13 = 5. Now: 5 + 22 = 27.\n</think>",
            "expected_answer": "27",
        },
        {
            "problem": "Kira had 43 shells, lost 16 of them and later found 16. How many shells does Kira have?",
            "generated_solution": "<think>\nAfter losing: 43 - 16 = 27. Now: 27 + 16 = 43.\n</think>",
            "expected_answer": "43",
        },
    ]
    assert list(arithmetic("test", 7)) == list(islice(arithmetic("test"), 7))


def test_more_rows_than_there_are_problems_are_refused() -> None:
    assert len(list(arithmetic("test", 3000))) == 3000
    with pytest.raises(UserError, match="at most 100,000"):
        open_source("sample:arithmetic", samples=sample.MOST_ROWS + 1)
