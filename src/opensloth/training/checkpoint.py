"""Checkpoints that are complete or not there: written under another name, renamed, and only then the oldest removed."""

import json
import os
import re
import shutil
from pathlib import Path

from opensloth import paths
from opensloth.errors import UserError

STATE = "trainer_state.json"
CONTENTS = "files.json"  # what belongs to a checkpoint: each file's size in bytes by its name; written last
STAGING = ".incomplete"


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and is_complete(path):
            found[int(number[1])] = path
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that a complete checkpoint has behind it."""
    return int(paths.read_json(checkpoint / STATE, "a checkpoint")["global_step"])


def is_complete(checkpoint: Path) -> bool:
    """Whether all files with which the checkpoint was saved are there, and as long as they were."""
    try:
        sizes = json.loads((checkpoint / CONTENTS).read_text(encoding="utf-8"))
        return STATE in sizes and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def seal(checkpoint: Path) -> None:
    """Note what a checkpoint holds. All of it is on the disk first: a power cut must not leave files of zeros."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CONTENTS]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    paths.write_json(checkpoint / CONTENTS, sizes)


def to_resume(resume: str, directory: Path) -> Path | None:
    """The checkpoint that `--resume` means. Raises UserError where a named one is not complete."""
    if resume == "never":
        return None
    if resume == "auto":
        found = complete(directory)
        return found[-1] if found else None
    path = Path(resume)
    if not is_complete(path):
        known = ", ".join(str(p) for p in complete(directory)) or "none"
        raise UserError(f"--resume {resume} is not a complete checkpoint.", f"Complete ones of this run: {known}.")
    return path


def publish(directory: Path, name: str, keep: int) -> None:
    """Give a staged checkpoint its name, then remove all but the newest `keep`.

    Later steps than its own are of a course that was left by `--resume PATH`: `auto` must not find them any more.
    """
    seal(directory / STAGING / name)
    target = _move_in(directory, name)
    clear(directory)
    found = complete(directory)
    newest = found.index(target) + 1
    for old in [*found[:newest][:-keep], *found[newest:]]:
        shutil.rmtree(old, ignore_errors=True)


def _move_in(directory: Path, name: str) -> Path:
    """A namesake, of a course that was left or cut off, goes only once there is a whole one in its place or staged."""
    target = directory / name
    if target.exists():
        os.replace(target, directory / STAGING / f"old-{os.getpid()}")
    os.replace(directory / STAGING / name, target)
    return target


def clear(directory: Path) -> None:
    """Remove what was being written when a run ended."""
    shutil.rmtree(directory / STAGING, ignore_errors=True)


def recover(directory: Path) -> None:
    """Name a checkpoint that was whole when its run was killed, and remove one that was not."""
    for staged in (directory / STAGING).glob("checkpoint-*"):
        if is_complete(staged):
            _move_in(directory, staged.name)
    clear(directory)
