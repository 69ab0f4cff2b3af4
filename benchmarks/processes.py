"""The processes of benchmarks: each with a log of its own, a limit of time, and nothing left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def in_time(words: Sequence[str], log: Path, seconds: float, settings: Mapping[str, str]) -> int | None:
    """Run a command and return its exit code; None where it was ended after `seconds`."""
    return ended(started(words, log, settings), seconds)


def started(words: Sequence[str], log: Path, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(settings), start_new_session=True
        )


def ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(work: Path) -> dict[str, str]:
    """Of every process: no network, one card, and no files in the working directory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return QUIET | {"CUDA_VISIBLE_DEVICES": visible, "UNSLOTH_COMPILE_LOCATION": str(work / "unsloth_compiled")}


def why(log: Path, code: int) -> str:
    """The last line of a log that tells of an error, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line]
    return f"exit code {code}: {(told or lines or ['no output'])[-1][:300]}"


def end_on_signal() -> None:
    """SIGTERM ends this process in order, and with it the one that is measured."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
