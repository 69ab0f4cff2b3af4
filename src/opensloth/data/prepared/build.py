"""Source rows to encoded rows: in this process for a little data, in a pool of workers for much.

Memory is bounded whatever the source's size: rows travel in batches, a few batches are under way at a time, and they
come back in the source's order.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.data.messages.examples import RowFormat
from opensloth.data.models.resolve import ModelRef, load_tokenizer
from opensloth.data.prepared.row_files import EncodedRows, encode, encode_prompts
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.sources.open import RawRow
from opensloth.data.tokens.prompts import PromptBuilder
from opensloth.data.tokens.rows import DroppedRow, RowBuilder
from opensloth.errors import WorkerFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 500
BATCH_CHARACTERS = 2_000_000  # ends a batch of long rows early, so that a batch is a few megabytes at most
START_SECONDS = 2.5  # what a pool's processes take to start, each of them on a core of its own
UNDER_WAY = 3  # batches per worker

Builder = RowBuilder | PromptBuilder


@dataclass(frozen=True)
class Recipe:
    """All that a process needs to turn source rows into prepared ones; small and picklable.

    With `max_prompt_len` they are prompts for GRPO; without it, token rows for SFT.
    """

    model: ModelRef
    trust_remote_code: bool
    contract: PromptContract
    row_format: RowFormat
    target_only: bool
    max_seq_length: int
    overlong: str
    max_prompt_len: int | None = None

    def builder(self, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Builder:
        tokenizer = tokenizer or load_tokenizer(self.model, self.trust_remote_code)
        if self.max_prompt_len is not None:
            return PromptBuilder(
                tokenizer,
                self.contract,
                self.row_format,
                max_prompt_len=self.max_prompt_len,
                overlong=self.overlong,
            )
        return RowBuilder(
            tokenizer,
            self.contract,
            self.row_format,
            target_only=self.target_only,
            max_seq_length=self.max_seq_length,
            overlong=self.overlong,
        )


@dataclass(frozen=True)
class Built:
    """What came of one batch: rows to write, rows dropped, and how many there were."""

    rows_in: int
    rows: EncodedRows
    dropped: list[DroppedRow]


def build_all(
    rows: Iterable[RawRow], recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", workers: int
) -> Iterator[Built]:
    """Build every row, in order. Raises what the builders raise, and WorkerFailed where a process died.

    `tokenizer` is the recipe's, for the rows that are built here; workers load it themselves. A pool starts once
    START_SECONDS were spent here, in which little data is done; who builds a row changes nothing about it.
    """
    batches, builder, spent = batched(rows), recipe.builder(tokenizer), 0.0
    for batch in batches:
        if workers > 1 and spent > START_SECONDS:
            yield from build_in_pool(chain([batch], batches), recipe, workers)
            return
        begin = time.monotonic()
        built = build(builder, batch)
        spent += time.monotonic() - begin
        yield built


def build(builder: Builder, batch: list[RawRow]) -> Built:
    if isinstance(builder, PromptBuilder):
        prompts, dropped = builder.build(batch)
        return Built(len(batch), encode_prompts(prompts), dropped)
    kept, dropped = builder.build(batch)
    return Built(len(batch), encode(kept), dropped)


def build_in_pool(batches: Iterator[list[RawRow]], recipe: Recipe, workers: int) -> Iterator[Built]:
    # spawn, on every platform: a fork copies locks that the progress bar's or Arrow's threads may hold at that moment
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker, initargs=(recipe,))
    under_way: deque[Future[Built]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(build_in_worker, batch))
            if len(under_way) >= UNDER_WAY * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        hint = "Most often the machine ran out of memory: lower --workers."
        raise WorkerFailed("A process that prepares rows ended before its work was done.", hint) from error
    finally:
        pool.shutdown(cancel_futures=True)


_builder: Builder | None = None  # of this worker process


def start_worker(recipe: Recipe) -> None:
    """Make the process's builder once. The tokenizer's own threads are off: there is one process per core already."""
    global _builder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    log.quiet_libraries()
    if not recipe.trust_remote_code:
        hide_torch()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to the whole group: end at once, without a traceback
    threading.Thread(target=end_with_parent, daemon=True).start()
    _builder = recipe.builder()


def hide_torch() -> None:
    """For a process that only prepares data: transformers imports torch where it finds it, and a tokenizer needs none.

    Hidden, a process starts in a third of the time and takes 70 MB instead of 330.
    """
    if "torch" not in sys.modules:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
        sys.modules["torch"] = None  # type: ignore[assignment]


def end_with_parent() -> None:
    """A worker of a killed parent would wait for work for ever: it holds both ends of its own queue."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def build_in_worker(batch: list[RawRow]) -> Built:
    assert _builder is not None
    return build(_builder, batch)


def batched(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Batches of BATCH_ROWS rows, or fewer where the rows are long."""
    batch: list[RawRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += size_of(row.value)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def size_of(value: Any) -> int:
    """Roughly the characters of a row's value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list):
        return sum(map(size_of, value))
    return 1
