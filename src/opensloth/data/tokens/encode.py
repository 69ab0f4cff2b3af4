"""Pieces of a rendered conversation -> token ids, where only the template can write control tokens.

A row is a list of pieces, each tokenized on its own: BPE would otherwise merge across the border between prompt and
answer, and the model would never see at generation what it saw in training. Two things make that exact:

- A piece that goes on a row must not get the blank that SentencePiece-like tokenizers put before a text.
- A person who writes `<|im_end|>` must not end the turn. `shield` marks such texts before the template runs, and the
  encoder turns the marks into the ids of the plain characters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from opensloth.data.tokens.words import WordEncoder, splits_at_blanks
from opensloth.errors import UserError

# Two of Unicode's noncharacters, which no text that people exchange holds. A text that does loses nothing: a mark can
# only ever become plain characters.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_PROBES = ("Aa bb", " cc", "\n7, 8", "<dd", "(e")


class PieceEncoder:
    """Encodes rows of pieces with a fast tokenizer. Raises UserError for a slow one, which has no batch call."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            raise UserError(
                f"{tokenizer.name_or_path or 'This model'} has no fast tokenizer (tokenizer.json).",
                "Choose a model that has one.",
            )
        self._backend = backend
        self.controls = _control_tokens(tokenizer)
        bos = tokenizer.bos_token
        self._named = {bos, tokenizer.eos_token, tokenizer.pad_token}
        self.bos = bos if bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else None
        self._any_control = re.compile("|".join(map(re.escape, self.controls))) if self.controls else None
        self._plain: dict[str, list[int]] = {}
        self._anchor, self._anchor_ids = self._find_anchor()
        self._cuts_at_controls = not self._anchor and self._exact_after_controls()
        self._words = WordEncoder(backend) if not self._anchor and splits_at_blanks(backend) else None

    def encode(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each piece of each row, in one call of the backend (marked pieces need a few more).

        What all rows begin with, up to a control token, is tokenized once.
        """
        head = self._common_head([row[0] for row in rows if row])
        wanted: dict[str, int] = {}  # text to encode -> its number in the batch
        numbers: list[list[int]] = []  # of each row's pieces; -1 where a piece is marked
        for row in rows:
            of_row = []
            for position, piece in enumerate(row):
                if _OPEN in piece:
                    of_row.append(-1)
                    continue
                text = piece[len(head) :] if position == 0 else self._anchor + piece
                of_row.append(wanted.setdefault(text, len(wanted)))
            numbers.append(of_row)
        self._reset()
        encoded = self._words.encode(list(wanted)) if self._words else self._ids(list(wanted))
        head_ids = self._ids([head])[0] if head else []
        result = []
        for row, of_row in zip(rows, numbers, strict=True):
            ids = []
            for position, (piece, number) in enumerate(zip(row, of_row, strict=True)):
                if number < 0:
                    ids.append(self._marked(piece, position == 0))
                elif position == 0:
                    ids.append(head_ids + encoded[number] if head else encoded[number])
                else:
                    ids.append(self._without_anchor(piece, encoded[number]))
            result.append(ids)
        return result

    def shield(self, messages: Sequence[Mapping[str, Any]], frame: str) -> list[dict[str, Any]]:
        """`messages` with the control tokens in their texts marked, so that `encode` makes plain characters of them.

        Of an assistant's text only bos, eos, pad and the tokens in `frame` (those that the template itself writes
        around turns) are marked: a model's own marks, as around its thinking, are part of what it has to write.
        """
        if self._any_control is None:
            return [dict(message) for message in messages]
        return [
            {key: value if key == "role" else self._shield(value, only) for key, value in message.items()}
            for message in messages
            for only in [frame if message.get("role") == "assistant" else None]
        ]

    def _shield(self, value: Any, only: str | None) -> Any:
        if isinstance(value, str):
            assert self._any_control is not None
            if self._any_control.search(value) is None:
                return value
            return self._any_control.sub(lambda found: self._mark(found.group(), only), value)
        if isinstance(value, Mapping):
            return {key: self._shield(item, only) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._shield(item, only) for item in value]
        return value

    def _mark(self, control: str, only: str | None) -> str:
        if only is not None and control not in only and control not in self._named:
            return control
        return f"{_OPEN}{self.controls.index(control)}{_CLOSE}"

    def _marked(self, piece: str, first: bool) -> list[int]:
        """Ids of a piece that holds marks: the text between them as ever, a mark as the characters it stands for."""
        ids: list[int] = []
        for turn, text in enumerate(_MARK.split(piece)):
            if turn % 2:
                number = int(text)
                ids += self._characters(self.controls[number] if number < len(self.controls) else text)
            elif text:
                anchor = "" if first and not ids else self._anchor
                ids += self._without_anchor(text, self._ids([anchor + text])[0]) if anchor else self._ids([text])[0]
        return ids

    def _characters(self, control: str) -> list[int]:
        if control not in self._plain:
            before = self._backend.encode_special_tokens
            self._backend.encode_special_tokens = True
            try:
                ids = self._ids([self._anchor + control])[0]
            finally:
                self._backend.encode_special_tokens = before
            self._plain[control] = self._without_anchor(control, ids)
        return self._plain[control]

    def _common_head(self, firsts: list[str]) -> str:
        if len(firsts) < 2 or not self._cuts_at_controls or self._any_control is None:
            return ""
        common = common_start(min(firsts), max(firsts))
        if _OPEN in common:
            return ""
        ends = [found.end() for found in self._any_control.finditer(common)]
        return common[: ends[-1]] if ends else ""

    def _without_anchor(self, piece: str, ids: list[int]) -> list[int]:
        if not self._anchor:
            return ids
        size = len(self._anchor_ids)
        # Where the anchor merged with the piece (line breaks, mostly), no blank was put between them either
        return ids[size:] if ids[:size] == self._anchor_ids else self._ids([piece])[0]

    def _find_anchor(self) -> tuple[str, list[int]]:
        """What to put before a piece that goes on a row, to cut off again, so that no blank comes before it."""
        for anchor in ("", "\n", *self.controls):
            before, *ids = self._ids([anchor, *(anchor + probe for probe in _PROBES)])
            size = len(before)
            if all(
                one[:size] == before and self._added_text(one[size:]) == probe
                for one, probe in zip(ids, _PROBES, strict=True)
            ):
                return anchor, before
        return "", []

    def _added_text(self, ids: list[int]) -> str:
        """What `ids` add to a row. Decoders drop the blank of a first token, so a full stop goes before them."""
        start = self._ids(["."])[0]
        decode = self._backend.decode
        return str(decode(start + ids, skip_special_tokens=False))[len(decode(start, skip_special_tokens=False)) :]

    def _exact_after_controls(self) -> bool:
        """Whether text after a control token has the ids it has alone (not so where a token eats the blanks around)."""
        alone = self._ids(list(_PROBES))
        for control in self.controls:
            own, *ids = self._ids([control, *(control + probe for probe in _PROBES)])
            if any(one != own + rest for one, rest in zip(ids, alone, strict=True)):
                return False
        return True

    def _ids(self, texts: list[str]) -> list[list[int]]:
        self._reset()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _reset(self) -> None:
        # A tokenizer.json may carry truncation and padding, which the backend would apply without a word
        self._backend.no_truncation()
        self._backend.no_padding()


_encoders: WeakKeyDictionary[Any, PieceEncoder] = WeakKeyDictionary()


def encoder_of(tokenizer: Any) -> PieceEncoder:
    """The encoder of `tokenizer`, made once: it probes the tokenizer, which takes a few milliseconds."""
    if tokenizer not in _encoders:
        _encoders[tokenizer] = PieceEncoder(tokenizer)
    return _encoders[tokenizer]


def common_start(first: str, second: str) -> str:
    """The longest beginning that two texts share."""
    return next((first[:i] for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(first, second))


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the special tokens, longest first, so that a pattern of them finds the whole of each."""
    named = {str(token) for token in tokenizer.all_special_tokens}
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(filter(None, named | added), key=lambda text: (-len(text), text)))
