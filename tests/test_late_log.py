"""Logs that come one step late, as on a card, tell what logs tell that come at once. Here the host is the device."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from transformers.training_args import ParallelMode

from opensloth.training import laps
from opensloth.training.callbacks import Metrics
from opensloth.training.grpo import group_trainer
from opensloth.training.laps import Laps
from opensloth.training.sft import pack_trainer
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

    def tells(self, held):
        told.append((held.step, self.state.global_step))
        tell(self, held)

    monkeypatch.setattr(LogsLate, "late", True)
    monkeypatch.setattr(LogsLate, "tell", tells)
    return told


@pytest.fixture
def clock(monkeypatch):
    """A device by whose clock step n takes n seconds, an evaluation 100, a checkpoint 1000, and all else nothing."""
    clock, made = SimpleNamespace(time=5.0), pack_trainer.trainer_class

    def trainer_class():
        class Timed(made()):
            def training_step(self, model, inputs, num_items_in_batch=None):
                clock.time += inputs["number"] + 1
                return super().training_step(model, inputs, num_items_in_batch)

            def held_out_loss(self):
                clock.time += 100
                return super().held_out_loss()

            def _save(self, output_dir=None, state_dict=None):
                clock.time += 1000
                super()._save(output_dir, state_dict)

        return Timed

    monkeypatch.setattr(pack_trainer, "trainer_class", trainer_class)
    monkeypatch.setattr(laps, "now", lambda device: clock.time)
    return clock


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def logged(directory):
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in metrics(directory)]


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


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize(
    ("every", "seconds"),
    [(1, {step: step for step in range(1, 9)}), (3, {1: 1, 3: (2 + 3) / 2, 6: (4 + 5 + 6) / 3})],
)
def test_each_line_has_the_time_of_its_own_steps(here, call, late, clock, monkeypatch, is_late, every, seconds):  # noqa: F811
    """Evaluations after every second step, also between two logs, and checkpoints are no part of it."""
    monkeypatch.setattr(LogsLate, "late", is_late)
    job = (*JOB, "--max-steps", 8, "--eval-fraction", 0.3, "--eval-steps", 2, "--save-steps", 5)
    assert call(*job, "--logging-steps", every, "--output", "run")[0] == 0
    assert bool(late) == is_late
    lines = [line for line in metrics(here / "run") if "loss" in line]
    assert {line["step"]: line["seconds/step"] for line in lines} == seconds
    if every == 1:
        tokens = sum(line["tokens_per_second"] * line["seconds/step"] for line in lines)
        assert tokens == pytest.approx(json.loads((here / "run" / "result.json").read_text())["tokens"], abs=3)


def test_an_evaluation_that_is_made_up_for_is_no_part_of_the_first_step(here, call, late, clock, monkeypatch):  # noqa: F811
    job = (*JOB, "--max-steps", 4, "--eval-fraction", 0.3, "--eval-steps", 2, "--output", "run")
    ask = pack_trainer.StopOnSignal.drop_if_asked

    def stop_now(self):
        signal.raise_signal(signal.SIGTERM)
        ask(self)

    with monkeypatch.context() as patch:
        patch.setattr(pack_trainer.StopOnSignal, "drop_if_asked", stop_now)
        assert call(*job)[0] == 75
    assert call(*job)[0] == 0
    lines = metrics(here / "run")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert [line["seconds/step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_lap_is_what_lies_between_two_ends_without_its_pauses(monkeypatch):
    moments = iter([0.0, 10.0, 12.0, 15.0, 20.0, 21.0, 26.0])
    monkeypatch.setattr(laps, "now", lambda device: next(moments))
    runs = Laps(torch.device("cpu"))
    runs.begin()
    with runs.pause():
        pass
    first = runs.end()
    with pytest.raises(RuntimeError), runs.pause():
        raise RuntimeError
    second = runs.end()
    assert (first.seconds(), second.seconds()) == (20.0 - 10.0 - 3.0, 26.0 - 20.0)


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


def test_a_step_is_told_at_once_where_a_log_asks_for_a_checkpoint(here, call, late, monkeypatch):  # noqa: F811
    """A callback that is told of step 3, once step 4 has been made, wants that one saved."""
    on_log = Metrics.on_log

    def save_after_3(self, args, state, control, *rest, **more):
        on_log(self, args, state, control, *rest, **more)
        control.should_save |= state.global_step == 3

    monkeypatch.setattr(Metrics, "on_log", save_after_3)
    assert call(*JOB, "--max-steps", 6, "--output", "asked")[0] == 0
    assert late == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6)]
    assert [line["step"] for line in logged(here / "asked") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (here / "asked" / "checkpoints" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("module", [pack_trainer, group_trainer])
def test_no_log_adds_up_over_processes_what_their_cards_would_have_to_be_waited_for(module, monkeypatch):
    """A gather on the card behind the step, read at once: hosts would give it the next step only when it is idle."""
    kind = module.trainer_class()
    trainer = kind.__new__(kind)
    trainer.args = SimpleNamespace(parallel_mode=ParallelMode.DISTRIBUTED, device=torch.device("cpu"))
    monkeypatch.delattr(transformers.trainer, "distributed_broadcast_scalars")
    trainer.store_flos()
