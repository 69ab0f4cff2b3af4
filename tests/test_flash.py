"""Which flash attention is used: torch's registry of them is real, the implementations in it are of the tests."""

import importlib.util
import types

import pytest
import torch
import torch.nn.attention as torch_attention
from torch.nn.attention import _registry

from opensloth.engine import flash


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """torch's registry as it is, and afterwards as it was."""
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))
    yield
    torch_attention.restore_flash_attention_impl(_raise_warn=False)


def register(name, raises=None):
    def enter():
        if raises:
            raise raises
        return types.SimpleNamespace(remove=lambda: None)

    torch_attention.register_flash_attention_impl(name, register_fn=enter)


def trial_by(found):
    """What each implementation computes; `None` is torch's own."""
    return lambda: [torch.tensor(found[torch_attention.current_flash_attention_impl()])]


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
    assert flash.candidates(major) == expected


def test_nothing_newer_is_installed_here():
    assert flash.candidates(9) == []
    assert flash.activate([], trial_by({None: [1.0]})) == (
        "torch's own flash attention: no newer one is installed for this card"
    )


def test_the_first_that_computes_the_same_is_used():
    register("FA3")
    register("FA4")
    words = flash.activate(["FA3", "FA4"], trial_by({None: [1.0, -3.0], "FA3": [1.01, -3.0], "FA4": [1.0, -3.0]}))
    assert words == "FA3, which computes the same as torch's own in a trial"
    assert torch_attention.current_flash_attention_impl() == "FA3"


def test_what_fails_or_differs_is_named_and_left():
    register("FA3", raises=RuntimeError("no backward kernels\nat all"))
    register("FA4")
    words = flash.activate(["FA3", "FA4"], trial_by({None: [1.0, -3.0], "FA4": [1.2, -3.0]}))
    assert words == (
        "torch's own flash attention: FA3 failed (RuntimeError: no backward kernels), FA4 computes something else"
    )
    assert torch_attention.current_flash_attention_impl() is None


def test_numbers_that_are_none_differ():
    register("FA4")
    assert "FA4 computes something else" in flash.activate(["FA4"], trial_by({None: [1.0], "FA4": [float("nan")]}))
