"""Logs that come one step late, as on a card, tell what logs tell that come at once. Here the host is the device."""

import json
import signal

import pytest

from opensloth.training.callbacks import Metrics
from opensloth.training.sft.late_log import LogsLate
from tiny import save_tiny_model
from training_fixtures import call, write_rows  # noqa: F401

JOB = ("rows.jsonl", "--model", "model", "--tokens-per-step", 200, "--processes", 1)
TIMES = ("seconds", "tokens_per_second", "memory_gib", "train_")  # what no two runs have in common


@pytest.fixture
def here(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def late(monkeypatch):
    """Logs are late from now on. Returns the steps that were held, each with the step at which it was told."""
    told, tell = [], LogsLate.tell

    def tells(self, held, start_time):
        told.append((held.step, self.state.global_step))
        tell(self, held, start_time)

    monkeypatch.setattr(LogsLate, "late", True)
    monkeypatch.setattr(LogsLate, "tell", tells)
    return told


def logged(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


@pytest.mark.parametrize(("every", "held"), [(1, [1, 3, 5, 7]), (3, [1, 3])])
def test_late_logs_tell_the_same(here, call, late, monkeypatch, every, held):  # noqa: F811
    """Every second step is evaluated, and told at once with what was held before it."""
    job = (*JOB, "--max-steps", 8, "--eval-fraction", 0.3, "--eval-steps", 2, "--logging-steps", every)
    assert call(*job, "--output", "late")[0] == 0
    assert late == [(step, step + 1) for step in held]
    with monkeypatch.context() as patch:
        patch.setattr(LogsLate, "late", False)
        assert call(*job, "--output", "at-once")[0] == 0
    assert logged(here / "late") == logged(here / "at-once")
    assert [line["step"] for line in logged(here / "late") if "loss" in line] == (
        list(range(1, 9)) if every == 1 else [1, 3, 6]
    )
    one, other = (json.loads((here / name / "result.json").read_text()) for name in ("late", "at-once"))
    assert [one[name] for name in ("loss", "weights_sha256")] == [other[name] for name in ("loss", "weights_sha256")]


def test_a_run_that_goes_on_logs_each_step_once(here, call, late, monkeypatch):  # noqa: F811
    job = (*JOB, "--max-steps", 8, "--save-steps", 3)
    assert call(*job, "--output", "whole")[0] == 0
    on_log = Metrics.on_log

    def stop_at_4(self, args, state, *rest, **more):
        on_log(self, args, state, *rest, **more)
        if state.global_step == 4:  # which is told when step 5 has been made
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_log", stop_at_4)
        code, out = call(*job, "--output", "cut")
    assert (code, "after step 6, which is saved" in out) == (75, True), out
    assert call(*job, "--output", "cut")[0] == 0
    one, other = ([line for line in logged(here / name) if "loss" in line] for name in ("cut", "whole"))
    assert [line["step"] for line in one] == list(range(1, 9))
    assert one == other
    name = "adapter_model.safetensors"
    assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_a_loss_that_is_no_number_is_named_with_its_step_and_never_saved(here, call, late):  # noqa: F811
    job = (*JOB, "--max-steps", 9, "--warmup-steps", 0, "--lr", 1e30, "--save-steps", 4, "--output", "diverged")
    code, out = call(*job)
    assert code == 3, out
    assert "at step 2, rows " in out[out.index("error:") :]
    assert late == [(1, 2), (2, 3)]
    assert not list((here / "diverged" / "checkpoints").glob("checkpoint-*"))
