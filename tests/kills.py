"""Runs of a tiny model in two processes that are killed at random moments, and what must be left of them.

Used by tests/test_soak.py (a few kills) and benchmarks/soak.py (many).
"""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from training_fixtures import environment, write_rows

STEPS = {"sft": 24, "grpo": 12}
PATIENCE = 180  # seconds that one life of a run may take
MOMENTS = ("start", "training", "checkpoint", "training", "checkpoint")  # most of a life is its start
COMMANDS = {
    "sft": (
        *("opensloth.cli.sft", "sft-data", "--model", "model", "--dtype", "float32", "--tokens-per-step", 256),
        *("--pack-tokens", 160, "--lora-dropout", 0.1, "--lr", 1e-3),
    ),
    "grpo": (
        *("opensloth.cli.grpo", "data", "--model", "model", "--dtype", "float32", "--prompts-per-step", 2),
        *("--group-size", 4, "--max-new", 12, "--lr", 1e-3, "--rewards", "rewards.py:letters"),
    ),
}


@dataclass(frozen=True)
class Kill:
    """One kill and how the command ended. `step` is that of the newest checkpoint at that moment."""

    method: str
    run: int
    moment: str
    victim: str
    signal: str
    step: int
    code: int
    seconds: float  # from the signal to the end of the command

    def record(self) -> dict:
        return asdict(self)


def make_place(directory: Path) -> Path:
    """A directory with a tiny model, and data of it for both methods."""
    import pytest

    import grpo_fixtures
    from opensloth.cli import data, program

    grpo_fixtures.make_place(directory)
    write_rows(directory / "conversations.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        words = ["conversations.jsonl", "--model", "model", "--workers", "1", "--output", "sft-data"]
        assert program.run(data.app, words) == 0
    return directory


def begin(place: Path, method: str, output: str, *more: str) -> subprocess.Popen:
    module, *arguments = COMMANDS[method]
    words = [*arguments, "--max-steps", STEPS[method], "--save-steps", 2, "--processes", 2, "--output", output, *more]
    log = (place / f"{output}.out").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, words)],
            cwd=place,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def whole(place: Path, method: str) -> tuple[bytes, float]:
    """The adapter of the run that nothing disturbs, and how many seconds it took."""
    start = time.monotonic()
    process = begin(place, method, f"{method}-whole")
    assert process.wait(PATIENCE) == 0, said(place, f"{method}-whole")
    return adapter(place / f"{method}-whole"), time.monotonic() - start


def disturbed(place: Path, method: str, number: int, kills: int, chance: random.Random) -> list[Kill]:
    """A run that is killed and called again `kills` times, and then left to end.

    Raises AssertionError where a life ends otherwise than it should.
    """
    output, told = f"{method}-{number}", []
    for _ in range(kills):
        before = newest(place / output)
        if before >= STEPS[method] - 2:
            break  # nothing is left to kill it in
        told.append(_kill(place, method, number, output, before, chance))
    process = begin(place, method, output)
    assert process.wait(PATIENCE) == 0, said(place, output)
    return told


def _kill(place: Path, method: str, number: int, output: str, before: int, chance: random.Random) -> Kill:
    moment = chance.choice(MOMENTS)
    victim = chance.choice(("parent", "worker 0", "worker 1"))
    number_of_signal = chance.choice((signal.SIGTERM, signal.SIGKILL))
    # the first steps after a resume, so that a run has room for several kills
    waited_for = before + 2 * chance.randint(0, 1)
    later = chance.uniform(0, 8) if moment == "start" else chance.uniform(0, 0.25) if moment == "training" else 0.0
    later = chance.uniform(0, 0.03) if moment == "checkpoint" else later
    begun = time.time()
    process = begin(place, method, output)
    give_up = time.monotonic() + PATIENCE
    while process.poll() is None and not has_come(place / output, moment, waited_for, begun):
        assert time.monotonic() < give_up, said(place, output)
        time.sleep(0.001)
    time.sleep(later)
    workers = children(process.pid)
    if victim != "parent" and len(workers) < 2:
        victim = "parent"  # there is no worker yet
    target = process.pid if victim == "parent" else workers[int(victim[-1])]
    step = newest(place / output)
    sent = time.monotonic()
    try:
        if process.poll() is None:
            os.kill(target, number_of_signal)
    except ProcessLookupError:
        pass
    code = process.wait(PATIENCE)
    seconds = time.monotonic() - sent
    wait_until_gone(workers)
    killed = Kill(method, number, moment, victim, number_of_signal.name, step, code, round(seconds, 2))
    assert code in expected(killed, bool(workers)), f"{killed}\n{said(place, output)}"
    return killed


def expected(kill: Kill, had_workers: bool) -> set[int]:
    """The exit codes of a command that was killed so; 0 where it had ended its last step by then."""
    if kill.victim == "parent":
        early = {-signal.SIGTERM} if not had_workers else set()  # it has only just begun, or is about to end
        return {0, -signal.SIGKILL} if kill.signal == "SIGKILL" else {0, 75, *early}
    return {0, 3} if kill.signal == "SIGKILL" else {0, 75}


def has_come(run: Path, moment: str, step: int, begun: float) -> bool:
    """Whether that moment of the life that began at `begun` is there; an earlier life's traces do not count."""
    if moment == "start":
        return True
    if moment == "checkpoint":
        return newest(run) >= step and since(run / "checkpoints" / ".incomplete", begun)
    return since(run / "metrics.jsonl", begun) and lines(run / "metrics.jsonl") > step


def since(path: Path, begun: float) -> bool:
    try:
        return path.stat().st_mtime >= begun
    except FileNotFoundError:
        return False


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [path.name.removeprefix("checkpoint-") for path in (run / "checkpoints").glob("checkpoint-*")]
    return max((int(name) for name in names), default=0)


def children(pid: int) -> list[int]:
    """The process ids of the workers that a command has started, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"opensloth.launch.child" in words:
                log = Path(os.readlink(entry / "fd" / "1")).stem
                found[int(log.removeprefix("rank_"))] = int(entry.name)
        except (OSError, ValueError):
            continue  # it has ended meanwhile, or still waits to be a worker
    return [found[rank] for rank in sorted(found)]


def wait_until_gone(pids: list[int]) -> None:
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < give_up, f"workers {pids} outlive their command"
        time.sleep(0.01)


def said(place: Path, output: str) -> str:
    return (place / f"{output}.out").read_text()[-6000:]


def adapter(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()
