"""Packs of one shape through the model as two CUDA graphs: a forward up to the head, and a backward.

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

from opensloth.engine.leaves import Leaves
from opensloth.engine.tape import Tape

Forward = Callable[..., torch.Tensor]
"""Of named inputs of a pack: hidden states, (1, tokens, hidden size)."""

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function does on fixed buffers; what it returns does that again."""

# Of the length of each gradient. Attention's backward sums in no fixed order, and in 16 bits a last digit that differs
# becomes another rounding in every layer below. Passes that read another pack's rows are as far apart as the gradients
# are long.
TOLERANCE = 0.25
NOISE = 1e-3  # of the longest gradient: shorter ones may be rounding and nothing else
WORTH_IT = 50  # packs, after which a recording has paid: making one takes as long as some ten packs
MOST_RECORDINGS = 3  # in a row that a pack of another shape ended before that


def by_itself(work: Callable[[], None]) -> Callable[[], object]:
    """A recording where there are no graphs: the work, each time."""
    return work


class Sums:
    """The gradients of a step, where the recordings add theirs: one buffer, of which each parameter has a part.

    Args:
        trained: the parameters that take a gradient.
    """

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        self.trained = list(trained)
        self.sizes = [parameter.numel() for parameter in trained]
        self.flat = torch.zeros(sum(self.sizes), dtype=trained[0].dtype, device=trained[0].device)
        self.parts = self.divided(self.flat)
        self.addresses = [parameter.data_ptr() for parameter in trained]

    def divided(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = zip(torch.split(flat, self.sizes), self.trained, strict=True)
        return [part.view_as(parameter) for part, parameter in parts]

    def take_over(self) -> None:
        """Bring the gradients of the step, as far as there are any, into the buffer."""
        if self.trained[0].grad is self.parts[0]:
            return
        self.flat.zero_()
        for parameter, part in zip(self.trained, self.parts, strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad)
            parameter.grad = part

    @property
    def holds(self) -> bool:
        """Whether what trains still lies where it lay: the recordings read it there."""
        return all(
            parameter.data_ptr() == address for parameter, address in zip(self.trained, self.addresses, strict=True)
        )


class Passes:
    """The two recordings, and the buffers that they read and write.

    Args:
        forward: of a model that trains.
        leaves: of that model.
        inputs: of a pack; their tensors become the buffers.
        hidden: the hidden states of any pack of the shape.
    """

    def __init__(
        self, forward: Forward, leaves: Leaves, inputs: Mapping[str, Any], hidden: torch.Tensor, record: Record
    ) -> None:
        self.model, self.leaves, self.sums = forward, leaves, Sums(leaves.trained)
        self.inputs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        self.hidden, self.slopes = torch.zeros_like(hidden), torch.zeros_like(hidden)
        self.made: torch.Tensor | None = None  # by the forward, for the backward that follows it
        self.count = 0  # of packs
        self.forward = record(self.run_forward)
        self.backward = record(self.run_backward)

    def run_forward(self) -> None:
        with torch.enable_grad(), self.leaves.in_place():  # in the forward of a function there are no gradients
            self.made = self.model(**self.inputs)
        self.hidden.copy_(self.made.detach())

    def run_backward(self) -> None:
        made, self.made = self.made, None
        assert made is not None, "a backward pass follows each forward pass"
        with self.leaves.in_place():  # layers may be computed again
            found = torch.autograd.grad(made, self.leaves.fresh, self.slopes)
        torch._foreach_add_(self.sums.parts, found)

    def load(self, inputs: Mapping[str, Any]) -> None:
        for name, buffer in self.inputs.items():
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(inputs[name], non_blocking=True)

    def __call__(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The hidden states of a pack. They are there until the next pack comes."""
        self.load(inputs)
        anchor = torch.zeros((), requires_grad=True)
        hidden: torch.Tensor = Replay.apply(anchor, self)  # type: ignore[no-untyped-call]
        return hidden

    def trial(self, inputs: Mapping[str, Any], slopes: torch.Tensor) -> list[torch.Tensor]:
        """The hidden states of a pack, and the gradients that these slopes of theirs give; those of the step stay."""
        kept, found = self.sums.flat.clone(), torch.empty_like(self.sums.flat)
        self.load(inputs)
        self.forward()
        self.slopes.copy_(slopes)
        self.sums.flat.zero_()
        try:
            self.backward()
            found.copy_(self.sums.flat)
        finally:
            self.sums.flat.copy_(kept)
        return [self.hidden, *self.sums.divided(found)]


class Replay(torch.autograd.Function):
    """The recordings, as autograd sees them: parameters get their gradients beside it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, passes: Passes) -> torch.Tensor:
        passes.count += 1
        ctx.passes, ctx.number = passes, passes.count
        passes.forward()
        return passes.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, None]:
        passes: Passes = ctx.passes
        assert ctx.number == passes.count, "another pack went through the model before this one's backward pass"
        passes.slopes.copy_(upstream[0])
        passes.sums.take_over()
        passes.backward()
        return None, None


def shape_of(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two packs must have in common to go through the same recordings."""
    return tuple((name, x.shape if isinstance(x, torch.Tensor) else x) for name, x in sorted(inputs.items()))


class Graphed:
    """Recordings of the passes of a model, made when the first pack of the shape comes.

    Args:
        model: one that trains.
        example: inputs of any pack of the shape.
        say: is told once where the passes are not recorded, or no more, and why.
    """

    def __init__(self, model: torch.nn.Module, example: Mapping[str, Any], say: Callable[[str], object]):
        self.model, self.shape, self.say = model, shape_of(example), say
        self.passes: Passes | None = None
        self.recordings_left = MOST_RECORDINGS
        self.said = False

    def hidden(self, forward: Forward, inputs: Mapping[str, Any]) -> torch.Tensor:
        """As `forward` of the inputs; where a gradient is wanted and the pack has the shape, by the recordings."""
        if not torch.is_grad_enabled():
            return forward(**inputs)
        if shape_of(inputs) != self.shape:
            self.forget()  # there may be no memory for the activations of both
            if not self.recordings_left:
                self.say_once("the passes of packs are no longer recorded as CUDA graphs: many have another shape")
            return forward(**inputs)
        if self.passes is not None and not self.passes.sums.holds:
            self.forget()
        if self.passes is None and self.recordings_left and is_telling(inputs):
            self.record(forward, inputs)
        return forward(**inputs) if self.passes is None else self.passes(inputs)

    def forget(self) -> None:
        """Give the memory of the recordings back; gradients of the step stay where they are."""
        if self.passes is None:
            return
        if self.passes.count >= WORTH_IT:
            self.recordings_left = MOST_RECORDINGS
        self.passes = None
        give_back()

    def say_once(self, line: str) -> None:
        if not self.said:
            self.said = True
            self.say(line)

    def record(self, forward: Forward, inputs: Mapping[str, Any]) -> None:
        self.recordings_left -= 1
        try:
            self.passes, why = recorded(forward, Leaves(self.model), inputs)
        except RuntimeError as error:  # of whatever cannot be recorded, or of memory that is not enough for it
            why = cause(error)
        if why:
            self.recordings_left = 0
            self.say_once(f"the passes of packs are not recorded as CUDA graphs: {why}")
            give_back()


def recorded(forward: Forward, leaves: Leaves, inputs: Mapping[str, Any]) -> tuple[Passes | None, str]:
    """Recordings that compute of this pack what the model computes; or why there are none.

    Raises:
        RuntimeError: of what the model does there is something that cannot be recorded.
    """
    made = forward(**inputs)
    slopes = uneven(made, inputs["input_ids"])
    wanted = torch.autograd.grad(made, leaves.trained, slopes)
    hidden = made.detach().clone()
    del made
    give_back()
    record = Tape() if hidden.is_cuda else by_itself
    passes = Passes(forward, leaves, with_other_rows(inputs), hidden, record)
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
