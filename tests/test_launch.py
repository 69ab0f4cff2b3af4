"""Worker processes: which devices they get, how their failures reach the user, and how a run is stopped.

Workers are tiny programs written into the test's folder, started as the real one is.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensloth import errors
from opensloth.launch import failure, stop
from opensloth.launch.elastic import Screen, followed
from opensloth.launch.launcher import run_workers
from opensloth.launch.world import World, choose_gpus, plan_world

PATIENCE = 60  # seconds after which a test says that something hangs
PLAIN = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def options(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"gpus": "auto", "processes": None, "nnodes": 1, "node_rank": 0, "rdzv_endpoint": None} | changes
    )


def plan(gpus_there: int = 0, mask: str | None = None, environ: dict[str, str] | None = None, **launch: Any) -> World:
    environ = dict(environ or {}) | ({"CUDA_VISIBLE_DEVICES": mask} if mask is not None else {})
    return plan_world(options(**launch), environ=environ, count_gpus=lambda: gpus_there)


def torchrun(local: int, total: int | None = None, **more: str) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "MASTER_PORT")
    sizes = {"LOCAL_WORLD_SIZE": str(local), "WORLD_SIZE": str(total or local), "MASTER_ADDR": "127.0.0.1"}
    return dict.fromkeys(names, "0") | sizes | more


# --- devices -----------------------------------------------------------------------------------------------------


def test_auto_takes_every_visible_card() -> None:
    world = plan(gpus_there=3)
    assert (world.devices, world.backend, world.processes) == (("cuda:0", "cuda:1", "cuda:2"), "nccl", 3)


def test_auto_without_a_card_is_one_cpu_process() -> None:
    assert plan() == World(("cpu",), backend="gloo", processes=1)


def test_processes_are_cpu_processes_even_beside_cards() -> None:
    assert plan(gpus_there=8, processes=2).devices == ("cpu", "cpu")


def test_a_card_named_twice_is_shared_through_gloo() -> None:
    world = plan(gpus_there=1, gpus="0,0")
    assert (world.devices, world.backend) == (("cuda:0", "cuda:0"), "gloo")


def test_one_card_of_several_can_be_named() -> None:
    assert plan(gpus_there=4, gpus="2,").devices == ("cuda:2",)


def test_nodes_multiply_the_processes() -> None:
    world = plan(gpus_there=4, gpus="2", nnodes=3, node_rank=1, rdzv_endpoint="a:1")
    assert (world.processes, world.node_rank, world.rdzv_endpoint) == (6, 1, "a:1")


@pytest.mark.parametrize(
    ("there", "mask", "gpus", "said"),
    [
        (2, "3,5", "4", "--gpus 4 asks for 4 GPUs, but 2 are visible (CUDA_VISIBLE_DEVICES=3,5)."),
        (2, "3,5", "0,3", "--gpus 0,3: there is no GPU 3, 2 are visible (CUDA_VISIBLE_DEVICES=3,5)."),
        (1, None, "1,", "--gpus 1,: there is no GPU 1, 1 is visible."),
        (0, "", "1", "--gpus 1: no GPU is visible (CUDA_VISIBLE_DEVICES=)."),
        (2, None, "0", "--gpus 0 asks for no card."),
        (2, None, "all", "--gpus all is none of auto, a number, and a list"),
        (2, None, ",", "--gpus , is none of auto, a number, and a list"),
        (2, None, "-1", "--gpus -1 is none of auto, a number, and a list"),
    ],
)
def test_cards_that_are_not_there_are_refused(there: int, mask: str | None, gpus: str, said: str) -> None:
    with pytest.raises(errors.UserError) as caught:
        choose_gpus(gpus, there, mask)
    assert caught.value.message.startswith(said)


def test_processes_and_gpus_exclude_each_other() -> None:
    with pytest.raises(errors.UserError, match="--processes 2 trains on the CPU"):
        plan(gpus_there=2, gpus="1", processes=2)


def test_torchrun_decides_the_number_of_processes() -> None:
    world = plan(gpus_there=8, environ=torchrun(2, 4, GROUP_WORLD_SIZE="2", GROUP_RANK="1"))
    assert (world.devices, world.processes, world.nnodes, world.node_rank) == (("cuda:0", "cuda:1"), 4, 2, 1)
    assert plan(environ=torchrun(2)).devices == ("cpu", "cpu")


def test_options_that_contradict_torchrun_are_refused() -> None:
    with pytest.raises(errors.UserError, match="--processes 3 asks for 3 processes, but torchrun started 2"):
        plan(environ=torchrun(2), processes=3)
    with pytest.raises(errors.UserError, match="torchrun started 2 processes, but 1 is visible"):
        plan(gpus_there=1, environ=torchrun(2))
    assert plan(gpus_there=1, environ=torchrun(2), gpus="0,0").backend == "gloo"


# --- reports -----------------------------------------------------------------------------------------------------


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_a_report_comes_back_as_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("RANK", "3")
    assert failure.report(raised(errors.WorkerFailed("loss is NaN at step 7", "Lower --lr."))) == 3
    report = failure.read(path)
    assert report is not None
    assert (report.rank, report.kind, report.message, report.hint) == (
        3,
        "WorkerFailed",
        "loss is NaN at step 7",
        "Lower --lr.",
    )
    assert "Traceback" in report.traceback
    assert json.loads(path.read_text())["message"] == "loss is NaN at step 7"  # what torchrun shows


@pytest.mark.parametrize("text", ["", "{", "[]", '{"message": "x"}', '{"report": {"rank": 1}}', '"text"'])
def test_a_damaged_report_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "error.json").write_text(text)
    assert failure.read(tmp_path / "error.json") is None


def test_the_cause_is_not_the_first_to_complain() -> None:
    lost = failure.describe(raised(RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:9")))
    nan = failure.describe(raised(errors.WorkerFailed("NaN")))
    dead = failure.Report(1, failure.DEAD, "was killed by SIGKILL.", "", 3, "", nan.when + 1)
    ended = failure.Report(2, failure.ENDED, "was killed by SIGTERM.", "", 3, "", nan.when - 9)
    assert lost.when <= nan.when
    assert failure.root_cause([ended, lost, dead, nan]) is nan
    assert failure.root_cause([ended, lost, dead]) is dead
    assert failure.root_cause([ended, lost]) is lost


def test_an_error_raised_from_a_lost_connection_is_no_cause() -> None:
    assert failure.describe(raised(errors.WorkerFailed("a peer left"), ConnectionResetError())).lost_peer
    assert not failure.describe(raised(RuntimeError("size mismatch"))).lost_peer


# --- processes ---------------------------------------------------------------------------------------------------

JOIN = """
import os, sys, time, signal
from datetime import timedelta
from pathlib import Path
rank = int(os.environ["RANK"])
def join():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(seconds=int(os.environ["OPENSLOTH_TIMEOUT"])))
    return torch, dist
def all_reduce():
    torch, dist = join()
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    dist.barrier()
    dist.destroy_process_group()
    return value.item()
"""
WAIT_FOREVER = "time.sleep(600)"


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a worker module and return its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(code: str, name: str = "fake_worker") -> str:
        (tmp_path / f"{name}.py").write_text(JOIN + code, encoding="utf-8")
        return name

    return write


def run(tmp_path: Path, module: str, processes: int = 2, max_restarts: int = 0, timeout: int = PATIENCE) -> Path:
    world = World(("cpu",) * processes, processes=processes)
    run_workers(world, tmp_path / "run", max_restarts=max_restarts, timeout=timeout, module=module)
    return tmp_path / "run"


def failed(tmp_path: Path, module: str, kind: type[errors.OpenSlothError], **how: int) -> errors.OpenSlothError:
    with pytest.raises(kind) as caught:
        run(tmp_path, module, **how)
    assert type(caught.value) is kind
    return caught.value


def test_two_processes_reduce_over_gloo_and_leave_logs(
    tmp_path: Path, worker: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = worker(
        "assert sys.argv[1:] == [str(Path(__file__).parent / 'run')]\n"
        "print('sum', all_reduce(), os.environ['OPENSLOTH_DEVICE'], os.environ['OMP_NUM_THREADS'])\n"
        "print('also this', file=sys.stderr)\n"
    )
    logs = run(tmp_path, name) / "logs"
    for rank in (0, 1):
        lines = (logs / f"rank_{rank}.log").read_text().splitlines()
        assert lines[0].startswith("sum 3.0 cpu ")
        assert lines[1] == "also this"
    shown = capsys.readouterr()
    assert "sum 3.0" in shown.err  # rank 0's, as it works
    assert shown.err.count("also this") == 1
    assert shown.out == ""  # results only


def test_groups_end_while_the_models_they_trained_are_freed(tmp_path: Path, worker: Callable[[str], str]) -> None:
    """Where a group is freed with its model, about one run in ten hangs after its last line."""
    module = worker("""
import torch
from opensloth.training.place import join, leave
model = torch.nn.Linear(4, 4)
for run in range(30):
    torch.distributed.distributed_c10d._world.group_count = run  # where they meet, in the launcher's one store
    join("cpu")
    replica = torch.nn.parallel.DistributedDataParallel(model)
    replica(torch.ones(2, 4)).sum().backward()
    leave()
    del replica
print("came to the end")
""")
    begin = time.monotonic()
    logs = run(tmp_path, module, timeout=60) / "logs"
    assert all("came to the end" in (logs / f"rank_{rank}.log").read_text() for rank in range(2))
    assert time.monotonic() - begin < 60


def test_a_worker_that_is_done_waits_for_no_thread_and_runs_what_was_registered(
    tmp_path: Path, worker: Callable[[str], str]
) -> None:
    module = worker("""
import atexit, threading
atexit.register(print, "registered")
threading.Thread(target=time.sleep, args=(600,)).start()
""")
    begin = time.monotonic()
    logs = run(tmp_path, module, timeout=60) / "logs"
    assert all((logs / f"rank_{rank}.log").read_text() == "registered\n" for rank in range(2))
    assert time.monotonic() - begin < 60


def test_the_report_of_a_worker_is_the_error_of_the_run(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker(
        "from opensloth.launch import failure\nfrom opensloth.errors import UserError\n"
        f"if rank == 0: {WAIT_FOREVER}\n"
        "sys.exit(failure.report(UserError('No column answer.', 'Did you mean answers?')))\n"
    )
    begin = time.monotonic()
    error = failed(tmp_path, name, errors.UserError)
    assert time.monotonic() - begin < 15  # the other process was ended, not waited for
    assert (error.message, error.hint) == ("No column answer.", "Did you mean answers?")


def test_a_card_that_ran_out_of_memory_is_tried_with_half_the_pack(
    tmp_path: Path, worker: Callable[[str], str]
) -> None:
    name = worker(
        "import torch\n"
        "halvings = int(os.environ['OPENSLOTH_PACK_HALVINGS'])\n"
        "if halvings < 2: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')\n"
        "(Path(sys.argv[1]) / 'done').write_text(str(halvings))\n"
    )
    assert (run(tmp_path, name, processes=1, max_restarts=2) / "done").read_text() == "2"
    error = failed(tmp_path / "again", name, errors.WorkerFailed, processes=1, max_restarts=1)
    assert error.message.startswith("Out of GPU memory: CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert "--pack-tokens" in (error.hint or "")


def test_a_card_that_gave_up_is_told_with_a_way_on(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker("raise RuntimeError('CUDA error: unspecified launch failure\\nSearch for it.')\n")
    error = failed(tmp_path, name, errors.WorkerFailed, processes=1)
    assert error.message == "Process 0 (cpu) failed: RuntimeError: CUDA error: unspecified launch failure"
    assert "goes on from the last checkpoint; if this comes again, add --cuda-graphs off" in (error.hint or "")


def test_a_hang_is_ended_with_who_kept_whom_waiting(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker(
        "torch, dist = join()\n"
        "def slow_reward():\n"
        f"    {WAIT_FOREVER}\n"
        "if rank == 1: slow_reward()\n"
        "dist.all_reduce(torch.ones(1))\n"
    )
    begin = time.monotonic()
    error = failed(tmp_path, name, errors.WorkerFailed, timeout=6)
    assert time.monotonic() - begin < 40
    assert error.message.startswith("The run hung. Process 1 keeps them waiting in slow_reward (")
    assert "Process 0 waits for the others in all_reduce" in (error.hint or "")
    assert "after step 0, since " in error.message


def test_the_worker_at_fault_is_named_not_its_peers(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker(
        "from opensloth.errors import WorkerFailed\n"
        "torch, dist = join()\n"
        "dist.all_reduce(torch.ones(1))\n"
        "if rank == 1: raise WorkerFailed('The loss is NaN at step 3.', 'Lower --lr.')\n"
        "dist.all_reduce(torch.ones(1))\n"
    )
    error = failed(tmp_path, name, errors.WorkerFailed)
    assert error.message == "The loss is NaN at step 3."
    log = tmp_path / "run" / "logs" / "rank_1.log"
    assert error.hint == f"Lower --lr.\nLog: {log}"
    assert "The loss is NaN" in log.read_text()


def test_an_unexpected_error_shows_its_own_traceback(
    tmp_path: Path, worker: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = failed(tmp_path, worker("def broken():\n    raise ValueError('boom')\nbroken()\n"), errors.WorkerFailed)
    assert error.message in ("Process 0 (cpu) failed: ValueError: boom", "Process 1 (cpu) failed: ValueError: boom")
    assert "in broken" in error.hint
    assert "Log: " in error.hint
    assert "boom" not in capsys.readouterr().err  # once, by whoever prints the error


def test_a_killed_worker_is_named_with_its_signal_and_last_lines(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker(
        f"print('step 9 of rank', rank)\nif rank == 0: {WAIT_FOREVER}\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    error = failed(tmp_path, name, errors.WorkerFailed)
    assert error.message == "Process 1 (cpu) was killed by SIGKILL."
    assert "step 9 of rank 1" in error.hint
    assert failure.GOES_ON in error.hint
    assert str(tmp_path / "run" / "logs" / "rank_1.log") in error.hint


def test_a_silent_exit_is_a_failure(tmp_path: Path, worker: Callable[[str], str]) -> None:
    error = failed(tmp_path, worker("sys.exit(9)\n"), errors.WorkerFailed, processes=1)
    assert error.message == "Process 0 (cpu) ended with exit code 9 and no word."


def test_a_crash_is_tried_again_but_a_users_mistake_is_not(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker("if os.environ['OPENSLOTH_ATTEMPT'] == '0': os.abort()\nprint('second life')\n")
    assert "second life" in (run(tmp_path, name, processes=1, max_restarts=1) / "logs" / "rank_0.log").read_text()
    name = worker("from opensloth.errors import UserError\nraise UserError(os.environ['OPENSLOTH_ATTEMPT'])\n")
    assert failed(tmp_path, name, errors.UserError, processes=1, max_restarts=1).message == "0"


STOPPABLE = (
    "from opensloth.errors import RunStopped\nfrom opensloth.launch import stop\n"
    "asked = []\n"
    "for number in stop.signals(): signal.signal(number, lambda *a: asked.append(a[0]))\n"
    "Path(sys.argv[1], f'ready{rank}').touch()\n"
    "while not asked: time.sleep(0.02)\n"
    "time.sleep(rank)\n"  # rank 1 is slower, and must not be ended when rank 0 is done
    "Path(sys.argv[1], f'saved{rank}').touch()\n"
    "raise RunStopped(f'Stopped by {signal.Signals(asked[0]).name} after step 5, which is saved.')\n"
)
PARENT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
from pathlib import Path
from opensloth import errors
from opensloth.launch.launcher import run_workers
from opensloth.launch.world import World
try:
    run_workers(World(("cpu",) * 2, processes=2), Path(sys.argv[1]), max_restarts=0, timeout=60, module=sys.argv[2])
except errors.OpenSlothError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def start_parent(run_dir: Path, module: str, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + PARENT, str(run_dir), module]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(fact: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < end, "it never came true"
        assert process is None or process.poll() is None, process.communicate()
        threading.Event().wait(0.02)


def gone(pid: int) -> bool:
    """It runs no more; its parent may not know yet."""
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_lets_every_worker_save_and_ends_as_stopped(
    tmp_path: Path, worker: Callable[[str], str], number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    parent = start_parent(run_dir, worker(STOPPABLE))
    until(lambda: (run_dir / "ready0").exists() and (run_dir / "ready1").exists(), parent)
    parent.send_signal(number)
    out, err = parent.communicate(timeout=PATIENCE)
    said = f"RunStopped Stopped by {number.name} after step 5, which is saved.\n"
    assert (parent.returncode, out) == (errors.STOPPED, said)
    assert (run_dir / "saved0").exists()
    assert (run_dir / "saved1").exists()
    assert err == f"{number.name}: waiting for the workers to save ...\n"


@pytest.mark.parametrize("how", ["signal.signal(n, signal.SIG_IGN)", "signal.pthread_sigmask(signal.SIG_BLOCK, [n])"])
def test_workers_hear_their_launcher_whatever_was_ignored_or_held_back_where_it_was_started(
    tmp_path: Path, worker: Callable[[str], str], how: str
) -> None:
    run_dir = tmp_path / "run"
    deaf = f"import signal\nfor n in (signal.SIGUSR1, signal.SIGUSR2): {how}\n"
    parent = start_parent(run_dir, worker(STOPPABLE), deaf)
    until(lambda: (run_dir / "ready0").exists() and (run_dir / "ready1").exists(), parent)
    parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate(timeout=PATIENCE)
    assert (parent.returncode, out) == (errors.STOPPED, "RunStopped Stopped by SIGTERM after step 5, which is saved.\n")


def test_a_signal_that_comes_while_handlers_are_put_back_is_heard_and_a_second_one_has_its_usual_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python hands a signal that waits over before it sets the next handler."""
    put, handlers = signal.signal, {number: signal.getsignal(number) for number in stop.signals()}
    request = stop.StopRequest()

    def hands_over_first(number: int, handler: Any) -> Any:
        if number == signal.SIGTERM and request.name is None:
            request._caught(number, None)
        return put(number, handler)

    try:
        request.install()
        monkeypatch.setattr(signal, "signal", hands_over_first)
        assert request.asked()
        assert request.asked()
        assert (request.name, signal.getsignal(signal.SIGTERM)) == ("SIGTERM", signal.SIG_DFL)
        assert signal.getsignal(signal.SIGINT) == request._caught
    finally:
        for number, handler in handlers.items():
            put(number, handler)


def test_a_request_to_stop_is_heard_by_workers_whose_signals_a_library_took_over(
    tmp_path: Path, worker: Callable[[str], str]
) -> None:
    """As LLVM does once Triton has compiled a kernel: behind Python's back, and what comes meanwhile is lost."""
    takes_over = (
        "import ctypes\nfrom opensloth.errors import RunStopped\nfrom opensloth.launch import stop\n"
        "request = stop.StopRequest().install()\n"
        "ctypes.CDLL(None).signal(int(stop.forwarded()), ctypes.c_void_p(1))\n"
        "Path(sys.argv[1], f'ready{rank}').touch()\n"
        "time.sleep(3)\n"
        "while not request.asked(): time.sleep(0.02)\n"
        "time.sleep(3)\n"  # it saves, and is asked again
        "raise RunStopped('Stopped, and saved.')\n"
    )
    run_dir = tmp_path / "run"
    parent = start_parent(run_dir, worker(takes_over))
    until(lambda: (run_dir / "ready0").exists() and (run_dir / "ready1").exists(), parent)
    parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate(timeout=PATIENCE)
    assert (parent.returncode, out) == (errors.STOPPED, "RunStopped Stopped, and saved.\n")


def test_a_signal_that_ends_one_worker_before_it_can_save_is_a_stop_and_no_failure(
    tmp_path: Path, worker: Callable[[str], str]
) -> None:
    name = worker(f"if rank == 0: {WAIT_FOREVER}\nos.kill(os.getpid(), signal.SIGTERM)\n")
    error = failed(tmp_path, name, errors.RunStopped, max_restarts=1)
    assert error.message == "Process 1 was stopped by SIGTERM before a new checkpoint was complete."


def test_a_disk_that_refuses_is_named_and_not_tried_again(tmp_path: Path, worker: Callable[[str], str]) -> None:
    full = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nif rank == 0: {WAIT_FOREVER}\n"
    name = worker(full + "Path(sys.argv[1], f'attempt{os.environ[\"OPENSLOTH_ATTEMPT\"]}').write_bytes(bytes(9999))\n")
    error = failed(tmp_path, name, errors.WorkerFailed, max_restarts=1)
    assert "Cannot write" in error.message
    assert "File too large" in error.message
    assert not (tmp_path / "attempt1").exists()


FULL_DISK = """
import resource
import sys
import torch
from safetensors.torch import save_file
from opensloth.launch.failure import unwritable
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
value = {"a": torch.ones(10**5)}
for save in (torch.save, save_file):
    try:
        save(value, sys.argv[1])
    except Exception as error:
        print(unwritable(error))
"""


def test_errors_of_the_libraries_that_write_checkpoints_are_read_as_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "weights")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    lines = said.stdout.splitlines()
    assert len(lines) == 2, said
    assert all(line.startswith("Cannot write") for line in lines), lines


def test_a_second_signal_does_not_wait(tmp_path: Path, worker: Callable[[str], str]) -> None:
    run_dir = tmp_path / "run"
    stubborn = (
        "from opensloth.launch import stop\n"
        "for number in stop.signals():\n"
        "    signal.signal(number, lambda *a: Path(sys.argv[1], f'deaf{rank}').touch())\n"
        f"Path(sys.argv[1], f'ready{{rank}}').touch()\n{WAIT_FOREVER}\n"
    )
    parent = start_parent(run_dir, worker(stubborn))
    until(lambda: (run_dir / "ready0").exists() and (run_dir / "ready1").exists(), parent)
    parent.send_signal(signal.SIGINT)
    until(lambda: (run_dir / "deaf0").exists() and (run_dir / "deaf1").exists(), parent)
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == errors.STOPPED
    assert "before a new checkpoint was complete" in out


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_die_with_a_killed_launcher(tmp_path: Path, worker: Callable[[str], str]) -> None:
    run_dir = tmp_path / "run"
    code = "path = Path(sys.argv[1], f'pid{rank}')\npath.with_suffix('.new').write_text(str(os.getpid()))\n"
    parent = start_parent(run_dir, worker(code + f"os.replace(path.with_suffix('.new'), path)\n{WAIT_FOREVER}\n"))
    until(lambda: (run_dir / "pid0").exists() and (run_dir / "pid1").exists(), parent)
    pids = [int((run_dir / f"pid{rank}").read_text()) for rank in (0, 1)]
    parent.kill()
    parent.communicate()
    until(lambda: all(gone(pid) for pid in pids))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_machines_meet_and_are_numbered_as_told(tmp_path: Path, worker: Callable[[str], str]) -> None:
    name = worker("print('sum', all_reduce(), 'of', os.environ['WORLD_SIZE'], 'on', os.environ['GROUP_RANK'])\n")
    endpoint = f"127.0.0.1:{free_port()}"
    problems: list[BaseException] = []

    def node(number: int) -> None:
        world = World(("cpu",), 2, number, endpoint, "gloo", 2)
        try:
            run_workers(world, tmp_path / f"node{number}", max_restarts=0, timeout=PATIENCE, module=name)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=node, args=(number,), daemon=True) for number in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not problems
    for number in (0, 1):
        log = tmp_path / f"node{number}" / "logs" / f"rank_{number}.log"
        assert f"sum 3.0 of 2 on {number}" in log.read_text()


# --- torchrun ----------------------------------------------------------------------------------------------------

EVERYWHERE = """
import os, sys
from pathlib import Path
from opensloth import errors
from opensloth.launch.launcher import run_workers
from opensloth.launch.torchrun import leader_first
from opensloth.launch.world import plan_world
from opensloth.config.run import LaunchOptions
run_dir = Path(sys.argv[1])
def prepare():
    first = not (run_dir / "prepared").exists()
    if first:
        (run_dir / "prepared").write_text(os.environ["RANK"])
    if (run_dir / "fail").exists():
        raise errors.UserError("The data is empty.")
    return first
try:
    line = f"first {leader_first('data', prepare)} {leader_first('again', lambda: os.environ['RANK'])}\\n"
    os.write(1, line.encode())  # in one piece: the processes share the pipe
    run_workers(plan_world(LaunchOptions()), run_dir, max_restarts=0, timeout=60, module="fake_worker")
except errors.OpenSlothError as error:
    print("error:", error, flush=True)
    sys.exit(error.exit_code)
"""


def run_under_torchrun(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "command.py").write_text(EVERYWHERE)
    (tmp_path / "run").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(tmp_path / "command.py"), str(tmp_path / "run")],
        env=PLAIN | {"PYTHONPATH": os.environ["PYTHONPATH"], "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_under_torchrun_the_leader_prepares_and_all_train(tmp_path: Path, worker: Callable[[str], str]) -> None:
    worker("os.write(1, f'sum {all_reduce()} {os.environ[\"OPENSLOTH_DEVICE\"]} {sys.argv[1:]}\\n'.encode())\n")
    done = run_under_torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines[:2] == ["first False 1", "first True 0"]
    assert lines[2:] == [f"sum 3.0 cpu {[str(tmp_path / 'run')]}"] * 2
    assert (tmp_path / "run" / "prepared").read_text() == "0"


def test_under_torchrun_a_failed_preparation_is_said_once(tmp_path: Path, worker: Callable[[str], str]) -> None:
    worker("print('never')\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fail").touch()
    done = run_under_torchrun(tmp_path)
    assert done.returncode != 0
    assert done.stdout.splitlines() == ["error: The data is empty."]


def test_under_torchrun_a_workers_report_is_the_error_of_the_command(
    tmp_path: Path, worker: Callable[[str], str]
) -> None:
    worker(
        "from opensloth.launch import failure\nfrom opensloth.errors import UserError\n"
        f"if rank == 1: {WAIT_FOREVER}\n"
        "sys.exit(failure.report(UserError('No column answer.')))\n"
    )
    done = run_under_torchrun(tmp_path)
    assert done.stdout.splitlines().count("error: No column answer.") == 1
    assert "No column answer." in done.stderr  # torchrun's own table


# --- what is shown of rank 0's log -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_live_line_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    screen = Screen()
    for line in ("begin", "step 1/9", "step 2/9", "saved \x1b[2J", "step 3/9"):
        screen.line(line)
    screen.close()
    shown = "begin\nstep 1/9\r\x1b[2Kstep 2/9\nsaved \\x1b[2J\nstep 3/9\n"
    assert sys.stderr.getvalue() == shown  # type: ignore[attr-defined]


def test_an_earlier_runs_log_is_not_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "rank_0.log"
    log.write_text("old\n")
    with followed(log):
        os.replace(log, tmp_path / "rank_0.previous.log")
        with log.open("w") as file:
            print("new", file=file)
            print("half a line", end="", file=file)
    assert capsys.readouterr().err == "new\nhalf a line\n"
