"""Runs of two processes that are killed at random moments end with the bytes of one that was left alone.

`make soak` does the same at 40 moments.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import kills
from grpo_fixtures import LETTERS, PROBLEMS, metrics, rollouts, train
from opensloth.training.grpo import group_trainer

SEED = 4
DISTURBING = """
import os
import signal
from pathlib import Path

from opensloth.training.grpo import group_trainer

inner = group_trainer.generate


def generate(*arguments, noise, halt, **more):
    tokens = 0

    def counted():
        nonlocal tokens
        tokens += 1
        name = WHEN.get(noise.step)
        if os.environ.get("RANK") == "1" and tokens == 3 and name and not Path(name).exists():
            Path(name).touch()
            os.kill(os.getpid(), getattr(signal, name))
        return halt()

    return inner(*arguments, noise=noise, halt=counted, **more)


WHEN = {3: "SIGKILL", 11: "SIGINT"}
group_trainer.generate = generate
"""  # process 1, while it writes the third token of a batch, once each

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers are found in /proc")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return kills.make_place(tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def whole(place):
    """The adapters of the runs that nothing disturbs, by method."""
    with ThreadPoolExecutor(2) as both:  # a start is mostly waiting
        return dict(both.map(lambda method: (method, kills.whole(place, method)[0]), ("sft", "grpo")))


def test_runs_that_are_killed_three_times_each_end_with_the_same_bytes(place, whole):
    def ends_alike(method):
        told = kills.disturbed(place, method, 0, 3, random.Random(f"{SEED} {method}"))
        return told, kills.adapter(place / f"{method}-0") == whole[method]

    with ThreadPoolExecutor(2) as both:
        for told, alike in both.map(ends_alike, ("sft", "grpo")):
            assert len(told) == 3
            assert alike, told


def test_a_killed_process_is_restarted_and_ctrl_c_of_one_drops_the_completions_of_all(place, whole, monkeypatch):
    """And what two processes began, one goes on with."""
    own, steps = place / "signalled", kills.STEPS["grpo"]
    own.mkdir()
    for name in ("model", "data"):
        (own / name).symlink_to(place / name)
    (own / "rewards.py").write_text(LETTERS + DISTURBING)

    code = kills.begin(own, "grpo", "run", "--max-restarts", "1").wait(kills.PATIENCE)
    said = kills.said(own, "run")
    assert (code, "after step 11, which is saved" in said) == (75, True), said
    assert "checkpoints/checkpoint-2\n" in said
    assert (own / "SIGKILL").exists()
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        one, other = ((run / "checkpoints" / "checkpoint-10" / name) for run in (own / "run", place / "grpo-whole"))
        assert one.read_bytes() == other.read_bytes()
    logged = [[entry["loss"] for entry in metrics(run)] for run in (own / "run", place / "grpo-whole")]
    assert logged[0] == logged[1][:11]

    monkeypatch.chdir(own)
    monkeypatch.setattr(group_trainer, "generate", group_trainer.generate)  # rewards.py puts its own there
    job = (*kills.COMMANDS["grpo"][1:], "--max-steps", steps, "--save-steps", 2)
    said = train(*job, "--processes", 1, "--output", "run")
    assert "processes: 2 before, 1 now" in said
    assert "checkpoint-11" in said
    assert [entry["loss"] for entry in metrics(own / "run")] == pytest.approx(logged[1], rel=1e-4, abs=1e-6)
    rows = [row for step in range(1, steps + 1) for row in rollouts(own / "run", step)["row_id"]]
    assert sorted(rows) == sorted([*range(PROBLEMS)] * 4)  # each once in this epoch, with a group of 4
