"""Several processes on cards: N train what one does, over NCCL where there are two cards, and time is told unasked."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from grpo_fixtures import metrics
from kills import children
from opensloth.training.gradient_sync import Buckets, GradientSync, SyncSeconds
from opensloth.training.moments import now
from training_fixtures import begin, end, environment, wait_for

CYCLES = 10**9  # about half a second
SECONDS = 400
BFLOAT16 = 0.05  # roundings of 16 bits, over 300 steps, on losses of a few nats
CARD = torch.device("cuda", 0)
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")


def visible(place):
    """What commands see: all cards, and a cache of their own."""
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return {"CUDA_VISIBLE_DEVICES": cards, "OPENSLOTH_CACHE": str(place / "cache")}


def verify(place, *arguments):
    """`os-train verify ...`: what it found, the log of the second run, and its result."""
    output = place / "-".join(str(word).strip("-") for word in arguments)
    command = [sys.executable, "-m", "opensloth.cli.train", "verify", *map(str, arguments), "--json"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=place,
        env=environment(**visible(place)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
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


LONG = (
    *("sample:arithmetic", "--samples", 2000, "--model", "sample:tiny", "--chat-template", "reasoning"),
    *("--tokens-per-step", 2048, "--max-steps", 300, "--save-steps", 30, "--save-total-limit", 20, "--lr", 1e-3),
)


def disturbed(place, devices, disturb):
    """A run of LONG that goes on, or begins, on so many devices; `disturb` gets it once it has a new checkpoint."""
    folder = place / "cut" / "checkpoints"
    before = set(folder.glob("checkpoint-*"))
    run = begin(place, *LONG, *devices, "--output", "cut", **visible(place))
    wait_for(lambda: set(folder.glob("checkpoint-*")) - before, run, "a checkpoint")
    disturb(run)
    return end(run)


def check_faults(place, devices):
    """A worker that is killed, a run that goes on with fewer processes and is stopped, and one that ends it."""
    code, out = end(begin(place, *LONG, *devices(2), "--output", "whole", **visible(place)))
    assert code == 0, out
    code, out = disturbed(place, devices(2), lambda run: os.kill(children(run.pid)[-1], signal.SIGKILL))
    assert code == 3, out
    assert "was killed by SIGKILL" in out
    code, out = disturbed(place, devices(1), lambda run: run.send_signal(signal.SIGTERM))
    assert code == 75, out
    assert "Stopped by SIGTERM after step" in out
    code, out = end(begin(place, *LONG, *devices(2), "--output", "cut", **visible(place)))
    assert code == 0, out
    assert "going on from" in out
    whole, cut = ([line["loss"] for line in metrics(place / name)] for name in ("whole", "cut"))
    assert len(whole) == len(cut) == 300
    assert cut == pytest.approx(whole, abs=BFLOAT16)
    assert whole[-1] < whole[0] - 1


@two_cards
def test_over_nccl_killed_and_stopped_runs_go_on_with_other_cards(tmp_path):
    check_faults(tmp_path, lambda count: ("--gpus", count))


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
