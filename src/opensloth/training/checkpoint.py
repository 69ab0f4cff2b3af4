"""Checkpoints that are complete or not there: written under another name, renamed, and only then the oldest removed."""

import os
import re
import shutil
from pathlib import Path

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
    """Whether everything that a resume needs is there and not empty: weights, optimizer, scheduler, state."""
    needed = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt", STATE)]
    weights = [*checkpoint.glob("adapter_model.safetensors"), *checkpoint.glob("model*.safetensors")]
    return bool(weights) and all(path.is_file() and path.stat().st_size for path in needed + weights)


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
    """Give a staged checkpoint its name, then remove all but the newest `keep`."""
    target = directory / name
    shutil.rmtree(target, ignore_errors=True)  # left over from a run that was cut off before this one resumed
    os.replace(directory / STAGING / name, target)
    shutil.rmtree(directory / STAGING, ignore_errors=True)
    for old in complete(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
