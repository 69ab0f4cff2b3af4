"""Loss and log-probabilities made chunk by chunk are those of all logits at once, and so are gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opensloth.engine import attention, head
from opensloth.engine.head import Head
from opensloth.engine.loss import cross_entropy, pack_loss, padded_loss
from opensloth.engine.policy import packed, padded, score, score_hidden
from test_attention import ARCHITECTURES, batcher, build, gradients, largest_difference, rows
from test_policy import batch as completions
from tiny import tiny_model, tiny_tokenizer

SAME = 1e-6
TOKENS, HIDDEN, VOCABULARY = 23, 16, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five tokens of the vocabulary below at once, so that every pack has several chunks and a rest."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCABULARY * 5)


def case(bias=False, dtype=torch.float32):
    torch.manual_seed(4)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    nn.init.normal_(linear.weight)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    return linear, hidden, torch.randint(0, VOCABULARY, (TOKENS,))


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_chunks_cover_all_tokens_once():
    for count in (0, 1, 5, 23):
        assert [at for part in head.chunks(count, VOCABULARY) for at in range(count)[part]] == list(range(count))
    assert [part.stop - part.start for part in head.chunks(12, VOCABULARY)] == [5, 5, 2]
    assert [part.stop - part.start for part in head.chunks(2, 10**9)] == [1, 1]


def test_a_chunk_of_a_real_vocabulary_has_whole_tiles_and_stays_within_its_bytes(monkeypatch):
    monkeypatch.undo()
    first = next(iter(head.chunks(10**6, 151_936)))
    assert first.stop == 768
    assert 4 * 151_936 * first.stop <= head.CHUNK_BYTES


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_of_chunks_is_that_of_all_logits(bias, cap, trained):
    linear, hidden, targets = case(bias)
    linear.requires_grad_(trained)
    wanted = [hidden, *(linear.parameters() if trained else ())]
    expected = F.cross_entropy(capped(linear(hidden), cap), targets, reduction="sum")
    found = cross_entropy(Head(linear, cap), hidden, targets)
    assert found.item() == pytest.approx(expected.item(), rel=SAME)
    for one, other in zip(
        torch.autograd.grad(found * 0.3, wanted), torch.autograd.grad(expected * 0.3, wanted), strict=True
    ):
        assert torch.allclose(one, other, atol=SAME, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_the_scores_of_chunks_are_those_of_all_logits(bias, cap, trained):
    linear, hidden, targets = case(bias)
    linear.requires_grad_(trained)
    wanted, upstream = [hidden, *(linear.parameters() if trained else ())], torch.linspace(-1, 1, TOKENS)
    expected, expected_entropy = score(capped(linear(hidden), cap), targets, 0.7)
    found, entropy = score_hidden(Head(linear, cap), hidden, targets, 0.7)
    assert torch.allclose(found, expected, atol=SAME)
    assert torch.allclose(entropy, expected_entropy, atol=5 * SAME)
    assert not entropy.requires_grad
    for one, other in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        assert torch.allclose(one, other, atol=SAME, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_never_has_the_size_of_the_vocabulary(dtype):
    linear, hidden, targets = case(dtype=dtype)
    linear.requires_grad_(False)
    for forward in (cross_entropy, lambda *a: score_hidden(*a, 1.0)[0].sum()):
        made = []

        def note(tensor, made=made):
            made.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            forward(Head(linear), hidden, targets).backward()
        assert made
        assert max(made) <= max(TOKENS * HIDDEN, VOCABULARY * HIDDEN)


def test_sixteen_bits_change_the_loss_by_their_rounding_alone():
    linear, hidden, targets = case(dtype=torch.bfloat16)
    wide = hidden.detach().float().requires_grad_()
    expected = F.cross_entropy(wide @ linear.weight.float().T, targets, reduction="sum")
    found = cross_entropy(Head(linear), hidden, targets)
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    assert float((hidden.grad - wide.grad).abs().max()) < 2e-2 * float(wide.grad.abs().max())


def test_a_loss_scaler_of_fp16_does_not_make_the_gradient_infinite():
    linear, hidden, targets = case(dtype=torch.float16)
    (cross_entropy(Head(linear), hidden, targets) / len(targets) * 2.0**18).backward()  # more than fp16 can hold
    assert hidden.grad.isfinite().all()


def test_under_autocast_the_head_computes_in_its_type():
    linear, hidden, targets = case()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(linear(hidden).float(), targets, reduction="sum")
        found = cross_entropy(Head(linear), hidden, targets)
    for loss in (found, expected):
        loss.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pack_has_the_same_loss_and_adapter_gradients_with_and_without_all_logits(arch):
    model, made = build(arch), rows()
    found, why = head.find(model.get_base_model())
    assert found is not None, why
    model.set_attn_implementation(attention.NAME)
    check_losses(model, found, pack_loss, batcher(made, packing=True)(list(range(len(made)))))


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_padded_batch_has_the_same_loss_and_adapter_gradients_with_and_without_all_logits(arch):
    model, made = build(arch), rows()
    found, why = head.find(model.get_base_model())
    assert found is not None, why
    assert (found.cap is not None) == (arch == "gemma2")
    check_losses(model, found, padded_loss, batcher(made, packing=False)(list(range(len(made)))))


def check_losses(model, found, loss, batch):
    results = []
    targets = int((batch["labels"][:, 1:] != -100).sum())
    for last in (None, found):
        model.zero_grad()
        one = loss(model, batch, last) / targets
        one.backward()
        results.append((one.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=SAME)
    assert largest_difference(results[0][1], results[1][1]) <= SAME


@pytest.mark.parametrize("scores", [packed, padded])
def test_completions_have_the_same_scores_and_gradients_with_and_without_all_logits(scores):
    model = tiny_model(tiny_tokenizer())
    found, _ = head.find(model)
    model.set_attn_implementation(attention.NAME if scores is packed else "sdpa")
    ids, mask, length = completions()
    results = []
    for last in (None, found):
        model.zero_grad()
        one = scores(model, ids, mask, length, 0.7, last)
        one.logps.mean().backward()
        results.append((one, gradients(model)))
    assert torch.allclose(results[0][0].logps, results[1][0].logps, atol=5 * SAME)
    assert torch.allclose(results[0][0].entropy, results[1][0].entropy, atol=5 * SAME)
    assert largest_difference(results[0][1], results[1][1]) <= SAME


def test_the_reference_is_scored_with_its_own_head():
    model, reference = tiny_model(tiny_tokenizer()), tiny_model(tiny_tokenizer(), seed=1)
    found, _ = head.find(model)
    ids, mask, length = completions()
    with torch.no_grad():
        expected = padded(reference, ids, mask, length, 0.7).logps
        assert torch.allclose(padded(reference, ids, mask, length, 0.7, found).logps, expected, atol=5 * SAME)


@pytest.mark.parametrize("packing", [True, False])
def test_a_micro_batch_without_trained_tokens_gives_every_weight_a_gradient_of_zero(packing):
    model, made = build("llama"), rows((4, 3))
    found, _ = head.find(model.get_base_model())
    if packing:
        model.set_attn_implementation(attention.NAME)
    batch = batcher(made, packing)([0, 1])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if packing:
        batch["predictors"] = batch["predictors"][:0]
    loss = (pack_loss if packing else padded_loss)(model, batch, found)
    loss.backward()
    assert loss.item() == 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def test_the_head_is_as_it_was_after_a_forward_and_after_an_error():
    model = tiny_model(tiny_tokenizer())
    found, _ = head.find(model)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    assert found.hidden(model, input_ids=ids).shape == (1, 6, 32)
    with pytest.raises(ValueError, match="input_ids"):
        found.hidden(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" not in vars(model.lm_head)


def test_heads_that_do_more_are_known_and_left_to_the_model():
    model = tiny_model(tiny_tokenizer(), "granite")
    model.config.logits_scaling = 8.0
    assert head.find(model) == (None, "it changes the logits that its head gives")
    odd = tiny_model(tiny_tokenizer())
    odd.lm_head = nn.Sequential(odd.lm_head)
    assert head.find(odd) == (None, "its head is not a plain linear layer")
    other = tiny_model(tiny_tokenizer())
    other.config.final_logit_softcapping = 30.0  # its code knows no cap
    assert head.find(other) == (None, "it changes the logits that its head gives")


def test_an_unknown_cap_is_found_out_even_where_logits_are_small(monkeypatch):
    model = tiny_model(tiny_tokenizer())
    plain = type(model).forward

    def with_cap(self, *args, **words):
        out = plain(self, *args, **words)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    monkeypatch.setattr(type(model), "forward", with_cap)
    assert head.find(model)[0] is None
