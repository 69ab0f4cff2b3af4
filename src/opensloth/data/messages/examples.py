"""From a row of any known format to one conversation, or to a plain text.

A row that does not fit is a BadRow; its reason is a key of the manifest's counts. Where the formats leave a case open:

- A conversation ends with its last assistant turn: later turns hold nothing to learn from and are cut.
- An empty system turn counts as none. A system text may also stand in a column `system` beside the format's own.
- Two turns of one role in a row are a wrong order (but for tool results), as is a system turn that is not the first.
- Text keeps its own white space. A number is taken where an answer is expected; 63 and 63.0 read "63".
- Content given as parts is joined where all of them are text. Lists and turns may be JSON texts, as CSV has them.
- `problem` + `answer` rows may have a `solution` beside: it is the working, and the assistant's text.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opensloth.data.messages.conversation import WRONG_ORDER, BadRow, Turn, is_blank, ordered, read_turns
from opensloth.data.messages.formats import SHAPES, choose_format, parse_mapping

__all__ = ["BadRow", "Example", "RowFormat", "detect_format", "parse_mapping"]

Row = Mapping[str, Any]
Columns = Mapping[str, str]

NO_MARK = "no #### before the final answer"
THINK = re.compile(r"</?think>")
CALCULATION = re.compile(r"<<[^<>]*>>")


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
    if is_blank(value):
        raise BadRow(f"empty field: {column}")
    return value


def _answer(row: Row, column: str) -> str:
    """A final answer: a text without the space around it, or a number."""
    value = row[column]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"empty field: {column}")  # a hole in a column of numbers is NaN
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, column).strip()


def _optional(row: Row, columns: Columns, role: str) -> str:
    value = row.get(columns[role]) if role in columns else None
    if value is None:
        return ""
    if type(value) is not str:
        raise BadRow(f"wrong type: {columns[role]}")
    return "" if value.isspace() else value


def _prompt(row: Row, columns: Columns, role: str) -> list[Turn]:
    """One user text, or a list of turns of which the last is not the assistant's."""
    column = columns[role]
    if type(row[column]) is not list:
        return [{"role": "user", "content": _text(row, column)}]
    turns = read_turns(row[column], column)
    if turns[-1]["role"] == "assistant":
        raise BadRow(WRONG_ORDER)
    return turns


def _reply(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _conversation(role: str) -> Callable[[Row, Columns], Example]:
    def read(row: Row, columns: Columns) -> Example:
        turns = read_turns(row[columns[role]], columns[role])
        return Example(ordered(turns, _optional(row, columns, "system")), completion_format=role)

    return read


def _prompt_completion(row: Row, columns: Columns) -> Example:
    prompt, column = _prompt(row, columns, "prompt"), columns["completion"]
    reply = read_turns(row[column], column) if type(row[column]) is list else [_reply(_text(row, column))]
    messages = ordered([*prompt, *reply], _optional(row, columns, "system"))
    return Example(messages, completion_format="prompt-completion")


def _alpaca(row: Row, columns: Columns) -> Example:
    asked = _text(row, columns["instruction"])
    if given := _optional(row, columns, "input"):
        asked = f"{asked}\n\n{given}"
    turns = [{"role": "user", "content": asked}, _reply(_text(row, columns["output"]))]
    return Example(ordered(turns, _optional(row, columns, "system")), completion_format="alpaca")


def _solved(row: Row, columns: Columns, role: str, reply: str, working: str | None, answer: str, name: str) -> Example:
    messages = ordered([*_prompt(row, columns, role), _reply(reply)], _optional(row, columns, "system"))
    return Example(messages, working, answer, completion_format=name)


def _openmath(row: Row, columns: Columns) -> Example:
    source = _text(row, columns["generated_solution"])
    working = THINK.sub("", source).strip()
    if not working:
        raise BadRow(f"empty field: {columns['generated_solution']}")
    return _solved(row, columns, "problem", source, working, _answer(row, columns["expected_answer"]), "openmath")


def _prompt_solution(row: Row, columns: Columns) -> Example:
    answer = _answer(row, columns["solution"])
    return _solved(row, columns, "prompt", answer, None, answer, "prompt-solution")


def _problem_answer(row: Row, columns: Columns) -> Example:
    answer = _answer(row, columns["answer"])
    source = _optional(row, columns, "solution")
    working = THINK.sub("", source).strip() or None
    return _solved(row, columns, "problem", source or answer, working, answer, "problem-answer")


def _gsm8k(row: Row, columns: Columns) -> Example:
    source = _text(row, columns["answer"])
    working, mark, answer = source.rpartition("####")
    if not mark:
        raise BadRow(NO_MARK)
    answer = answer.strip()
    if not answer:
        raise BadRow(f"empty field: {columns['answer']}")
    working = CALCULATION.sub("", working).strip()
    return _solved(row, columns, "question", source, working or None, answer, "gsm8k")


def _plain(row: Row, columns: Columns) -> Example:
    return Example((), text=_text(row, columns["text"]), completion_format="text")


READERS: dict[str, Callable[[Row, Columns], Example]] = {
    "messages": _conversation("messages"),
    "conversations": _conversation("conversations"),
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "openmath": _openmath,
    "prompt-solution": _prompt_solution,
    "problem-answer": _problem_answer,
    "gsm8k": _gsm8k,
    "text": _plain,
}
