"""What every result file says of where it was made: machine, versions, command."""

import os
import platform
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth", "bitsandbytes", "liger-kernel")


def describe() -> dict[str, Any]:
    """Machine, versions of the libraries, the command line and the time (UTC) of this run."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"device": card(), "cpus": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := installed(name))},
        "command": " ".join(["python", *map(without_folders, sys.argv)]),
    }


def without_folders(word: str) -> str:
    """Where a file lay on the machine says nothing to a reader."""
    return Path(word).name if Path(word).is_absolute() else word


def card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def cards() -> int:
    import torch

    return torch.cuda.device_count()


def kind() -> str:
    """What result files are named after."""
    return next((kind.lower() for kind in ("H100", "H200") if kind in card()), "cpu" if card() == "cpu" else "gpu")


def peak_gib() -> float:
    """The most memory that this process has used: of the card (what torch allocated), or of the machine."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
