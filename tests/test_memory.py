"""The rule of memory, held to peaks that were measured and to what the engine does."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import resolve_model
from opensloth.engine import joint, memory, native
from tiny import save_tiny_model, tiny_model, tiny_tokenizer

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MEASURED = [row for row in json.loads((RESULTS / "sft-h200.json").read_text())["rows"] if row["impl"] == "opensloth"]
QWEN3 = {"qwen3-0.6b": (1024, 28, 16, 8, 3072), "qwen3-4b": (2560, 36, 32, 8, 9728)}


def qwen3(name):
    hidden, layers, heads, keys, intermediate = QWEN3[name]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['case']} {row['setting']}")
def test_the_rule_of_memory_foresees_what_was_measured(row):
    """Peaks on a card: never more than the rule says, and hardly less."""
    config = qwen3(row["model"])
    pack, mode = re.search(r"up to ([\d,]+) tokens .* checkpointing: (\w+)", row["plan"]).groups()
    options = SftJob(data=Path("data"), gradient_checkpointing=mode, load_in_4bit=row["bits"] == 4)
    need = memory.estimate(config, options, 2, memory.Means(chunked=True, in_place=True, gated=True))
    expected = need.total(int(pack.replace(",", ""))) / memory.GIB
    assert row["peak_gib"] <= expected <= 1.1 * row["peak_gib"]


def test_a_gated_mlp_needs_half_of_its_memory():
    config = tiny_model(tiny_tokenizer()).config
    options = SftJob(data=Path("data"), gradient_checkpointing="none")
    one, half = (memory.estimate(config, options, means=memory.Means(gated=gated)).per_token for gated in (False, True))
    assert one - half == config.num_hidden_layers * 2 * 2 * config.intermediate_size


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, True), ({"lora_dropout": 0.1}, False), ({"lora_targets": ("q_proj", "up_proj")}, False)],
)
def test_what_will_be_gated_is_what_is(changed, expected, tmp_path):
    path = save_tiny_model(tmp_path / "model")
    job = SftJob(data=Path("data"), dtype="float32", **changed)
    engine = native.load(job, resolve_model(str(path)), seed=1, device=torch.device("cpu"), packing=True)
    assert engine.means.gated is expected
    assert joint.will_be_gated(lambda: tiny_model(tiny_tokenizer()), job) is expected


@pytest.mark.parametrize(
    ("may_record", "longest", "expected"),
    [(False, 2048, ("selective", 6_000)), (True, 2048, ("none", 3_000)), (True, 4096, ("selective", 6_000))],
)
def test_recorded_passes_may_be_small_rather_than_recomputed(may_record, longest, expected, monkeypatch):
    """A 4B model in 4 bits on a card of 16 GiB: what is free once its weights are there."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 13 * memory.GIB)
    options = SftJob(data=Path("data"), load_in_4bit=True)
    means, card = memory.Means(chunked=True, in_place=True, gated=True), torch.device("cuda")
    plan = memory.plan(
        qwen3("qwen3-4b"), options, card, longest, torch.bfloat16, means=means, step=32_768, may_record=may_record
    )
    mode, about = expected
    assert plan.checkpointing == mode
    assert about <= plan.pack_tokens <= 1.2 * about
