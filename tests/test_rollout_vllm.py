"""`--rollout vllm`: TRL's own support, asked by our command, over a stand-in for vLLM itself (tests/vllm_stand_in)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_fixtures import BATCH, MAX_NEW, make_adapter, make_place, metrics, record, rollouts, train
from opensloth.cli import program
from opensloth.cli import train as train_cli
from opensloth.errors import UserError
from opensloth.rollout.merge import adapted, copies, put_back
from opensloth.rollout.room import Room
from opensloth.rollout.sampling import Sampling
from opensloth.rollout.vllm import MOST_OF_A_CARD, OWN, room_of, sampling_arguments
from training_fixtures import environment

STAND_IN = Path(__file__).parent / "vllm_stand_in"
GIB = 2**30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = make_place(tmp_path_factory.mktemp("vllm"))
    make_adapter(directory)
    return directory


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def with_stand_in(*arguments):
    """The real `os-grpo`, on a machine where `import vllm` finds the stand-in."""
    path = os.pathsep.join([str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "opensloth.cli.grpo", *map(str, arguments)]
    own = {"PYTHONPATH": path, "VLLM_STAND_IN": str(Path.cwd())}
    return subprocess.run(command, env=environment(**own), capture_output=True, text=True, timeout=240)


def test_a_run_trains_on_completions_of_vllm(here):
    # the one held-out prompt is the first process's: the second completes nothing before the first step
    arguments = ("one-held", "--model", "adapter", *BATCH, "--rewards", "rewards.py:letters", "--processes", 2)
    done = with_stand_in(*arguments, "--max-steps", 2, "--rollout", "vllm", "--output", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    started = [record(here, f"{rank}.json") for rank in (0, 1)]
    assert [Path(one["model"]) for one in started] == [here / "model"] * 2
    assert [(one["max_num_seqs"], one["max_model_len"]) for one in started] == [(12, 43 + MAX_NEW)] * 2
    # the weights that vLLM got are the policy's: it finds the same probabilities
    gaps = [entry["logp_gap/max"] for entry in metrics(here / "run", "logp_gap/max")]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4, gaps
    written = rollouts(here / "run", 2)
    assert len(set(written["completion"])) > 4
    assert not all(written["cut"])
    assert record(here / "run", "result.json")["steps"] == 2
    before, after = (load_file(here / name / "adapter_model.safetensors") for name in ("adapter", "run"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_arguments_of_vllm():
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05)
    assert sampling_arguments(sampling, [3, 5], 64) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.0,
        "max_tokens": 64,
        "stop_token_ids": [3, 5],
        "ignore_eos": True,
    }


def test_bases_are_put_back_bit_for_bit(place):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, place / "adapter")
    layers = adapted(model)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
    with put_back(layers, copies(layers, on_card=False)):
        model.merge_adapter()
        merged = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
        model.unmerge_adapter()
        back = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
    assert all(not torch.equal(merged[name], before[name]) for name in before)
    assert any(not torch.equal(back[name], before[name]) for name in before), "PEFT's own way back is exact by now"
    assert all(torch.equal(layer.get_base_layer().weight, before[name]) for name, layer in layers.items())
    assert not any(layer.merged for layer in layers.values())


@pytest.mark.parametrize(
    ("completions", "row", "weights", "share"),
    [(64, GIB // 16, GIB, 0.15), (64, GIB // 4, GIB, 0.3), (1024, GIB // 4, 8 * GIB, MOST_OF_A_CARD)],
)
def test_the_share_of_a_card(completions, row, weights, share):
    room = room_of(completions, row, weights, 80 * GIB)
    assert isinstance(room, Room)
    assert room.stays
    assert room.rows == completions
    assert room.kept / (80 * GIB) == pytest.approx(share, abs=1e-6)
    assert OWN + weights < room.kept


def test_a_card_without_room_for_the_weights_is_told():
    with pytest.raises(UserError, match=r"16\.0 GiB, leave too little of the card's 24\.0 GiB"):
        room_of(64, GIB // 16, 16 * GIB, 24 * GIB)


def test_without_vllm_the_way_out_is_named(here, capsys):
    said = train("data", *BATCH, "--processes", 1, "--rollout", "vllm", "--output", "none", expect=2)
    assert "vllm is not installed" in said
    assert 'pip install "openslothai[vllm]"' in said
    assert not (here / "none").exists()
    arguments = ["grpo", "rows.jsonl", "--model", "model", "--rollout", "vllm", "--output", "none"]
    assert program.run(train_cli.app, arguments) == 2  # before the data is prepared
    assert "vllm is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "words"), [(["--load-in-4bit"], "16 bits"), (["--engine", "unsloth"], "native")])
def test_what_vllm_does_not_serve(here, more, words):
    assert words in train("data", *BATCH, "--processes", 1, "--rollout", "vllm", *more, expect=2)
