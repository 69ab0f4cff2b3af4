"""Source rows -> prompts for GRPO, many at a time: the ids that generation starts from, and what rewards need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from opensloth.data.messages.conversation import is_blank
from opensloth.data.messages.examples import BadRow, RowFormat
from opensloth.data.messages.formats import PROMPT_ROLES, SHAPES
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.prompt.segments import split_prompt
from opensloth.data.sources.rows import RawRow
from opensloth.data.tokens.encode import encoder_of
from opensloth.data.tokens.rows import DroppedRow
from opensloth.errors import UserError

TOO_LONG = "prompt too long"
# What rewards are given under these names comes from the prepared row itself
OWN_COLUMNS = ("prompt", "answer", "row_id", "input_ids", "prompts", "completions", "completion_ids")


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
        self._format = row_format
        self._limit = max_prompt_len
        self._overlong = overlong
        used = {row_format.columns[role] for role in used_roles(row_format.name) if role in row_format.columns}
        self._left_out = used.union(OWN_COLUMNS)

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
        if example.answer is None or is_blank(example.answer):
            raise BadRow("no answer")
        return self._contract.prompt_messages(example), example.answer

    def _others(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self._left_out}


def used_roles(row_format: str) -> list[str]:
    """The roles whose columns the prompt and the answer are made of."""
    shape = SHAPES[row_format]
    return [role for role in (*shape.required, *shape.optional) if role in PROMPT_ROLES or role == shape.gold]


def check_overlong(overlong: str) -> None:
    """Raise UserError for `truncate`, which suits rows to train on only."""
    if overlong == "truncate":
        raise UserError(
            "--overlong truncate is for --method sft: a prompt that lost its end asks something else.",
            "Choose --overlong drop or error, or raise --max-prompt-len.",
        )
