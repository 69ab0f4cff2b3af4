"""The decoder with fixed buffers, as it runs without recordings; tests/gpu runs it with them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from opensloth.rollout import graph
from opensloth.rollout.generate import generate
from opensloth.rollout.graph import CHECK_EVERY, LATER, GraphDecoder, smallest
from opensloth.rollout.merge import Merge, adapted
from opensloth.rollout.sampling import Noise, Sampling
from opensloth.rollout.store import BUCKET

PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 10, 11, 12, 13], [9, 10, 11, 12, 13], [4] * (BUCKET + 6)]
STOPS = [3, *range(50, 69)]  # many, so that completions end at different lengths


def policy(arch: str = "llama") -> Any:
    model = tiny.tiny_model(tiny.tiny_tokenizer(), arch)
    model.set_attn_implementation("sdpa")
    targets = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))


def settings(slots: int, **changed: Any) -> dict[str, Any]:
    sampling, noise = Sampling(temperature=0.9, top_k=100), Noise(1, 2, tuple(range(slots)))
    return {"stops": STOPS, "pad": 0, "max_new": 40, "sampling": sampling, "noise": noise, **changed}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_it_writes_what_the_plain_loop_writes(arch: str) -> None:
    model = policy(arch)
    plain = generate(model, PROMPTS, **settings(5))
    fixed = generate(model, PROMPTS, write=GraphDecoder(), **settings(5))
    assert len({len(one.ids) for one in plain}) > 1
    for one, other in zip(plain, fixed, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_smaller_and_larger_batches_follow_in_the_same_buffers() -> None:
    model, decoder = policy(), GraphDecoder()
    for count in (3, 2, 5, 4):
        plain = generate(model, PROMPTS[:count], **settings(count))
        fixed = generate(model, PROMPTS[:count], write=decoder, **settings(count))
        assert [one.ids for one in plain] == [one.ids for one in fixed]


def test_prompts_that_are_a_little_longer_keep_the_buffers_and_their_recordings() -> None:
    model, decoder = policy(), GraphDecoder()
    generate(model, [[5] * 20, [6] * 3], write=decoder, **settings(2))
    before = decoder.buffers
    generate(model, [[5] * 25, [6] * 3], write=decoder, **settings(2))
    assert decoder.buffers is before


def test_buffers_hold_the_longest_prompt_that_is_said_to_come() -> None:
    model, decoder = policy(), GraphDecoder(longest=2 * BUCKET)
    generate(model, [[5] * 20], write=decoder, **settings(1))
    before = decoder.buffers
    generate(model, [[5] * 2 * BUCKET], write=decoder, **settings(1))
    assert decoder.buffers is before


def test_a_batch_of_shorter_completions_follows_in_the_same_buffers() -> None:
    model, decoder = policy(), GraphDecoder()
    for longest in (40, 9):
        asked = settings(5, max_new=longest)
        plain, fixed = generate(model, PROMPTS, **asked), generate(model, PROMPTS, write=decoder, **asked)
        assert [one.ids for one in plain] == [one.ids for one in fixed]


def test_finished_rows_stop_costing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven completions of three prompts in buffers for sixteen; they end one after the other, and none is lost."""
    model, decoder = policy(), GraphDecoder()
    computed: list[int] = []
    plain_step = GraphDecoder.plain

    def counted(self: Any, model: Any, state: Any, *more: Any) -> None:
        computed.append(state.count)
        plain_step(self, model, state, *more)

    monkeypatch.setattr(graph, "SMALLEST", 2)
    monkeypatch.setattr(GraphDecoder, "plain", counted)
    generate(model, [[5, 6]] * 16, write=decoder, **settings(16, max_new=2))
    computed.clear()
    prompts = (PROMPTS * 3)[:11]
    asked = settings(11, stops=[3, *range(50, 58)], max_new=120)
    plain, fixed = generate(model, prompts, **asked), generate(model, prompts, write=decoder, **asked)
    assert [one.ids for one in plain] == [one.ids for one in fixed]
    for one, other in zip(plain, fixed, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert computed == sorted(computed, reverse=True)
    assert len(set(computed)) > 2
    lengths = [len(one.ids) for one in plain]
    for at, count in enumerate(computed, start=1):  # half of what is computed is open, but for the steps between looks
        seen = max(at - LATER, 0) // CHECK_EVERY * CHECK_EVERY
        still = sum(length > seen for length in lengths)
        assert count == smallest(16, still)


@pytest.mark.parametrize(
    ("rows", "needed", "count"), [(64, 64, 64), (64, 32, 32), (64, 33, 64), (100, 13, 13), (9, 1, 5)]
)
def test_rows_are_halved_while_all_that_are_open_fit(rows: int, needed: int, count: int) -> None:
    assert smallest(rows, needed) == count


def test_buffers_that_were_freed_are_made_anew() -> None:
    model, decoder = policy(), GraphDecoder()
    first = generate(model, PROMPTS, write=decoder, **settings(5))
    decoder.release()
    assert decoder.buffers is None
    assert generate(model, PROMPTS, write=decoder, **settings(5)) == first


def test_greedy_and_cut_completions_are_the_same_too() -> None:
    model = policy()
    asked = settings(5, sampling=Sampling(temperature=0), noise=None, stops=[3], max_new=7)
    plain, fixed = generate(model, PROMPTS, **asked), generate(model, PROMPTS, write=GraphDecoder(), **asked)
    assert [one.ids for one in plain] == [one.ids for one in fixed]


@pytest.mark.parametrize("beside", [True, False])
def test_the_weights_come_back_bit_for_bit_and_where_they_lay(monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    monkeypatch.setattr("opensloth.rollout.merge.folds", lambda layer: beside)
    model = policy().to(torch.bfloat16)
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    merge = Merge()
    for _ in range(2):
        with merge(model):
            changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n][0])]
            assert (changed == []) == beside
            assert all("base_layer" in name for name in changed)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name][0])
            assert value.data_ptr() == before[name][1]


def test_the_weights_come_back_after_an_error() -> None:
    model = policy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError), Merge()(model):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in adapted(model).values())


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi", "phi3"])  # qwen2 has biases, phi and phi3 other layers
def test_merged_beside_or_in_place_it_computes_the_same(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    model = tiny.tiny_model(tiny.tiny_tokenizer(), arch)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for beside in (True, False):
            monkeypatch.setattr("opensloth.rollout.merge.folds", lambda layer, beside=beside: beside)
            with Merge()(model):
                assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)


def test_layers_that_read_the_same_input_are_one_matmul() -> None:
    model = policy()
    merge = Merge()
    with merge(model):
        sizes = [len(group.layers) for group in merge.fused]
    assert sizes == [2, 1] * (len(sizes) // 2), "q_proj with v_proj, and down_proj"


def test_a_model_without_an_adapter_is_left_alone() -> None:
    model = tiny.tiny_model(tiny.tiny_tokenizer())
    assert adapted(model) == {}
    with Merge()(model):
        pass
