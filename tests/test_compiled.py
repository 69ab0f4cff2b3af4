"""One compilation serves all layers: what differs between them is data, never a type or a path of code."""

import pytest
import torch
from torch._dynamo.utils import counters

from opensloth.engine import fused
from opensloth.engine.compiled import compile_layers
from test_attention import build


def graphs(arch, layers, monkeypatch):
    """How many graphs the compiler makes of a model's layers, forward and backward run twice."""
    torch._dynamo.reset()
    counters.clear()
    model = build(arch, num_hidden_layers=layers).train()
    for module in model.modules():
        fused.fuse_norm(module)
    theirs = torch.nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda module, **options: theirs(module, backend="eager", **options))
        compile_layers(model, dynamic=False)
    for _ in range(2):  # with eager attention: that over packs is one operation on a card, and many on a CPU
        model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits.sum().backward()
    assert any(isinstance(module, fused.Normed) for module in model.modules())
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_one_compilation_serves_all_layers(arch, monkeypatch):
    few = graphs(arch, 2, monkeypatch)  # the input of the first wants no gradient
    assert few > 0
    assert graphs(arch, 5, monkeypatch) == few
