"""Reads local data files as a stream of rows: .jsonl, .json, .csv, .parquet, each also as .gz or .zst.

Memory does not grow with the file. A line that is no row becomes a RawRow with its problem; a file that cannot be read
to its end is a UserError, because the rows behind the damage would be lost in silence.
"""

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from opensloth.data.sources.json_values import json_values
from opensloth.data.sources.rows import RawRow
from opensloth.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXTENSIONS = " ".join(FORMATS) + " (also .gz .zst)"
ROW_BYTES = 64 << 20  # a longer row is no row: it bounds the memory that a file without line ends takes
CHUNK = 1 << 20
BATCH_ROWS = 1000
BOM = b"\xef\xbb\xbf"

BROKEN = "broken JSON"
NO_OBJECT = "not an object"
NOT_UTF8 = "not UTF-8"
NOT_TEXT = "not Unicode text"  # an escape such as \ud800 alone: no tokenizer takes it
TOO_LONG = "row over 64 MiB"
MORE_FIELDS = "more fields than the header"
FEWER_FIELDS = "fewer fields than the header"


def data_format(path: Path) -> str | None:
    """The format's extension (`.jsonl` for `a.JSONL.gz`), or None for a name that is no data file's."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_file(path: Path) -> Iterator[RawRow]:
    """The rows of one file whose `data_format` is known. Raises UserError where it is damaged or cannot be read."""
    import pyarrow as pa

    form = data_format(path)
    try:
        if form == ".parquet":
            yield from _parquet(path)
        elif form == ".csv":
            yield from _csv(path)
        elif form == ".json" and not _first_line_is_json(path):
            yield from _json_list(path)
        else:
            yield from _json_lines(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}.", "Convert it to UTF-8, or save it as .jsonl.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.", "Is the file whole and readable?") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged: {error}.", "Fetch or write the file again.") from error


def count_rows(path: Path) -> int | None:
    """The number of rows, where the file says it (Parquet that is not compressed as a whole)."""
    if path.suffix.lower() != ".parquet":
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no whole Parquet file: {error}.", "Fetch or write the file again.") from error


@contextmanager
def _bytes(path: Path) -> Iterator[BinaryIO]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        with path.open("rb", buffering=CHUNK) as file:
            yield file
        return
    import pyarrow as pa

    with pa.input_stream(str(path), compression=compression) as stream, io.BufferedReader(stream, CHUNK) as reader:
        yield reader


def _json_lines(path: Path) -> Iterator[RawRow]:
    loads = json.loads
    with _bytes(path) as file:
        number = 0
        for line in iter(partial(file.readline, ROW_BYTES), b""):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) == ROW_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield RawRow(number, None, TOO_LONG)
                continue
            if not line or line.isspace():
                continue
            try:
                value = loads(line.decode())
            except UnicodeDecodeError:
                yield RawRow(number, None, NOT_UTF8)
            except (ValueError, RecursionError):
                yield RawRow(number, None, BROKEN)
            else:
                yield _checked(number, value, b"\\ud" in line or b"\\uD" in line)


def _checked(number: int, value: Any, surrogates: bool) -> RawRow:
    if type(value) is not dict:
        return RawRow(number, None, NO_OBJECT)
    if surrogates and not _is_text(value):
        return RawRow(number, None, NOT_TEXT)
    return RawRow(number, value)


def _is_text(value: Any) -> bool:
    return _is_encodable(json.dumps(value, ensure_ascii=False))


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_line_is_json(path: Path) -> bool:
    """Whether a .json file is JSON Lines by content: its first line that is not blank holds one whole object."""
    with _bytes(path) as file:
        line = file.readline(CHUNK).removeprefix(BOM)
        while line and line.isspace():
            line = file.readline(CHUNK)
        if not line.lstrip().startswith(b"{"):
            return False
        while not line.endswith(b"\n") and len(line) < ROW_BYTES and (more := file.readline(CHUNK)):
            line += more
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _json_list(path: Path) -> Iterator[RawRow]:
    with _bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        for number, value in enumerate(json_values(text, str(path), CHUNK, ROW_BYTES), 1):
            yield _checked(number, value, surrogates=True)


def _csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(ROW_BYTES)
    with (
        _bytes(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        reader = csv.reader(text)
        header = next((fields for fields in reader if not _is_blank(fields)), None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise UserError(f"{path} names a column twice: {', '.join(header)}.", "Give each column its own name.")
        before = reader.line_num
        try:
            for fields in reader:
                line, before = before + 1, reader.line_num  # where the row starts: quoted fields span lines
                if _is_blank(fields):
                    continue
                if len(fields) != len(header):
                    yield RawRow(line, None, MORE_FIELDS if len(fields) > len(header) else FEWER_FIELDS)
                elif not _is_encodable("".join(fields)):
                    yield RawRow(line, None, NOT_UTF8)
                else:
                    yield RawRow(line, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise UserError(
                f"{path} is no CSV from line {before + 1} on: {error}.", "Is a quote not closed?"
            ) from error


def _is_blank(fields: list[str]) -> bool:
    return not fields or (len(fields) == 1 and not fields[0].strip())


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as plain:
        if path.suffix.lower() in COMPRESSIONS:  # Parquet is read from its end, which needs the whole file
            with _bytes(path) as file:
                shutil.copyfileobj(file, plain, CHUNK)
            source: Any = plain
        else:
            source = str(path)
        with pq.ParquetFile(source, buffer_size=CHUNK, pre_buffer=False) as table:
            yield from arrow_rows(table.iter_batches(batch_size=BATCH_ROWS, use_threads=False))


def read_arrow(path: Path) -> Iterator[RawRow]:
    """The rows of one Arrow stream file, as `save_to_disk` writes them, memory-mapped."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            yield from arrow_rows(stream)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged: {error}.", "Save the data set again.") from error


def arrow_rows(batches: Iterable[Any]) -> Iterator[RawRow]:
    """The rows of pyarrow record batches, numbered from 1."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            for value in _python_rows(part):
                number += 1
                yield RawRow(number, value, None if value is not None else NOT_UTF8)


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None
