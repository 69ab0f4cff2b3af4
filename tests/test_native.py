"""Engine `native`: what it loads weights from, and the types it keeps them in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import ModelRef, resolve_model
from opensloth.engine import native
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
