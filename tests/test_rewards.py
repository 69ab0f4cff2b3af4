"""The math rewards: docs/rewards.md is true, and no way of answering pays that should not."""

import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opensloth.errors import UserError
from opensloth.rewards import REWARDS, TASKS, get, gold_check, task
from opensloth.rewards.grade import Grade, grade
from opensloth.rewards.math import ANSWER, NUMBER

PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
MATH = ("math_format", "math_answer", "math_number")
FUNCTIONS = {name: get(name) for name in MATH}

PROPERTY = settings(deadline=None)  # an example may wait for the verifier to start
INTEGERS = st.integers(-(10**9), 10**9)
NUMBERS = st.decimals(-(10**6), 10**6, allow_nan=False, places=2).map(lambda number: f"{number:f}") | INTEGERS.map(str)
BOMB = "10^{10^{10}}"


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(cell: str) -> str:
    found = re.fullmatch(r"`(.*)`", cell)
    assert found, cell
    return found[1]


def number(cell: str) -> float | None:
    return None if cell == "None" else float(cell)


def marked(solution: str) -> str:
    return f"working<end_working_out><SOLUTION>{solution}</SOLUTION>"


def scores(completion: str, gold: str) -> list[float | None]:
    """Format, answer, number."""
    return [f(prompts=[""], completions=[completion], answer=[gold])[0] for f in FUNCTIONS.values()]


def total(completion: str, gold: str) -> float:
    return sum(score or 0.0 for score in scores(completion, gold))


@pytest.mark.parametrize("row", table("Scores of solutions"), ids=lambda row: f"{row[0]} for {row[1]}")
def test_the_page_says_what_a_solution_scores(row: list[str]) -> None:
    assert scores(marked(code(row[0])), code(row[1])) == [3.0, number(row[2]), number(row[3])]


@pytest.mark.parametrize("row", table("Scores of forms"), ids=lambda row: row[0])
def test_the_page_says_what_a_form_scores(row: list[str]) -> None:
    assert scores(code(row[0]), "42") == [number(cell) for cell in row[1:]]


def test_the_page_has_every_grade() -> None:
    rows = {code(name): [number(answer), number(value)] for name, _, answer, value in table("Grades")}
    assert rows == {grade.name: [ANSWER[grade], NUMBER[grade]] for grade in Grade}


def test_the_page_has_every_reward_of_the_preset() -> None:
    section = PAGE.split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(TASKS["math"]) == list(REWARDS)


def test_the_preset_is_the_four_rewards_with_weight_one() -> None:
    assert [(name, weight) for name, _, weight in task("math")] == [(name, 1.0) for name in TASKS["math"]]


def test_messages_score_as_their_text_does() -> None:
    text = marked("42")
    messages = [{"role": "assistant", "content": text}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    for reward in FUNCTIONS.values():
        as_text = reward(prompts=[""], completions=[text], answer=["42"])
        assert as_text == reward(prompts=[""], completions=[messages], answer=["42"])
        assert as_text == reward(prompts=[""], completions=[parts], answer=["42"])


def test_a_blank_gold_answer_has_no_score_and_a_number_is_one() -> None:
    completions = [marked("42")] * 4
    for name in ("math_answer", "math_number"):
        found = get(name)(prompts=[""] * 4, completions=completions, answer=[None, " ", 42, 42.0])
        assert found[:2] == [None, None]
        assert found[2] == found[3] == get(name)(prompts=[""], completions=completions[:1], answer=["42"])[0]


def test_a_missing_answer_column_is_named() -> None:
    with pytest.raises(UserError, match="needs the column answer"):
        get("math_answer")(prompts=[""], completions=[marked("42")])


@PROPERTY
@given(NUMBERS, NUMBERS)
def test_plain_numbers_are_always_judged_and_within_bounds(answer: str, gold: str) -> None:
    form, right, value = scores(marked(answer), gold)
    assert form == 3.0
    assert right is not None
    assert value is not None
    assert -3.5 <= right <= 5.0
    assert -2.5 <= value <= 3.5
    assert (right == 5.0) == (value == 3.5) == (Fraction(answer) == Fraction(gold))


@PROPERTY
@given(INTEGERS.filter(lambda n: abs(n) >= 10))
def test_right_beats_near_beats_wrong_beats_no_answer(gold: int) -> None:
    right, near, wrong = marked(str(gold)), marked(str(gold + gold // abs(gold))), marked(str(3 * gold))
    for reward in ("math_answer", "math_number"):
        ladder = [
            get(reward)(prompts=[""], completions=[text], answer=[str(gold)])[0]
            for text in (right, near, wrong, marked("."), "")
        ]
        assert None not in ladder
        assert ladder[0] > 3 * ladder[1], "a near miss earns a third of a right answer"
        assert ladder[1] > ladder[2] > ladder[3] >= ladder[4]
    assert total(right, str(gold)) > 3 * total(near, str(gold))


@PROPERTY
@given(st.text(max_size=40), st.integers(0, 10**6))
def test_what_holds_no_digit_never_beats_an_honest_wrong_answer(text: str, gold: int) -> None:
    assume(not re.search(r"[\d½¼¾⅓⅔²³\\ei]|[^\W\d_]\s*=", text))
    honest = total(marked(str(3 * gold + 10)), str(gold))
    assert total(marked(text), str(gold)) <= honest
    assert total(text, str(gold)) <= honest


@PROPERTY
@given(
    NUMBERS,
    st.lists(
        st.sampled_from(["${}$", "$${}$$", "\\({}\\)", "\\boxed{{{}}}", "**{}**", " {} ", "\\text{{{}}}", "{}\n"]),
        unique=True,
    ),
)
def test_wrapping_changes_nothing(gold: str, wrappings: list[str]) -> None:
    text = gold
    for wrapping in wrappings:
        text = wrapping.format(text) if "$" not in text or "$" not in wrapping else text
    assert scores(marked(text), gold) == scores(marked(gold), gold)
    assert scores(marked(f"{text}."), gold) == scores(marked(gold), gold)
    assert scores(marked(gold), text) == scores(marked(gold), gold)


@PROPERTY
@given(INTEGERS)
def test_separators_and_idle_zeros_change_nothing_on_either_side(number: int) -> None:
    forms = [f"{number:,}", f"{number:_}", f"{number:,}".replace(",", "{,}"), f"{number:,}".replace(",", " "),
             f"{number}.0", f"{number:,}.00", f"{number:,}".replace(",", "\\,")]  # fmt: skip
    for form in forms:
        assert scores(marked(form), str(number)) == scores(marked(str(number)), form) == [3.0, 5.0, 3.5]


@PROPERTY
@given(st.integers(-999, 999), st.sampled_from([2, 4, 5, 8, 10, 20, 25, 50, 100]))
def test_a_fraction_its_decimal_and_its_percentage_are_equal(top: int, bottom: int) -> None:
    decimal = f"{top / bottom:.6f}"
    percentage = f"{100 * top / bottom:.4f}%"
    for one, other in ((f"{top}/{bottom}", decimal), (f"\\frac{{{top}}}{{{bottom}}}", decimal), (percentage, decimal)):
        for answer, gold in ((one, other), (other, one)):
            _, right, value = scores(marked(answer), gold)
            assert right is not None
            assert right >= 0.6 * 5
            assert value == 3.5


SEPARATORS = st.sampled_from(
    [", ", ",", "; ", " ", " or ", " and ", "\n", " / or / ", "\\quad ", " \\text{ or } ", "$ $"]
)


@PROPERTY
@given(st.lists(st.integers(0, 10**4), min_size=2, max_size=6, unique=True), SEPARATORS, st.data())
def test_a_list_of_guesses_earns_little_though_the_right_one_is_among_them(
    guesses: list[int], separator: str, data: st.DataObject
) -> None:
    gold = data.draw(st.sampled_from(guesses))
    _, right, value = scores(marked(separator.join(map(str, guesses))), str(gold))
    assert right is not None
    assert value is not None
    assert right < 0.6 * 5
    assert value < 0.6 * 3.5


JUNK = st.text(alphabet=" ()[]{}|/\\.,;:!?^_*=&%~'", min_size=1, max_size=4)


@settings(PROPERTY, max_examples=300)
@given(JUNK, st.sampled_from(["7", "19", "43"]), st.booleans())
def test_no_punctuation_hides_a_second_guess(junk: str, other: str, first: bool) -> None:
    """math-verify by itself takes `42}43`, `42..43`, `43) 42` and many more for 42."""
    answer = f"42{junk}{other}" if first else f"{other}{junk}42"
    assume(grade(answer, "42") is not Grade.UNJUDGED)  # 42!!43
    assert grade(answer, "42") not in (Grade.EXACT, Grade.EQUAL)


DEFECTS = (
    "{exact} And so on.",
    "{exact}{exact}",
    "w<end_working_out><SOLUTION>{solution}</SOLUTION><SOLUTION>{solution}</SOLUTION>",
    "w<end_working_out><SOLUTION><SOLUTION>{solution}</SOLUTION></SOLUTION>",
    "w<end_working_out><SOLUTION><end_working_out>{solution}</SOLUTION>",
    "w<SOLUTION>{solution}</SOLUTION>",
    "w<SOLUTION>{solution}</SOLUTION><end_working_out>",
    "w<end_working_out><SOLUTION>{solution}",
    "w<end_working_out>{solution}</SOLUTION>",
    "w<end_working_out>{solution}",
    "<start_working_out>{exact}",
    "{solution}",
    "",
)


@pytest.mark.parametrize("defect", DEFECTS)
@PROPERTY
@given(gold=st.integers(-100, 100), off=st.integers(-20, 20))
def test_a_fault_of_form_always_costs(defect: str, gold: int, off: int) -> None:
    solution = str(gold + off)
    exact = marked(solution)
    assert total(defect.format(exact=exact, solution=solution), str(gold)) < total(exact, str(gold))


@PROPERTY
@given(st.text(max_size=200), st.text(min_size=1, max_size=30))
def test_any_text_scores_within_bounds(text: str, gold: str) -> None:
    for completion in (text, marked(text)):
        form, right, value = scores(completion, gold)
        assert form is not None
        assert -2.0 <= form <= 3.0
        assert right is None or -3.5 <= right <= 5.0
        assert value is None or -2.5 <= value <= 3.5


def test_a_bomb_earns_no_more_than_an_honest_wrong_answer() -> None:
    assert scores(marked(BOMB), "42")[1] is None
    assert total(marked(BOMB), "42") < total(marked("7000"), "42")


def test_time_outs_are_counted_for_the_trainer() -> None:
    logged: dict[str, float] = {}
    get("math_answer")(
        prompts=["", ""], completions=[marked(BOMB), marked("42")], answer=["42", "42"], log_metric=logged.__setitem__
    )
    assert logged == {"math_answer/timeouts": 1.0}


def test_a_plain_number_costs_well_under_a_tenth_of_a_millisecond() -> None:
    count = 3000
    completions = [marked(str(place)) for place in range(count)]
    answers = [str(place + place % 3) for place in range(count)]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for reward in FUNCTIONS.values():
            reward(prompts=completions, completions=completions, answer=answers)
        seconds.append(time.process_time() - start)
        grade.cache_clear()
    assert min(seconds) / count < 1e-3 * 0.1 * len(FUNCTIONS)


def test_other_tags_are_those_of_the_contract() -> None:
    from opensloth.data.prompt.contract import Tags

    tags = Tags("<think>", "</think>", "<answer>", "</answer>")
    completion = "w</think><answer>42</answer>"
    found = [get(name, tags=tags)(prompts=[""], completions=[completion], answer=["42"]) for name in MATH]
    assert found == [[3.0], [5.0], [3.5]]
    assert gold_check([{"answer": "42"}], tags=tags) == []


def test_the_gold_check_names_rows_that_teach_nothing() -> None:
    rows = [
        {"row_id": 7, "answer": "42"},
        {"row_id": 8, "answer": "\\frac{1}{2}"},
        {"row_id": 9, "answer": "(0, 1]"},
        {"row_id": 10, "answer": "Paris"},
        {"row_id": 11, "answer": None},
        {"row_id": 12, "answer": "</SOLUTION>"},
        {"row_id": 13, "answer": "..."},
        {"row_id": 14, "answer": 63.0},
        {"row_id": 15, "answer": "x=987654321"},
    ]
    assert [(failure.row, failure.reason.split()[0]) for failure in gold_check(rows)] == [
        (11, "there"),
        (12, "math_format"),
    ]


def test_the_registry_loads_no_model_library() -> None:
    heavy = {"torch", "transformers", "trl", "datasets", "sympy", "math_verify", "numpy"}
    program = f"import sys, opensloth.rewards as r; r.get('math_answer'); print(*{heavy!r} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
