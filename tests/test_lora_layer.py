"""Our LoRA layer gives what PEFT's gives, saves what PEFT's saves, and leaves to it what it cannot do."""

import copy
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from safetensors.torch import load_file

from opensloth.config.jobs import SftJob
from opensloth.config.run import SEVEN_LINEARS
from opensloth.data.models.resolve import resolve_model
from opensloth.engine import lora, matmul, native
from opensloth.engine.lora_layer import Adapted, LoraLinear, OneMatmul
from opensloth.rollout.merge import Merge
from tiny import save_tiny_model, tiny_model, tiny_tokenizer

SAME = 1e-6
# eight bits are kept: 2 ** -8 is one rounding, and a value goes through several
BFLOAT16 = 0.03
IDS = torch.arange(5, 45).view(2, 20)


def ours(arch="llama", **changed):
    asked = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, **changed}
    return away_from_zero(
        lora.attach(tiny_model(tiny_tokenizer(), arch), SimpleNamespace(lora_targets=SEVEN_LINEARS, **asked), seed=3)
    )


def pefts(model):
    """The same model with PEFT's own layers."""
    config = model.peft_config["default"]
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )
    other = get_peft_model(tiny_model(tiny_tokenizer(), model.config.model_type), plain)
    other.load_state_dict(model.state_dict())
    assert {type(layer) for layer in layers(other)} == {Linear}
    return other


def away_from_zero(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def in_sixteen_bits(model):
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def outcome(model):
    """Logits, and the gradients of the adapter."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def used(monkeypatch):
    """Counts the forwards that are ours."""
    calls = []
    forward = Adapted.forward

    def counted(*arguments):
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(Adapted, "forward", staticmethod(counted))
    return calls


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])  # qwen2 has biases
def test_logits_and_gradients_are_those_of_peft(arch, rslora, monkeypatch):
    model, calls = ours(arch, use_rslora=rslora), used(monkeypatch)
    assert {type(layer) for layer in layers(model)} == {LoraLinear}
    other = pefts(model)
    (logits, gradients), (expected, expected_gradients) = outcome(model), outcome(other)
    assert len(calls) == len(layers(model))
    assert torch.allclose(logits, expected, atol=SAME)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=SAME), name


@pytest.mark.parametrize("times", [1.0, 2.0])
def test_in_sixteen_bits_they_are_those_of_peft_within_rounding(times, monkeypatch):
    monkeypatch.setattr(matmul, "times", times)
    check_rounding(ours())


def check_rounding(model):
    """Logits and gradients in 16 bits are no further from the exact ones than PEFT's, twice over."""
    exact, exact_gradients = outcome(pefts(model))
    other = in_sixteen_bits(pefts(model))
    logits, gradients = outcome(in_sixteen_bits(model))
    peft_logits, peft_gradients = outcome(other)

    def off(found, wanted):
        return float((found - wanted).abs().max() / wanted.abs().max())

    assert off(logits, exact) < max(BFLOAT16, 2 * off(peft_logits, exact))
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        wanted = exact_gradients[name]
        assert off(gradient, wanted) < max(BFLOAT16, 2 * off(peft_gradients[name], wanted)), name


@pytest.mark.parametrize("times", [1.0, 2.0])
@pytest.mark.parametrize("bias", [0.0, 10.0])
def test_the_share_of_an_adapter_that_has_just_begun_is_not_lost_in_sixteen_bits(bias, times, monkeypatch):
    monkeypatch.setattr(matmul, "times", times)
    check_share(torch.device("cpu"), bias)


def check_share(device, bias):
    """A share that is far smaller than the last digit of what the base gives moves a rounding now and then: on average
    by as much as it is. Added to what was rounded already it would vanish until the adapter has grown."""
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 512, bias=bool(bias)).requires_grad_(False).bfloat16()
    if bias:
        base.bias.data.normal_(0, bias)
    layer = LoraLinear(base, "default", LoraConfig(r=8, lora_alpha=16), r=8, lora_alpha=16, lora_dropout=0.0)
    layer.lora_A.float()
    layer.lora_B.float()["default"].weight.data.normal_(0, 1e-4)
    layer, x = layer.to(device), torch.randn(4096, 256).bfloat16().to(device)
    a, b = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        share = 2.0 * x.float() @ a.T @ b.T
        with_it, without = layer(x).float(), base(x).float()
    assert share.abs().max() < 2**-9 * without.abs().max()
    kept = float(((with_it - without) * share).sum() / share.square().sum())
    assert kept == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("kept", "times", "said"),
    [
        ({1.0: 0.99}, 1.0, "in place: 99% of a small one is kept"),
        ({1.0: 0.02, 2.0: 0.03}, 1.0, "of a small one 2% is kept, and 3% where it is halved"),
        ({1.0: 0.02, 2.0: 1.0}, 2.0, "as twice its half: of a small one 100% is kept, not 2%"),
    ],
)
def test_how_a_share_is_added_is_chosen_by_what_is_kept(kept, times, said, monkeypatch):
    monkeypatch.setattr(matmul, "times", 5.0)
    monkeypatch.setattr(matmul.Trial, "kept", lambda _, factor: kept[factor])
    model = torch.nn.Linear(8, 4)
    drawn = torch.get_rng_state()
    assert said in matmul.choose_adding(model)
    assert matmul.times == times
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_is_recorded_adds_to_a_product_in_fp32(monkeypatch):
    """A CPU's own matmul would round it."""
    monkeypatch.setattr(matmul, "times", 2.0)
    monkeypatch.setattr(matmul, "being_recorded", lambda x: True)
    in_float32 = []

    def exactly(left, right):
        in_float32.append(left.shape)
        return left.float() @ right.float()

    monkeypatch.setattr(matmul, "in_float32", exactly)
    check_share(torch.device("cpu"), 0.0)
    assert in_float32 == [(4096, 256)]


def test_a_cpu_keeps_a_small_share_in_either_way():
    trial = matmul.Trial(256, 64, torch.device("cpu"))
    assert [trial.kept(1.0), trial.kept(2.0)] == pytest.approx([1.0, 1.0], abs=0.1)


def test_activations_are_never_cast_to_fp32():
    model = in_sixteen_bits(ours())
    saved = []

    def note(tensor):
        saved.append((tensor.dtype, tensor.shape))
        return tensor

    layer, x = layers(model)[0], torch.randn(7, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x).sum().backward()
    assert {dtype for dtype, _ in saved} == {torch.bfloat16}


def test_dropout_is_left_to_peft_in_training_alone(monkeypatch):
    model, calls = ours(lora_dropout=0.5), used(monkeypatch)
    model.train()(input_ids=IDS)
    assert not calls
    model.eval()(input_ids=IDS)
    assert calls


def test_without_its_adapter_the_model_is_the_base(monkeypatch):
    model, calls = ours(), used(monkeypatch)
    with torch.no_grad():
        expected = tiny_model(tiny_tokenizer())(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not calls


def test_a_merge_for_rollouts_computes_the_same_and_puts_the_base_back():
    model = ours()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        unmerged = model(input_ids=IDS).logits
        with Merge()(model):
            assert all("forward" in vars(layer) for layer in layers(model))
            assert torch.allclose(model(input_ids=IDS).logits, unmerged, atol=5 * SAME)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in layers(model))


def test_a_second_adapter_is_used_when_it_is_active(monkeypatch):
    model = ours()
    model.add_adapter("ref", model.peft_config["default"])
    calls = used(monkeypatch)
    with torch.no_grad():
        first = model(input_ids=IDS).logits
        model.set_adapter("ref")
        second = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
    assert len(calls) == 2 * len(layers(model))
    assert torch.allclose(second, base, atol=SAME)  # B of a new adapter is 0
    assert not torch.allclose(first, second, atol=1e-3)


def test_what_is_saved_is_a_plain_adapter_and_is_taken_over(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "adapter")
    pefts(model).save_pretrained(tmp_path / "peft")
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "peft"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "lora_layer" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    without = PeftModel.from_pretrained(tiny_model(tiny_tokenizer()), tmp_path / "adapter")
    assert {type(layer) for layer in layers(without)} == {Linear}
    again = lora.take_over(tiny_model(tiny_tokenizer()), tmp_path / "adapter")
    assert {type(layer) for layer in layers(again)} == {LoraLinear}
    with torch.no_grad():
        logits = [one(input_ids=IDS).logits for one in (model, without, again)]
    assert torch.allclose(logits[0], logits[1], atol=SAME)
    assert torch.equal(logits[0], logits[2])
    assert lora.weights_hash(again) == lora.weights_hash(model)


def test_on_a_base_in_four_bits_they_are_those_of_peft(tmp_path):
    path = save_tiny_model(tmp_path / "model")
    job = SftJob(data=Path("data"), load_in_4bit=True, dtype="float32", lora_r=4)
    model = native.load(job, resolve_model(str(path)), seed=1, device=torch.device("cpu"), packing=False).model
    away_from_zero(model).train()
    mine = [module for module in model.modules() if isinstance(module, OneMatmul)]
    assert len(mine) == 2 * 7
    logits, gradients = outcome(model)
    for layer in mine:
        layer.forward = MethodType(Linear4bit.forward, layer)
    expected, expected_gradients = outcome(model)
    assert torch.allclose(logits, expected, atol=SAME)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, expected_gradients[name], atol=SAME), name


def test_under_autocast_a_base_of_its_type_is_ours_and_another_is_pefts(monkeypatch):
    model, calls = ours(), used(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
        assert not calls
        in_sixteen_bits(model)(input_ids=IDS)
    assert len(calls) == len(layers(model))


def test_gradient_checkpointing_changes_no_gradient():
    model = ours()
    _, expected = outcome(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    _, found = outcome(model.train())
    assert all(torch.allclose(found[name], gradient, atol=SAME) for name, gradient in expected.items())


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("arch", "times"), [("llama", 1.0), ("qwen2", 1.0), ("llama", 2.0)])  # qwen2 has biases
def test_compiled_it_computes_the_same_and_copies_nothing_to_add_to_it(arch, times, dynamic, monkeypatch):
    """`addmm(out, ...)`, which a compiler makes of an addition in place, copies `out` first."""
    from torch._dynamo.backends.common import aot_autograd

    monkeypatch.setattr(matmul, "times", times)
    seen = set()

    def collect(graph, _):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = ours(arch)
    layer = next(layer for layer in layers(model) if isinstance(layer, LoraLinear))
    x = torch.randn(2, 7, layer.in_features, requires_grad=True)
    found = []
    for run in (
        layer,
        torch.compile(layer, backend=aot_autograd(fw_compiler=collect), fullgraph=True, dynamic=dynamic),
    ):
        out = run(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *trained(layer)])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=SAME, rtol=1e-5)
    assert "opensloth.products.default" in seen
    assert not any("addmm" in name for name in seen)


def trained(layer):
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]
