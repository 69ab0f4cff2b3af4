"""What every result file says of where it was made: machine, versions, command."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth", "bitsandbytes", "liger-kernel")


def describe() -> dict[str, Any]:
    """Machine, versions of the libraries, the command line and the time (UTC) of this run."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"device": card(), "cpus": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := installed(name))},
        "command": " ".join(["python", *sys.argv]),
    }


def card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
