"""The values of one JSON list, or JSON values that follow each other, parsed piece by piece: a file of any size."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from opensloth.errors import UserError


def json_values(file: TextIO, name: str, chunk: int, longest: int) -> Iterator[Any]:
    """The elements in order. `chunk` characters are read at a time; no element may have more than `longest`.

    Raises UserError (with `name`) for broken JSON: behind the break no element's beginning can be told.
    """
    pieces = _Pieces(file, name, chunk, longest)
    if pieces.peek() != "[":
        while pieces.peek():
            yield pieces.value()
        return
    pieces.skip()
    while pieces.peek() != "]" or pieces.number:  # but for the empty list, a value must come here
        yield pieces.value()
        mark = pieces.peek()
        if mark == "]":
            break
        if mark != ",":
            raise pieces.damaged("is broken JSON after")
        pieces.skip()
    pieces.skip()
    if pieces.peek():
        raise pieces.damaged("goes on after its list, which ends with")


class _Pieces:
    def __init__(self, file: TextIO, name: str, chunk: int, longest: int) -> None:
        self.file, self.name, self.chunk, self.longest = file, name, chunk, longest
        self.buffer, self.at, self.ended = "", 0, False
        self.number = 0  # values read
        self.decoder = json.JSONDecoder()

    def damaged(self, what: str) -> UserError:
        hint = "Save it as .jsonl: there a broken line costs one row, not the file."
        return UserError(f"{self.name} {what} element {self.number}.", hint)

    def more(self, size: int) -> None:
        piece = self.file.read(size)
        self.buffer, self.at, self.ended = self.buffer[self.at :] + piece, 0, not piece

    def peek(self) -> str:
        """The next character that is not white space, or an empty text at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if self.ended:
                return ""
            self.more(self.chunk)

    def skip(self) -> None:
        self.at += 1

    def value(self) -> Any:
        self.peek()
        size = self.chunk
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except (ValueError, RecursionError):
                if self.ended or len(self.buffer) - self.at > self.longest:
                    raise self.damaged("is broken JSON after") from None
            else:
                if end < len(self.buffer) or self.ended:  # a number may go on in the next piece
                    self.at, self.number = end, self.number + 1
                    return value
            self.more(size)
            size *= 2  # parsing starts again each time: twice as much keeps that cheap for a long element
