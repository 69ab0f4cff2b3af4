"""The largest pack is tried before the first step, and halved until it fits."""

import pytest
import torch

from opensloth.engine import attention
from opensloth.engine.model import Engine
from opensloth.engine.policy import packed
from opensloth.errors import WorkerFailed
from opensloth.training.grpo.run import largest_pack
from opensloth.training.rehearsal import largest_that_fits
from tiny import tiny_model, tiny_tokenizer


def test_a_pack_that_fits_stays():
    assert largest_that_fits(8192, 512, lambda tokens: True) == 8192


def test_a_pack_is_halved_until_it_fits():
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= 2500

    assert largest_that_fits(8192, 512, fits) == 2048
    assert tried == [8192, 4096, 2048]


def test_a_pack_never_gets_smaller_than_the_longest_row():
    assert largest_that_fits(8192, 3000, lambda tokens: tokens <= 3500) == 3000
    with pytest.raises(WorkerFailed, match="not even one row of 3,000 tokens fits"):
        largest_that_fits(8192, 3000, lambda tokens: False)


def test_the_rehearsal_of_completions_fills_the_pack():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.set_attn_implementation(attention.NAME)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    engine = Engine("native", model, tokenizer, None, True, torch.float32, False, [])
    attempt = largest_pack(engine, packed, prompt=20, max_new=8, device=torch.device("cpu"))
    attempt(100).backward()
    attempt(1).backward()  # a pack holds one completion in any case
    assert seen == [20 + 10 * 8, 20 + 8]
