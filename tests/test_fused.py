"""Norms and rotary positions in one kernel each compute what the model's own code does."""

import sys

import pytest
import torch

from interpreted import needs_triton
from opensloth.engine import fused
from test_attention import ARCHITECTURES, build


@pytest.fixture
def rotary():
    """The kernel, run by triton's interpreter on CPU tensors."""
    from opensloth.engine import rotary

    return rotary


def frozen(arch, dtype=torch.float32):
    torch.manual_seed(0)
    model = build(arch).get_base_model().eval().requires_grad_(False).to(dtype)
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.weight.copy_(torch.randn_like(module.weight))
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_of_every_architecture_compute_the_same(arch):
    model, ids = frozen(arch), torch.arange(3, 15)[None]
    expected = model(input_ids=ids).logits
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for module in norms:
        fused.fuse_norm(module)
    assert all(isinstance(module, fused.Normed) for module in norms)
    assert (norms != []) == (arch != "phi")  # which has layer norms
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 24), (16, 128)])
def test_heads_that_lie_apart_are_normalized_where_they_are(heads, size, dtype):
    from opensloth.engine.norm import normalize

    torch.manual_seed(0)
    wide = torch.randn(5, 2, (heads + 2) * size).to(dtype)
    x = wide[..., size : (heads + 1) * size].unflatten(-1, (heads, size))
    weight = torch.randn(size).to(dtype)
    found = normalize(x, weight, 1e-6)
    assert found.is_contiguous()
    expected = torch.nn.functional.rms_norm(x.float(), (size,), weight.float(), 1e-6)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found.float(), expected, atol=rounding, rtol=rounding)


def test_a_norm_that_computes_something_else_stays_as_it_is():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

        def forward(self, x):
            return x.abs() * self.weight

    odd = OddRMSNorm()
    fused.fuse_norm(odd)
    assert type(odd) is OddRMSNorm


def test_a_norm_that_trains_stays_as_it_is():
    model = frozen("llama")
    norm = model.get_decoder().norm.requires_grad_(True)
    fused.fuse_norm(norm)
    assert not isinstance(norm, fused.Normed)


@needs_triton
@pytest.mark.parametrize("positions", [1, 9])
@pytest.mark.parametrize(
    ("rows", "size", "dtype"), [(3, 64, torch.float32), (1, 24, torch.float32), (2, 32, torch.bfloat16)]
)
def test_the_kernel_rotates_as_transformers_does(rotary, rows, positions, size, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs

    q, k = (torch.randn(rows, positions, heads, size, dtype=dtype).transpose(1, 2) for heads in (6, 2))
    angles = torch.randn(rows, positions, size)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slopes = [torch.randn_like(x) for x in (q, k)]
    found = []
    for turn in (theirs, rotary.rotate):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        out = turn(a, b, cos, sin)
        found.append([*out, *torch.autograd.grad(out, (a, b), slopes)])
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5 if dtype == torch.float32 else 0.05)


@needs_triton
def test_one_angle_serves_all_rows(rotary):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs

    q, k, angles = torch.randn(4, 3, 5, 16), torch.randn(4, 1, 5, 16), torch.randn(1, 5, 16)
    for ours, wanted in zip(
        rotary.rotate(q, k, angles.cos(), angles.sin()), theirs(q, k, angles.cos(), angles.sin()), strict=True
    ):
        assert torch.allclose(ours, wanted, atol=1e-6)


@needs_triton
def test_only_rotations_by_halves_are_replaced(rotary, monkeypatch):
    class Modeling:
        @staticmethod
        def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):  # by neighbours
            turned = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
            return q * cos.unsqueeze(unsqueeze_dim) + turned * sin.unsqueeze(unsqueeze_dim), k

    theirs = Modeling.apply_rotary_pos_emb
    fused.fuse_rotary(Modeling)
    assert Modeling.apply_rotary_pos_emb is theirs
    llama = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", llama.apply_rotary_pos_emb)  # put back afterwards
    fused.fuse_rotary(llama)
    assert hasattr(llama.apply_rotary_pos_emb, "theirs")
    q, k, angles = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 5, 16)
    ours = llama.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())  # on a CPU: theirs
    assert torch.equal(ours[0], llama.apply_rotary_pos_emb.theirs(q, k, angles.cos(), angles.sin())[0])
