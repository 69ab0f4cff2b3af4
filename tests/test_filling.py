"""Packs of completions that are filled up score as they are, and have few shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensloth.engine import attention, head
from opensloth.engine.filling import Rows, filled, missing, rounded
from opensloth.engine.graphed import Graphed
from opensloth.engine.policy import packed
from test_policy import SAME, TEMPERATURE, batch
from tiny import tiny_model, tiny_tokenizer


@given(st.integers(1, 10**6))
def test_a_size_is_at_most_a_sixteenth_above(count):
    assert count <= rounded(count) <= count * 17 / 16
    assert rounded(rounded(count)) == rounded(count)


@given(st.integers(1, 500), st.integers(0, 3000), st.integers(0, 9), st.integers(1, 9), st.booleans())
def test_rows_of_padding_have_no_more_queries_than_keys(tokens, beyond, query_bits, key_bits, shares):
    longest = [1 << query_bits, 1 << max(query_bits, key_bits)]
    keys = tokens + (beyond if shares else 0)
    more, more_keys = missing(tokens, keys, longest, shares)
    assert 0 <= more <= more_keys
    assert (more == 0) == (more_keys == 0)
    assert rounded(tokens + more) == tokens + more
    assert shares or more == more_keys
    padding = max(-(-more // longest[0]), -(-more_keys // longest[1]))
    assert padding <= more


@pytest.mark.parametrize("shares", [False, True])
def test_a_pack_goes_on_with_rows_of_its_own(shares):
    ids, ends = torch.arange(3, 40), torch.tensor([0, 20, 37], dtype=torch.int32)
    keys = torch.tensor([0, 20, 57], dtype=torch.int32) if shares else ends
    places = torch.cat([torch.arange(20), torch.arange(37)]) if shares else None
    rows = filled(Rows(ids, ids, ends, keys, 20, 37 if shares else 20, places), shares)
    assert torch.equal(rows.ids[:37], ids)
    assert not rows.ids[37:].any()
    assert len(rows.ids) == len(rows.positions) == int(rows.queries[-1]) == rounded(len(rows.ids))
    assert len(rows.queries) == len(rows.keys)
    assert torch.equal(rows.queries[:3], ends)
    assert torch.equal(rows.keys[:3], keys)
    assert int(rows.queries.diff().max()) <= rows.longest_queries
    assert int(rows.keys.diff().max()) <= rows.longest_keys
    assert bool((rows.queries.diff() <= rows.keys.diff()).all())
    if rows.places is None:
        assert torch.equal(rows.queries, rows.keys)
    else:
        assert len(rows.places) == int(rows.keys[-1])
        assert torch.equal(rows.places[:57], places)
        assert bool((rows.places[57:] >= 37).all())  # no key of a real token


@pytest.mark.parametrize("together", [False, True])
def test_filled_packs_score_as_they_are(together, monkeypatch):
    model = tiny_model(tiny_tokenizer(), "qwen3").train()
    plain, recorded = (head.find(model)[0] for _ in range(2))
    for head_of in (plain, recorded):
        head_of.linear.weight.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    said = []
    recorded.graphed = Graphed(trained, said.append)
    ids, mask, length = batch()
    if together:  # each prompt has two completions
        ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
        ids[1::2, -length:] += 1
    shapes = set()
    for times in range(4):
        some = slice(0, len(ids) - times % 2)
        wanted = packed(model, ids[some], mask[some], length, TEMPERATURE, plain)
        found = packed(model, ids[some], mask[some], length, TEMPERATURE, recorded)
        assert torch.allclose(found.logps, wanted.logps, atol=SAME)
        assert torch.allclose(found.entropy, wanted.entropy, atol=SAME)
        ours = gradients_of(model, found.logps)
        for name, gradient in gradients_of(model, wanted.logps).items():
            assert torch.allclose(ours[name], gradient, atol=SAME), name
        shapes |= set(recorded.graphed.passes)
    assert said == []
    assert len(shapes) == 2


def gradients_of(model, logps):
    found = {}
    weights = torch.linspace(-1, 1, logps.numel()).reshape(logps.shape)
    model.zero_grad()
    (logps * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found
