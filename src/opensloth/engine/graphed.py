"""Packs through the model as two CUDA graphs: a forward up to the head, and a backward.

A layer with an adapter is about 130 kernels, each of which costs the host 10 to 40 microseconds to launch. With packs
of a few thousand tokens, which is what fits small cards, that takes longer than the card takes for the work. Recorded
once, a whole pass is one launch (torch.cuda.CUDAGraph; the pattern is that of torch.cuda.make_graphed_callables).

The recordings read a pack from fixed buffers, and add the gradients of what trains to fixed ones. The loss, whose size
depends on how many tokens of a pack are trained, stays outside. They are recorded with other rows than those of the
pack that they are tried on: where passes cannot be recorded, or come out different, the model itself computes, and a
line says so.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from opensloth.engine.passes import Forward, Passes, Record, Sums
from opensloth.engine.tape import Tape

# Of the length of each gradient. Attention's backward sums in no fixed order, and in 16 bits a last digit that differs
# becomes another rounding in every layer below. Passes that read another pack's rows are as far apart as the gradients
# are long.
TOLERANCE = 0.25
NOISE = 1e-3  # of the longest gradient: shorter ones may be rounding and nothing else
MOST_RECORDINGS = 3  # where packs have one shape: one of another in between costs a recording
MOST_SHAPES, MOST_RECORDINGS_OF_SHAPES = 8, 24  # at once and in all, where they have several
MOST_REMEMBERED = 64  # shapes that came once


def by_itself(work: Callable[[], None]) -> Callable[[], object]:
    """A recording where there are no graphs: the work, each time."""
    return work


Shape = tuple[Any, ...]


def shape_of(inputs: Mapping[str, Any]) -> Shape:
    """What two packs must have in common to go through the same recordings."""
    return tuple((name, x.shape if isinstance(x, torch.Tensor) else x) for name, x in sorted(inputs.items()))


class Graphed:
    """Recordings of the passes of a model.

    Args:
        trained: the parameters that take a gradient.
        say: is told once where the passes are not recorded, or no more, and why.
        example: inputs of any pack, where all packs have one shape: a recording is made when the first one comes, and
            given up where one has another shape, since there may be no memory for the activations of both. Without it
            each shape that comes again gets a recording, beside which others go through the model itself.
    """

    def __init__(
        self,
        trained: Sequence[torch.nn.Parameter],
        say: Callable[[str], object],
        example: Mapping[str, Any] | None = None,
    ) -> None:
        self.trained, self.say = list(trained), say
        self.shape = None if example is None else shape_of(example)
        self.most, self.left = (MOST_SHAPES, MOST_RECORDINGS_OF_SHAPES) if example is None else (1, MOST_RECORDINGS)
        self.passes: dict[Shape, Passes] = {}  # the last one was used last
        self.sums: Sums | None = None
        self.record: Record | None = None
        self.came: dict[Shape, None] = {}  # shapes without a recording, the last one came last

    def hidden(self, forward: Forward, inputs: Mapping[str, Any]) -> torch.Tensor:
        """As `forward` of the inputs; where a gradient is wanted, by a recording, if there is one of the shape."""
        if not torch.is_grad_enabled():
            return forward(**inputs)
        shape = shape_of(inputs)
        if self.sums is not None and not self.sums.holds:
            self.keep(0)  # what trains lies elsewhere now
            self.sums = None
        if shape not in self.passes and self.is_due(shape) and is_telling(inputs):
            self.make(shape, forward, inputs)
        passes = self.passes.pop(shape, None)
        if passes is None:
            if self.shape not in (None, shape):
                self.keep(0)
            return forward(**inputs)
        self.passes[shape] = passes
        return passes(inputs)

    def is_due(self, shape: Shape) -> bool:
        """Whether a recording is to be made of a shape."""
        if not self.left:
            return False
        if self.shape is not None:
            return shape == self.shape
        if shape in self.came:
            return True
        self.came[shape] = None
        while len(self.came) > MOST_REMEMBERED:
            del self.came[next(iter(self.came))]
        return False

    def keep(self, count: int) -> None:
        """Keep so many recordings, those that were used last; gradients of the step stay where they are."""
        if len(self.passes) <= count:
            return
        while len(self.passes) > count:
            del self.passes[next(iter(self.passes))]
        give_back()
        if not self.left and self.shape is not None:
            self.say("the passes of packs are no longer recorded as CUDA graphs: too many packs have another shape")

    def make(self, shape: Shape, forward: Forward, inputs: Mapping[str, Any]) -> None:
        self.keep(self.most - 1)
        self.left -= 1
        self.came.pop(shape, None)
        self.sums = self.sums or Sums(self.trained)
        self.record = self.record or (Tape() if self.trained[0].is_cuda else by_itself)
        try:
            passes, why = recorded(forward, self.sums, inputs, self.record)
        except RuntimeError as error:  # of whatever cannot be recorded, or of memory that is not enough for it
            passes, why = None, cause(error)
        if passes is not None:
            self.passes[shape] = passes
            return
        self.left = 0
        self.keep(0)
        self.say(f"the passes of packs are not recorded as CUDA graphs: {why}")
        give_back()


def recorded(forward: Forward, sums: Sums, inputs: Mapping[str, Any], record: Record) -> tuple[Passes | None, str]:
    """Recordings that compute of this pack what the model computes; or why there are none.

    Raises:
        RuntimeError: of what the model does there is something that cannot be recorded.
    """
    made = forward(**inputs)
    slopes = uneven(made, inputs["input_ids"])
    wanted = torch.autograd.grad(made, sums.trained, slopes)
    hidden = made.detach().clone()
    del made
    give_back()
    passes = Passes(forward, sums, with_other_rows(inputs), hidden, record)
    off = farthest(passes.trial(inputs, slopes), [hidden, *wanted])
    return (passes, "") if off <= TOLERANCE else (None, f"they compute something else, {off:.2g} off")


def is_telling(inputs: Mapping[str, Any]) -> bool:
    """Whether a trial on this pack tells something: one token again and again is attended to alike by all."""
    ids = inputs["input_ids"]
    return bool((ids != ids[0, 0]).any())


def with_other_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of the same shape: the tokens are others, and the boundaries between rows lie one token before."""

    def other(name: str, value: Any) -> Any:
        if name == "input_ids":
            return value.roll(1, 1)
        if name.startswith("cu_seq_lens"):
            return torch.where(value < value[-1], (value - 1).clamp(min=0), value)
        return value

    return {name: other(name, value) for name, value in inputs.items()}


def uneven(like: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Numbers between -1 and 1, other ones for each token, but 0 for what fills a pack up, and for each token of its
    kind: in a model whose padding is embedded as zeros, every norm makes the gradient of it a thousand times larger.

    Random numbers would change those that the run draws.
    """
    numbers = torch.arange(like.numel(), device=like.device, dtype=torch.float32).sin_().view_as(like)
    return (numbers * (ids != ids[0, -1])[..., None]).to(like.dtype)


def farthest(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest length of a difference, over the length of what is wanted. The first of each are hidden states, the
    others gradients, of which one that is short beside the longest counts as long as NOISE makes it."""
    apart = torch.stack([length(one - other) for one, other in zip(found, wanted, strict=True)])
    long = torch.stack([length(one) for one in wanted])
    long[1:] = long[1:].clamp(min=NOISE * float(long[1:].max()))
    return float((apart / long).max())


def length(numbers: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(numbers, dtype=torch.float32)
    return found


def cause(error: BaseException) -> str:
    """The first line of what went wrong first: where a recording breaks off, what follows says only that it did."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def give_back() -> None:
    """Memory that nothing uses, to the card: what is recorded takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
