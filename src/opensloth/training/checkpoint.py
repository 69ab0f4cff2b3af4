"""Checkpoints that are complete or not there: written under another name, renamed, and only then the oldest removed."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opensloth.errors import UserError

STATE = "trainer_state.json"  # written last by transformers
STAGING = ".incomplete"


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and is_complete(path):
            found[int(number[1])] = path
    return [found[step] for step in sorted(found)]


def is_complete(checkpoint: Path) -> bool:
    """Whether everything that a resume needs is there and whole: weights, optimizer, scheduler, state."""
    weights = [*checkpoint.glob("adapter_model.safetensors"), *checkpoint.glob("model*.safetensors")]
    pickles = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    return (
        bool(weights)
        and all(map(is_whole_safetensors, weights))
        and all(map(zipfile.is_zipfile, pickles))  # looks for the directory at the end of torch's files
        and is_whole_json(checkpoint / STATE)
    )


def is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def is_whole_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


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
    target = directory / name
    shutil.rmtree(target, ignore_errors=True)  # left over from a run that was cut off before this one resumed
    os.replace(directory / STAGING / name, target)
    shutil.rmtree(directory / STAGING, ignore_errors=True)
    found = complete(directory)
    newest = found.index(target) + 1
    for old in [*found[:newest][:-keep], *found[newest:]]:
        shutil.rmtree(old, ignore_errors=True)
