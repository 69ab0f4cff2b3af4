"""`os-data show`: prepared data in the terminal. What is trained is green, all else (so a whole prompt) is dim.

Where there are no colours, in a file or a pipe, what is trained stands between marks.
"""

import os
from itertools import groupby
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from opensloth import log, paths
from opensloth.data.prepared.summary import Summary
from opensloth.data.show.html import page
from opensloth.data.show.view import Bar, RowView, View, view
from opensloth.errors import UserError

BAR_WIDTH = 40
TRAINED, MASKED = "green", "dim"
OPEN, CLOSE = "⟦", "⟧"


def show(
    directory: Path, *, row: int | None = None, n: int = 3, html: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Print the data on stdout, or write it to one HTML file that needs no network.

    Args:
        row: the id of the one row to show (its 0-based number among the source's rows); else `n` rows of the order.
    Raises:
        UserError: the directory is damaged, there is no such row, the file cannot be written.
    """
    shown = view(directory, row, n, trust_remote_code)
    if html is None:
        console = Console(soft_wrap=True, highlight=False)
        console.print(terminal(shown, marked=console.color_system is None))
        return
    try:
        paths.write_text(html, page(shown))
    except OSError as error:
        raise UserError(f"Cannot write {html}: {error.strerror or error}.", "Name another file.") from error
    log.say(f"Wrote {html} ({os.path.getsize(html):,} bytes).")


def summary_table(summary: Summary) -> Table:
    """The figures of prepared data, as `os-data` prints them when it is done."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in [("directory", str(summary.directory)), *summary.lines()]:
        table.add_row(name, Text(log.printable(value)))
    return table


def terminal(shown: View, marked: bool = False) -> RenderableType:
    """Everything as one thing that rich prints. Control characters of the data are made visible.

    Args:
        marked: what is trained stands between marks.
    """
    parts: list[RenderableType] = [
        Text(log.printable(f"{shown.source} for {shown.model}")),
        summary_table(shown.summary),
        heading(f"Tokens of a {shown.unit}"),
        bars(shown.lengths),
    ]
    if shown.fills:
        parts += [heading("Tokens of a pack"), bars(shown.fills)]
    if shown.drops:
        parts += [heading("Dropped (the first)"), *(Text(log.printable(f"line {n}: {why}")) for n, why in shown.drops)]
    if marked and any(piece.trained for row in shown.rows for piece in row.pieces):
        parts.append(Text(f"\nWhat is trained stands between {OPEN} and {CLOSE}."))
    for row in shown.rows:
        parts += [heading(row.title), row_text(row, marked)]
        parts += [known(name, value) for name, value in (row.known or {}).items()]
    return Group(*parts)


def heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def bars(histogram: list[Bar]) -> Text:
    """One line a bar: the range, a bar as long as its share of the longest, the count."""
    most = max(bar.count for bar in histogram)
    wide = len(f"{histogram[-1].high:,}")
    lines = []
    for bar in histogram:
        drawn = "█" * round(BAR_WIDTH * bar.count / most)
        lines.append(f"{bar.low:>{wide},} - {bar.high:>{wide},}  {drawn:{BAR_WIDTH}}  {bar.count:,}")
    return Text("\n".join(lines))


def known(name: str, value: str) -> Text:
    return Text.assemble((f"{log.printable(name)}: ", "bold"), log.printable(value))


def row_text(row: RowView, marked: bool) -> Text:
    text = Text()
    for trained, pieces in groupby(row.pieces, lambda piece: piece.trained):
        words = log.printable("".join(piece.text for piece in pieces))
        text.append(f"{OPEN}{words}{CLOSE}" if trained and marked else words, style=TRAINED if trained else MASKED)
    return text
