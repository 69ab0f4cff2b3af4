"""The kernel that attends over shared prompts, run by triton's interpreter on CPU tensors."""

import pytest
import torch
import torch.nn.functional as F

from interpreted import needs_triton
from opensloth.engine.fused import fuse_norm
from opensloth.rollout.generate import generate
from opensloth.rollout.graph import CHECK_EVERY, GraphDecoder
from opensloth.rollout.merge import projected
from opensloth.rollout.store import OwnRows, SharedPrompts, positions_of_row, why_not_shared
from opensloth.rollout.turn import forwards
from test_rollout_graph import PROMPTS, policy, settings

pytestmark = needs_triton

CASES = [  # rows, prompts, query heads for a key head, key heads, head size, longest prompt, room, written
    (5, 2, 2, 2, 32, 70, 40, 0),
    (5, 2, 1, 3, 24, 7, 100, 77),
    (9, 3, 4, 2, 64, 65, 130, 129),
    (6, 6, 7, 1, 128, 130, 64, 10),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies no bfloat16
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_over_the_prompt_and_what_was_written(case, dtype):
    from opensloth.rollout.kernel import attend

    rows, prompts, group, heads, size, longest, room, own = case
    torch.manual_seed(0)
    query = torch.randn(rows, group * heads, size, dtype=dtype)
    key, value = (torch.randn(rows, heads, size, dtype=dtype) for _ in range(2))
    keys, values = (torch.randn(rows + 2, heads, room, size, dtype=dtype) for _ in range(2))
    of_prompts = [torch.randn(prompts + 1, heads, longest + 5, size, dtype=dtype) for _ in range(2)]
    source, starts = torch.arange(rows + 2) % prompts, torch.randint(0, longest, (prompts + 1,))
    before = keys.clone()
    end, written = torch.tensor([longest]), torch.tensor([own])
    out = attend(query, key, value, keys, values, *of_prompts, source, starts, end, written, size**-0.5)
    assert torch.equal(keys[:rows, :, own], key)
    assert torch.equal(values[:rows, :, own], value)
    before[:rows, :, own] = key
    assert torch.equal(keys, before), "only the new position is written"
    for row in range(rows):
        seen = slice(int(starts[source[row]]), longest)
        k, v = (
            torch.cat([shared[source[row], :, seen], mine[row, :, : own + 1]], 1).float().repeat_interleave(group, 0)
            for shared, mine in zip(of_prompts, (keys, values), strict=True)
        )
        expected = ((query[row].float()[:, None] @ k.mT) * size**-0.5).softmax(-1) @ v
        assert torch.allclose(out[row].float(), expected[:, 0], atol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_a_decoder_with_it_writes_what_the_plain_loop_writes(arch):
    model, decoder = policy(arch), GraphDecoder(SharedPrompts)
    for count in (5, 3):
        plain = generate(model, PROMPTS[:count], **settings(count, max_new=12))
        ours = generate(model, PROMPTS[:count], write=decoder, **settings(count, max_new=12))
        for one, other in zip(plain, ours, strict=True):
            assert one.ids == other.ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_that_have_ended_leave_and_longer_prompts_follow():
    model, decoder = policy(), GraphDecoder(SharedPrompts)
    prompts = PROMPTS[:4] * 4
    for more in ([], [9] * 30):  # the second batch needs larger buffers
        longer = [[*prompt, *more] for prompt in prompts]
        how = settings(16, stops=[3, *range(40, 140)], max_new=2 * CHECK_EVERY)
        plain = generate(model, longer, **how)
        assert [one.ids for one in generate(model, longer, write=decoder, **how)] == [one.ids for one in plain]
    assert decoder.buffers.count < decoder.buffers.rows


def test_a_shared_prompt_is_counted_for_its_share():
    config, card = policy().config, torch.device("cuda", 0)
    assert positions_of_row(100, 50, 1 / 8, torch.device("cpu"), config) == 192 + 100 / 8
    assert positions_of_row(100, 50, 1 / 8, card, config) == 50 + (128 + 100) / 8
    assert why_not_shared(config, torch.device("cpu"))
    assert not why_not_shared(config, card)
    assert GraphDecoder(OwnRows).kind is OwnRows


def turnable(arch):
    """A model whose norms of heads are recognized, as a model on a card has them."""
    model = policy(arch)
    for module in model.modules():
        module.requires_grad_(False)
        fuse_norm(module)
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_heads_that_the_kernel_turns_write_the_same(arch):
    model, decoder = turnable(arch), GraphDecoder(SharedPrompts)
    for count in (5, 3):
        plain = generate(model, PROMPTS[:count], **settings(count, max_new=12))
        ours = generate(model, PROMPTS[:count], write=decoder, **settings(count, max_new=12))
        # of a common layer three: itself, its attention and its MLP
        layers = len(model.get_base_model().get_decoder().layers)
        assert len(decoder.turned) == layers * (1 if arch == "gemma3_text" else 3)
        for one, other in zip(plain, ours, strict=True):
            assert one.ids == other.ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert not any("forward" in vars(layer) for layer in decoder.turned)


def test_what_recorded_steps_read_stays_where_it_is():
    """Gemma's norms multiply by one plus their weight, a tensor of its own."""
    model, decoder = turnable("gemma3_text"), GraphDecoder(SharedPrompts)
    seen = []
    for _ in range(2):
        generate(model, PROMPTS[:2], write=decoder, **settings(2, max_new=3))
        seen.append(dict(decoder.turned))
    assert all(forward is seen[1][layer] for layer, forward in seen[0].items())
    assert seen[0]


@pytest.mark.parametrize("special", [{"clip_qkv": 8.0}, {"rope_parameters": {"llama_4_scaling_beta": 0.1}}])
def test_what_a_trial_need_not_show_is_left_alone(special):
    model = turnable("llama")
    layers = model.get_base_model().get_decoder().layers
    assert len(forwards(model)) == len(layers)
    for name, value in special.items():
        setattr(model.config, name, value)
    assert forwards(model) == {}


def test_a_layer_that_adds_in_another_way_keeps_that_and_its_heads_are_turned(monkeypatch):
    model, decoder = turnable("llama"), GraphDecoder(SharedPrompts)
    layers = model.get_base_model().get_decoder().layers
    theirs = type(layers[0]).forward
    monkeypatch.setattr(type(layers[0]), "forward", lambda self, x, **words: 0.5 * x + theirs(self, x, **words))
    plain = generate(model, PROMPTS, **settings(5, max_new=12))
    ours = generate(model, PROMPTS, write=decoder, **settings(5, max_new=12))
    assert set(decoder.turned) == {layer.self_attn for layer in layers}
    assert [one.ids for one in plain] == [one.ids for one in ours]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 1024, 1500])
def test_the_gate_reads_both_halves_where_they_lie(width, dtype):
    from opensloth.engine.gate import gated

    torch.manual_seed(0)
    gate, up = torch.randn(5, 1, 2 * width).mul(3).to(dtype).chunk(2, -1)
    found = gated(gate, up)
    assert found.is_contiguous()
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found.float(), F.silu(gate.float()) * up.float(), atol=rounding, rtol=rounding)


@pytest.mark.parametrize("bias", [False, True])
def test_a_matmul_adds_the_residual_where_the_layer_is_one(bias):
    linear = torch.nn.Linear(6, 4, bias=bias).requires_grad_(False)
    x, residual = torch.randn(3, 1, 6), torch.randn(3, 1, 4)
    assert torch.equal(projected(linear, x, None), linear(x))
    expected = linear(x) + residual
    found = projected(linear, x, residual)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found is residual) == (not bias)  # beside the bias there is no place for it


@pytest.mark.parametrize("change", ["norms", "angles"])
def test_a_layer_that_does_something_else_keeps_its_own_forward(change, monkeypatch):
    """It is found out by its parts, or where these look alike, by what it computes."""
    model, decoder = turnable("qwen3"), GraphDecoder(SharedPrompts)
    layers = model.get_base_model().get_decoder().layers
    if change == "norms":
        layers[1].self_attn.q_norm = torch.nn.Identity()
    else:
        theirs = type(layers[0].self_attn).forward
        monkeypatch.setattr(
            type(layers[0].self_attn),
            "forward",
            lambda self, position_embeddings, **words: theirs(
                self, position_embeddings=tuple(x.flip(-1) for x in position_embeddings), **words
            ),
        )
    plain = generate(model, PROMPTS, **settings(5, max_new=12))
    ours = generate(model, PROMPTS, write=decoder, **settings(5, max_new=12))
    assert decoder.turned == {}
    assert [one.ids for one in plain] == [one.ids for one in ours]
