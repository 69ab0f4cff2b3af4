"""The kernels that make loss, scores and slopes of logits, run by triton's interpreter, beside torch's functions."""

import pytest
import torch

from interpreted import needs_triton
from opensloth.engine import head, loss, policy
from opensloth.engine.head import Head

pytestmark = needs_triton
TOKENS = 5
CASES = [(vocabulary, cap) for vocabulary in (7, 2048, 3 * 2048 + 3) for cap in (None, 30.0)]
EXPONENT = 5e-6  # fp32 has no finer steps at 40 / 0.6, and an exponential turns them into shares of its value
# A step between two numbers of a type: the interpreter cuts bfloat16 off where a card rounds, and numbers that differ
# in their last bits of fp32 may be rounded to both sides.
STEP = {torch.float32: EXPONENT, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.fixture
def kernels():
    from opensloth.engine import softmax

    return softmax


def case(vocabulary, dtype=torch.float32):
    chooser = torch.Generator().manual_seed(vocabulary)
    raw = 6 * torch.randn(TOKENS, vocabulary, generator=chooser)
    raw[1, vocabulary // 2] = 40.0  # all but certain
    return raw.to(dtype), torch.randint(0, vocabulary, (TOKENS,), generator=chooser)


def exact(raw, targets, temperature, cap):
    """Log-probabilities and entropy in fp64: torch's entropy in fp32 is the difference of two large numbers."""
    logits = raw.double() if cap is None else cap * torch.tanh(raw.double() / cap)
    logps = (logits / temperature).log_softmax(-1)
    entropy = -(logps.exp() * logps.clamp(min=-1e9)).sum(-1)  # of a masked token 0
    return logps.gather(1, targets[:, None])[:, 0].float(), entropy.float()


def assert_slopes(found, expected):
    assert found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), rtol=STEP[found.dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize(("vocabulary", "cap"), CASES)
def test_the_loss_and_its_slopes_are_those_of_torch(vocabulary, cap, dtype, kernels):
    raw, targets = case(vocabulary, dtype)
    expected, slopes = loss.loss_and_slopes(raw.clone(), targets, cap, True)
    kept = raw.clone()
    alone, nothing = kernels.loss_and_slopes(raw, targets, cap, False)
    assert nothing is None
    assert torch.equal(raw, kept)
    found, overwritten = kernels.loss_and_slopes(raw, targets, cap, True)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == alone.item() == pytest.approx(expected.item(), rel=1e-6)
    assert overwritten is raw
    assert_slopes(raw, slopes)


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("vocabulary", "cap"), CASES)
def test_scores_are_exact_and_their_slopes_those_of_torch(vocabulary, cap, temperature, dtype, kernels):
    raw, targets = case(vocabulary, dtype)
    logps, entropy = exact(raw, targets, temperature, cap)
    kept = raw.clone()
    found, found_entropy = kernels.scores_of(raw, targets, temperature, cap)
    assert torch.equal(raw, kept)
    assert found.dtype == found_entropy.dtype == torch.float32
    assert torch.allclose(found, logps, rtol=1e-6, atol=EXPONENT)
    assert torch.allclose(found_entropy, entropy, rtol=1e-6, atol=1e-6 if cap is None else EXPONENT)
    upstream = torch.linspace(-1, 1, TOKENS)
    slopes = policy.slopes_of(raw.clone(), targets, upstream, temperature, cap)
    assert kernels.slopes_of(raw, targets, upstream, temperature, cap) is raw
    assert_slopes(raw, slopes)


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_tokens_have_no_share(masked, kernels):
    """Single ones, the first block of a row and some of the next, and all but one token."""
    raw, targets = case(3 * 2048 + 3)
    raw[0, ::3], raw[1, :3000], raw[2] = masked, masked, masked
    targets[:3] = torch.tensor([1, 6000, 5000])
    raw[2, 5000] = -3.0
    found, entropy = kernels.scores_of(raw, targets, 0.6, None)
    logps, expected_entropy = exact(raw, targets, 0.6, None)
    assert torch.allclose(found, logps, rtol=1e-6, atol=EXPONENT)
    assert torch.allclose(entropy, expected_entropy, rtol=1e-6, atol=1e-6)
    assert entropy[2] == found[2] == 0
    upstream = torch.linspace(-1, 1, TOKENS)
    slopes = policy.slopes_of(raw.clone(), targets, upstream, 0.6, None)
    assert_slopes(kernels.slopes_of(raw.clone(), targets, upstream, 0.6, None), slopes)
    expected, slopes = loss.loss_and_slopes(raw.clone(), targets, None, True)
    found, _ = kernels.loss_and_slopes(raw, targets, None, True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_slopes(raw, slopes)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("place", [0, 2048, 5000])
def test_logits_that_are_no_numbers_show(place, cap, kernels):
    raw, targets = case(5001)
    raw[3, place] = torch.nan
    logps, entropy = kernels.scores_of(raw, targets, 1.0, cap)
    assert logps.isnan().tolist() == entropy.isnan().tolist() == [False, False, False, True, False]
    assert kernels.loss_and_slopes(raw, targets, cap, True)[0].isnan()


@pytest.mark.parametrize("number", [-torch.inf, torch.inf])
def test_a_row_without_a_distribution_shows(number, kernels):
    raw, targets = case(50)
    raw[3] = number
    assert kernels.scores_of(raw, targets, 1.0, None)[0].isnan().tolist() == [False, False, False, True, False]
    assert kernels.loss_and_slopes(raw, targets, None, False)[0].isnan()


@pytest.mark.parametrize("target", [-100, 50])
def test_a_target_that_is_not_in_the_vocabulary_shows(target, kernels):
    raw, targets = case(50)
    targets[2] = target
    assert kernels.scores_of(raw, targets, 1.0, None)[0].isnan().tolist() == [False, False, True, False, False]
    assert kernels.loss_and_slopes(raw, targets, None, False)[0].isnan()


def test_rows_may_lie_apart_and_what_lies_between_is_left_alone(kernels):
    raw, targets = case(50)
    wide = torch.full((TOKENS, 64), 7.0)
    wide[:, :50] = raw
    expected, slopes = loss.loss_and_slopes(raw.clone(), targets, None, True)
    found, _ = kernels.loss_and_slopes(wide[:, :50], targets, None, True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_slopes(wide[:, :50].contiguous(), slopes)
    assert (wide[:, 50:] == 7).all()


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_go_through_the_kernels(bias, cap, monkeypatch):
    """Loss, scores and the gradients of hidden states, weight and bias are the same with them and without."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 50 * 5)
    torch.manual_seed(0)
    linear, hidden = torch.nn.Linear(16, 50, bias=bias), torch.randn(23, 16, requires_grad=True)
    targets, last = torch.randint(0, 50, (23,)), Head(linear, cap)
    results = []
    for by_kernel in (False, True):
        for module in (loss, policy):
            monkeypatch.setattr(module, "by_kernel", lambda hidden, answer=by_kernel: answer)
        summed = loss.cross_entropy(last, hidden, targets)
        logps, entropy = policy.score_hidden(last, hidden, targets, 0.7)
        wanted = [hidden, *linear.parameters()]
        slopes = [torch.autograd.grad(one, wanted) for one in (summed * 0.3, logps.sum())]
        results.append([summed, logps, entropy, *slopes[0], *slopes[1]])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=5e-6)
