"""What the tests of training share: small uneven data, and the real command in this process or in its own."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from opensloth.cli import program, sft, train
from opensloth.launch import run_directory
from opensloth.training import worker

PATIENCE = 240  # seconds after which a test says that a command hangs
SECRET = "hf_a-secret-that-must-appear-nowhere"


def conversation(number):
    """Between 25 and 120 tokens of the tiny tokenizer, of which between 10 and 60 are trained."""
    asked = {"role": "user", "content": f"What is {number} + 1? " + "Think well. " * (number % 7)}
    return {
        "messages": [asked, {"role": "assistant", "content": f"It is {number + 1}. " + "So. " * (number * number % 11)}]
    }


def write_rows(path, count=48):
    path.write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(count)), "utf-8")
    return path


def environment(**more):
    """Of a command with one thread a process, a secret, and no place among the processes of another launcher."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_TOKEN": SECRET, "CI": "", **more}


def begin(directory, *arguments, **more):
    """Start `os-train sft` with these arguments in `directory`; its output goes to files."""
    command = [sys.executable, "-m", "opensloth.cli.train", "sft", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=directory, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def end(process):
    """Wait for the command. Returns its exit code and what it printed."""
    out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, out.decode()


def wait_for(condition, process, what):
    """Look at once and again every 2 ms, as long as the command runs."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"the command ended before {what}: {process.communicate()[0].decode()}"
        assert time.monotonic() < give_up, f"no sign of {what}"
        time.sleep(0.002)


@contextmanager
def as_a_worker(device="cpu"):
    """This process as the only worker of a run: what a worker changes for itself is put back."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    environ = dict(os.environ)
    os.environ["OPENSLOTH_DEVICE"] = device
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environ)
        for state in (AcceleratorState, GradientState, PartialState):  # a process has one run, in use
            state._reset_state()


def in_this_process(world, run_dir, *, max_restarts, timeout):
    """In place of `run_workers`, for runs of one process."""
    assert world.processes == 1
    with as_a_worker():
        worker.run(Path(run_dir).absolute())


@pytest.fixture
def call(capfd, monkeypatch):
    """`os-train sft ...` or `os-sft ...` whose worker runs in this process: exit code and all output.

    A worker of its own takes seconds to start; the tests of the launcher and the few real commands cover that.
    """

    monkeypatch.setattr(run_directory, "run_workers", in_this_process)

    def run(*arguments, app=train.app):
        words = ["sft", *arguments] if app is train.app else arguments
        code = program.run(app, [str(word) for word in words])
        out = capfd.readouterr()
        return code, out.out + out.err

    return run


__all__ = ["call", "sft"]
