"""Which flash attention computes packs on a card: torch's own, which is FlashAttention 2, or a newer one.

The rule: the first of NEWER that is made for the card, is installed, and computes the same as torch's own in a trial
with the model's heads and windows, forward and backward. torch puts it in its own's place for the whole process
(torch.nn.attention.activate_flash_attention_impl); it calls both prototypes, and their packages change: hence the
trial. The package flash-attn brings the kernels that torch has.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F
from transformers import PretrainedConfig

from opensloth.engine import attention
from opensloth.engine.memory import head_size

TOLERANCE = 0.02  # of the largest value: 16 bits, summed in another order
LENGTHS = (5, 64, 200)  # of the rows of a trial
OWN = "torch's own flash attention"


class Newer(NamedTuple):
    """An implementation that torch knows.

    Attributes:
        module: what must be importable for it.
        majors: of the compute capabilities that it is made for.
    """

    name: str
    module: str
    majors: tuple[int, ...]


NEWER = (Newer("FA3", "flash_attn_interface", (9,)), Newer("FA4", "flash_attn.cute", (9, 10)))

Trial = Callable[[], list[torch.Tensor]]
"""What one attention computes; another must compute the same."""


def use_fastest(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Choose by the rule, for the whole process. Returns the choice and its reason, in words."""

    def trial() -> list[torch.Tensor]:
        windows = {None, getattr(config, "sliding_window", None)}
        return [x for window in windows for x in computed(config, device, dtype, window)]

    if not attention.has_kernel(torch.empty(0, 1, head_size(config), dtype=dtype, device=device)):
        return "row by row: no flash attention is made for this card, number type and size of a head"
    return activate(candidates(torch.cuda.get_device_capability(device)[0]), trial)


def candidates(major: int) -> list[str]:
    """Those made for cards of this major compute capability whose packages are here, in the order of NEWER."""
    known: list[str] = getattr(torch_attention, "list_flash_attention_impls", list)()
    return [one.name for one in NEWER if major in one.majors and one.name in known and importable(one.module)]


def importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def activate(names: list[str], trial: Trial) -> str:
    """Put the first of them in the place of torch's own that computes the same. What fails is named."""
    if not names:
        return f"{OWN}: no newer one is installed for this card"
    expected = trial()
    failed = []
    for name in names:
        try:
            torch_attention.activate_flash_attention_impl(name)
            found = trial()
        except Exception as error:  # of a package that is not ours: whatever it raises, torch's own serves
            failed.append(f"{name} failed ({first_line(error)})")
        else:
            if all(map(same, found, expected)):
                return f"{name}, which computes the same as torch's own in a trial"
            failed.append(f"{name} computes something else")
        torch_attention.restore_flash_attention_impl()
    return f"{OWN}: {', '.join(failed)}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def computed(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, window: int | None
) -> list[torch.Tensor]:
    """The attention of three rows with the model's heads, its gradients, and that of all as one row."""
    text = config.get_text_config()
    heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    chooser = torch.Generator(device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(sum(LENGTHS), count, head_size(config), generator=chooser, device=device).to(dtype)
        for count in (heads, keys, keys, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    rows = attention.Boundaries(ends, ends, max(LENGTHS), max(LENGTHS))
    with torch.enable_grad():
        out = attention.flash_varlen(q, k, v, rows, None, window)
        gradients = torch.autograd.grad(out, inputs, upstream)
    # torch puts it into scaled-dot-product attention too, which prompts go through
    query, key, value = (x.detach().transpose(0, 1)[None].repeat_interleave(heads // x.shape[1], 1) for x in inputs)
    return [out.detach(), *gradients, F.scaled_dot_product_attention(query, key, value, is_causal=True)]
