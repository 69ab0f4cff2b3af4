"""From a row of any known format to one conversation, or to a plain text.

A row that does not fit is a BadRow; its reason is a key of the manifest's counts. Where the formats leave a case open:

- A conversation ends with its last assistant turn: later turns hold nothing to learn from and are cut.
- An empty system turn counts as none. A system text may also stand in a column `system` beside the format's own.
- Two turns of one role in a row are a wrong order (but for tool results), as is a system turn that is not the first.
- Text keeps its own white space. A number is taken where an answer is expected; 63 and 63.0 read "63".
- Content given as parts is joined where all of them are text. Lists and turns may be JSON texts, as CSV has them.
- `problem` + `answer` rows may have a `solution` beside: it is the working, and the assistant's text.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opensloth.data.formats import SHAPES, choose_format, parse_mapping

__all__ = ["BadRow", "Example", "RowFormat", "detect_format", "parse_mapping"]

Turn = dict[str, Any]
Row = Mapping[str, Any]

NO_ASSISTANT = "no assistant turn"
WRONG_ORDER = "wrong order of roles"
UNKNOWN_ROLE = "unknown role"
NO_MARK = "no #### before the final answer"

# The roles of `messages` and the names that `conversations` (ShareGPT) gives them.
SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
AFTER = {  # what may come after a role; None is the beginning
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}
THINK = re.compile(r"</?think>")
CALCULATION = re.compile(r"<<[^<>]*>>")


class BadRow(Exception):
    """A row that cannot be used. `reason` is short and stable: rows are counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `messages` ends with the assistant turn, in the source's own text (empty for the format `text`).

    `working` and `answer` are set where the row holds them apart. For GRPO the prompt is `messages[:-1]`.
    """

    messages: tuple[Turn, ...]
    working: str | None = None
    answer: str | None = None
    text: str | None = None
    completion_format: str = "messages"


@dataclass(frozen=True)
class RowFormat:
    """A format and the columns of its roles. It can be pickled."""

    name: str
    columns: dict[str, str]

    def example(self, row: Row) -> Example:
        """Raises BadRow, which names the column where one is at fault."""
        for role in SHAPES[self.name].required:
            if self.columns[role] not in row:
                raise BadRow(self._why_missing(row, self.columns[role]))
        return READERS[self.name](row, self.columns)

    def _why_missing(self, row: Row, column: str) -> str:
        for name, shape in SHAPES.items():
            if name != self.name and all(role in row for role in shape.required):
                return f"another row format: {name}"
        return f"missing field: {column}"


def detect_format(columns: list[str], mapping: Mapping[str, str], method: str = "sft") -> RowFormat:
    """The format of rows with these columns, after `--map`. For `method="grpo"` it holds an answer.

    Raises UserError that lists the columns, the formats, and the nearest --map.
    """
    return RowFormat(*choose_format(columns, mapping, method))


def _text(row: Row, column: str) -> str:
    """A text that is there and not blank, as it is."""
    value = row[column]
    if type(value) is not str:
        raise BadRow(f"empty field: {column}" if value is None else f"wrong type: {column}")
    if not value or value.isspace():
        raise BadRow(f"empty field: {column}")
    return value


def _answer(row: Row, column: str) -> str:
    """A final answer: a text without the space around it, or a number."""
    value = row[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow(f"empty field: {column}")  # a hole in a column of numbers is NaN
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)
    return _text(row, column).strip()


def _optional(row: Row, columns: Mapping[str, str], role: str) -> str:
    value = row.get(columns[role]) if role in columns else None
    if value is None:
        return ""
    if type(value) is not str:
        raise BadRow(f"wrong type: {columns[role]}")
    return "" if value.isspace() else value


def _json(value: Any) -> Any:
    """A list or a turn that is kept as JSON text."""
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _turns(value: Any, column: str) -> list[Turn]:
    """The turns of a list, with our names of roles; order is not looked at here."""
    turns = _json(value)
    if not turns:
        raise BadRow(f"empty field: {column}")
    if type(turns) is not list:
        raise BadRow(f"wrong type: {column}")
    return [_turn(turn, column) for turn in turns]


def _turn(given: Any, column: str) -> Turn:
    turn = _json(given)
    if type(turn) is not dict:
        raise BadRow(f"wrong type: {column}")
    speaker = turn.get("role")
    content_key = "content"
    if speaker is None and "from" in turn:
        speaker, content_key = turn["from"], "value"
    if type(speaker) is not str:
        raise BadRow(f"missing field: {column}.role" if speaker is None else f"wrong type: {column}.role")
    role = SPEAKERS.get(speaker) or SPEAKERS.get(speaker.strip().lower())
    if role is None:
        raise BadRow(UNKNOWN_ROLE)
    content = turn.get(content_key)
    if type(content) is str and len(turn) == 2:
        extra: Turn = {}
    else:
        content = _content(content, f"{column}.{content_key}")
        extra = {k: v for k, v in turn.items() if v is not None and k not in ("role", "content", "from", "value")}
        if extra.get("tool_calls") == []:
            del extra["tool_calls"]
    if (not content or content.isspace()) and role in ("user", "assistant") and "tool_calls" not in extra:
        raise BadRow(f"empty field: {column}.{content_key}")
    return {"role": role, "content": content, **extra}


def _content(content: Any, field: str) -> str:
    if content is None:
        return ""
    if type(content) is list:
        parts = [part.get("text") if type(part) is dict else part for part in content]
        texts = [part for part in parts if type(part) is str]
        if len(texts) == len(parts):
            return "".join(texts)
    if type(content) is not str:
        raise BadRow(f"wrong type: {field}")
    return content


def _ordered(turns: list[Turn], system: str = "") -> tuple[Turn, ...]:
    """The conversation up to its last assistant turn, in an order that makes sense."""
    if turns[0]["role"] == "system":
        if not turns[0]["content"] or turns[0]["content"].isspace():
            turns = turns[1:]
    elif system:
        turns = [{"role": "system", "content": system}, *turns]
    last = len(turns)
    while last and turns[last - 1]["role"] != "assistant":
        last -= 1
    if not last:
        raise BadRow(NO_ASSISTANT)
    before: str | None = None
    for turn in turns:
        role = turn["role"]
        if role not in AFTER[before]:
            raise BadRow(WRONG_ORDER)
        before = role
    return tuple(turns[:last])


def _conversation(row: Row, columns: Mapping[str, str], role: str) -> Example:
    column = columns[role]
    return Example(_ordered(_turns(row[column], column), _optional(row, columns, "system")), completion_format=role)


def _messages(row: Row, columns: Mapping[str, str]) -> Example:
    return _conversation(row, columns, "messages")


def _conversations(row: Row, columns: Mapping[str, str]) -> Example:
    return _conversation(row, columns, "conversations")


def _asked(row: Row, columns: Mapping[str, str], role: str) -> list[Turn]:
    """A prompt: one user text, or turns of which the assistant's is not the last."""
    column = columns[role]
    if isinstance(row[column], list):
        turns = _turns(row[column], column)
        if turns[-1]["role"] == "assistant":
            raise BadRow(WRONG_ORDER)
        return turns
    return [{"role": "user", "content": _text(row, column)}]


def _answered(row: Row, columns: Mapping[str, str], asked: list[Turn], reply: str) -> tuple[Turn, ...]:
    turns = [*asked, {"role": "assistant", "content": reply}]
    return _ordered(turns, _optional(row, columns, "system"))


def _prompt_completion(row: Row, columns: Mapping[str, str]) -> Example:
    asked = _asked(row, columns, "prompt")
    column = columns["completion"]
    if isinstance(row[column], list):
        turns = [*asked, *_turns(row[column], column)]
        return Example(_ordered(turns, _optional(row, columns, "system")), completion_format="prompt-completion")
    messages = _answered(row, columns, asked, _text(row, column))
    return Example(messages, completion_format="prompt-completion")


def _alpaca(row: Row, columns: Mapping[str, str]) -> Example:
    asked = _text(row, columns["instruction"])
    if given := _optional(row, columns, "input"):
        asked = f"{asked}\n\n{given}"
    turns = [{"role": "user", "content": asked}]
    return Example(_answered(row, columns, turns, _text(row, columns["output"])), completion_format="alpaca")


def _openmath(row: Row, columns: Mapping[str, str]) -> Example:
    source = _text(row, columns["generated_solution"])
    working = THINK.sub("", source).strip()
    if not working:
        raise BadRow(f"empty field: {columns['generated_solution']}")
    messages = _answered(row, columns, _asked(row, columns, "problem"), source)
    return Example(messages, working, _answer(row, columns["expected_answer"]), completion_format="openmath")


def _prompt_solution(row: Row, columns: Mapping[str, str]) -> Example:
    answer = _answer(row, columns["solution"])
    messages = _answered(row, columns, _asked(row, columns, "prompt"), answer)
    return Example(messages, None, answer, completion_format="prompt-solution")


def _problem_answer(row: Row, columns: Mapping[str, str]) -> Example:
    answer = _answer(row, columns["answer"])
    source = _optional(row, columns, "solution")
    working = THINK.sub("", source).strip() or None
    messages = _answered(row, columns, _asked(row, columns, "problem"), source or answer)
    return Example(messages, working, answer, completion_format="problem-answer")


def _gsm8k(row: Row, columns: Mapping[str, str]) -> Example:
    source = _text(row, columns["answer"])
    working, mark, answer = source.rpartition("####")
    if not mark:
        raise BadRow(NO_MARK)
    answer = answer.strip()
    if not answer:
        raise BadRow(f"empty field: {columns['answer']}")
    messages = _answered(row, columns, _asked(row, columns, "question"), source)
    return Example(messages, CALCULATION.sub("", working).strip() or None, answer, completion_format="gsm8k")


def _plain(row: Row, columns: Mapping[str, str]) -> Example:
    return Example((), text=_text(row, columns["text"]), completion_format="text")


READERS: dict[str, Callable[[Row, Mapping[str, str]], Example]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "openmath": _openmath,
    "prompt-solution": _prompt_solution,
    "problem-answer": _problem_answer,
    "gsm8k": _gsm8k,
    "text": _plain,
}
