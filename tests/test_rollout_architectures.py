"""For each architecture: what is written is what transformers writes, and its probabilities are the trainer's.

Also the ones that the fast decoders leave to transformers, because of what their attention does. fp32, random weights.
"""

from typing import Any

import numpy as np
import pytest
import torch

from opensloth.engine import attention, policy
from opensloth.rollout.decode import decode, why_not
from opensloth.rollout.generate import Write, by_transformers, generate, writer_for
from opensloth.rollout.graph import GraphDecoder
from opensloth.rollout.sampling import Noise, Sampling
from tiny import tiny_model, tiny_tokenizer

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3")
LEFT_TO_TRANSFORMERS = ("gemma2",)
PROMPTS = [[5, 17, 200, 31], [40], [9, 300, 12, 88, 120, 7, 410]]
NEW = 20
LONGEST = 7 + NEW
SAME = 1e-4
CHI_SQUARE = 44.3  # 15 degrees of freedom, 1e-4


def model_of(arch: str) -> Any:
    model = tiny_model(tiny_tokenizer(), arch).eval()
    if attention.why_not(model.config):
        model.set_attn_implementation("eager")  # as engine native does
    return model


def writers(model: Any) -> list[Write]:
    """All that may write for a model in a run."""
    return [by_transformers] if why_not(model, LONGEST) else [by_transformers, decode, GraphDecoder()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate_and_log_probabilities_the_trainers(arch: str) -> None:
    model = model_of(arch)
    assert bool(why_not(model, LONGEST)) == (arch in LEFT_TO_TRANSFORMERS)
    assert writer_for(model, LONGEST) is (by_transformers if arch in LEFT_TO_TRANSFORMERS else decode)
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=3, pad_token_id=0)
        for prompt in PROMPTS
    ]
    asked: dict[str, Any] = {"stops": [3], "pad": 0, "max_new": NEW}
    for write in writers(model):
        greedy = generate(model, PROMPTS, sampling=Sampling(temperature=0), write=write, **asked)
        for prompt, one, ids in zip(PROMPTS, greedy, expected, strict=True):
            assert one.ids == ids[0, len(prompt) :].tolist()
        for sampling in (Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9)):
            found = generate(model, PROMPTS, sampling=sampling, noise=Noise(1, 2, (0, 1, 2)), write=write, **asked)
            trainer = by_trainer(model, [one.ids for one in found], sampling.temperature or 1.0)
            for one, logps in zip(found, trainer, strict=True):
                assert one.logprobs == pytest.approx(logps[: len(one.ids)], abs=SAME)


def by_trainer(model: Any, completions: list[list[int]], temperature: float) -> list[list[float]]:
    """As engine/policy.py scores them, packed where it can."""
    left, right = max(map(len, PROMPTS)), max(map(len, completions))
    ids = torch.zeros(len(PROMPTS), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        ids[row, left - len(prompt) : left + len(completion)] = torch.tensor(prompt + completion)
        mask[row, left - len(prompt) : left + len(completion)] = 1
    before = model.config._attn_implementation
    packs = not attention.why_not(model.config)
    scores = policy.packed if packs else policy.padded
    model.set_attn_implementation(attention.NAME if packs else before)
    with torch.no_grad():
        logps = scores(model, ids, mask, right, temperature).logps
    model.set_attn_implementation(before)
    return logps.tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_drawn_as_often_as_the_model_says(arch: str) -> None:
    """The second token of 4,000 completions of one prompt, by the fastest that serves: a chi-square test."""
    model = model_of(arch)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # random weights find everything alike
    draws, prompt = 4_000, PROMPTS[0]
    sampling = Sampling(temperature=0.8, top_k=4)
    found = generate(
        model, [prompt] * draws, stops=[], pad=0, max_new=2, sampling=sampling, noise=Noise(3, 0, tuple(range(draws))),
        batch=1_000, write=writers(model)[-1],
    )  # fmt: skip
    shares: dict[tuple[int, int], float] = {}
    for first, share in best(model, prompt):
        for second, other in best(model, [*prompt, first]):
            shares[first, second] = share * other
    assert set(shares) >= {tuple(one.ids) for one in found}
    counts = np.array([sum(tuple(one.ids) == pair for one in found) for pair in shares])
    expected = draws * np.array(list(shares.values()))
    assert float(((counts - expected) ** 2 / expected).sum()) < CHI_SQUARE


def best(model: Any, ids: list[int]) -> list[tuple[int, float]]:
    """The four likeliest next tokens with their shares."""
    with torch.no_grad():
        values, tokens = (model(torch.tensor([ids]), use_cache=False).logits[0, -1] / 0.8).topk(4)
    return list(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))
