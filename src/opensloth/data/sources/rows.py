"""What every kind of source gives: numbered rows, its columns, and a digest of its content."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from opensloth.errors import UserError

COLUMN_ROWS = 100  # readable rows that tell the columns


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row. `line` is 1-based: the line in a single text file, the row's number in any other source.

    `value` is None exactly where `problem` says why the line is no row.
    """

    line: int
    value: dict[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """An open INPUT of the commands. Nothing is held in memory; `rows()` may be called again.

    `size` is the number of rows where it is known without reading them. `revision` is the commit of a hub data set.
    `samples` bounds the rows that `rows()` gives, bad ones counted; it is no part of `digest`.
    """

    spec: str
    kind: Literal["file", "directory", "hub", "sample"]
    name: str
    split: str
    read: Callable[[], Iterator[RawRow]]
    fingerprint: Callable[[], str]
    subset: str | None = None
    revision: str | None = None
    samples: int | None = None
    total: int | None = None

    def rows(self) -> Iterator[RawRow]:
        """Stream the rows. Raises UserError where the source cannot be read to its end."""
        return islice(self.read(), self.samples)

    @property
    def size(self) -> int | None:
        if self.total is None or self.samples is None:
            return self.total
        return min(self.total, self.samples)

    @cached_property
    def digest(self) -> str:
        """A SHA-256 (hex) of the content: the files' bytes, or the hub's commit, with split and subset."""
        return self.fingerprint()

    @cached_property
    def columns(self) -> list[str]:
        """The columns that at least half of the first readable rows have, in order of appearance.

        Half, because a stray row of another shape must not decide how all the others are read.
        Raises UserError where there is no row at all, or none that can be read.
        """
        found: Counter[str] = Counter()
        first_problem: RawRow | None = None
        readable = 0
        for row in self.rows():
            if row.value is None:
                first_problem = first_problem or row
                continue
            found.update(row.value.keys())
            readable += 1
            if readable == COLUMN_ROWS:
                break
        if readable:
            return [column for column, times in found.items() if 2 * times >= readable]
        if first_problem is None:
            raise UserError(f"{self.spec} holds no rows.", "Name a source that has some.")
        raise UserError(
            f"No row of {self.spec} can be read (row {first_problem.line}: {first_problem.problem}).",
            "Each line of a .jsonl file is one JSON object in UTF-8.",
        )
