"""Log-probabilities of completions: packed, padded and one row at a time they are the same, and so are gradients."""

import pytest
import torch

from opensloth.engine import attention
from opensloth.engine.policy import lay_out, packed, padded, score
from tiny import tiny_model, tiny_tokenizer

SAME = 1e-5
PROMPTS, COMPLETIONS = (7, 3, 12, 1), (5, 9, 1, 4)  # tokens of each row
TEMPERATURE = 0.7


def batch():
    """Rows as TRL makes them: prompts padded on the left, completions on the right."""
    chooser = torch.Generator().manual_seed(3)
    left, right = max(PROMPTS), max(COMPLETIONS)
    ids = torch.randint(5, 300, (len(PROMPTS), left + right), generator=chooser)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mask[row, left - prompt : left + completion] = 1
    return ids, mask, right


def by_rows(model, ids, mask, length):
    """Each row alone, without padding or packing: the definition."""
    logps, entropy = (torch.zeros(len(ids), length) for _ in range(2))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        tokens = ids[row][mask[row].bool()]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, prompt - 1 : -1] / TEMPERATURE
        all_logps = logits.log_softmax(-1)
        logps[row, :completion] = all_logps[range(completion), tokens[prompt:]]
        entropy[row, :completion] = -(all_logps.exp() * all_logps).sum(-1).detach()
    return logps, entropy


def gradients(model, logps):
    weights = torch.linspace(-1, 1, logps.numel()).reshape(logps.shape)
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=SAME), name


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_packed_and_padded_rows_score_as_each_row_alone(arch):
    model = tiny_model(tiny_tokenizer(), arch)
    ids, mask, length = batch()
    assert not attention.why_not(model.config)
    expected, entropy = by_rows(model, ids, mask, length)
    expected_gradients = gradients(model, expected)
    for scores, implementation in ((padded, "sdpa"), (packed, attention.NAME)):
        model.set_attn_implementation(implementation)
        found = scores(model, ids, mask, length, TEMPERATURE)
        assert torch.allclose(found.logps, expected, atol=SAME)
        assert torch.allclose(found.entropy, entropy, atol=SAME)
        assert not found.entropy.requires_grad
        assert_same(gradients(model, found.logps), expected_gradients)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_a_prompt_that_rows_share_goes_through_the_model_once(arch, monkeypatch):
    """Groups of three, one and two completions; their scores and gradients are those of rows with a prompt each."""
    model = tiny_model(tiny_tokenizer(), arch)
    model.set_attn_implementation(attention.NAME)
    chooser = torch.Generator().manual_seed(5)
    groups, left, right = ((5, 3), (8, 1), (2, 2)), 8, 6
    ids, mask = (torch.zeros(6, left + right, dtype=torch.long) for _ in range(2))
    row = 0
    for prompt, count in groups:
        asked = torch.randint(5, 300, (prompt,), generator=chooser)
        for _ in range(count):
            length = int(torch.randint(1, right + 1, (1,), generator=chooser))
            ids[row, left - prompt : left] = asked
            ids[row, left : left + length] = torch.randint(5, 300, (length,), generator=chooser)
            mask[row, left - prompt : left + length] = 1
            row += 1
    shared = packed(model, ids, mask, right, TEMPERATURE)
    shared_gradients = gradients(model, shared.logps)
    laid = lay_out(ids, mask.bool(), right)
    assert int(laid.keep.sum()) == 5 + 8 + 2 + int(mask[:, left:].sum())
    monkeypatch.setattr(attention, "shares", lambda device: False)
    assert lay_out(ids, mask.bool(), right).key_places is None
    alone = packed(model, ids, mask, right, TEMPERATURE)
    assert torch.allclose(shared.logps, alone.logps, atol=SAME)
    assert torch.allclose(shared.entropy, alone.entropy, atol=SAME)
    assert_same(shared_gradients, gradients(model, alone.logps))


def test_a_model_that_caps_its_logits_is_scored_on_padded_rows():
    model = tiny_model(tiny_tokenizer(), "gemma2")
    model.set_attn_implementation("eager")
    ids, mask, length = batch()
    expected, entropy = by_rows(model, ids, mask, length)
    expected_gradients = gradients(model, expected)
    found = padded(model, ids, mask, length, TEMPERATURE)
    assert torch.allclose(found.logps, expected, atol=SAME)
    assert torch.allclose(found.entropy, entropy, atol=SAME)
    assert_same(gradients(model, found.logps), expected_gradients)


def test_what_stands_in_the_padding_changes_nothing():
    model = tiny_model(tiny_tokenizer())
    ids, mask, length = batch()
    other = torch.where(mask.bool(), ids, 1)
    for scores, implementation in ((padded, "sdpa"), (packed, attention.NAME)):
        model.set_attn_implementation(implementation)
        first, second = (scores(model, rows, mask, length, 1.0).logps for rows in (ids, other))
        assert torch.allclose(first, second, atol=1e-6)
        assert not first[~mask[:, -length:].bool()].any()


def test_padded_rows_need_no_mask():
    """Unsloth's models pass over it while they train."""
    model = tiny_model(tiny_tokenizer())
    ids, mask, length = batch()
    expected = padded(model, ids, mask, length, 1.0).logps

    def without_mask(attention_mask, **words):
        return model(**words)

    assert torch.allclose(padded(without_mask, ids, mask, length, 1.0).logps, expected, atol=1e-6)


def test_the_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, 2.0, 4.0]])
    logps, entropy = score(logits, torch.tensor([1]), 2.0)
    expected = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
    assert logps.item() == pytest.approx(expected[1].item())
    assert entropy.item() == pytest.approx(-(expected.exp() * expected).sum().item())
