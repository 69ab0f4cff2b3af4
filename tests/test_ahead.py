"""Processes that are begun before their run is known: they become its workers, and nothing is left of the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opensloth import errors
from opensloth.launch import ahead
from opensloth.launch.launcher import run_workers
from opensloth.launch.world import World

PATIENCE = 60
LIBRARIES = """
import os
from pathlib import Path
def load(method):
    path = Path(__file__).parent / f"begun-{method}-{os.getpid()}"
    path.touch()
"""
WORKER = """
import json, os, sys
from pathlib import Path
run_dir, rank = Path(sys.argv[1]), os.environ["RANK"]
found = {"pid": os.getpid(), "environ": dict(os.environ), "argv": sys.argv, "stdin": sys.stdin.read()}
(run_dir / f"found-{rank}-{os.environ['OPENSLOTH_ATTEMPT']}").write_text(json.dumps(found))
print("said by", rank)
sys.stderr.write(f"and by {rank} again\\n")
"""
OF_ITS_OWN = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    write(tmp_path, "own_worker", WORKER)
    write(tmp_path, "libraries", LIBRARIES)


def write(directory: Path, name: str, code: str) -> None:
    (directory / f"{name}.py").write_text(code, encoding="utf-8")


def begun(directory: Path, count: int) -> list[int]:
    """The processes that have imported; waits until there are `count`."""
    until(lambda: len(list(directory.glob("begun-sft-*"))) == count)
    return [int(path.name.rpartition("-")[2]) for path in directory.glob("begun-sft-*")]


def until(fact: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def run(tmp_path: Path, processes: int = 2, max_restarts: int = 0) -> Path:
    run_workers(world(processes), tmp_path / "run", max_restarts=max_restarts, timeout=PATIENCE, module="own_worker")
    return tmp_path / "run"


def world(processes: int = 2) -> World:
    return World(("cpu",) * processes, processes=processes)


def found(run_dir: Path, rank: int, attempt: int = 0) -> dict:
    return json.loads((run_dir / f"found-{rank}-{attempt}").read_text())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_waiting_processes_become_the_workers(tmp_path: Path) -> None:
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        pids = begun(tmp_path, 2)
        run_dir = run(tmp_path)
    assert sorted(found(run_dir, rank)["pid"] for rank in (0, 1)) == sorted(pids)
    for rank in (0, 1):
        log = (run_dir / "logs" / f"rank_{rank}.log").read_text()
        assert log.splitlines() == [f"said by {rank}", f"and by {rank} again"]


def test_they_are_told_what_new_ones_would_have_been(tmp_path: Path) -> None:
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        waited = [found(run(tmp_path), rank) for rank in (0, 1)]
    new = [found(run(tmp_path), rank) for rank in (0, 1)]
    for one, other in zip(waited, new, strict=True):
        assert one["argv"] == other["argv"]
        assert one["stdin"] == ""
        assert one["environ"].keys() == other["environ"].keys()
        apart = {name for name, value in one["environ"].items() if other["environ"][name] != value}
        assert apart <= OF_ITS_OWN


def test_one_that_has_ended_is_replaced(tmp_path: Path) -> None:
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        lost = begun(tmp_path, 2)[0]
        os.kill(lost, signal.SIGKILL)
        until(lambda: gone(lost))
        run_dir = run(tmp_path)
    assert lost not in {found(run_dir, rank)["pid"] for rank in (0, 1)}


def test_a_restart_has_new_processes(tmp_path: Path) -> None:
    write(tmp_path, "own_worker", WORKER + "if os.environ['OPENSLOTH_ATTEMPT'] == '0': os._exit(9)\n")
    with ahead.begun(world(1), "sft", "native", libraries="libraries"):
        run_dir = run(tmp_path, processes=1, max_restarts=1)
    assert [found(run_dir, 0)["pid"]] == begun(tmp_path, 1)
    assert found(run_dir, 0, attempt=1)["pid"] != found(run_dir, 0)["pid"]


def test_imports_that_fail_are_left_to_the_run(tmp_path: Path) -> None:
    write(tmp_path, "libraries", LIBRARIES + "    import no_such_library\n")
    with ahead.begun(world(1), "sft", "native", libraries="libraries"):
        run_dir = run(tmp_path, processes=1)
    assert [found(run_dir, 0)["pid"]] == begun(tmp_path, 1)


def test_those_that_are_not_needed_are_ended(tmp_path: Path) -> None:
    pids = []

    def fails() -> None:
        with ahead.begun(world(), "sft", "native", libraries="libraries"):
            pids.extend(begun(tmp_path, 2))
            raise errors.UserError("The data has no rows.")

    with pytest.raises(errors.UserError, match="no rows"):
        fails()
    assert all(gone(pid) for pid in pids)


def test_none_is_begun_where_unsloth_comes_first_or_torchrun_has_begun_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ahead.begun(world(), "sft", "unsloth", libraries="libraries"):
        assert not ahead._waiting
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        assert not ahead._waiting


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_they_end_with_a_killed_command(tmp_path: Path) -> None:
    code = (
        "import time; from opensloth.launch import ahead; from opensloth.launch.world import World\n"
        "with ahead.begun(World(('cpu',)), 'sft', 'native', libraries='libraries'): time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    (pid,) = begun(tmp_path, 1)
    parent.kill()
    parent.wait()
    until(lambda: gone(pid))


@pytest.mark.parametrize(("method", "trainer"), [("sft", "SFTTrainer"), ("grpo", "GRPOTrainer")])
def test_the_libraries_of_a_worker_are_imported(method: str, trainer: str) -> None:
    code = (
        "import sys; from opensloth.training import libraries; libraries.load(sys.argv[1])\n"
        f"assert hasattr(sys.modules['trl.trainer.{method}_trainer'], '{trainer}')\n"
        "from opensloth.launch.child import run\n"  # the worker itself is run as a program, which runpy wants new
        "assert 'opensloth.training.worker' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, method], check=True, env=os.environ | {"OPENSLOTH_DEVICE": "cpu"})
