"""Which flash attention is used, and how FlashAttention 4 is called.

The rule, torch's registry, its operators, autograd and its compiler are real; what computes is of the tests.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.attention as torch_attention
from torch.nn.attention import _registry
from transformers import LlamaConfig

from opensloth.engine import attention, flash, flash4


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """torch's registry and our choice as they are, and afterwards as they were."""
    monkeypatch.setattr(attention, "flash", attention.flash)
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))
    yield
    torch_attention.restore_flash_attention_impl(_raise_warn=False)


def newer(name, raises=None):
    """An implementation that the trial sees at work as `name`."""

    def enter():
        if raises:
            raise raises
        attention.flash = name

    return flash.Newer(name, "", (9,), enter, flash.by_torch)


def trial_by(found):
    """What each implementation computes; `None` is torch's own."""
    return lambda: [torch.tensor(found[None if attention.flash is attention.flash_varlen else attention.flash])]


@pytest.mark.parametrize(
    ("major", "packages", "expected"),
    [
        (9, {"flash_attn_interface", "flash_attn.cute"}, ["FA3", "FA4"]),
        (9, {"flash_attn.cute"}, ["FA4"]),
        (10, {"flash_attn_interface", "flash_attn.cute"}, ["FA4"]),
        (8, {"flash_attn_interface", "flash_attn.cute"}, []),
        (12, {"flash_attn_interface", "flash_attn.cute"}, []),
        (9, {"flash_attn"}, []),
    ],
)
def test_what_is_made_for_the_card_and_installed_is_tried(monkeypatch, major, packages, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    assert [one.name for one in flash.candidates(major)] == expected


def test_a_package_that_was_built_for_another_torch_is_as_if_it_were_not_there(monkeypatch, tmp_path):
    (tmp_path / "broken_flash").mkdir()
    (tmp_path / "broken_flash" / "__init__.py").write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not flash.importable("broken_flash.cute")


def test_nothing_newer_is_installed_here():
    assert flash.candidates(9) == []
    assert flash.activate([], trial_by({None: [1.0]})) == (
        "torch's own flash attention: no newer one is installed for this card"
    )


def test_the_first_that_computes_the_same_is_used():
    trial = trial_by({None: [1.0, -3.0], "FA3": [1.01, -3.0], "FA4": [1.0, -3.0]})
    words = flash.activate([newer("FA3"), newer("FA4")], trial)
    assert words == "FA3, which computes the same as torch's own in a trial"
    assert attention.flash == "FA3"


def test_what_fails_or_differs_is_named_and_left():
    failing = newer("FA3", raises=RuntimeError("no backward kernels\nat all"))
    words = flash.activate([failing, newer("FA4")], trial_by({None: [1.0, -3.0], "FA4": [1.2, -3.0]}))
    assert words == (
        "torch's own flash attention: FA3 failed (RuntimeError: no backward kernels), FA4 computes something else"
    )
    assert attention.flash is attention.flash_varlen


def test_numbers_that_are_none_differ():
    trial = trial_by({None: [1.0], "FA4": [float("nan")]})
    assert "FA4 computes something else" in flash.activate([newer("FA4")], trial)


def test_torch_puts_the_third_in_the_place_of_its_own():
    torch_attention.register_flash_attention_impl("FA3", register_fn=lambda: types.SimpleNamespace(remove=lambda: None))
    third = flash.NEWER[0]
    third.enter()
    assert torch_attention.current_flash_attention_impl() == third.name == "FA3"
    third.leave()
    assert torch_attention.current_flash_attention_impl() is None


def scores(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal=False, window_size_left=None, least=0, **words):
    """What both functions of the package begin with: (heads, tokens, tokens), of all rows of the pack at once."""
    assert words.pop("window_size_right", None) == (None if causal else 0)
    assert causal == (window_size_left is None)
    longest = {"max_seqlen_q": int(cu_seqlens_q.diff().max()), "max_seqlen_k": int(cu_seqlens_k.diff().max())}
    assert words == {name: max(length, least) for name, length in longest.items()}
    found = softmax_scale * torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    sees = torch.zeros(found.shape[1:], dtype=torch.bool)
    ends = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    for start, stop, first, last in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        sees[start:stop, first:last] = attention.band(stop - start, last - first, (window_size_left or 99) + 1, "cpu")
    return found.masked_fill(~sees, float("-inf"))


@pytest.fixture
def fourth(monkeypatch):
    """A package whose two functions compute as the paper says, and return more than is asked for, as the newest do."""

    def forward(q, k, v, return_lse, **words):
        assert return_lse
        found = scores(q, k, **words)
        out = torch.einsum("hij,jhd->ihd", found.softmax(-1), v.repeat_interleave(q.shape[1] // v.shape[1], 1))
        return out.contiguous(), found.logsumexp(-1), None, None

    def backward(q, k, v, out, dout, lse, **words):
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        shares = (scores(q, k, least=flash4.TWO_BLOCKS, **words) - lse[..., None]).exp()
        slopes = torch.einsum("ihd,jhd->hij", dout, values) - (dout * out).sum(-1).T[..., None]
        slopes = words["softmax_scale"] * shares * slopes
        to_q, to_k, to_v = (
            torch.einsum(form, left, right)
            for form, left, right in (
                ("hij,jhd->ihd", slopes, keys),
                ("hij,ihd->jhd", slopes, q),
                ("hij,ihd->jhd", shares, dout),
            )
        )
        return to_q, *(x.unflatten(1, (-1, group)).sum(2) for x in (to_k, to_v))

    package = types.ModuleType(flash4.MODULE)
    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, flash4.MODULE, package)
    for name in (flash4.KEEPS, flash4.KEPT_IN):
        monkeypatch.setenv(name, "0")
    flash4.package.cache_clear()
    yield
    flash4.package.cache_clear()


def rows_of(queries, keys):
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    return attention.Boundaries(*ends, max(queries), max(keys))


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [rows_of([4, 2, 6], [4, 2, 6]), rows_of([4, 2, 6, 0], [7, 2, 6, 0])])
def test_the_fourth_gives_values_and_gradients_of_the_rows(fourth, compiles, window, rows):
    torch._dynamo.reset()
    chooser = torch.Generator().manual_seed(1)
    q, k, v, upstream = (
        torch.randn(int(ends[-1]), heads, 8, generator=chooser).requires_grad_()
        for heads, ends in ((4, rows.queries), (2, rows.keys), (2, rows.keys), (4, rows.queries))
    )
    attend = torch.compile(flash4.attend, backend="aot_eager", fullgraph=True) if compiles else flash4.attend
    out = attend(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, rows, None, window)
    expected = attention.row_by_row(q, k, v, rows, None, window)
    assert torch.allclose(out, expected, atol=1e-6)
    found, wanted = (torch.autograd.grad(x, (q, k, v), upstream.detach()) for x in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_fourth_keeps_what_it_compiles(fourth, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENSLOTH_CACHE", str(tmp_path))
    for name in (flash4.KEEPS, flash4.KEPT_IN):
        monkeypatch.delenv(name)
    by_package = flash.NEWER[1]
    by_package.enter()
    assert attention.flash is flash4.attend
    assert (os.environ[flash4.KEEPS], Path(os.environ[flash4.KEPT_IN]).parent) == ("1", tmp_path)
    by_package.leave()
    assert attention.flash is attention.flash_varlen


@pytest.mark.parametrize("window", [None, 16])
def test_the_trial_covers_shared_beginnings_and_rows_without_tokens(monkeypatch, window):
    seen = []

    def watched(q, k, v, rows, scaling, window):
        seen.append([ends.diff().tolist() for ends in (rows.queries, rows.keys)])
        return attention.row_by_row(q, k, v, rows, scaling, window)

    monkeypatch.setattr(attention, "flash", watched)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    results = flash.computed(config, torch.device("cpu"), torch.float32, window)
    assert seen == [[[5, 64, 200, 0, 0]] * 2, [[64, 200], [69, 205]]]
    own, shared = results[0], results[4]
    # the second row alone has the first one's tokens before it now, and the window of both sees other tokens
    assert shared.shape == own[5:].shape
    assert not torch.allclose(shared[:64], own[5:69])
    assert all(bool(x.isfinite().all()) for x in results)
