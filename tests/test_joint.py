"""What is computed together (attention's projections, a gated MLP) gives what PEFT's own layers give one by one."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit

from interpreted import needs_triton
from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import resolve_model
from opensloth.engine import mlp, native
from opensloth.engine.joint import join
from opensloth.engine.lora_layer import Adapted, OneMatmul, Together
from opensloth.engine.mlp import Gated, GatedMlp
from test_lora_layer import BFLOAT16, IDS, SAME, away_from_zero, in_sixteen_bits, ours, outcome, pefts
from tiny import save_tiny_model

GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"]  # gemma's gate is a GELU
NOT_GATED = ["phi", "phi3"]  # no gate; one layer for gate and up


def joined(arch="llama", **changed):
    model = ours(arch, **changed)
    join(model)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts the forwards of each function."""
    made = {Adapted: 0, GatedMlp: 0}
    for function in made:

        def counted(*arguments, function=function, forward=function.forward):
            made[function] += 1
            return forward(*arguments)

        monkeypatch.setattr(function, "forward", staticmethod(counted))
    return made


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("arch", GATED)
def test_logits_and_gradients_are_those_of_peft(arch, rslora, calls):
    model = joined(arch, use_rslora=rslora)
    calls.update(dict.fromkeys(calls, 0))  # joining has tried them
    (logits, gradients), (expected, expected_gradients) = outcome(model), outcome(pefts(model))
    count = model.config.num_hidden_layers
    assert calls == {Adapted: 2 * count, GatedMlp: count}  # queries, keys and values are one; the other is o_proj
    assert torch.allclose(logits, expected, atol=SAME)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=SAME), name


@pytest.mark.parametrize("arch", NOT_GATED)
def test_other_mlps_stay_as_they_are(arch):
    model = joined(arch)
    assert not any(isinstance(module, Gated) for module in model.modules())
    assert torch.allclose(outcome(model)[0], outcome(pefts(model))[0], atol=SAME)


def test_an_mlp_that_computes_something_else_stays_as_it_is():
    model = ours()
    inner = model.get_base_model().get_decoder().layers[0].mlp
    kind = type(inner)

    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    inner.__class__ = Doubled
    join(model)
    found = [type(layer.mlp) for layer in model.get_base_model().get_decoder().layers]
    assert found[0] is Doubled
    assert all(issubclass(one, Gated) for one in found[1:])


def test_in_sixteen_bits_they_are_those_of_peft_within_rounding():
    model = joined()
    exact, exact_gradients = outcome(pefts(model))
    other = in_sixteen_bits(pefts(model))
    logits, gradients = outcome(in_sixteen_bits(model))
    peft_logits, peft_gradients = outcome(other)

    def off(found, wanted):
        return float((found - wanted).abs().max() / wanted.abs().max())

    assert off(logits, exact) < max(BFLOAT16, 2 * off(peft_logits, exact))
    for name, gradient in gradients.items():
        wanted = exact_gradients[name]
        assert gradient.dtype == torch.float32
        assert off(gradient, wanted) < max(BFLOAT16, 2 * off(peft_gradients[name], wanted)), name


def test_an_mlp_keeps_two_of_its_widest_activations():
    model, saved = in_sixteen_bits(joined()), []
    inner = model.get_base_model().get_decoder().layers[0].mlp
    x = torch.randn(7, inner.gate_proj.in_features, dtype=torch.bfloat16, requires_grad=True)

    def note(tensor):
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        inner(x).sum().backward()
    assert saved.count((torch.bfloat16, (7, inner.gate_proj.out_features))) == 2
    assert all(dtype == torch.bfloat16 for dtype, _ in saved)


def test_a_projection_given_something_else_computes_it_anew():
    attention = next(module for module in joined().modules() if isinstance(module, Together))
    x, other = torch.randn(2, 3, attention.q_proj.in_features)
    alone = attention.k_proj(other)
    attention.k_proj.given = x, torch.zeros_like(alone)
    assert torch.equal(attention.k_proj(other), alone)
    assert torch.equal(attention.k_proj(x), attention.k_proj(x.clone()))  # what was given is used once, or not at all


def test_without_gradients_with_dropout_and_without_the_adapter_modules_are_their_own(calls):
    model = joined(lora_dropout=0.5)
    calls.update(dict.fromkeys(calls, 0))
    model.train()(input_ids=IDS)
    assert calls == {Adapted: 0, GatedMlp: 0}
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert calls[GatedMlp] == 0
    with model.disable_adapter():
        model(input_ids=IDS)
    assert calls[GatedMlp] == 0


def test_gradient_checkpointing_changes_no_gradient():
    model = joined()
    _, expected = outcome(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    _, found = outcome(model.train())
    assert all(torch.allclose(found[name], gradient, atol=SAME) for name, gradient in expected.items())


def test_compiled_they_compute_the_same_without_a_break():
    model = joined("qwen3").train()
    logits, gradients = outcome(model)
    torch._dynamo.reset()
    for layer in model.get_base_model().get_decoder().layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    found, found_gradients = outcome(model)
    assert torch.allclose(found, logits, atol=SAME)
    assert all(torch.allclose(found_gradients[name], gradient, atol=SAME) for name, gradient in gradients.items())


def test_on_a_base_in_four_bits_they_are_those_of_peft(tmp_path, calls):
    path = save_tiny_model(tmp_path / "model")
    job = SftJob(data=Path("data"), load_in_4bit=True, dtype="float32", lora_r=4)
    model = native.load(job, resolve_model(str(path)), seed=1, device=torch.device("cpu"), packing=False).model
    away_from_zero(model).train()
    calls.update(dict.fromkeys(calls, 0))
    logits, gradients = outcome(model)
    assert calls[GatedMlp] == model.config.num_hidden_layers
    for module in list(model.modules()):
        if isinstance(module, Together | Gated):
            module.__class__ = type(module).__mro__[2]
        if isinstance(module, OneMatmul):
            module.forward = Linear4bit.forward.__get__(module)
    expected, expected_gradients = outcome(model)
    assert torch.allclose(logits, expected, atol=SAME)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, expected_gradients[name], atol=SAME), name


def wide(rows, width, rank, dtype):
    torch.manual_seed(0)
    made = [torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, width)]
    made += [torch.randn(rows, 2 * rank), torch.randn(width, rank), torch.randn(width, rank)]
    made += [torch.randn(rows, rank), torch.randn(rank, width)]
    return [x.to(dtype) for x in made]


@needs_triton
@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize(
    ("rows", "width", "rank", "dtype"),
    [(5, 40, 4, torch.float32), (70, 130, 16, torch.float32), (33, 96, 24, torch.float32), (1, 64, 64, torch.float32)],
)
def test_the_kernels_compute_what_torch_does(rows, width, rank, dtype, kind):
    from opensloth.engine.gate import Shares, gated, gated_back

    g, u, slopes, low, of_gate, of_up, low_slopes, down = wide(rows, width, rank, dtype)
    lows = low.float().split(rank, 1)
    x, value = (
        (one.float() + part @ factor.float().T).requires_grad_()
        for one, part, factor in zip((g, u), lows, (of_gate, of_up), strict=True)
    )
    expected = mlp.act(x, kind) * value
    wanted = torch.autograd.grad(expected, (x, value), slopes.float() + low_slopes.float() @ down.float())
    shares = Shares(low, of_gate, of_up)
    rounding = 1e-4 if dtype == torch.float32 else 1e-2

    def same(found, exact):
        assert found.dtype == dtype
        assert torch.allclose(found.float(), exact, atol=rounding * float(exact.abs().max()))

    same(gated(g, u, shares, kind), expected)
    for found, exact in zip(
        gated_back(g, u, slopes, shares, (low_slopes, down), kind), (*wanted, expected), strict=True
    ):
        same(found, exact)


@needs_triton
def test_without_shares_the_kernels_are_those_of_the_gate_alone():
    from opensloth.engine.gate import gated, gated_back

    g, u, slopes, *_ = wide(9, 50, 4, torch.float32)
    assert torch.allclose(gated(g, u), mlp.opened(g, u, [], "silu"), atol=1e-5)
    for found, exact in zip(gated_back(g, u, slopes), mlp.back_through(g, u, slopes, [], "silu"), strict=True):
        assert torch.allclose(found, exact, atol=1e-5)
