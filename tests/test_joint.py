"""What is computed together (attention's projections, a gated MLP) gives what PEFT's own layers give one by one."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit

from interpreted import needs_triton
from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import resolve_model
from opensloth.engine import matmul, mlp, native
from opensloth.engine.joint import join
from opensloth.engine.lora import with_our_layers
from opensloth.engine.lora_layer import Adapted, OneMatmul, Together
from opensloth.engine.mlp import Gated, GatedMlp
from opensloth.rollout.merge import Merge
from test_lora_layer import IDS, SAME, away_from_zero, check_rounding, in_sixteen_bits, ours, outcome, pefts
from tiny import save_tiny_model, tiny_model, tiny_tokenizer

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


class Capped(torch.nn.Module):
    """As some models do it: what never shows with small values."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x).clamp(-10, 10))


class Dropped(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)


class Pair(torch.nn.Module):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("odd", [Capped, Dropped, Pair])
def test_an_mlp_that_does_more_stays_as_it_is(odd):
    model = ours().eval()
    first, *others = (layer.mlp for layer in model.get_base_model().get_decoder().layers)
    first.__class__ = type(odd.__name__, (odd, type(first)), {})
    join(model)
    assert type(first).__name__ == odd.__name__
    assert not first.training
    assert all(isinstance(mlp, Gated) for mlp in others)


class Trace:
    pass


class Traced(torch.autograd.Function):
    """The identity; what stands in its context lives as long as the graph does."""

    @staticmethod
    def forward(ctx, x, trace):
        ctx.trace = trace
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slopes):
        return slopes, None


@pytest.mark.parametrize("dies", ["q_norm", "k_norm", "o_proj"])
def test_nothing_is_held_after_memory_ran_out_in_the_middle(dies):
    """What a projection was given is the end of a graph that holds the activations of all layers before."""
    model = joined("qwen3")
    first, *_, last = model.get_base_model().get_decoder().layers
    trace = Trace()
    alive = weakref.ref(trace)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    hooks = [
        first.register_forward_hook(lambda _, inputs, out, trace=trace: Traced.apply(out, trace)),
        getattr(last.self_attn, dies).register_forward_pre_hook(out_of_memory),
    ]
    del trace
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    del hooks
    gc.collect()
    assert alive() is None
    assert not any(getattr(module, "given", None) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_with_and_without_gradient_or_a_fresh_adapter_are_equal(dtype):
    """To the bit: the ratio of a policy to itself is 1, and its distance from where it began is 0."""
    model = joined("qwen3")
    if dtype == torch.bfloat16:
        in_sixteen_bits(model)
    learning = model(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, learning)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, base)
    assert not torch.equal(base, learning)


def test_ranks_and_factors_may_differ_and_adapters_leave_layers_out():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"],
        rank_pattern={"k_proj": 2, "up_proj": 3},
        alpha_pattern={"v_proj": 5, "down_proj": 3},
        task_type="CAUSAL_LM",
    )
    config.target_modules = set(config.target_modules)
    found = []
    for together in (True, False):
        torch.manual_seed(5)
        base = tiny_model(tiny_tokenizer(), "qwen2")
        model = away_from_zero(get_peft_model(base, with_our_layers(config, base) if together else config))
        if together:
            join(model)
            assert any(isinstance(module, Gated) for module in model.modules())
        found.append(outcome(model))
        config = copy.deepcopy(config)
        config._custom_modules = None
    (logits, gradients), (expected, expected_gradients) = found
    assert torch.allclose(logits, expected, atol=SAME)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=SAME), name


def test_a_second_adapter_is_used_when_it_is_active():
    model = joined()
    model.add_adapter("ref", model.peft_config["default"])
    first = model(input_ids=IDS).logits
    model.set_adapter("ref")
    second = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.allclose(second, model(input_ids=IDS).logits, atol=SAME)  # B of a new adapter is 0
    model.set_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, first)


def test_a_merge_and_a_copy_compute_the_same():
    model = joined()
    expected = model(input_ids=IDS).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, expected)
    with torch.no_grad(), Merge()(model):
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=5 * SAME)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    model.merge_adapter()
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=5 * SAME)


def test_a_model_without_an_adapter_stays_as_it_is():
    model = tiny_model(tiny_tokenizer())
    kinds = [type(module) for module in model.modules()]
    join(model)
    assert [type(module) for module in model.modules()] == kinds


def test_in_sixteen_bits_they_are_those_of_peft_within_rounding():
    check_rounding(joined())


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


def test_with_dropout_and_without_the_adapter_modules_are_their_own(calls):
    model = joined(lora_dropout=0.5)
    calls.update(dict.fromkeys(calls, 0))
    model.train()(input_ids=IDS)
    with model.disable_adapter():
        model(input_ids=IDS)
    assert calls == {Adapted: 0, GatedMlp: 0}


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


def test_decoding_on_a_base_in_four_bits_is_left_to_its_own_kernel(tmp_path, monkeypatch):
    path = save_tiny_model(tmp_path / "model")
    job = SftJob(data=Path("data"), load_in_4bit=True, dtype="float32", lora_r=4)
    model = native.load(job, resolve_model(str(path)), seed=1, device=torch.device("cpu"), packing=False).model
    away_from_zero(model).train()  # in evaluation its weights would be laid out anew for the CPU
    expected = model(input_ids=IDS).logits
    with torch.no_grad():  # evaluation and scores round as training does
        assert torch.equal(model(input_ids=IDS).logits, expected)
        before = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        made = []
        monkeypatch.setattr(matmul, "dense", lambda *_: made.append(1))
        last = model(input_ids=IDS[:, -1:], past_key_values=before).logits
    assert torch.allclose(last, expected[:, -1:], atol=10 * SAME)
    assert not made


def wide(rows, width, rank):
    torch.manual_seed(0)
    made = [torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, width)]
    made += [torch.randn(rows, 2 * rank), torch.randn(width, rank), torch.randn(width, rank)]
    made += [torch.randn(rows, rank), torch.randn(rank, width)]
    return made


@needs_triton
@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "width", "rank"), [(5, 40, 4), (70, 130, 16), (33, 96, 24), (1, 64, 64)])
def test_the_kernels_compute_what_torch_does(rows, width, rank, kind):
    from opensloth.engine.gate import Shares, gated, gated_back

    g, u, slopes, low, of_gate, of_up, low_slopes, down = wide(rows, width, rank)
    x, value = (
        (one + part @ factor.T).requires_grad_()
        for one, part, factor in zip((g, u), low.split(rank, 1), (of_gate, of_up), strict=True)
    )
    expected = mlp.act(x, kind) * value
    wanted = torch.autograd.grad(expected, (x, value), slopes + low_slopes @ down)
    shares = Shares(low, of_gate, of_up)

    def same(found, exact):
        assert torch.allclose(found, exact, atol=1e-4 * float(exact.abs().max()))

    same(gated(g, u, shares, kind), expected)
    for found, exact in zip(
        gated_back(g, u, slopes, shares, (low_slopes, down), kind), (*wanted, expected), strict=True
    ):
        same(found, exact)


@needs_triton
def test_without_shares_the_kernels_are_those_of_the_gate_alone():
    from opensloth.engine.gate import gated, gated_back

    g, u, slopes, *_ = wide(9, 50, 4)
    assert torch.allclose(gated(g, u), mlp.opened(g, u, [], "silu"), atol=1e-5)
    for found, exact in zip(gated_back(g, u, slopes), mlp.back_through(g, u, slopes, [], "silu"), strict=True):
        assert torch.allclose(found, exact, atol=1e-5)
