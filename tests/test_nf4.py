"""Weights in 4 bits: our kernel makes of them the numbers that bitsandbytes makes."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from interpreted import needs_triton
from opensloth.engine import matmul


def quantized(shape, nested, dtype=torch.float32, kind="nf4"):
    torch.manual_seed(0)
    return quantize_4bit(torch.randn(shape).to(dtype), compress_statistics=nested, quant_type=kind)


@needs_triton
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 64), (7, 64), (96, 128), (33, 514), (300, 256)]
)  # of some the last block is short
def test_the_numbers_are_those_of_bitsandbytes(shape, nested):
    from opensloth.engine import nf4

    weight, state = quantized(shape, nested)
    assert nf4.serves(state)
    assert torch.equal(nf4.numbers(weight, state), dequantize_4bit(weight, state))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_they_are_those_within_a_rounding(dtype):
    """Triton's interpreter cuts bfloat16 off, where a card rounds."""
    from opensloth.engine import nf4

    weight, state = quantized((48, 128), True, dtype)
    found, expected = nf4.numbers(weight, state), dequantize_4bit(weight, state)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)


@needs_triton
def test_another_code_is_left_to_bitsandbytes():
    from opensloth.engine import nf4

    assert not nf4.serves(quantized((8, 64), True, kind="fp4")[1])


def test_without_a_card_bitsandbytes_makes_them():
    assert "on a card" in matmul.use_kernel(torch.nn.Linear(4, 4))
    assert matmul.from_four_bits is matmul.by_bitsandbytes
