"""Several processes on cards: N train what one does, over NCCL where there are two cards, and time is told unasked."""

import json
import os
import subprocess
import sys

import pytest
import torch

from opensloth.training.gradient_sync import Buckets, GradientSync, SyncSeconds
from opensloth.training.moments import now
from training_fixtures import environment

CYCLES = 10**9  # about half a second
SECONDS = 400
CARD = torch.device("cuda", 0)
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")


def verify(place, *arguments):
    """`os-train verify ...`: what it found, the log of the second run, and its result."""
    output = place / "-".join(str(word).strip("-") for word in arguments)
    command = [sys.executable, "-m", "opensloth.cli.train", "verify", *map(str, arguments), "--json"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    more = environment(CUDA_VISIBLE_DEVICES=visible, OPENSLOTH_CACHE=str(place / "cache"))
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=place, env=more, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (output / "several" / "metrics.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    return json.loads(done.stdout), steps, json.loads((output / "several" / "result.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_two_processes_on_one_card_train_as_one_does(place, method):
    found, steps, result = verify(place, method, "--gpus", "0,0")
    assert found["processes_with_same_weights"] == 2
    assert all(entry["seconds/sync"] > 0 for entry in steps)
    assert min(result["per_process"]["communication_seconds"]) > 0


@two_cards
@pytest.mark.parametrize(("method", "dtype"), [("sft", "bfloat16"), ("grpo", "float32")])
def test_over_nccl_all_cards_train_as_one_does(place, method, dtype):
    cards = torch.cuda.device_count()
    found, steps, result = verify(place, method, "--gpus", cards if 12 % cards == 0 else 2, "--dtype", dtype)
    assert found["processes_with_same_weights"] == found["processes"] >= 2
    assert all(0 < entry["seconds/communication"] < entry["seconds/step"] for entry in steps[1:])
    assert len(result["per_process"]["memory_gib"]) == found["processes"]


def test_what_the_card_has_not_done_yet_is_not_waited_for():
    sync = GradientSync(CARD)
    torch.cuda.synchronize()
    sync.current = Buckets([now(CARD)], [now(CARD)])
    torch.cuda._sleep(CYCLES)
    sync.backward_done()
    assert sync.read() == SyncSeconds()
    torch.cuda.synchronize()
    found = sync.read()
    assert found.steps == 1
    assert found.exposed > 0.05
    assert found.total < 0.05
