"""The fast path on a card, for each architecture: packs, our LoRA layer and logits by chunks equal the slow exact path.

The slow path is eager attention over one row at a time, PEFT's own layers, all logits at once, in fp32, with the same
(16-bit) weights.
"""

import sys

import pytest
import torch
from peft.tuners.lora import Linear

from opensloth.engine import attention, fill, fused, head, lora_layer, loss, matmul, mlp, policy
from opensloth.engine.compiled import compile_layers
from opensloth.engine.fill import Need
from opensloth.engine.head import Head
from opensloth.engine.joint import join
from opensloth.engine.lora_layer import LoraLinear
from opensloth.engine.loss import cross_entropy, pack_loss, padded_loss
from opensloth.engine.tape import Tape
from test_attention import ARCHITECTURES, VOCABULARY, batcher, build, gradients, rows
from test_fill import GROUPS, Policy
from test_graphed import PACKS, Recorded
from test_lora_layer import check_share
from test_policy import batch as completions
from tiny import tiny_model, tiny_tokenizer

# Length of the difference over that of the exact values. bfloat16 rounds to 2**-9 of a value; on its way through two
# layers a value is rounded some ten times, and a gradient twice as often. One row that saw another gives about 1.
LOGITS, GRADIENTS = 0.03, 0.08


@pytest.fixture
def device():
    return torch.device("cuda", 0)


def frozen_in(model, dtype):
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def off(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def on(device, batch):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def slow(arch, made, device, monkeypatch):
    """Logits of each row, and the gradients of the adapter, in fp32."""
    with monkeypatch.context() as peft:
        peft.setattr(LoraLinear, "forward", Linear.forward)
        model = frozen_in(frozen_in(build(arch), torch.bfloat16), torch.float32).to(device)
        logits, one_by_one = [], batcher(made, packing=False)
        targets = sum(int((row.labels[1:] != -100).sum()) for row in made)
        for number in range(len(made)):
            batch = on(device, one_by_one([number]))
            with torch.no_grad():
                logits.append(model(input_ids=batch["input_ids"], use_cache=False).logits[0])
            (padded_loss(model, batch) / targets).backward()
        return torch.cat(logits), gradients(model), targets


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_compiled_layers_equal_the_plain_ones(arch, monkeypatch, device):
    pack = on(device, batcher(rows(), packing=True)([0, 1, 2, 3, 4]))
    losses, found = [], []
    for compiles in (False, True):
        model = frozen_in(build(arch), torch.bfloat16).to(device)
        join(model)
        last, _ = head.find(model.get_base_model())
        model.set_attn_implementation(attention.NAME)
        if compiles:
            compile_layers(model, dynamic=False)
        loss = pack_loss(model, pack, last)
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    assert losses[1] == pytest.approx(losses[0], rel=LOGITS)
    for name, gradient in found[0].items():
        assert off(found[1][name], gradient) < GRADIENTS, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_logits_and_adapter_gradients_equal_the_slow_path(arch, monkeypatch, device):
    made = rows()
    logits, wanted, targets = slow(arch, made, device, monkeypatch)
    model = frozen_in(build(arch), torch.bfloat16).to(device)
    modeling = sys.modules[type(model.get_base_model()).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)  # put back for the slow path
    fused.fuse(model)
    join(model)
    assert hasattr(modeling.apply_rotary_pos_emb, "theirs")
    found, why = head.find(model.get_base_model())
    assert found is not None, why
    model.set_attn_implementation(attention.NAME)
    pack = on(device, batcher(made, packing=True)(list(range(len(made)))))
    inputs = {name: value for name, value in pack.items() if name not in ("labels", "predictors")}
    ours = []
    forward = lora_layer.Adapted.forward
    monkeypatch.setattr(lora_layer.Adapted, "forward", staticmethod(lambda *a: ours.append(1) or forward(*a)))
    with torch.no_grad():
        assert off(model(**inputs, use_cache=False).logits[0], logits) < LOGITS
    (pack_loss(model, pack, found) / targets).backward()
    assert ours
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert off(gradient, wanted[name]) < GRADIENTS, name


@pytest.mark.parametrize("how", ["plain", "checkpointing", "compiled", "held"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_recorded_passes_are_those_of_the_model(arch, how, monkeypatch, device):
    """Packs with other rows than those that were recorded, step after step; and memory is given back."""

    def prepare(model):
        model = frozen_in(model, torch.bfloat16).to(device)
        if how == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        modeling = sys.modules[type(model.get_base_model()).__module__]
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
        fused.fuse(model)
        join(model)
        if how == "compiled":
            compile_layers(model, dynamic=False)
        return model

    model = Recorded(arch, prepare)
    model.tolerance = 0.02  # attention's backward sums in no fixed order
    # as DDP does, which keeps autograd's own ends of the graph
    held = [weight.view_as(weight).grad_fn for weight in model.trained] if how == "held" else []
    for _ in range(3):
        model.check(PACKS)
    assert model.said == []
    assert model.passes is not None
    del held
    odd = batcher(rows(), packing=True)([0, 2])
    model.check([PACKS[0], odd, PACKS[1]])
    assert model.said == []


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_recorded_packs_of_completions_are_those_of_the_model(arch, monkeypatch, device):
    """Two sizes in turn, whose recordings have their memory in common; prompts are shared."""

    def prepare(model):
        model = frozen_in(model, torch.bfloat16).to(device)
        modeling = sys.modules[type(model.get_base_model()).__module__]
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
        fused.fuse(model)
        join(model)
        return model

    monkeypatch.setattr(fill, "LONG", 0)
    model = Policy(arch, prepare=prepare)
    model.tolerance = GRADIENTS
    for keys in (60, 200):  # and then in other sizes
        model.sizes.expect([Need(100, 24, keys)])
        for seed in range(6):
            model.check(GROUPS, seed)
            model.check(GROUPS[:1], seed)
        assert model.said == []
        assert len(model.head.graphed.passes) == 2
        assert all(passes.count == 4 for passes in model.head.graphed.passes.values())


def test_passes_that_wait_for_the_card_leave_it_as_it_was(device):
    """What cannot be recorded breaks the recording off: the stream, memory and random numbers are as before."""
    model = Recorded("llama", lambda model: frozen_in(model, torch.bfloat16).to(device))
    model.tolerance = 0.02
    layer = model.model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().any()))
    model.check(PACKS)
    assert len(model.said) == 1
    assert model.passes is None
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device=device).isfinite().all()
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    before = torch.cuda.memory_reserved()
    del held
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - 2**28


def test_chunks_of_a_real_vocabulary_have_the_loss_and_gradient_of_all_logits(device):
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 151_936, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(2_000, 256, device=device).bfloat16().requires_grad_()
    targets = torch.randint(0, 151_936, (2_000,), device=device)
    wide = hidden.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide @ linear.weight.float().T, targets, reduction="sum")
    expected.backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = cross_entropy(Head(linear), hidden, targets)
    found.backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * head.CHUNK_BYTES
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert off(hidden.grad, wide.grad) < LOGITS


@pytest.mark.parametrize("cap", [None, 30.0])
def test_kernels_make_of_a_real_vocabulary_what_torch_makes_of_it(cap, device):
    """A chunk of bfloat16 logits with masked tokens: loss, scores, and the slopes of both, written over the logits.

    Both round slopes once, from fp32 numbers that differ in their last bits: a step of bfloat16 apart at most.
    """
    from opensloth.engine import softmax

    torch.manual_seed(0)
    raw = (6 * torch.randn(768, 151_936, device=device)).bfloat16()
    targets = torch.randint(0, 151_936, (768,), device=device)
    raw[::2, :5_000], raw[::3, 7::16] = -torch.inf, -torch.inf
    raw.scatter_(1, targets[:, None], 20.0)
    assert head.by_kernel(raw)
    expected, slopes = loss.loss_and_slopes(raw.clone(), targets, cap, True)
    overwritten = raw.clone()
    found, returned = softmax.loss_and_slopes(overwritten, targets, cap, True)
    assert returned is overwritten
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(overwritten.float(), slopes.float(), rtol=2**-7, atol=1e-6)
    capped = raw.double() if cap is None else cap * torch.tanh(raw.double() / cap)
    exact = (capped / 0.7).log_softmax(-1)
    logps, entropy = softmax.scores_of(raw, targets, 0.7, cap)
    assert torch.allclose(logps, exact.gather(1, targets[:, None])[:, 0].float(), atol=1e-4)
    assert torch.allclose(entropy, -(exact.exp() * exact.clamp(min=-1e9)).sum(-1).float(), atol=1e-4)
    upstream = torch.linspace(-1, 1, 768, device=device)
    slopes = policy.slopes_of(raw.clone(), targets, upstream, 0.7, cap)
    assert torch.allclose(
        softmax.slopes_of(raw, targets, upstream, 0.7, cap).float(), slopes.float(), rtol=2**-7, atol=1e-6
    )


def test_scores_of_packed_completions_equal_those_of_padded_ones(device):
    model = tiny_model(tiny_tokenizer()).to(device, torch.bfloat16)
    last, _ = head.find(model)
    ids, mask, length = (x.to(device) if isinstance(x, torch.Tensor) else x for x in completions())
    expected = policy.padded(model.float(), ids, mask, length, 0.7).logps
    model.to(torch.bfloat16).set_attn_implementation(attention.NAME)
    found = policy.packed(model, ids, mask, length, 0.7, last).logps
    assert float((found - expected).abs().max()) < 0.05  # nats


@pytest.mark.parametrize("bias", [0.0, 10.0])
def test_the_share_of_an_adapter_that_has_just_begun_is_not_lost(bias, monkeypatch, device):
    """In the way of adding that is chosen for the card; what it says is shown where it is not enough."""
    monkeypatch.setattr(matmul, "times", 1.0)
    print(matmul.choose_adding(torch.nn.Linear(256, 512, device=device)))
    check_share(device, bias)


@pytest.mark.parametrize("as_one", [False, True])
def test_a_recording_keeps_a_small_share_too(as_one, monkeypatch, device):
    """Of a share of 2e-4 beside a product of 1, what is left on average."""
    monkeypatch.setattr(matmul, "times", 2.0)
    torch.manual_seed(0)
    low, x = (torch.randn(4096, width, device=device).bfloat16() for width in (8, 256))
    up, weight = (
        (scale * torch.randn(512, width, device=device)).bfloat16().T for scale, width in ((7e-5, 8), (1 / 16, 256))
    )
    add = matmul.with_share_as_one if as_one else matmul.with_share_in_place
    out = torch.empty(4096, 512, device=device, dtype=torch.bfloat16)
    add(low, up, x, weight, None)  # libraries load their kernels
    replay = Tape()(lambda: out.copy_(add(low, up, x, weight, None)))
    replay()
    with_it, share = out.float(), low.float() @ up.float()
    low.zero_()
    replay()
    assert float(((with_it - out.float()) * share).sum() / share.square().sum()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "width", "rank"), [(300, 3072, 16), (77, 9728, 64), (5, 136, 4)])
def test_the_gate_with_its_adapters_is_that_of_torch(rows, width, rank, kind, device):
    """Forward and backward, beside float32; as an operator of the compiler too."""
    torch.manual_seed(0)
    shapes = [(rows, width)] * 3 + [(rows, 2 * rank), (width, rank), (width, rank), (rows, rank), (rank, width)]
    g, u, slopes, *shares, low, down = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    lows = shares[0].float().split(rank, 1)
    x, value = (
        (one.float() + part @ factor.float().T).requires_grad_()
        for one, part, factor in zip((g, u), lows, shares[1:], strict=True)
    )
    expected = mlp.act(x, kind) * value
    wanted = torch.autograd.grad(expected, (x, value), slopes.float() + low.float() @ down.float())
    for opened, back in ((mlp.by_kernel, mlp.back_by_kernel), (mlp.as_one, mlp.back_as_one)):
        assert off(opened(g, u, shares, kind), expected) < LOGITS
        for found, exact in zip(back(g, u, slopes, [*shares, low, down], kind), (*wanted, expected), strict=True):
            assert off(found, exact) < LOGITS


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(9728, 2560), (33, 514)])
def test_weights_in_four_bits_are_those_of_bitsandbytes(shape, nested, device):
    from bitsandbytes.functional import quantize_4bit

    from opensloth.engine import nf4

    torch.manual_seed(0)
    packed, state = quantize_4bit(
        torch.randn(shape, device=device).bfloat16(), compress_statistics=nested, quant_type="nf4"
    )
    found, expected = nf4.numbers(packed, state), matmul.by_bitsandbytes(packed, state)
    assert found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)


def test_a_loss_without_a_host_sync(device):
    """Packs name the places of their trained tokens, so that the host need not wait to learn how many there are."""
    model = frozen_in(build("llama"), torch.bfloat16).to(device)
    last, _ = head.find(model.get_base_model())
    model.set_attn_implementation(attention.NAME)
    pack = on(device, batcher(rows(), packing=True)([0, 1, 2, 3, 4]))
    pack_loss(model, pack, last).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_loss(model, pack, last).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sharing", [True, False])
def test_scores_of_completions_without_a_host_sync(sharing, device):
    """Rows that the host has are laid out there; forward and backward never wait for the card."""
    model = frozen_in(build("llama"), torch.bfloat16).to(device)
    last, _ = head.find(model.get_base_model())
    model.set_attn_implementation(attention.NAME)
    ids, mask, length = completions()
    ids = ids % VOCABULARY  # they were made for a model that knows more words
    if sharing:
        ids, mask = (x.repeat_interleave(2, 0) for x in (ids, mask))
    policy.packed(model, ids, mask, length, 0.7, last).logps.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.packed(model, ids, mask, length, 0.7, last).logps.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
