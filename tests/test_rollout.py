"""Completions: drawn as asked, by noise that knows nothing but places, from a model that is left as it was."""

import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opensloth.engine import attention
from opensloth.rollout.decode import why_not
from opensloth.rollout.generate import as_policy, generate
from opensloth.rollout.grouped import grouped
from opensloth.rollout.sampling import Noise, Sampling, choose
from tiny import tiny_model, tiny_tokenizer

PROMPTS = ((5, 17, 200, 31), (40,), (9, 300, 12, 88, 120, 7, 410), (5, 17, 200, 31), (66, 3, 21))
GREEDY = Sampling(temperature=0.0)
LOGITS = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0, -torch.inf, -3.0, 1.0])
DRAWS = 20_000
CHI_SQUARE = {7: 29.9, 15: 44.3, 99: 161.3}  # at 1e-4, by degrees of freedom: so seldom is a fair sampler this far off


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(params=["our loop", "transformers"])
def either_way(request, monkeypatch):
    """Both ways of making completions: what a test says holds for each."""
    if request.param == "transformers":
        monkeypatch.setattr("opensloth.rollout.generate.why_not", lambda *asked: "a test")


@pytest.fixture
def adapted(model):
    """A model under an adapter that says something (a new one is a zero)."""
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.3))
    for name, weights in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    return peft


def write(model, prompts=PROMPTS, *, sampling=GREEDY, slots=None, step=3, seed=11, max_new=12, stops=(2,), **more):
    noise = Noise(seed, step, tuple(range(len(prompts)) if slots is None else slots))
    return generate(model, prompts, stops=stops, pad=0, max_new=max_new, sampling=sampling, noise=noise, **more)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


# ---- noise


def test_noise_is_uniform_over_slots_and_positions():
    numbers = Noise(7, 2, tuple(range(400))).uniforms(300)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for part in (numbers, numbers[:3], numbers[:, :3], numbers[:, ::64]):
        counts, _ = np.histogram(part, 16, (0, 1))
        assert chi_square(counts, part.size / 16) < CHI_SQUARE[15]


@pytest.mark.parametrize(
    ("other", "shift"),
    [
        (Noise(8, 2, tuple(range(400))), (0, 0)),  # the next seed
        (Noise(7, 3, tuple(range(400))), (0, 0)),  # the next step
        (Noise(2, 7, tuple(range(400))), (0, 0)),  # seed and step exchanged
        (Noise(7, 2, tuple(range(400))), (1, 0)),  # the next slot
        (Noise(7, 2, tuple(range(400))), (0, 1)),  # the next position
        (Noise(7, 2, tuple(range(400))), (1, -1)),
    ],
)
def test_neighbouring_noise_is_independent(other, shift):
    mine = Noise(7, 2, tuple(range(400))).uniforms(300)
    theirs = np.roll(other.uniforms(300), shift, (0, 1))
    assert not (mine == theirs).any()
    pairs, _, _ = np.histogram2d(mine.ravel(), theirs.ravel(), 10, [(0, 1), (0, 1)])
    assert chi_square(pairs, mine.size / 100) < CHI_SQUARE[99]


def test_a_number_depends_on_its_own_slot_and_position_alone():
    whole = Noise(7, 2, (0, 1, 2, 3)).uniforms(9)
    assert (Noise(7, 2, (3, 1)).uniforms(5) == whole[[3, 1], :5]).all()


def test_noise_is_the_same_for_ever():
    """A run that was begun with an older version goes on with the same completions."""
    assert Noise(0, 0, (0,)).uniforms(1)[0, 0] == 0.1296456182997474
    assert Noise(3407, 5, (2**31,)).uniforms(3)[0, 2] == 0.6546036223361054


# ---- one token


def expected(sampling):
    """The distribution that should be drawn from, written down plainly: no tensor, one token after the other."""
    weights = {at: np.exp(float(x) / sampling.temperature) for at, x in enumerate(LOGITS) if np.isfinite(float(x))}
    if sampling.top_k:
        weights = dict(sorted(weights.items(), key=lambda pair: -pair[1])[: sampling.top_k])
    total, kept, mass = sum(weights.values()), {}, 0.0
    for at, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
        if mass < sampling.top_p:
            kept[at] = weight
        mass += weight / total
    kept = {at: weight for at, weight in kept.items() if weight >= sampling.min_p * max(kept.values())}
    return {at: weight / sum(kept.values()) for at, weight in kept.items()}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(temperature=1.7),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=1.3, top_k=5, top_p=0.9, min_p=0.1),
    ],
    ids=repr,
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampling):
    numbers = torch.from_numpy(Noise(1, 0, tuple(range(DRAWS))).uniforms(1)[:, 0])
    chosen, logprobs = choose(LOGITS.expand(DRAWS, -1), sampling, numbers)
    shares = expected(sampling)
    assert set(chosen.tolist()) == set(shares)
    counts = np.bincount(chosen.numpy(), minlength=len(LOGITS))[list(shares)]
    assert chi_square(counts, DRAWS * np.array(list(shares.values()))) < CHI_SQUARE[7]
    whole = (LOGITS / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, whole[chosen])  # of the whole vocabulary, whatever was left out


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=4), Sampling(min_p=0.01)])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-53])
def test_no_token_of_probability_0_is_drawn(sampling, number):
    nothing = -torch.inf
    rows = torch.tensor([[nothing, 1.0, nothing, 2.0, nothing], [nothing, nothing, nothing, nothing, 0.0]])
    chosen, logprobs = choose(rows, sampling, torch.full((2,), number, dtype=torch.float64))
    assert torch.isfinite(logprobs).all()
    assert chosen[1] == 4


def test_the_tail_of_a_large_vocabulary_is_reached():
    """A hundred thousand tokens of 1e-8 each are drawn once in a thousand, and fp32 sums would lose them."""
    rows = torch.full((1, 100_001), float(np.log(1e-8)))
    rows[0, 0] = float(np.log(1 - 1e-3))
    chosen, _ = choose(rows, Sampling(), torch.tensor([1 - 0.5e-3], dtype=torch.float64))
    assert 49_000 < int(chosen) < 51_000


def inverse(logits, uniforms):
    """The inverse of the cumulative distribution in float64: the token at each number, and at a little to each side."""
    upto = np.cumsum(np.exp(logits.astype(np.float64) - logits.max()))
    return [np.searchsorted(upto, np.clip(uniforms + by, 0, 1) * upto[-1], side="right") for by in (0, -1e-7, 1e-7)]


@pytest.mark.parametrize("size", [151_936, 513, 512, 511, 7])
def test_tokens_are_those_of_the_inverse_distribution_in_float64(size):
    """A block's sum in fp32 may move an edge by 1e-7 of the whole, and no draw more than that."""
    noise = Noise(3, 1, (0,)).uniforms(2000)[0]
    uniforms = torch.tensor(np.concatenate([[0.0, 1 - 2.0**-53], noise]))
    logits = (3 * torch.randn(size, generator=torch.Generator().manual_seed(size))).bfloat16()
    before = logits.clone()
    exact, low, high = inverse(logits.float().numpy(), uniforms.numpy())
    for part in range(0, len(uniforms), 100):
        at = slice(part, part + 100)
        numbers = uniforms[at]
        chosen = choose(logits.expand(len(numbers), -1), Sampling(), numbers)[0].numpy()
        high[at] = np.minimum(high[at], size - 1)
        assert (low[at] <= chosen).all()
        assert (chosen <= high[at]).all()
        assert (chosen == exact[at]).mean() > 0.95
    assert torch.equal(logits, before)


@pytest.mark.parametrize("number", [0.0, 0.3, 0.999, 1 - 2.0**-53])
def test_masked_blocks_and_masked_ends_are_never_drawn(number):
    """Whole blocks of -inf before, between and after the tokens that may be drawn, and one token alone."""
    rows = torch.full((3, 3000), -torch.inf)
    rows[0, [600, 1023, 1700]] = torch.tensor([0.0, -80.0, 1.0])
    rows[1, 2999] = -7.0
    rows[2, 1024:1536] = 0.0
    chosen, logprobs = choose(rows, Sampling(), torch.full((3,), number, dtype=torch.float64))
    assert int(chosen[0]) in (600, 1023, 1700)
    assert (int(chosen[1]), float(logprobs[1])) == (2999, 0.0)
    assert int(chosen[2]) == 1024 + int(number * 512)
    torch.testing.assert_close(logprobs, rows.log_softmax(-1).gather(1, chosen[:, None])[:, 0])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.9), Sampling(top_k=9), Sampling(min_p=0.1)])
def test_a_row_without_numbers_has_no_log_probability(sampling):
    rows = torch.zeros(3, 700)
    rows[0, 600], rows[1, 3], rows[2] = torch.nan, torch.inf, -torch.inf
    chosen, logprobs = choose(rows, sampling, torch.full((3,), 0.5, dtype=torch.float64))
    assert logprobs.isnan().all()
    assert (chosen < 700).all()


def test_greedy_takes_the_first_of_several_that_are_likeliest():
    rows = torch.randn(20, 151_936, generator=torch.Generator().manual_seed(0)).bfloat16().clamp(max=3)
    chosen, logprobs = choose(rows, GREEDY, None)
    assert torch.equal(chosen, torch.from_numpy(rows.float().numpy().argmax(-1)))
    torch.testing.assert_close(logprobs, rows.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0])


def test_16_bit_logits_are_computed_in_fp32():
    rows = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    numbers = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    for sampling in (GREEDY, Sampling()):
        low, high = choose(rows, sampling, numbers), choose(rows.float(), sampling, numbers)
        assert torch.equal(low[0], high[0])
        assert torch.equal(low[1], high[1])


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}])
def test_a_way_to_sample_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="not a way to sample"):
        Sampling(**bad)


# ---- completions


def both(test):
    return pytest.mark.usefixtures("either_way")(test)


@both
def test_greedy_is_what_generate_writes(model):
    model.eval()
    for prompt, rollout in zip(PROMPTS, write(model), strict=True):
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=12, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        assert rollout.ids == out[0, len(prompt) :].tolist()


@both
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.7, top_k=20)], ids=repr)
def test_logprobs_are_those_of_a_plain_forward_pass(adapted, sampling):
    rollouts = write(adapted, sampling=sampling)
    adapted.eval()
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        logits = adapted(input_ids=torch.tensor([[*prompt, *rollout.ids]])).logits[0, len(prompt) - 1 : -1]
        plain = (logits / (sampling.temperature or 1)).log_softmax(-1).gather(-1, torch.tensor(rollout.ids)[:, None])
        torch.testing.assert_close(torch.tensor(rollout.logprobs), plain[:, 0], rtol=0, atol=1e-4)


@both
def test_completions_depend_on_their_slots_alone(model):
    whole = write(model, sampling=Sampling(), batch=8)
    assert len({tuple(rollout.ids) for rollout in whole}) == len(PROMPTS)  # equal prompts are answered differently
    same = [rollout.ids for rollout in whole]
    for size in (1, 2, 3):
        assert [rollout.ids for rollout in write(model, sampling=Sampling(), batch=size)] == same
    order = (3, 0, 4, 2, 1)
    turned = write(model, [PROMPTS[at] for at in order], sampling=Sampling(), slots=order)
    assert [rollout.ids for rollout in turned] == [same[at] for at in order]
    halves = [
        write(model, [PROMPTS[at] for at in part], sampling=Sampling(), slots=part) for part in ((0, 2), (1, 3, 4))
    ]
    assert [rollout.ids for half in halves for rollout in half] == [same[at] for at in (0, 2, 1, 3, 4)]
    assert [rollout.ids for rollout in write(model, sampling=Sampling(), step=4)] != same
    assert [rollout.ids for rollout in write(model, sampling=Sampling(), seed=12)] != same


@both
def test_a_completion_ends_with_its_stop_token_or_is_cut(model):
    free = write(model, sampling=Sampling(), stops=(), max_new=10)
    assert all(len(rollout.ids) == 10 for rollout in free)
    stops = (free[0].ids[4], free[2].ids[0])
    ended = write(model, sampling=Sampling(), stops=stops, max_new=10)
    for whole, rollout in zip(free, ended, strict=True):
        length = next((at + 1 for at, token in enumerate(whole.ids) if token in stops), 10)
        assert rollout.ids == whole.ids[:length]
        assert rollout.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
    assert len(ended[0].ids) == 5
    assert len(ended[2].ids) == 1


@both
def test_settings_that_come_with_a_model_change_nothing(model):
    plain = write(model, sampling=Sampling())
    model.generation_config.update(
        repetition_penalty=9.0, temperature=0.1, top_k=1, do_sample=True, bad_words_ids=[[plain[0].ids[0]]],
        forced_eos_token_id=5, min_new_tokens=12, eos_token_id=[plain[0].ids[1]], max_new_tokens=3,
    )  # fmt: skip
    assert write(model, sampling=Sampling()) == plain
    assert model.generation_config.repetition_penalty == 9.0


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "granite"])
def test_our_loop_writes_what_transformers_does(tokenizer, arch, monkeypatch):
    model = tiny_model(tokenizer, arch).eval()
    assert not why_not(model, 64)
    groups = [prompt for prompt in PROMPTS for _ in range(4)]
    stops = tuple(range(0, 700, 9))  # completions end one after the other, so that the batch shrinks
    ours = write(model, groups, sampling=Sampling(), stops=stops, max_new=24)
    monkeypatch.setattr("opensloth.rollout.generate.why_not", lambda *asked: "a test")
    theirs = write(model, groups, sampling=Sampling(), stops=stops, max_new=24)
    assert [rollout.ids for rollout in ours] == [rollout.ids for rollout in theirs]
    lengths = {len(rollout.ids) for rollout in ours}
    assert len(lengths) > 5
    assert model.config._attn_implementation == "sdpa"
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("heads", [2, 6])
def test_grouped_attention_is_sdpa(new, heads):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // 2
    query, key, value = (torch.randn(3, count, length, 8) for count, length in ((heads, new), (2, 9), (2, 9)))
    seen = torch.ones(3, 1, new, 9, dtype=torch.bool).tril(9 - new)
    seen[1, ..., :4] = False
    for mask in (seen, None) if new == 1 else (seen,):
        ours, _ = grouped(module, query, key, value, mask, scaling=0.3)
        theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
        torch.testing.assert_close(ours, theirs)


def test_our_loop_says_what_it_leaves_to_transformers(tokenizer, model, monkeypatch):
    sliding = tiny_model(tokenizer, "mistral")
    assert not why_not(sliding, 4096)  # a window that nobody leaves hides nothing
    assert why_not(sliding, 4097) == "4,097 tokens are more than its window of 4,096"
    assert "caps attention logits" in why_not(tiny_model(tokenizer, "gemma2"), 20)
    assert not why_not(model, 4097)
    model.set_attn_implementation("eager")
    assert "eager" in why_not(model, 20)
    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(sys.modules, "unsloth", sys)
    assert "not transformers' own" in why_not(model, 20)


def test_finished_completions_are_counted(model):
    seen = []
    write(model, batch=2, done=seen.append)
    assert seen == [2, 4, 5]


def test_no_prompt_no_completion(model):
    assert write(model, []) == []


def test_sampling_needs_a_slot_for_each_prompt(model):
    with pytest.raises(ValueError, match="one slot for each prompt"):
        write(model, sampling=Sampling(), slots=(0, 1))
    with pytest.raises(ValueError, match="one slot for each prompt"):
        generate(model, PROMPTS, stops=(), pad=0, max_new=2, sampling=Sampling())


@both
def test_a_broken_model_is_noticed(model):
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        write(model, sampling=Sampling())


# ---- the model is left as it was


def state(model):
    base = model.get_base_model()
    return (
        {name: module.training for name, module in model.named_modules()},
        {name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)},
        base.config._attn_implementation,
        base.config.use_cache,
        base.generation_config,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@pytest.fixture
def training(adapted):
    """As the trainer has it: recomputation, packed attention, no cache; one module is in eval mode."""
    adapted.set_attn_implementation(attention.NAME)
    adapted.gradient_checkpointing_enable()
    adapted.config.use_cache = False
    adapted.train()
    adapted.get_base_model().model.norm.eval()
    return adapted


@both
def test_the_model_is_left_as_it_was(training):
    weights = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    before = state(training)
    write(training, sampling=Sampling())
    assert state(training) == before
    for name, tensor in training.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    with pytest.raises(KeyError):
        break_off(training)
    assert state(training) == before


def break_off(model):
    with as_policy(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise KeyError


@both
def test_the_policy_is_the_one_that_trains(training):
    """Neither dropout nor recomputation nor packed attention changes what is written, and the adapter counts."""
    found = write(training, sampling=Sampling())
    training.eval()
    training.gradient_checkpointing_disable()
    training.set_attn_implementation("sdpa")
    assert write(training, sampling=Sampling()) == found
    with training.disable_adapter():
        assert write(training, sampling=Sampling()) != found


@both
def test_a_model_inside_data_parallel_writes_the_same(training, tmp_path):
    alone = write(training, sampling=Sampling())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert write(torch.nn.parallel.DistributedDataParallel(training), sampling=Sampling()) == alone
    finally:
        torch.distributed.destroy_process_group()
