"""Source rows -> token ids and labels, many rows at a time. Labels are masks by position: no id decides them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opensloth.data.messages.examples import BadRow, Example, RowFormat
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.prompt.segments import Segment
from opensloth.data.sources.rows import RawRow
from opensloth.data.tokens.encode import encoder_of
from opensloth.errors import UserError

MASKED = -100  # the label that torch's cross entropy ignores


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row to train on. `row_id` is 0-based (`line` - 1); `labels` are as long as `input_ids`, -100 where masked.

    `cut` says that the row was too long and lost its end.
    """

    row_id: int
    line: int
    input_ids: list[int]
    labels: list[int]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not trained on, with a short reason that rows of one kind share."""

    line: int
    reason: str


class RowBuilder:
    """Builds token rows under one contract.

    With `target_only` the assistant's texts and their turn-end tokens have labels; without it, and for rows of plain
    text, everything has. The first token never has: nothing comes before it that could predict it.
    """

    def __init__(
        self,
        tokenizer: Any,
        contract: PromptContract,
        row_format: RowFormat,
        *,
        target_only: bool,
        max_seq_length: int,
        overlong: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder_of(tokenizer)
        self._contract = contract
        self._format = row_format
        self._target_only = target_only
        self._limit = max_seq_length
        self._overlong = overlong

    def build(self, rows: Sequence[RawRow]) -> tuple[list[TokenRow], list[DroppedRow]]:
        """The rows that can be trained on and the others, each in the order of `rows`.

        Raises UserError for a row over `max_seq_length` where `overlong` is "error".
        """
        lines: list[int] = []
        cut: list[list[Segment]] = []
        dropped: list[DroppedRow] = []
        for row in rows:
            try:
                if row.value is None:
                    raise BadRow(row.problem or "no row")
                cut.append(self._segments(self._format.example(row.value)))
                lines.append(row.line)
            except BadRow as bad:
                dropped.append(DroppedRow(row.line, bad.reason))

        kept: list[TokenRow] = []
        encoded = self._encoder.encode([[segment.text for segment in segments] for segments in cut])
        for line, segments, pieces in zip(lines, cut, encoded, strict=True):
            ids: list[int] = []
            labels: list[int] = []
            for segment, piece in zip(segments, pieces, strict=True):
                ids += piece
                labels += piece if segment.trained else [MASKED] * len(piece)
            labels[:1] = [MASKED] * len(labels[:1])
            cut_short = len(ids) > self._limit
            reason = self._fit(line, ids, labels)
            if reason:
                dropped.append(DroppedRow(line, reason))
            else:
                kept.append(TokenRow(line - 1, line, ids, labels, cut_short))
        dropped.sort(key=lambda row: row.line)
        return kept, dropped

    def _segments(self, example: Example) -> list[Segment]:
        if example.text is not None:
            return [Segment(self._whole_text(example.text), True)]
        messages = self._contract.messages(example)
        assistants = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
        if not assistants:
            raise BadRow("no assistant turn")
        if self._target_only:
            messages = messages[: assistants[-1] + 1]  # what follows is neither trained nor seen by what is
        return self._contract.segments(self._contract.shield(self._tokenizer, messages), self._target_only)

    def _whole_text(self, text: str) -> str:
        """A row of format `text`: a beginning token where the tokenizer puts one itself, and the end token."""
        bos, eos = self._encoder.bos or "", self._contract.eos_token
        return (bos if not text.startswith(bos) else "") + text + (eos if not text.endswith(eos) else "")

    def _fit(self, line: int, ids: list[int], labels: list[int]) -> str | None:
        """Cut a row that is too long, in place, or tell why it is dropped."""
        if len(ids) > self._limit:
            if self._overlong == "error":
                raise UserError(
                    f"Line {line} has {len(ids):,} tokens, more than --max-seq-length {self._limit:,}.",
                    "Raise --max-seq-length, or choose --overlong drop or truncate.",
                )
            if self._overlong == "drop":
                return "too long"
            del ids[self._limit :], labels[self._limit :]
        if labels.count(MASKED) == len(labels):
            return "nothing left to train on"
        return None
