"""The kernels that draw a token, run by triton's interpreter on CPU tensors, beside torch's draw."""

import pytest
import torch

from interpreted import needs_triton
from opensloth.rollout.sampling import Sampling, choose

pytestmark = needs_triton
GREEDY = Sampling(temperature=0)
EDGES = [0.0, 1e-12, 0.25, 0.5, 0.75, 1 - 2.0**-53]


def rows_of_logits(rows, vocabulary, dtype=torch.float32):
    chooser = torch.Generator().manual_seed(vocabulary)
    return (4 * torch.randn(rows, vocabulary, generator=chooser)).to(dtype)


def by_kernel(logits, sampling, uniforms):
    from opensloth.rollout.draw import choose_whole

    return choose_whole(logits, 1.0 if sampling.greedy else sampling.temperature, uniforms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 512, 1500, 5 * 512 * 8 + 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6), GREEDY], ids=str)
def test_the_draw_is_the_same(vocabulary, dtype, sampling):
    logits = rows_of_logits(12, vocabulary, dtype)
    numbers = None if sampling.greedy else torch.linspace(0, 1 - 2.0**-53, 12, dtype=torch.float64)
    expected, logprobs = choose(logits, sampling, numbers)
    found, values = by_kernel(logits, sampling, numbers)
    assert torch.equal(found, expected)
    assert torch.allclose(values, logprobs, atol=2e-6)


@pytest.mark.parametrize("number", EDGES)
def test_what_cannot_be_drawn_is_not(number):
    """Whole blocks of a vocabulary, its beginning and its end among them, and single tokens."""
    logits = torch.full((3, 2100), -torch.inf)
    logits[0, 700] = 3.0
    logits[1, [520, 2090]] = torch.tensor([1.0, 1.0])
    logits[2, 513:1020:2] = 0.5
    numbers = torch.full((3,), number, dtype=torch.float64)
    found, values = by_kernel(logits, Sampling(), numbers)
    assert torch.equal(found, choose(logits, Sampling(), numbers)[0])
    assert torch.isfinite(logits.gather(1, found[:, None])).all()
    assert torch.isfinite(values).all()


def test_the_first_of_several_is_the_greedy_one():
    logits = torch.zeros(2, 3000)
    logits[0, [900, 901, 2000]] = 5.0
    assert by_kernel(logits, GREEDY, None)[0].tolist() == [900, 0]


def test_logits_that_are_no_numbers_show():
    logits = rows_of_logits(2, 600)
    logits[1, 5] = torch.nan
    _, values = by_kernel(logits, Sampling(), torch.tensor([0.3, 0.3], dtype=torch.float64))
    assert torch.isfinite(values[0])
    assert torch.isnan(values[1])


def test_rows_may_lie_apart():
    wide = rows_of_logits(6, 2000)
    numbers = torch.linspace(0, 0.99, 3, dtype=torch.float64)
    assert torch.equal(
        by_kernel(wide[::2], Sampling(), numbers)[0], by_kernel(wide[::2].clone(), Sampling(), numbers)[0]
    )


def test_numbers_may_lie_apart():
    logits = rows_of_logits(4, 1500)
    numbers = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected, _ = choose(logits, Sampling(), numbers[:, 1])
    assert torch.equal(by_kernel(logits, Sampling(), numbers[:, 1])[0], expected)


def test_frequencies_are_the_probabilities():
    """Chi-square over 20 tokens in two blocks, 19 degrees of freedom: 50.8 is passed once in 10,000 times."""
    tokens = torch.arange(0, 600, 30)
    logits = torch.full((1, 600), -torch.inf)
    logits[0, tokens] = rows_of_logits(1, 20)[0] / 3
    draws = 800
    numbers = torch.rand(draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, _ = by_kernel(logits.expand(draws, -1), Sampling(), numbers)
    expected = logits[0, tokens].softmax(0) * draws
    counts = torch.bincount(found, minlength=600)[tokens]
    assert int(counts.sum()) == draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 50.8
