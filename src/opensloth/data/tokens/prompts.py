"""Source rows -> prompts for GRPO, many at a time: the ids that generation starts from, and what rewards need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from opensloth.data.messages.examples import BadRow, RowFormat
from opensloth.data.messages.formats import PROMPT_ROLES, SHAPES
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.prompt.segments import split_prompt
from opensloth.data.sources.rows import RawRow
from opensloth.data.tokens.encode import encoder_of
from opensloth.data.tokens.rows import DroppedRow
from opensloth.errors import UserError

TOO_LONG = "prompt too long"
# Names under which rewards are given something else than the source's column
OWN_COLUMNS = (
    *("prompt", "answer", "row_id", "input_ids"),  # of the prepared row
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),  # of the call
)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt. `row_id` is 0-based, the row's number in the source.

    Attributes:
        input_ids: the prompt's tokens up to and including the generation prompt.
        messages: the same as a conversation, with its system turn.
        answer: the gold answer.
        columns: the source's other columns, by name.
    """

    row_id: int
    input_ids: list[int]
    messages: list[dict[str, Any]]
    answer: str
    columns: dict[str, Any]


class PromptBuilder:
    """Builds prompts under one contract. Whether it has tags is no matter here.

    Raises UserError for `overlong="truncate"`: a prompt that lost its end asks something else.
    """

    def __init__(
        self, tokenizer: Any, contract: PromptContract, row_format: RowFormat, *, max_prompt_len: int, overlong: str
    ) -> None:
        check_overlong(overlong)
        self._tokenizer = tokenizer
        self._encoder = encoder_of(tokenizer)
        self._contract = contract
        self._format = without_working(row_format)
        self._limit = max_prompt_len
        self._overlong = overlong
        self._left_out = {*self._format.columns.values(), *OWN_COLUMNS}

    def build(self, rows: Sequence[RawRow]) -> tuple[list[PromptRow], list[DroppedRow]]:
        """The prompts and the dropped rows, each in the order of `rows`.

        Raises UserError for a prompt over `max_prompt_len` where `overlong` is "error".
        """
        found: list[tuple[RawRow, list[dict[str, Any]], str]] = []
        texts: list[list[str]] = []
        dropped: list[DroppedRow] = []
        for row in rows:
            try:
                messages, answer = self._read(row)
                shielded = self._contract.shield(self._tokenizer, messages)
                texts.append(split_prompt(self._contract.render, shielded, self._contract.stop))
                found.append((row, messages, answer))
            except BadRow as bad:
                dropped.append(DroppedRow(row.line, bad.reason))

        kept: list[PromptRow] = []
        for (row, messages, answer), pieces in zip(found, self._encoder.encode(texts), strict=True):
            ids = list(chain.from_iterable(pieces))
            if len(ids) <= self._limit:
                kept.append(PromptRow(row.line - 1, ids, messages, answer, self._others(row.value or {})))
            elif self._overlong == "drop":
                dropped.append(DroppedRow(row.line, TOO_LONG))
            else:
                message = f"The prompt of line {row.line} has {len(ids):,} tokens"
                raise UserError(
                    f"{message}, more than --max-prompt-len {self._limit:,}.",
                    "Raise --max-prompt-len, or choose --overlong drop.",
                )
        dropped.sort(key=lambda row: row.line)
        return kept, dropped

    def _read(self, row: RawRow) -> tuple[list[dict[str, Any]], str]:
        if row.value is None:
            raise BadRow(row.problem or "no row")
        example = self._format.example(row.value)
        assert example.answer is not None  # a row whose gold answer is missing or blank was refused by its format
        return self._contract.prompt_messages(example), example.answer

    def _others(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self._left_out}


def without_working(row_format: RowFormat) -> RowFormat:
    """The format that reads the same prompt and gold answer, whatever a row has for a working.

    A prompt needs no working, so a row without a usable one is still a row, and the column is left to the rewards.
    """
    gold = SHAPES[row_format.name].gold
    assert gold is not None
    columns = {role: column for role, column in row_format.columns.items() if role in PROMPT_ROLES}
    if row_format.name == "openmath":
        return RowFormat("problem-answer", {**columns, "answer": row_format.columns[gold]})
    return RowFormat(row_format.name, {**columns, gold: row_format.columns[gold]})


def check_overlong(overlong: str) -> None:
    """Raise UserError for `truncate`, which suits rows to train on only."""
    if overlong == "truncate":
        raise UserError(
            "--overlong truncate is for --method sft: a prompt that lost its end asks something else.",
            "Choose --overlong drop or error, or raise --max-prompt-len.",
        )
