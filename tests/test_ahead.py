"""Processes that are begun before their run is known: they become its workers, and nothing is left of the others."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opensloth import errors
from opensloth.cli import data as cli_data
from opensloth.cli import program, train
from opensloth.launch import ahead, run_directory
from opensloth.launch.launcher import run_workers
from opensloth.launch.world import World
from test_launch import PATIENCE, gone, until

BEGIN = ahead._begin  # before tests' own is put in its place
LIBRARIES = """
import json, os
from pathlib import Path
def load(method):
    path = Path(__file__).parent / f"begun-{method}-{os.getpid()}"
    path.with_suffix(".new").write_text(json.dumps(dict(os.environ)))
    os.replace(path.with_suffix(".new"), path)
"""
WORKER = """
import json, os, signal, sys
from pathlib import Path
run_dir, rank = Path(sys.argv[1]), os.environ["RANK"]
found = {"pid": os.getpid(), "environ": dict(os.environ), "argv": sys.argv, "stdin": sys.stdin.read()}
found["deaf"] = [n for n in (signal.SIGUSR1, signal.SIGUSR2) if signal.getsignal(n) is signal.SIG_IGN]
(run_dir / f"found-{rank}-{os.environ['OPENSLOTH_ATTEMPT']}").write_text(json.dumps(found))
print("said by", rank)
sys.stderr.write(f"and by {rank} again\\n")
"""
OF_ITS_OWN = {"MASTER_PORT", "TORCHELASTIC_RUN_ID"}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_begin", BEGIN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    write(tmp_path, "own_worker", WORKER)
    write(tmp_path, "libraries", LIBRARIES)


def write(directory: Path, name: str, code: str) -> None:
    (directory / f"{name}.py").write_text(code, encoding="utf-8")


def begun(directory: Path, count: int) -> list[int]:
    """The processes that have imported; waits until there are `count`."""
    until(lambda: len(list(directory.glob("begun-sft-*[0-9]"))) == count)
    return [int(path.name.rpartition("-")[2]) for path in directory.glob("begun-sft-*[0-9]")]


def run(tmp_path: Path, processes: int = 2, max_restarts: int = 0) -> Path:
    run_workers(world(processes), tmp_path / "run", max_restarts=max_restarts, timeout=PATIENCE, module="own_worker")
    return tmp_path / "run"


def world(processes: int = 2) -> World:
    return World(("cpu",) * processes, processes=processes)


def found(run_dir: Path, rank: int, attempt: int = 0) -> dict:
    return json.loads((run_dir / f"found-{rank}-{attempt}").read_text())


def both(run_dir: Path) -> list[dict]:
    return [found(run_dir, rank) for rank in (0, 1)]


def reaped(pid: int) -> bool:
    """Nothing is left of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_waiting_processes_become_the_workers(tmp_path: Path) -> None:
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        pids = begun(tmp_path, 2)
        run_dir = run(tmp_path)
    assert sorted(found(run_dir, rank)["pid"] for rank in (0, 1)) == sorted(pids)
    for rank in (0, 1):
        log = (run_dir / "logs" / f"rank_{rank}.log").read_text()
        assert log.splitlines() == [f"said by {rank}", f"and by {rank} again"]


def test_they_are_told_what_new_ones_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN_AWAY_LATER", "1")
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        pids = begun(tmp_path, 2)
        monkeypatch.delenv("TAKEN_AWAY_LATER")
        monkeypatch.setenv("SET_LATER", "1")
        waited = both(run(tmp_path))
    new = both(run(tmp_path))
    for one, other in zip(waited, new, strict=True):
        assert one["pid"] in pids
        assert one["argv"] == other["argv"]
        assert one["stdin"] == ""
        assert one["environ"].keys() == other["environ"].keys()
        apart = {name for name, value in one["environ"].items() if other["environ"][name] != value}
        assert apart <= OF_ITS_OWN


def test_they_import_in_the_environment_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        begun(tmp_path, 2)
        worker, _ = both(run(tmp_path))
    for path in tmp_path.glob("begun-sft-*"):
        early = json.loads(path.read_text())
        for name in ("OMP_NUM_THREADS", "OPENSLOTH_DEVICE", "PYTHONUNBUFFERED", "PYTHONIOENCODING"):
            assert early[name] == worker["environ"][name]


def test_what_imports_set_stays(tmp_path: Path) -> None:
    write(tmp_path, "libraries", LIBRARIES + "    os.environ['SET_BY_AN_IMPORT'] = '1'\n")
    with ahead.begun(world(1), "sft", "native", libraries="libraries"):
        begun(tmp_path, 1)
        assert found(run(tmp_path, processes=1), 0)["environ"]["SET_BY_AN_IMPORT"] == "1"


def test_new_ones_are_started_once_the_hub_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients read that as they are imported."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with ahead.begun(world(1), "sft", "native", libraries="libraries"):
        (pid,) = begun(tmp_path, 1)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        worker = found(run(tmp_path, processes=1), 0)
        assert reaped(pid)
    assert worker["pid"] != pid
    assert worker["environ"]["HF_HUB_OFFLINE"] == "1"


def test_they_hear_their_launcher_whatever_was_ignored_where_it_was_started(tmp_path: Path) -> None:
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGUSR1, signal.SIGUSR2)]
    try:
        with ahead.begun(world(1), "sft", "native", libraries="libraries"):
            (pid,) = begun(tmp_path, 1)
            worker = found(run(tmp_path, processes=1), 0)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert (worker["pid"], worker["deaf"]) == (pid, [])


def test_what_imports_say_after_the_run_began_is_in_its_log(tmp_path: Path) -> None:
    slow = "    import time\n    while not (path.parent / 'run' / 'logs' / 'rank_0.log').exists(): time.sleep(0.01)\n"
    write(tmp_path, "libraries", LIBRARIES + slow + "    time.sleep(0.3)\n    print('an import warns')\n")
    with ahead.begun(world(1), "sft", "native", libraries="libraries"):
        run_dir = run(tmp_path, processes=1)
    assert (run_dir / "logs" / "rank_0.log").read_text().splitlines()[:2] == ["an import warns", "said by 0"]


def test_one_that_has_ended_is_replaced(tmp_path: Path) -> None:
    with ahead.begun(world(), "sft", "native", libraries="libraries"):
        lost, left = begun(tmp_path, 2)
        os.kill(lost, signal.SIGKILL)
        until(lambda: gone(lost))
        run_dir = run(tmp_path)
    pids = {found(run_dir, rank)["pid"] for rank in (0, 1)}
    assert left in pids
    assert len(pids) == 2
    assert reaped(lost)


def test_none_is_left_where_beginning_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, processes = ahead._begin, []

    def interrupted(*arguments: Any) -> Any:
        if processes:
            raise KeyboardInterrupt
        processes.append(begin(*arguments))
        return processes[0]

    monkeypatch.setattr(ahead, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt), ahead.begun(world(), "sft", "native", libraries="libraries"):
        pass
    assert reaped(processes[0].pid)


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
    assert all(reaped(pid) for pid in pids)


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
@pytest.mark.parametrize("then", ["", "    import signal\n    signal.pause()\n"])
def test_they_end_with_a_killed_command(tmp_path: Path, then: str) -> None:
    """Also in the midst of an import that hears nothing."""
    write(tmp_path, "libraries", LIBRARIES + then)
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
        "import os, sys; from opensloth.training import libraries; libraries.load(sys.argv[1])\n"
        f"assert hasattr(sys.modules['trl.trainer.{method}_trainer'], '{trainer}')\n"
        f"assert {{'opensloth.training.{method}.run', 'torch.utils.tensorboard'}} <= sys.modules.keys()\n"
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == '', 'a CPU run leaves the cards alone'\n"
        "assert os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'\n"
        "assert os.environ['TORCHINDUCTOR_CACHE_DIR'].endswith('compiled')\n"
        "assert 'opensloth.training.worker' not in sys.modules, 'runpy wants it new'\n"
    )
    quiet = ("HF_HUB_DISABLE_TELEMETRY", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    subprocess.run([sys.executable, "-c", code, method], check=True, env=environment | {"OPENSLOTH_DEVICE": "cpu"})


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_commands_begin_their_processes_early(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def no_run(*_: Any, **__: Any) -> None:
        seen.append(sorted(ahead._waiting))
        raise errors.UserError("This is as far as it goes.")

    monkeypatch.setattr(run_directory, "run_workers", no_run)
    monkeypatch.setattr(ahead, "LIBRARIES", "libraries")
    monkeypatch.chdir(tmp_path)
    data = ["sample:arithmetic", "--model", "sample:tiny", "--chat-template", "reasoning", "--samples", "20"]
    some = ["--max-new", "8", "--group-size", "2", "--prompts-per-step", "2"] if method == "grpo" else []
    assert program.run(cli_data.app, [*data, "--method", method, "--output", "prepared"]) == 0
    alone = importlib.import_module(f"opensloth.cli.{method}")
    assert program.run(alone.app, ["prepared", "--processes", "2", *some]) == errors.USER_ERROR
    assert program.run(train.app, [method, *data, "--processes", "2", *some]) == errors.USER_ERROR
    assert seen == [[0, 1], [0, 1]]
