"""What `os-data show` shows of prepared data, before it becomes terminal or HTML output."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensloth.data.models.resolve import load_tokenizer, resolve_model, tokenizer_digest
from opensloth.data.prepared.directory import Prepared, open_prepared
from opensloth.data.prepared.manifest import AGAIN, DROPPED
from opensloth.data.prepared.summary import Summary, summarize
from opensloth.data.tokens.rows import MASKED
from opensloth.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = 12
DROPS_NAMED = 20
LONGEST_VALUE = 500  # characters of another column


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text whose tokens are all trained, or all masked."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RowView:
    """One row as text, and its place: the pack and shard of the plan, and the split.

    `known` is what a prompt for GRPO has beside its text: the gold answer and the other columns, by name.
    """

    row_id: int
    tokens: int
    trained: int
    pack: int
    shard: int
    split: str
    pieces: list[Piece]
    known: dict[str, str] | None = None

    @property
    def title(self) -> str:
        size = f"Row {self.row_id}: {self.tokens:,} tokens"
        if self.known is not None:
            return f"{size} ({self.split} split)"
        return f"{size}, {self.trained:,} trained ({self.split} split, pack {self.pack}, shard {self.shard})"


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: how many values lie in low..high."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class View:
    """All that is shown. `drops` are the first dropped rows as (line, reason)."""

    summary: Summary
    source: str
    model: str
    lengths: list[Bar]
    fills: list[Bar]  # tokens in a planned pack; empty for GRPO, whose prompts are not packed
    drops: list[tuple[int, str]]
    rows: list[RowView]

    @property
    def unit(self) -> str:
        """What one row is called."""
        return "prompt" if self.summary.method == "grpo" else "row"


def view(directory: Path, row_id: int | None, n: int, trust_remote_code: bool) -> View:
    """Gather what there is to show: the row with `row_id`, or else the first `n` rows of the global order.

    Raises UserError where the directory is damaged, the model's tokenizer is another one, or no row has that id.
    """
    prepared = open_prepared(directory)
    if row_id is None:
        indices = [int(index) for index in prepared.plan["row"][:n]]
    else:
        index = prepared.rows.find(row_id)
        if index is None:
            raise UserError(f"{directory} has no row {row_id}: it does not exist or was dropped.", f"See {DROPPED}.")
        indices = [index]
    tokenizer = own_tokenizer(prepared, trust_remote_code) if indices else None
    fills = []
    if prepared.manifest.method == "sft":
        fills = histogram(np.bincount(prepared.plan["pack"], weights=prepared.plan["length"]).astype(np.int64))
    return View(
        summary=summarize(prepared),
        source=prepared.manifest.source.spec,
        model=prepared.manifest.model,
        lengths=histogram(prepared.lengths),
        fills=fills,
        drops=first_drops(directory),
        rows=[view_row(prepared, tokenizer, index) for index in indices] if tokenizer is not None else [],
    )


def own_tokenizer(prepared: Prepared, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer that the rows were made with. Raises UserError where its model has another one by now."""
    manifest = prepared.manifest
    tokenizer = load_tokenizer(resolve_model(manifest.model, manifest.model_revision), trust_remote_code)
    if tokenizer_digest(tokenizer) != manifest.tokenizer_digest:
        raise UserError(
            f"{manifest.model} has another tokenizer than the one {prepared.directory} was made with.", AGAIN
        )
    return tokenizer


def view_row(prepared: Prepared, tokenizer: "PreTrainedTokenizerBase", index: int) -> RowView:
    known: dict[str, str] | None = None
    if prepared.manifest.method == "grpo":
        prompt = prepared.rows.prompt(index)
        row_id, ids, trained = prompt.row_id, prompt.input_ids, [False] * len(prompt.input_ids)
        known = {"answer": prompt.answer} | {name: as_text(value) for name, value in prompt.columns.items()}
    else:
        row = prepared.rows.row(index)
        row_id, ids, trained = row.row_id, row.input_ids.tolist(), (row.labels != MASKED).tolist()
    place = int(np.flatnonzero(prepared.plan["row"] == index)[0])
    return RowView(
        row_id=row_id,
        tokens=len(ids),
        trained=int(prepared.trained[index]),
        pack=int(prepared.plan["pack"][place]),
        shard=int(prepared.plan["shard"][place]),
        split=str(prepared.plan["split"][place]),
        pieces=pieces(tokenizer, ids, trained),
        known=known,
    )


def as_text(value: Any) -> str:
    """A column's value, or its beginning: a generated solution may be as long as a book's chapter."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text):,} characters)"


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """The row's text, cut where training starts or stops.

    A piece is what its tokens add to the text before them: decoded alone, a tokenizer may drop its first blank.
    """
    cuts = [place for place in range(1, len(ids)) if trained[place] != trained[place - 1]]
    found: list[Piece] = []
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        so_far = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        found.append(Piece(so_far[len(shown) :], bool(trained[start])))
        shown = so_far
    return found


def histogram(values: np.ndarray) -> list[Bar]:
    """Up to BARS bars of equal width over whole numbers; the bars' counts sum to the number of values."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // BARS)
    counts = np.bincount((values - low) // width)
    return [Bar(low + i * width, min(low + (i + 1) * width - 1, high), int(count)) for i, count in enumerate(counts)]


def first_drops(directory: Path) -> list[tuple[int, str]]:
    drops: list[tuple[int, str]] = []
    with (directory / DROPPED).open(encoding="utf-8") as file:
        for line in file:
            drop = json.loads(line)
            drops.append((int(drop["line"]), str(drop["reason"])))
            if len(drops) == DROPS_NAMED:
                break
    return drops
