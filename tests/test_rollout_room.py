"""The memory of rollouts: how many rows, and whether it is kept while the policy trains."""

import pytest
from transformers import Qwen3Config

from opensloth.rollout.generate import bytes_of_row
from opensloth.rollout.room import FREED, KEPT, MOST, choose

GIB = 2**30


@pytest.mark.parametrize(
    ("completions", "row", "free", "rows", "stays"),
    [
        (64, GIB // 10, 70 * GIB, 64, True),  # all of a batch in a fifth
        (64, GIB // 2, 70 * GIB, 64, False),  # 28 in a fifth: three turns instead of one
        (64, GIB // 4, 70 * GIB, 64, False),  # 56 in a fifth: two turns instead of one
        (100, GIB, 10 * GIB, 7, False),
        (1, 50 * GIB, 70 * GIB, 1, True),  # more than a fifth, but one there must be
        (5000, GIB // 1000, 70 * GIB, MOST, True),
    ],
)
def test_buffers_stay_unless_that_doubles_the_turns(completions, row, free, rows, stays):
    room = choose(completions, row, free)
    assert (room.rows, room.stays) == (rows, stays)
    assert room.rows * row <= max(free * (KEPT if stays else FREED), row)
    assert room.kept == (rows * row if stays else 0)


def test_a_row_is_its_keys_and_values_and_a_choice():
    config = Qwen3Config(num_hidden_layers=28, num_key_value_heads=8, head_dim=128, vocab_size=151_936)
    cache = 28 * 8 * 128 * 2 * 2  # keys and values, two bytes a number
    assert bytes_of_row(config, 576.5, 2) == int(cache * 576.5) + 151_936 * 40
    assert bytes_of_row(config, 512, 4) == cache * 512 * 2 + 151_936 * 40


def test_what_is_kept_is_said():
    assert str(choose(64, GIB // 10, 70 * GIB)) == (
        "64 completions at once in 6.40 GiB of buffers, which stay while it trains"
    )
    assert str(choose(64, GIB // 2, 70 * GIB)).endswith("32.00 GiB of buffers, freed while it trains")
