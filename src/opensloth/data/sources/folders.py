"""Local directories as sources: what `save_to_disk` wrote, or a folder of data files, of which one split is read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opensloth import paths
from opensloth.data.sources import files
from opensloth.data.sources.rows import RawRow
from opensloth.errors import UserError, nearest

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
METADATA = {"dataset_info.json", "dataset_infos.json", SAVED, SAVED_SPLITS}
SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}


@dataclass(frozen=True)
class Folder:
    """The files of one split, in order."""

    files: tuple[Path, ...]
    arrow: bool

    def rows(self) -> Iterator[RawRow]:
        return numbered(self.files, arrow=self.arrow)

    def count(self) -> int | None:
        counts = [None if self.arrow else files.count_rows(path) for path in self.files]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def digest(self, directory: Path, split: str) -> str:
        content = [(path.relative_to(directory).as_posix(), paths.digest_file(path)) for path in self.files]
        return paths.digest(["directory", split, content])


def numbered(parts: tuple[Path, ...], arrow: bool = False) -> Iterator[RawRow]:
    """The rows of several files one after the other; rows are numbered through where there are several."""
    read = files.read_arrow if arrow else files.read_file
    if len(parts) == 1:
        yield from read(parts[0])
        return
    number = 0
    for part in parts:
        for row in read(part):
            number += 1
            yield RawRow(number, row.value, row.problem)


def open_folder(directory: Path, split: str) -> Folder:
    """The files of `split`. Raises UserError for no data files, mixed formats, or a split that is not there."""
    if (directory / SAVED_SPLITS).is_file():
        splits = [str(name) for name in paths.read_json(directory / SAVED_SPLITS, "a saved data set")["splits"]]
        if split not in splits:
            raise no_split(str(directory), split, splits)
        return _saved(directory / split)
    if (directory / SAVED).is_file():
        if split != "train":
            raise UserError(f"{directory} is one saved data set without splits.", f"Leave --split {split} out.")
        return _saved(directory)
    if (directory / "manifest.json").is_file() and (directory / "prompt.json").is_file():
        made = paths.read_json(directory / "manifest.json", "prepared data").get("method", "sft")
        raise UserError(
            f"{directory} is prepared data already.",
            f"Train on it (os-{made} {directory}), or name the rows that it was made of.",
        )
    return Folder(_data_files(directory, split), arrow=False)


def _saved(directory: Path) -> Folder:
    state = paths.read_json(directory / SAVED, "a saved data set")
    try:
        parts = tuple(directory / part["filename"] for part in state["_data_files"])
    except (KeyError, TypeError):
        raise UserError(f"{directory / SAVED} is damaged.", "Save the data set again with save_to_disk.") from None
    for part in parts:
        if not part.is_file():
            raise UserError(f"{directory} lacks its file {part.name}.", "Save the data set again with save_to_disk.")
    return Folder(parts, arrow=True)


def _data_files(directory: Path, split: str) -> tuple[Path, ...]:
    found = sorted(
        path
        for path in directory.rglob("*")
        if files.data_format(path)
        and path.name not in METADATA
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    if not found:
        raise UserError(f"{directory} holds no data files.", f"Data files end in {files.EXTENSIONS}.")
    formats = sorted({files.data_format(path) or "" for path in found})
    if len(formats) > 1:
        raise UserError(f"{directory} holds files of several formats: {', '.join(formats)}.", "Name one file.")
    words = {path: set(re.findall(r"[a-z]+", path.relative_to(directory).as_posix().lower())) for path in found}
    named = {path: _named_split(words[path]) for path in found}
    chosen = tuple(path for path in found if named[path] == split_name(split))
    chosen = chosen or tuple(path for path in found if split.lower() in words[path])
    if not chosen:
        raise no_split(str(directory), split, sorted(set(named.values())))
    return chosen


def _named_split(words: set[str]) -> str:
    """The split that a path names; a path that names none is training data."""
    return next((split for split, known in SPLIT_WORDS.items() if split != "train" and words & set(known)), "train")


def split_name(word: str) -> str:
    """`validation` for `dev`, and so on; other words as they are."""
    return next((split for split, known in SPLIT_WORDS.items() if word.lower() in known), word)


def no_split(spec: str, split: str, splits: list[str]) -> UserError:
    """The error for a split that a source does not have."""
    if "[" in split:
        hint = "For the first rows of a split, use --samples N."
    elif len(splits) == 1:
        hint = f"Use --split {splits[0]}."
    else:
        hint = nearest(split, splits) or "Use --split with one of these."
    return UserError(f"{spec} has no split {split!r}; it has: {', '.join(splits)}.", hint)
