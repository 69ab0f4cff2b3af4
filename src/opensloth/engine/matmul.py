"""Matmuls of frozen bases and small adapters: sums that are added as they are written, weights that are made anew."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from opensloth.hardware import TRITON

TOLERANCE = 0.01  # of the largest weight: one rounding in 16 bits
SMALL = 2e-4  # a young adapter's share beside what the base gives, whose last digit in bf16 is 4e-3
MOST = 0.9  # of a small share that is kept where sums are rounded once
MOST_OUT = 32_768  # numbers that a layer gives; a head gives more, and has no adapter
TRIED_ROWS = 4096

Add = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What is made of a share and two factors: the share, which may be written over, and the product."""


def by_bitsandbytes(weight: Any, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    found: torch.Tensor = dequantize_4bit(weight.data, state)
    return found


from_four_bits: Callable[[Any, Any], torch.Tensor] = by_bitsandbytes
"""What makes numbers of weights in 4 bits: bitsandbytes, or what `use_kernel` has put in its place for the process."""


def use_kernel(model: nn.Module) -> str:
    """Use our own kernel (engine/nf4.py) for a base in 4 bits on a card, if it makes the same numbers of the first
    layer. Returns the choice and its reason, in words."""
    global from_four_bits
    from_four_bits = by_bitsandbytes
    weights = (getattr(module, "weight", None) for module in model.modules())
    first = next((one for one in weights if getattr(one, "quant_state", None) is not None), None)
    if first is None or not (first.is_cuda and TRITON):
        return "bitsandbytes': ours runs on a card with Triton"
    from opensloth.engine import nf4

    if not nf4.serves(first.quant_state):
        return "bitsandbytes': ours is for nf4"
    theirs = by_bitsandbytes(first, first.quant_state).float()
    apart = (nf4.numbers(first, first.quant_state).float() - theirs).abs().max()
    if not bool(apart <= TOLERANCE * theirs.abs().max()):
        return f"bitsandbytes': ours is {float(apart):.3g} off in a trial"
    from_four_bits = nf4.numbers
    return "ours, which makes the same numbers as bitsandbytes in a trial"


def dense(weight: Any, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A layer's frozen weights (out, in) as numbers: of a base in 4 bits made anew whenever they are wanted.

    Args:
        state: bitsandbytes' account of how they are quantized; None where they are numbers already.
    """
    if state is None:
        found: torch.Tensor = weight
        return found
    return from_four_bits(weight, state).to(dtype)


def in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right, rounded once. On a card the matmul writes fp32 itself; elsewhere torch has none that does."""
    if left.is_cuda and left.dtype != torch.float32 and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


times = 1.0
"""What a matmul multiplies an adapter's share by when it adds to it: 1, or the 2 that `choose_adding` has chosen."""


def being_recorded(x: torch.Tensor) -> bool:
    """Whether what is done with x goes into a recording (engine/graphed.py).

    A share is added in fp32 there. Recorded, the kernels that multiply what is there ended 5 of 13 runs on H200s, which
    trained beside others on their card, with an "unspecified launch failure", once in about 200 steps
    (docs/performance.md). Launched one by one they never did.
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def with_share(
    share: tuple[torch.Tensor, torch.Tensor], product: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """Two products and the bias. The first, an adapter's share, may be smaller than the last digit of the second: it is
    written first, and what adds to it is rounded once, as far as the card's matmuls do so at all.

    For the compiler, as in `products`, it is one operator.
    """
    add = with_share_as_one if torch.compiler.is_compiling() else with_share_in_place
    found: torch.Tensor = add(*share, *product, bias)
    return found


def with_share_in_place(
    low: torch.Tensor, up: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if times == 1:
        out = (low @ up).addmm_(rows, matrix)
    elif being_recorded(rows):
        out = low @ up
        torch.add(in_float32(rows, matrix), out, out=out)
    else:
        out = (low @ (up / times)).addmm_(rows, matrix, beta=times)
    return out if bias is None else out.add_(bias)


def products(lefts: Iterable[torch.Tensor], rights: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of left right: each matmul adds to what the ones before made.

    The compiler makes everything functional, and would copy all activations before each sum: for it this is one
    operator that it does not look into. Elsewhere a generator's next matrix is made once the one before was used.
    """
    if torch.compiler.is_compiling():
        found: torch.Tensor = products_as_one(list(lefts), list(rights))
        return found
    return products_in_place(lefts, rights)


def products_in_place(lefts: Iterable[torch.Tensor], rights: Iterable[torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor | None = None
    for left, right in zip(lefts, rights, strict=True):
        out = left @ right if out is None else out.addmm_(left, right)
    assert out is not None, "a sum of nothing"
    return out


with_share_as_one = torch.library.custom_op(
    "opensloth::with_share",
    with_share_in_place,
    mutates_args=(),
    schema="(Tensor low, Tensor up, Tensor rows, Tensor matrix, Tensor? bias) -> Tensor",
)
with_share_as_one.register_fake(lambda low, up, rows, matrix, _: rows.new_empty(rows.shape[0], matrix.shape[1]))
products_as_one = torch.library.custom_op(
    "opensloth::products", products_in_place, mutates_args=(), schema="(Tensor[] lefts, Tensor[] rights) -> Tensor"
)
products_as_one.register_fake(lambda lefts, rights: lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1]))


def choose_adding(model: nn.Module) -> str:
    """Find how an adapter's share is added on a card, by a trial in the shapes of the layers. Returns the choice and
    its reason, in words.

    A kernel that adds to what is there may round the product first, and then add in memory: of a share that is smaller
    than the last digit next to nothing is left. One that multiplies what is there as well reads it, and rounds once; on
    an H200 it takes 1.03 to 1.1 times as long (benchmarks/adds.py). How long it takes here is not asked: other work on
    the card would answer.
    """
    global times
    times = 1.0
    layers = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features <= MOST_OUT]
    shapes = dict.fromkeys((one.out_features, one.in_features, one.weight.device) for one in layers)
    if not shapes:
        return "in place: there is no layer to try it on"
    trials = [Trial(*shape) for shape in shapes]
    found = min(trial.kept(1.0) for trial in trials)
    if found >= MOST:
        return f"in place: {found:.0%} of a small one is kept"
    halved = min(trial.kept(2.0) for trial in trials)
    if halved < MOST:
        return f"in place: of a small one {found:.0%} is kept, and {halved:.0%} where it is halved and doubled again"
    times = 2.0
    return f"as twice its half: of a small one {halved:.0%} is kept, not {found:.0%}"


class Trial:
    """A small share, and two factors of a product of about 1. The random numbers of the run stay as they are."""

    def __init__(self, out: int, width: int, device: torch.device, rows: int = TRIED_ROWS) -> None:
        own = torch.Generator(device).manual_seed(0)

        def numbers(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=own, device=device)

        self.share = (SMALL * numbers(rows, out)).bfloat16()
        self.x, self.weight = numbers(rows, width).bfloat16(), (numbers(out, width) / width**0.5).bfloat16().T

    def kept(self, factor: float, add: Add | None = None) -> float:
        """Of the share, on average: 1 where nothing is lost.

        Args:
            factor: what the share is divided by as it is written.
            add: how the product is added to it; in place, to `factor` times as much, unless told.
        """
        add = add or (lambda share, x, weight: share.addmm_(x, weight, beta=factor))
        begun = (torch.zeros_like(self.share), self.share / factor)
        without, found = (add(one, self.x, self.weight).float() for one in begun)
        return float(((found - without) * self.share).sum() / self.share.float().square().sum())
