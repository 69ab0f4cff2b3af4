"""The child that compares expressions: it may hang or die, and nobody waits for it or finds it afterwards."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensloth.rewards.checker import Checker

BOMBS = ("10^{10^{10}}", "9^{9^{9^{9}}}", "100000000!", "2^{2^{2^{2^{2^{2}}}}}")


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    checker = Checker(limit=1.0)
    yield checker
    checker.close()


def gone(pid: int) -> bool:
    """Whether there is no process `pid`, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_equal_and_unequal_expressions(checker: Checker) -> None:
    assert checker.equal("2\\sqrt{2}", "\\sqrt{8}") is True
    assert checker.equal("2\\sqrt{3}", "\\sqrt{8}") is False


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_left_after_the_limit_and_leaves_no_zombie(checker: Checker, bomb: str) -> None:
    assert checker.equal("1+1", "2") is True
    child, unjudged = checker.pid, checker.unjudged
    assert child is not None
    start = time.monotonic()
    result = checker.equal(bomb, "42")
    assert time.monotonic() - start < checker.limit + 5
    if result is None:
        assert gone(child)
        assert checker.unjudged == unjudged + 1
    assert checker.equal("1+1", "2") is True


def test_a_child_that_was_killed_is_replaced(checker: Checker) -> None:
    checker.equal("1+1", "2")
    assert checker._child is not None
    checker._child.process.kill()
    checker._child.process.wait()
    assert checker.equal("1+1", "2") is None
    assert checker.equal("1+1", "2") is True


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_after_an_interrupt_no_question_gets_the_answer_to_another(checker: Checker) -> None:
    checker.equal("1+1", "2")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            checker.equal(BOMBS[0], "42")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert [checker.equal("1+1", gold) for gold in ("2", "3", "2")] == [True, False, True]


def test_threads_get_their_own_answers(checker: Checker) -> None:
    found: dict[int, bool | None] = {}

    def ask(number: int) -> None:
        for _ in range(5):
            found[number] = checker.equal(f"{number}+1", str(number + 1 + number % 2))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number % 2 == 0 for number in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_asks_a_child_of_its_own(checker: Checker) -> None:
    checker.equal("1+1", "2")
    program = """
        import os
        from opensloth.rewards.checker import Checker
        checker = Checker()
        checker.equal("1+1", "2")
        before = checker.pid
        child = os.fork()
        if child == 0:
            right = checker.equal("1+1", "2") is True and checker.pid != before
            checker.close()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert checker.equal("1+1", "2") is True and checker.pid == before
        checker.close()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_a_script_without_a_main_guard_and_with_files_named_like_libraries_can_score(tmp_path: Path) -> None:
    (tmp_path / "sympy.py").write_text("raise SystemExit('the wrong sympy')")
    script = tmp_path / "score.py"
    script.write_text(
        "from opensloth.rewards import get\n"
        "text = 'w<end_working_out><SOLUTION>2+2</SOLUTION>'\n"
        "print(get('math_answer')(prompts=[''], completions=[text], answer=['4']))\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (run.stdout, run.stderr) == ("[4.0]\n", "")
    read_from_stdin = subprocess.run(
        [sys.executable, "-"], input=script.read_text(), capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert read_from_stdin.stdout == "[4.0]\n"
