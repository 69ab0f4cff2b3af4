"""`--rewards`: names, weights, the user's own functions, and what happens when those misbehave."""

import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensloth.errors import UserError, WorkerFailed
from opensloth.rewards import get, load

FILE = '''
"""Rewards of a test."""
import re
import time

import neighbour


def longest(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def picky(completions, level):
    return [neighbour.ONE * len(level) for _ in completions]


def raises(completions, **columns):
    return [1 / len(text) for text in completions]


def short(completions, **columns):
    return [1.0]


def nan(completions, **columns):
    return [1.0, float("nan")]


def infinite(completions, **columns):
    return [float("inf"), 1.0]


def string(completions, **columns):
    return [1.0, "good"]


def none(completions, **columns):
    return None


def unsure(completions, **columns):
    return [None, True]


def sleeps(completions, **columns):
    time.sleep(60)


def swallows(completions, **columns):
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


def runs_wild(completions, **columns):
    re.match("(a+)+b", "a" * 60)


def spins(completions, **columns):
    while True:
        pass


async def waits(completions, **columns):
    return []


LIMIT = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("ONE = 1.0\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(FILE.splitlines(), start=1) if text in line)


def call(file: Path, name: str, limit: float = 30.0, **columns: Any) -> list[float | None]:
    [(_, function, _)] = load(f"{file}:{name}", limit=limit)
    return function(**{"prompts": ["p", "q"], "completions": ["ab", "abc"], "row_id": [40, 41], **columns})


def test_names_weights_and_files_are_read(file: Path) -> None:
    found = load(f"math_answer, math_format=0.5,{file}:longest=2")
    assert [(name, weight) for name, _, weight in found] == [
        ("math_answer", 1.0),
        ("math_format", 0.5),
        ("longest", 2.0),
    ]
    assert [function.__name__ for _, function, _ in found] == ["math_answer", "math_format", "longest"]
    assert found[2].function(prompts=["", ""], completions=["ab", "abc"]) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("math_anwser", "no reward 'math_anwser'. Did you mean math_answer?"),
        ("math_answer=much", "The weight in --rewards 'math_answer=much' is no number"),
        ("math_answer=nan", "is no number"),
        ("math_answer,math_answer=2", "names 'math_answer' twice"),
        (" , ", "names no reward"),
        ("nowhere.py:f", "nowhere.py does not exist"),
        ("{file}:longst", "has no function 'longst'. Did you mean longest?"),
        ("{file}:LIMIT", "is no plain function"),
        ("{file}:waits", "is no plain function"),
    ],
)
def test_bad_words_are_one_clear_error(file: Path, words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(words.format(file=file))


@pytest.mark.parametrize(
    ("text", "line"), [("x = 1\nx +\n", 2), ("\nimport nothing_of_this_name\n", 2), ("1 / 0\n", 1)]
)
def test_a_file_that_does_not_run_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=rf"bad\.py, line {line}: "):
        load(f"{tmp_path / 'bad.py'}:f")


def test_an_unknown_name_has_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean demo_reward"):
        get("demo_rewards")


def test_a_function_gets_the_columns_that_it_names(file: Path) -> None:
    assert call(file, "picky", level=[1, 2]) == [2.0, 2.0]
    with pytest.raises(UserError, match="needs the column 'level', which the rows lack"):
        call(file, "picky")


def test_none_and_truth_are_scores(file: Path) -> None:
    assert call(file, "unsure") == [None, 1.0]


def test_a_reward_that_raises_is_named_with_file_line_and_row(file: Path) -> None:
    with pytest.raises(WorkerFailed) as caught:
        call(file, "raises", completions=["ab", ""])
    assert f"{file}, line {line_of('1 / len(text)')}" in caught.value.message
    assert "row 41 (completion 1 of the batch): ZeroDivisionError" in caught.value.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "returned 1 scores for 2 completions; row 40"),
        ("nan", "returned nan for row 41"),
        ("infinite", "returned inf for row 40"),
        ("string", "returned 'good' for row 41"),
        ("none", "returned NoneType, not a list"),
    ],
)
def test_what_is_no_list_of_numbers_is_named_with_file_line_and_row(file: Path, name: str, message: str) -> None:
    with pytest.raises(WorkerFailed) as caught:
        call(file, name)
    assert message in caught.value.message
    assert f"({file}, line {line_of(f'def {name}(')})" in caught.value.message


@pytest.mark.parametrize(
    ("name", "text"),
    [("sleeps", "    time.sleep(60)"), ("swallows", "        time.sleep(60)"), ("runs_wild", "re.match(")],
)
def test_a_reward_that_hangs_is_ended_and_named(file: Path, name: str, text: str) -> None:
    with pytest.raises(WorkerFailed) as caught:
        call(file, name, limit=0.2)
    line = next(
        number for number, line in enumerate(FILE.splitlines(), start=1) if line.startswith(text) or text in line
    )
    assert (
        f"took longer than 0.2 seconds: {file}, line {line_of(text) if name != 'sleeps' else line}"
        in caught.value.message
    )
    assert "row 40" in caught.value.message


def test_a_reward_that_hangs_in_another_thread_is_ended_too(file: Path) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            call(file, "spins", limit=0.2)
        except WorkerFailed as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert "took longer than 0.2 seconds" in str(raised[0])


def test_the_alarm_of_others_is_given_back(file: Path) -> None:
    signal = pytest.importorskip("signal")
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers here")
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.setitimer(signal.ITIMER_REAL, 500)
        call(file, "longest")
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        assert math.isclose(signal.setitimer(signal.ITIMER_REAL, 0)[0], 500, abs_tol=30)
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_the_demo_scores_nothing_and_shows_every_nth_batch(capsys: pytest.CaptureFixture[str]) -> None:
    demo = get("demo_reward", print_every=3)
    shown = []
    for place in range(7):
        scores = demo(prompts=["What?", "x"], completions=[f"text {place} [bold]\x1b[31m", "y"], answer=["42", "1"])
        assert scores == [0.0, 0.0]
        shown.append(capsys.readouterr().err)
    assert [bool(text) for text in shown] == [True, False, False, True, False, False, True]
    assert "  | What?" in shown[0]
    assert "  | text 0 [bold]\\x1b[31m" in shown[0], "markup and control characters are shown, not obeyed"
    assert "  | 42" in shown[0]


def test_the_demo_counts_the_steps_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    demo = get("demo_reward", print_every=3)
    for step in (4, 5, 6, 7):
        demo(prompts=["p"], completions=[f"text {step}"], trainer_state=SimpleNamespace(global_step=step))
    out = capsys.readouterr()
    assert [step for step in (4, 5, 6, 7) if f"text {step}" in out.out + out.err] == [6]


def test_the_demo_counts_optimizer_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a batch is trained on twice, and where a run goes on after step 40."""
    demo = get("demo_reward", print_every=5)
    shown = []
    for step in (40, 42, 44, 46, 48, 50):
        demo(prompts=["p"], completions=["c"], trainer_state=SimpleNamespace(global_step=step))
        shown.append(bool(capsys.readouterr().err))
    assert shown == [True, False, False, True, False, True]


def test_the_demo_shows_on_the_first_process_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert get("demo_reward")(prompts=["p"], completions=["c"]) == [0.0]
    assert capsys.readouterr().err == ""
