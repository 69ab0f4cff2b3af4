"""Tests that need a CUDA card (`make test-gpu`): skipped, with the reason, where there is none.

To start a process and its libraries takes longer than to train a tiny model: what needs no process of its own runs in
this one, on the first card. Files share nothing, so they may run side by side.
"""

import contextlib
import io
from pathlib import Path

import pytest

from grpo_fixtures import metrics
from opensloth.cli import program, train
from opensloth.launch import run_directory
from opensloth.training import worker
from training_fixtures import as_a_worker

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    build = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch sees no CUDA card"
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA card: {build}"))


def worker_here(world, run_dir, **_):
    """In place of `run_workers`, for runs of one process."""
    assert world.devices == ("cuda:0",)
    with as_a_worker(world.devices[0]):
        worker.run(Path(run_dir).absolute())


@pytest.fixture(scope="session")
def train_here():
    """`train_here(place, "sft", ..., "--output", output)`: `os-train` in this process; the logs of its steps."""

    def run(place, *words):
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            patch.chdir(place)
            patch.setattr(run_directory, "run_workers", worker_here)
            code = program.run(train.app, [*map(str, words), "--gpus", "1"])
        assert code == 0, out.getvalue()
        return metrics(place / words[-1])

    return run
