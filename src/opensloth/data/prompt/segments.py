"""Which part of a rendered conversation the model has to write, found by rendering it turn by turn.

No template needs `{% generation %}` marks for this. A turn is trained if, and only if, the model will see exactly the
text before it when it generates: the conversation up to the turn, rendered with the generation prompt, must begin the
rendering of the whole. So templates that rewrite earlier turns (Qwen3 removes earlier thinking) train the last turn
alone, and a generation prompt that opens a thinking block is part of the prompt, never of the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opensloth.data.messages.examples import BadRow
from opensloth.data.tokens.encode import common_start

# How far back from the end of a generation prompt a mark such as `<think>\n` may begin
_LONGEST_MARK = 64


class Render(Protocol):
    def __call__(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as text."""


@dataclass(frozen=True)
class Segment:
    """A piece of a row, tokenized on its own; `trained` says whether its tokens have labels."""

    text: str
    trained: bool


def split(
    render: Render, messages: Sequence[Mapping[str, Any]], stop: Sequence[str], target_only: bool = True
) -> list[Segment]:
    """Cut the rendering of `messages` at every exact assistant turn; the texts together are the rendering.

    A trained segment is the assistant's text and its turn-end token (one of `stop`), without the line break after it.
    With `target_only=False` the cuts are the same, so that the ids are too, and every segment is trained.

    One exception to "together are the rendering": a template whose generation prompt is no beginning of its last turn,
    as where the prompt opens `<think>` and the rendering removes the thinking. The row is then the prompt that the
    model will see, and the message's own text without what the prompt already holds. Raises BadRow where that text
    does not begin as the prompt ends.
    """
    full = render(messages)
    if not any(message["role"] == "assistant" for message in messages):
        return [Segment(full, not target_only)]
    spans = list(_exact_turns(render, messages, full, stop))
    if messages[-1]["role"] == "assistant" and (not spans or spans[-1].index != len(messages) - 1):
        return _reopened(render, messages, full, stop, target_only)
    return _cut(full, spans, target_only)


def split_prompt(render: Render, messages: Sequence[Mapping[str, Any]], stop: Sequence[str]) -> list[str]:
    """The texts of a prompt with its generation prompt, cut where the row that goes on from it is cut."""
    full = render(messages, add_generation_prompt=True)
    return [segment.text for segment in _cut(full, list(_exact_turns(render, messages, full, stop)), True)]


@dataclass(frozen=True)
class _Span:
    index: int
    start: int
    end: int


def _exact_turns(
    render: Render, messages: Sequence[Mapping[str, Any]], full: str, stop: Sequence[str]
) -> Iterator[_Span]:
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], add_generation_prompt=True)
        if not full.startswith(prompt):
            continue
        # The rendering of a whole conversation that ends here is `full` itself, unless that is a prompt
        turn = full if index == len(messages) - 1 else render(messages[: index + 1])
        end = _end_of_turn(turn, len(prompt), stop)
        # What follows a turn's end may differ: some templates close every conversation with one more token
        if len(prompt) < end and full.startswith(turn[:end]):
            yield _Span(index, len(prompt), end)


def _end_of_turn(turn: str, start: int, stop: Sequence[str]) -> int:
    ends = [place + len(text) for text in stop if (place := turn.rfind(text, start)) >= 0]
    return max(ends) if ends else len(turn.rstrip())


def _cut(full: str, spans: list[_Span], target_only: bool) -> list[Segment]:
    segments = []
    at = 0
    for span in spans:
        segments += [Segment(full[at : span.start], not target_only), Segment(full[span.start : span.end], True)]
        at = span.end
    segments.append(Segment(full[at:], not target_only))
    return [segment for segment in segments if segment.text]


def _reopened(
    render: Render, messages: Sequence[Mapping[str, Any]], full: str, stop: Sequence[str], target_only: bool
) -> list[Segment]:
    prompt = render(messages[:-1], add_generation_prompt=True)
    content = messages[-1].get("content")
    shared = len(common_start(prompt, full))
    last_stop = max((full.rfind(text) for text in stop), default=-1)
    tail = full[last_stop:] if last_stop >= 0 else ""
    for begin in range(shared, max(0, len(prompt) - _LONGEST_MARK) - 1, -1):
        mark = prompt[begin:]
        if not isinstance(content, str) or not tail or not mark.strip():
            break
        if content.lstrip().startswith(mark.strip()):
            answer = content.lstrip().removeprefix(mark.strip()).removeprefix(mark[len(mark.rstrip()) :])
            end = next(len(text) for text in stop if tail.startswith(text))
            before = _cut(prompt, list(_exact_turns(render, messages[:-1], prompt, stop)), target_only)
            ending = [Segment(tail[end:], not target_only)] if tail[end:] else []
            return [*before, Segment(answer + tail[:end], True), *ending]
    raise BadRow("assistant turn does not begin as the generation prompt ends")
