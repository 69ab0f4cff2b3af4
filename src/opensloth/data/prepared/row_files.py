"""rows/: the token rows on disk, as Arrow that is written in a stream and read memory-mapped.

The directory is also what `datasets.load_from_disk` reads, so users can look at their rows with a library they know.
Nothing here needs that library.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opensloth import paths
from opensloth.data.tokens.rows import MASKED, TokenRow
from opensloth.errors import UserError

FILE = "data-00000-of-00001.arrow"
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "row_id": pa.int64()})
INFO = {
    "features": {
        "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
        "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
        "row_id": {"dtype": "int64", "_type": "Value"},
    }
}


@dataclass(frozen=True)
class EncodedRows:
    """Token rows as they go to disk, with what the plan needs to know of each.

    Attributes:
        batch: an Arrow IPC message with the columns of SCHEMA.
        lengths: tokens of each row.
        trained: tokens of each row that are predicted in training. A row's first token has nothing before it and
            never counts.
        hashes: 64 bits of each row's `input_ids`. Ten million different rows give a false repetition with a
            probability of 3e-6.
        cut: how many of the rows were too long and lost their ends.
    """

    batch: bytes
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    cut: int


def encode(rows: Sequence[TokenRow]) -> EncodedRows:
    """Turn token rows into what RowWriter writes."""
    lengths = np.fromiter((len(row.input_ids) for row in rows), np.int32, len(rows))
    ends = np.cumsum(lengths, dtype=np.int64)
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    total = int(offsets[-1])
    ids = np.fromiter(chain.from_iterable(row.input_ids for row in rows), np.int32, total)
    labels = np.fromiter(chain.from_iterable(row.labels for row in rows), np.int32, total)
    predicted = labels != MASKED
    predicted[offsets[:-1]] = False
    counted = np.concatenate([[0], np.cumsum(predicted)])
    content = memoryview(ids.tobytes())
    cuts = (offsets * ids.itemsize).tolist()
    hashes = [hashlib.blake2b(content[start:end], digest_size=8).digest() for start, end in pairwise(cuts)]
    batch = pa.record_batch(
        [
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, labels),
            pa.array([row.row_id for row in rows], pa.int64()),
        ],
        schema=SCHEMA,
    )
    return EncodedRows(
        batch=batch.serialize().to_pybytes(),
        lengths=lengths,
        trained=np.diff(counted[offsets]).astype(np.int32),
        hashes=np.frombuffer(b"".join(hashes), np.uint64),
        cut=sum(row.cut for row in rows),
    )


class RowWriter:
    """Writes rows/ batch by batch. Complete only once the `with` block has ended."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._writer = pa.ipc.new_stream(str(directory / FILE), SCHEMA)

    def write(self, rows: EncodedRows) -> None:
        self._writer.write_batch(pa.ipc.read_record_batch(pa.py_buffer(rows.batch), SCHEMA))

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if error is None:
            paths.write_json(self.directory / "dataset_info.json", INFO)
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


@dataclass(frozen=True)
class Row:
    """One stored row. The arrays are read-only views of the file: `input_ids` and `labels`, int32, equally long."""

    row_id: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class Rows:
    """Random access to rows/ without loading it. Raises UserError where the file is damaged."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        try:
            with pa.memory_map(str(self.path)) as file:
                self._batches = pa.ipc.open_stream(file).read_all().to_batches()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} is damaged ({error}).", "Prepare the data again with --force.") from None
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Row:
        """The row at `index` (0-based place in rows/, not the row_id). Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        place = index - int(self._ends[number]) + len(batch)
        ids, labels = (batch.column(name)[place].values.to_numpy() for name in ("input_ids", "labels"))
        return Row(batch.column("row_id")[place].as_py(), ids, labels)

    def find(self, row_id: int) -> int | None:
        """The index of the row with this `row_id`, or None. Rows lie in the order of their ids."""
        ids = np.concatenate([batch.column("row_id").to_numpy() for batch in self._batches])
        index = int(np.searchsorted(ids, row_id))
        return index if index < len(ids) and ids[index] == row_id else None
