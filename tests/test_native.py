"""Engine `native`: what it loads weights from, and the types it keeps them in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import ModelRef, resolve_model
from opensloth.engine import attention, native
from opensloth.errors import UserError
from tiny import save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


def load(ref: ModelRef, **options):
    job = SftJob(data=Path("data"), **options)
    return native.load(job, ref, seed=1, device=CPU, packing=True)


def as_pickle(weights: Path, name: str) -> None:
    """Keep the tensors of a safetensors file as a pickle instead."""
    torch.save(load_file(weights), weights.with_name(name))
    weights.unlink()


def test_a_model_that_only_exists_as_pickles_is_refused(model):
    as_pickle(model / "model.safetensors", "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(resolve_model(str(model)))


def test_an_adapter_that_only_exists_as_a_pickle_is_refused(model, tmp_path):
    adapter = tmp_path / "adapter"
    load(resolve_model(str(model))).model.save_pretrained(adapter)
    ref = ModelRef(str(adapter), str(model), None, adapter, "adapter")
    load(ref)
    as_pickle(adapter / "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load(ref)


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_attention_computes_in_bfloat16_on_a_quantized_base_too(model, monkeypatch, bits):
    seen = []

    def watched(q, *rest):
        seen.append(q.dtype)
        return row_by_row(q, *rest)

    row_by_row = attention.row_by_row
    monkeypatch.setattr(attention, "row_by_row", watched)
    engine = load(resolve_model(str(model)), dtype="bfloat16", **bits)
    engine.model.train()
    ids, boundaries = torch.arange(8)[None], torch.tensor([0, 8], dtype=torch.int32)
    ends = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 8, "max_length_k": 8}
    engine.loss(engine.model, {"input_ids": ids, "labels": ids, "position_ids": ids, **ends}).backward()
    assert set(seen) == {torch.bfloat16}
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in trained)
    assert all("lora_" in name for name, parameter in engine.model.named_parameters() if parameter.requires_grad)
