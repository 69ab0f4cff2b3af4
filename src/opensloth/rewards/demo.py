"""A sample of what the model writes, shown now and then while it trains."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from opensloth import log
from opensloth.rewards.reading import text_of

LONGEST = 1500  # letters of a prompt or a completion that are shown
PRINT_EVERY = 10


def demo_reward(print_every: int = PRINT_EVERY) -> Callable[..., list[float | None]]:
    """A reward that scores 0 and shows a completion of its first call and then one every `print_every` optimizer steps.

    A batch on which several steps train is one call; outside of a trainer each call is a step. The steps are those of
    the whole run, so that a resumed one goes on as it was. Only the first process shows. 0 shows nothing.
    """
    calls = 0
    shown: int | None = None  # how often it was due at the last call

    def demo_reward(
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        nonlocal calls, shown
        step = calls if trainer_state is None else trainer_state.global_step
        calls += 1
        if shown is None and print_every and step % print_every:
            shown = step // print_every  # before this run was stopped
        if completions and print_every and step // print_every != shown and os.environ.get("RANK", "0") == "0":
            shown = step // print_every
            log.say(sample(text_of(prompts[0]), text_of(completions[0]), None if answer is None else answer[0]))
        return [0.0] * len(completions)

    return demo_reward


def sample(prompt: str, completion: str, answer: Any) -> str:
    """The three texts, each under its name and indented, so that nobody takes them for messages of the program."""
    parts = [("prompt", shortened(prompt)), ("completion", shortened(completion))]
    if answer is not None:
        parts.append(("expected answer", shortened(str(answer))))
    return "\n".join(f"  --- {name}\n{indented(text)}" for name, text in parts) + "\n  ---"


def shortened(text: str) -> str:
    """The end of a long text: that is where the question and the solution stand."""
    return text if len(text) <= LONGEST else f"[{len(text) - LONGEST:,} letters more] ...{text[-LONGEST:]}"


def indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.strip().splitlines()) or "  | (empty)"
