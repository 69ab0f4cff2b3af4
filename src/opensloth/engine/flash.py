"""Which flash attention computes packs on a card: torch's own, which is FlashAttention 2, or a newer one.

The rule: the first of NEWER that is made for the card, is installed, and computes the same as torch's own in a trial
with the model's heads and windows, forward and backward. torch can put either in its own's place
(torch.nn.attention.activate_flash_attention_impl), but calls that a prototype; for FlashAttention 4, whose package
changes faster than torch, we call the package ourselves (engine/flash4.py). Hence the trial. The package flash-attn
brings the kernels that torch has.
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
WINDOW = 32  # of a trial, where a model has one: it must cut something
OWN = "torch's own flash attention"


class Newer(NamedTuple):
    """A newer implementation.

    Attributes:
        module: what must be importable for it.
        majors: of the compute capabilities that it is made for.
        enter: puts it in the place of torch's own, for the whole process; raises whatever it may where it cannot.
        leave: puts torch's own back.
    """

    name: str
    module: str
    majors: tuple[int, ...]
    enter: Callable[[], object]
    leave: Callable[[], object]


def by_package() -> None:
    from opensloth.engine import flash4

    flash4.package()
    attention.flash = flash4.attend


def by_torch() -> None:
    attention.flash = attention.flash_varlen


NEWER = (
    Newer(
        "FA3",
        "flash_attn_interface",
        (9,),
        lambda: torch_attention.activate_flash_attention_impl("FA3"),
        lambda: torch_attention.restore_flash_attention_impl(),
    ),
    Newer("FA4", "flash_attn.cute", (9, 10), by_package, by_torch),
)

Trial = Callable[[], list[torch.Tensor]]
"""What one attention computes; another must compute the same."""


def use_fastest(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Choose by the rule, for the whole process. Returns the choice and its reason, in words."""

    def trial() -> list[torch.Tensor]:
        window = getattr(config.get_text_config(), "sliding_window", None)
        windows = {None, window and min(window, WINDOW)}
        return [x for window in windows for x in computed(config, device, dtype, window)]

    if not serves(config, device, dtype):
        return "row by row: no flash attention is made for this card, number type and size of a head"
    return activate(candidates(torch.cuda.get_device_capability(device)[0]), trial)


def serves(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is any for the heads of a model."""
    return attention.has_kernel(torch.empty(0, 1, head_size(config), dtype=dtype, device=device))


def candidates(major: int) -> list[Newer]:
    """Those made for cards of this major compute capability whose packages are here, in the order of NEWER."""
    return [one for one in NEWER if major in one.majors and importable(one.module)]


def importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, OSError):  # nor is the package that it would be in, or that was built for another torch
        return False


def activate(newer: list[Newer], trial: Trial) -> str:
    """Put the first of them in the place of torch's own that computes the same. What fails is named."""
    if not newer:
        return f"{OWN}: no newer one is installed for this card"
    by_torch()
    expected = trial()
    failed = []
    for one in newer:
        try:
            one.enter()
            found = trial()
        except Exception as error:  # of a package that is not ours: whatever it raises, torch's own serves
            failed.append(f"{one.name} failed ({first_line(error)})")
        else:
            if all(map(same, found, expected)):
                return f"{one.name}, which computes the same as torch's own in a trial"
            failed.append(f"{one.name} computes something else")
        one.leave()
    return f"{OWN}: {', '.join(failed)}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def computed(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, window: int | None
) -> list[torch.Tensor]:
    """The attention of three rows with the model's heads, its gradients, that of rows whose beginnings lie in the first
    one, and that of all as one row."""
    text = config.get_text_config()
    heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    chooser = torch.Generator(device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(sum(LENGTHS), count, head_size(config), generator=chooser, device=device).to(dtype)
        for count in (heads, keys, keys, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ends = boundaries([0, *LENGTHS, 0, 0], device)  # packs of one size have rows without tokens at their end
    rows = attention.Boundaries(ends, ends, max(LENGTHS), max(LENGTHS))
    first, second, third = LENGTHS
    beginning, longer = list(range(first)), [first + second, first + third]
    middle, end = list(range(first, first + second)), list(range(first + second, sum(LENGTHS)))
    places = torch.tensor([*beginning, *middle, *beginning, *end], device=device)
    shorter = attention.Boundaries(
        boundaries([0, second, third], device), boundaries([0, *longer], device), third, first + third
    )
    with torch.enable_grad():
        out = attention.flash(q, k, v, rows, None, window)
        gradients = torch.autograd.grad(out, inputs, upstream)
        after = attention.flash(q[first:], k[places], v[places], shorter, None, window)
        more = torch.autograd.grad(after, inputs, upstream[first:])
    # torch puts it into scaled-dot-product attention too, which prompts go through
    query, key, value = (x.detach().transpose(0, 1)[None].repeat_interleave(heads // x.shape[1], 1) for x in inputs)
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return [out.detach(), *gradients, after.detach(), *more, whole]


def boundaries(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(lengths, device=device).cumsum(0).int()
