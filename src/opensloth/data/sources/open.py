"""Opens an INPUT: a hub data set, a data file, a directory, or `sample:arithmetic`.

What exists on this machine is local. Of the rest, `owner/name` and a bare `name` are hub ids; absolute paths, `./x`,
`~/x`, deeper paths and names that end as a data file does are meant as files, and their absence is an error.
"""

import difflib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from opensloth import paths
from opensloth.data.sources import arithmetic as sample
from opensloth.data.sources import files, folders
from opensloth.data.sources.rows import RawRow, Source
from opensloth.errors import UserError, nearest

__all__ = ["RawRow", "Source", "open_source"]

SAMPLES = {"sample:arithmetic": "arithmetic"}


def open_source(
    spec: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    samples: int | None = None,
) -> Source:
    """Find what `spec` means; prove that it has a readable row (of a hub data set: that it has the split).

    Raises UserError, with what lies nearby or is available, for anything that cannot be opened.
    """
    if spec.startswith("sample:"):
        _refuse(spec, "is built in", subset=subset, revision=revision)
        return _sample(spec, split, samples)
    path = Path(spec).expanduser()
    if path.exists():
        _refuse(spec, "is local", subset=subset, revision=revision)
        source = _directory(spec, path, split, samples) if path.is_dir() else _file(spec, path, split, samples)
        _ = source.columns  # an empty or unreadable source is refused here, before any other work
        return source
    if is_path(spec):
        raise _missing(spec, path)
    from opensloth.data.sources import hub

    return hub.open_hub(spec, split=split, subset=subset, revision=revision, samples=samples)


def _refuse(spec: str, what: str, *, subset: str | None, revision: str | None) -> None:
    for option, value in (("--subset", subset), ("--data-revision", revision)):
        if value is not None:
            raise UserError(f"{spec} {what} and knows no {option}.", f"Leave {option} {value} out.")


def _sample(spec: str, split: str, samples: int | None) -> Source:
    if spec not in SAMPLES:
        raise UserError(
            f"There is no built-in data set {spec}.", nearest(spec, SAMPLES) or "There is sample:arithmetic."
        )
    if split not in sample.DEFAULT_ROWS:
        raise folders.no_split(spec, split, list(sample.DEFAULT_ROWS))
    if samples is not None and samples > sample.MOST_ROWS:
        raise UserError(f"{spec} has at most {sample.MOST_ROWS:,} different rows.", "Lower --samples.")
    return Source(
        spec=spec,
        kind="sample",
        name=SAMPLES[spec],
        split=split,
        samples=samples,
        total=samples or sample.DEFAULT_ROWS[split],
        read=partial(_sample_rows, split, samples),
        fingerprint=partial(paths.digest, [spec, sample.VERSION, split]),
    )


def _sample_rows(split: str, samples: int | None) -> Iterator[RawRow]:
    for number, value in enumerate(sample.arithmetic(split, samples), 1):
        yield RawRow(number, value)


def _file(spec: str, path: Path, split: str, samples: int | None) -> Source:
    if not path.is_file():
        raise UserError(f"{spec} is neither a file nor a directory.", "Write its rows to a .jsonl file first.")
    if files.data_format(path) is None:
        raise UserError(f"{spec}: its name does not tell its format.", f"Data files end in {files.EXTENSIONS}.")
    if split != "train" and folders.split_name(split) not in {folders.split_name(w) for w in _words(path.name)}:
        raise UserError(f"{spec} is one file and has no split {split!r}.", f"Leave --split {split} out.")
    return Source(
        spec=spec,
        kind="file",
        name=_short(path.name.split(".")[0] or path.name),
        split=split,
        samples=samples,
        total=files.count_rows(path),
        read=partial(files.read_file, path),
        fingerprint=partial(_file_digest, path, split),
    )


def _file_digest(path: Path, split: str) -> str:
    return paths.digest(["file", files.data_format(path), split, paths.digest_file(path)])


def _directory(spec: str, path: Path, split: str, samples: int | None) -> Source:
    folder = folders.open_folder(path, split)
    return Source(
        spec=spec,
        kind="directory",
        name=_short(path.resolve().name),
        split=split,
        samples=samples,
        total=folder.count(),
        read=folder.rows,
        fingerprint=partial(folder.digest, path, split),
    )


def is_path(spec: str) -> bool:
    """Whether `spec` is meant as a place on this machine, whatever lies there."""
    return (
        spec.startswith((".", "~"))
        or os.path.isabs(spec)
        or spec.endswith("/")
        or "\\" in spec
        or spec.count("/") > 1
        or files.data_format(Path(spec)) is not None
        or ("/" not in spec and "." in spec)
    )


def _missing(spec: str, path: Path) -> UserError:
    """The error for a file that is not there, with the nearest names of the nearest folder that is."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir():
            folder = folder.parent
        return UserError(f"{spec} does not exist; of its path, only {folder.absolute()} does.", "Check the path.")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() or files.data_format(p))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    where = folder.absolute()
    if close:
        return UserError(f"{spec} does not exist.", f"Did you mean {folder / close[0]}?")
    data = [name for name in names if files.data_format(Path(name))][:5]
    return UserError(f"{spec} does not exist.", f"{where} holds {', '.join(data)}." if data else f"Looked in {where}.")


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def _short(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"
