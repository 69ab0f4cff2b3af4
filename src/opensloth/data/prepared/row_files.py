"""rows/: token rows (SFT) or prompts (GRPO) on disk, as Arrow that is written in a stream and read memory-mapped.

The directory is also what `datasets.load_from_disk` reads, so users can look at their rows with a library they know.
Nothing here needs that library.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opensloth import paths
from opensloth.data.tokens.prompts import PromptRow
from opensloth.data.tokens.rows import MASKED, TokenRow
from opensloth.errors import UserError

FILE = "data-00000-of-00001.arrow"
IDS = pa.list_(pa.int32())
SCHEMAS = {
    "sft": pa.schema({"input_ids": IDS, "labels": IDS, "row_id": pa.int64()}),
    # `prompt` and `columns` are JSON texts, so that rows of one file may differ in their types
    "grpo": pa.schema(
        {"input_ids": IDS, "prompt": pa.string(), "answer": pa.string(), "row_id": pa.int64(), "columns": pa.string()}
    ),
}


@dataclass(frozen=True)
class EncodedRows:
    """Token rows as they go to disk, with what the plan needs to know of each.

    Attributes:
        batch: an Arrow IPC message with the columns of the method's schema.
        lengths: tokens of each row.
        trained: tokens of each row that are predicted in training. A row's first token has nothing before it and
            never counts.
        hashes: 64 bits of each row's `input_ids`, for GRPO and its answer. Ten million different rows give a false
            repetition with a probability of 3e-6.
        cut: how many of the rows were too long and lost their ends.
    """

    batch: bytes
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    cut: int


def encode(rows: Sequence[TokenRow]) -> EncodedRows:
    """Turn token rows into what RowWriter writes."""
    lengths, offsets, ids = flat([row.input_ids for row in rows])
    labels = np.fromiter(chain.from_iterable(row.labels for row in rows), np.int32, len(ids))
    predicted = labels != MASKED
    predicted[offsets[:-1]] = False
    counted = np.concatenate([[0], np.cumsum(predicted)])
    batch = pa.record_batch(
        [
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, labels),
            pa.array([row.row_id for row in rows], pa.int64()),
        ],
        schema=SCHEMAS["sft"],
    )
    return EncodedRows(
        batch=batch.serialize().to_pybytes(),
        lengths=lengths,
        trained=np.diff(counted[offsets]).astype(np.int32),
        hashes=hashes(ids, offsets),
        cut=sum(row.cut for row in rows),
    )


def encode_prompts(rows: Sequence[PromptRow]) -> EncodedRows:
    """Turn prompts into what RowWriter writes. None of their tokens is trained."""
    lengths, offsets, ids = flat([row.input_ids for row in rows])
    batch = pa.record_batch(
        [
            pa.ListArray.from_arrays(offsets, ids),
            pa.array([to_json(row.messages) for row in rows], pa.string()),
            pa.array([row.answer for row in rows], pa.string()),
            pa.array([row.row_id for row in rows], pa.int64()),
            pa.array([to_json(row.columns) for row in rows], pa.string()),
        ],
        schema=SCHEMAS["grpo"],
    )
    return EncodedRows(
        batch=batch.serialize().to_pybytes(),
        lengths=lengths,
        trained=np.zeros(len(rows), np.int32),
        hashes=hashes(ids, offsets, [row.answer.encode() for row in rows]),
        cut=0,
    )


def flat(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """The lengths of the rows, their offsets (one more than rows), and all ids one after the other."""
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return lengths, offsets, np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1]))


def hashes(
    ids: NDArray[np.int32], offsets: NDArray[np.int32], more: Sequence[bytes] | None = None
) -> NDArray[np.uint64]:
    content = memoryview(ids.tobytes())
    cuts = (offsets * ids.itemsize).tolist()
    parts = (content[start:end] for start, end in pairwise(cuts))
    texts = parts if more is None else (bytes(part) + text for part, text in zip(parts, more, strict=True))
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts), np.uint64)


def to_json(value: Any) -> str:
    """JSON of what a source may hold. Bytes and numbers that are none become null, dates and the like their text."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str | None:
    return None if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowWriter:
    """Writes rows/ batch by batch. Complete only once the `with` block has ended."""

    def __init__(self, directory: Path, method: str = "sft") -> None:
        directory.mkdir()
        self.directory = directory
        self._schema = SCHEMAS[method]
        self._writer = pa.ipc.new_stream(str(directory / FILE), self._schema)

    def write(self, rows: EncodedRows) -> None:
        self._writer.write_batch(pa.ipc.read_record_batch(pa.py_buffer(rows.batch), self._schema))

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if error is None:
            paths.write_json(self.directory / "dataset_info.json", {"features": features(self._schema)})
            state: dict[str, Any] = {
                "_data_files": [{"filename": FILE}],
                "_fingerprint": self.directory.parent.name.strip("."),
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            paths.write_json(self.directory / "state.json", state)


def features(schema: pa.Schema) -> dict[str, Any]:
    """The columns as `datasets` writes them down."""

    def feature(kind: pa.DataType) -> dict[str, Any]:
        if pa.types.is_list(kind):
            return {"feature": feature(kind.value_type), "_type": "List"}
        return {"dtype": str(kind), "_type": "Value"}

    return {field.name: feature(field.type) for field in schema}


@dataclass(frozen=True)
class Row:
    """One stored row for SFT. `input_ids` and `labels` are read-only views of the file: int32, equally long."""

    row_id: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class Rows:
    """Random access to rows/ without loading it. Raises UserError where the file is damaged."""

    def __init__(self, directory: Path, method: str = "sft") -> None:
        self.path = directory / FILE
        try:
            with pa.memory_map(str(self.path)) as file:
                table = pa.ipc.open_stream(file).read_all()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} is damaged ({error}).", "Prepare the data again with --force.") from None
        if table.schema != SCHEMAS.get(method):
            columns = ", ".join(table.schema.names)
            message = f"{self.path} holds other columns ({columns}) than data for {method} has."
            raise UserError(message, "Prepare the data again with --force.")
        self._batches = table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Row:
        """The row for SFT at `index` (0-based place in rows/, not the row_id). Raises IndexError."""
        batch, place = self._place(index)
        ids, labels = (batch.column(name)[place].values.to_numpy() for name in ("input_ids", "labels"))
        return Row(batch.column("row_id")[place].as_py(), ids, labels)

    def prompt(self, index: int) -> PromptRow:
        """The prompt at `index` of rows/ for GRPO. Raises IndexError."""
        batch, place = self._place(index)
        stored = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
        return PromptRow(
            row_id=stored["row_id"],
            input_ids=stored["input_ids"],
            messages=json.loads(stored["prompt"]),
            answer=stored["answer"],
            columns=json.loads(stored["columns"]),
        )

    def answers(self) -> Iterator[dict[str, Any]]:
        """`row_id` and `answer` of every prompt for GRPO, in order."""
        for batch in self._batches:
            yield from batch.select(["row_id", "answer"]).to_pylist()

    def prompt_columns(self) -> set[str]:
        """The names of the source's other columns: of all rows, for a row of JSON may lack some."""
        texts = (text for batch in self._batches for text in batch.column("columns").unique().to_pylist())
        return {name for text in texts for name in json.loads(text)}

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        return batch, index - int(self._ends[number]) + len(batch)

    def ids(self) -> NDArray[np.int64]:
        """The `row_id` of every row."""
        return np.concatenate([batch.column("row_id").to_numpy() for batch in self._batches])

    def find(self, row_id: int) -> int | None:
        """The index of the row with this `row_id`, or None. Rows lie in the order of their ids."""
        ids = self.ids()
        index = int(np.searchsorted(ids, row_id))
        return index if index < len(ids) and ids[index] == row_id else None
