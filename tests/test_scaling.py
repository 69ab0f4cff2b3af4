"""The arithmetic of benchmarks/scaling.py: what runs are asked for, and what is made of their figures."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scaling

SIZES = scaling.ON_CARDS


def test_each_run_is_asked_for_once_and_the_ends_come_first():
    asked = scaling.plan(["sft"], ["small"], [1, 2, 4], SIZES)
    assert len({setting.name for setting in asked}) == len(asked)
    work, fixed = SIZES.work["sft"], SIZES.fixed["sft"]
    assert [(setting.devices, setting.work) for setting in asked[:2]] == [(1, work), (4, 4 * work)]
    assert [setting for setting in asked if not setting.packing] == [
        scaling.Setting("sft", "small", 1, work, packing=False)
    ]
    # two devices of weak scaling have the work that strong scaling divides
    assert {(s.devices, s.work) for s in asked} == {(n, n * work) for n in (1, 2, 4)} | {(n, fixed) for n in (1, 2, 4)}
    assert len(asked) == 6


@pytest.mark.parametrize(("cards", "found"), [(1, "1"), (2, "1,2"), (3, "1,2"), (8, "1,2,4,8")])
def test_devices_are_the_powers_of_two_that_are_there(cards, found):
    assert scaling.powers(cards) == found


def test_steps_that_warm_up_do_not_count():
    def line(step, tokens, seconds):
        costs = {"seconds/sync": 0.1 * seconds, "seconds/communication": 0.2 * seconds}
        even = {"padding": 0.5, "unfilled": 0.5, "imbalance": 1.0 + step / 100}
        return {"step": step, "loss": 1.0, "tokens_per_second": tokens, "seconds/step": seconds} | costs | even

    lines = [line(1, 1, 100.0), line(2, 100, 1.0), {"step": 2, "eval_loss": 1.0}, line(3, 50, 3.0)]
    found = scaling.measured(lines, skip=1)
    assert found["steps"] == 2
    assert found["tokens_per_second"] == 250 / 4  # all tokens over all time, not the mean of speeds
    assert found["seconds_per_step"] == 2.0
    assert found["share_of_time"] == {"communication": 0.2, "sync": 0.1}
    assert found["imbalance"] == 1.025


def row(devices, work, speed, packing=True):
    return {
        **{"method": "sft", "model": "small", "devices": devices, "work": work, "packing": packing},
        **{"tokens_per_second": speed, "padding": 0.4 * (not packing)},
    }


def test_packing_and_scaling_are_told_apart():
    work, fixed = SIZES.work["sft"], SIZES.fixed["sft"]
    rows = [row(1, work, 100.0), row(2, 2 * work, 190.0), row(1, work, 50.0, packing=False), row(1, fixed, 120.0)]
    found = {(one["kind"], one["devices"]): one for one in scaling.scaling(rows, SIZES)}
    assert found["weak", 2] == {
        **{"kind": "weak", "method": "sft", "model": "small", "devices": 2},
        **{"speedup": 1.9, "efficiency": 0.95},
    }
    assert found["strong", 2]["speedup"] == round(190 / 120, 3)
    assert set(found) == {("weak", 1), ("weak", 2), ("strong", 1), ("strong", 2)}
    gain = {"method": "sft", "model": "small", "padding_without": 0.4, "factor": 2.0}
    assert scaling.packing(rows) == [gain]


def test_without_the_run_of_one_device_nothing_is_compared():
    assert scaling.scaling([row(2, 2 * SIZES.work["sft"], 190.0)], SIZES) == []
    assert scaling.packing([row(1, SIZES.work["sft"], 100.0)]) == []


@pytest.mark.parametrize("packing", [True, False])
def test_options_for_all_runs_stand_in_each_command(tmp_path, packing):
    arguments = argparse.Namespace(work=tmp_path, steps=2, skip=1, options="--cuda-graphs off")
    setting = scaling.Setting("grpo", "tiny", 1, 2, packing)
    words = scaling.command(arguments, setting, "sample:tiny", scaling.REHEARSAL, on_cards=False)
    assert "--cuda-graphs off" in " ".join(words)
