"""Files that are complete or absent: atomic writes, the cache folder, digests, checks before long work."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opensloth.errors import UserError

LEFT_SECONDS = 3600  # without a sign of life, after which a half-made directory belongs to nobody


def cache_dir() -> Path:
    """Where converted models are kept: `OPENSLOTH_CACHE`, else the platform's cache folder."""
    if override := os.environ.get("OPENSLOTH_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "opensloth"


def keep_compiled() -> None:
    """Have torch keep what it compiles in our cache. Call before it is imported: parts of it choose a place then."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file in the same folder, so that readers see the old text or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from the other members of a team
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file that this program wrote. Raises UserError, naming `what`, where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so {path.parent} is not {what}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}).", "Make it again with --force.") from None


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Fill a temporary directory beside `target`, which takes its place only when the block ends without an error."""
    target = target.absolute()
    check_writable(target)
    remove_left(target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old.")) / "old"
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old is not None:  # give back what was there
                os.replace(old, target)
            raise
        finally:
            if old is not None:
                shutil.rmtree(old.parent, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"Cannot write {target}: {error.strerror or error}.", "Free space or choose another --output."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left(target: Path) -> None:
    """What killed processes have left of `new_directory`; not what another machine may be at work on."""
    for old in target.parent.glob(f".{glob.escape(target.name)}.*"):
        with suppress(OSError):  # another process removes it, or it is not ours to look into
            newest = max(path.stat().st_mtime for path in (old, *old.rglob("*")))
            if old.is_dir() and time.time() > newest + LEFT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def one_at_a_time(target: Path, busy: str = "") -> Iterator[None]:
    """Let one process at a time work on `target`. A process that is killed holds nothing.

    Args:
        busy: what to say where another process is at work; without it, wait for that process instead.
    Raises:
        UserError: `busy`.
    """
    from filelock import FileLock, Timeout

    check_writable(target)
    whose = digest(
        [str(target.absolute()), getattr(os, "getuid", int)()]
    )  # not beside the target: nobody clears it away
    lock = FileLock(Path(tempfile.gettempdir()) / f"opensloth-{whose[:16]}.lock", timeout=0 if busy else -1)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(busy, "Wait for it to end, or choose another --output.") from None
    try:
        yield
    finally:
        lock.release()


def check_writable(directory: Path) -> None:
    """Create the parents of `directory` and prove, before long work, that a file can be made there."""
    existing = directory if directory.is_dir() else directory.parent
    try:
        existing.mkdir(parents=True, exist_ok=True)
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--output {directory} is a file.", "Name a directory.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {existing}: {error.strerror}.", "Choose another --output.") from error


def digest(value: Any) -> str:
    """A SHA-256 (hex) of any JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """A SHA-256 (hex) of a file's bytes, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
