"""Packs of one shape, or of a few, through the model as two CUDA graphs: a forward up to the head, and a backward.

A layer with an adapter is about 130 kernels, each of which costs the host 10 to 40 microseconds to launch. With packs
of a few thousand tokens, which is what fits small cards, that takes longer than the card takes for the work. Recorded
once, a whole pass is one launch (torch.cuda.CUDAGraph; the pattern is that of torch.cuda.make_graphed_callables).

The recordings read a pack from fixed buffers, and add the gradients of what trains to fixed ones. The loss, whose size
depends on how many tokens of a pack are trained, stays outside. They are recorded with other rows than those of the
pack that they are tried on: where passes cannot be recorded, or come out different, the model itself computes, and a
line says so.
"""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from opensloth.engine import trial
from opensloth.engine.leaves import Leaves
from opensloth.engine.tape import Tape

Forward = Callable[..., torch.Tensor]
"""Of named inputs of a pack: hidden states, (1, tokens, hidden size)."""

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function does on fixed buffers; what it returns does that again."""

Shapes = dict[str, Any]
"""Of the tensors among a pack's inputs, by name; the other inputs as they are."""
Key = tuple[tuple[str, Any], ...]
"""The same, sorted."""

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


class Common(NamedTuple):
    """What the passes of packs of all shapes have in common: no two of them are under way at once."""

    leaves: Leaves
    sums: Sums
    record: Record


class Passes:
    """The two recordings, and the buffers that they read and write.

    Args:
        forward: of a model that trains.
        common: to all passes of that model.
        inputs: of a pack; their tensors become the buffers.
        hidden: the hidden states of any pack of the shape.
    """

    def __init__(self, forward: Forward, common: Common, inputs: Mapping[str, Any], hidden: torch.Tensor) -> None:
        self.model, (self.leaves, self.sums, record) = forward, common
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


def shapes_of(inputs: Mapping[str, Any]) -> Shapes:
    """What two packs must have in common to go through the same recordings."""
    return {name: x.shape if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


class Graphed:
    """Recordings of the passes of a model, made when packs of a shape come that may be recorded.

    Args:
        model: one that trains.
        takes: whether packs of these shapes are recorded.
        say: is told once where the passes are not recorded, or no more, and why.
        recordings: that are made in a row though none has paid.
        unrecorded: packs of a shape that come before it is recorded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        takes: Callable[[Shapes], bool],
        say: Callable[[str], object],
        recordings: int = MOST_RECORDINGS,
        unrecorded: int = 0,
    ) -> None:
        self.model, self.takes, self.say = model, takes, say
        self.recordings = self.recordings_left = recordings
        self.unrecorded = unrecorded
        self.came: Counter[Key] = Counter()
        self.passes: dict[Key, Passes] = {}
        self.common: Common | None = None  # to all passes
        self.said = False

    def hidden(self, forward: Forward, inputs: Mapping[str, Any]) -> torch.Tensor:
        """As `forward` of the inputs; where a gradient is wanted and the pack has the shape, by the recordings."""
        if not torch.is_grad_enabled():
            return forward(**inputs)
        shapes = shapes_of(inputs)
        if not self.takes(shapes):
            self.forget()  # there may be no memory for the activations of both
            if not self.recordings_left:
                self.say_once("the passes of packs are no longer recorded as CUDA graphs: many have another shape")
            return forward(**inputs)
        if self.common is not None and not (self.common.sums.holds and all(map(self.takes, map(dict, self.passes)))):
            self.forget()
        key = tuple(sorted(shapes.items()))
        self.came[key] += 1
        if key not in self.passes and self.came[key] > self.unrecorded:
            if not self.recordings_left:
                self.say_once("no more sizes of packs are recorded as CUDA graphs: too many came")
            elif trial.is_telling(inputs):
                self.record(key, forward, inputs)
        return self.passes[key](inputs) if key in self.passes else forward(**inputs)

    @property
    def gave_up(self) -> bool:
        """Whether nothing is recorded, nor will be."""
        return not (self.passes or self.recordings_left)

    def forget(self) -> None:
        """Give the memory of the recordings back; gradients of the step stay where they are."""
        if not self.passes:
            return
        if sum(passes.count for passes in self.passes.values()) >= WORTH_IT:
            self.recordings_left = self.recordings
        self.passes, self.common = {}, None
        give_back()

    def say_once(self, line: str) -> None:
        if not self.said:
            self.said = True
            self.say(line)

    def record(self, key: Key, forward: Forward, inputs: Mapping[str, Any]) -> None:
        if all(passes.inputs["input_ids"].numel() < inputs["input_ids"].numel() for passes in self.passes.values()):
            self.forget()  # what smaller packs gave back to the recordings' memory is in pieces too small for this one
        self.recordings_left -= 1
        try:
            if self.common is None:
                leaves = Leaves(self.model)
                self.common = Common(leaves, Sums(leaves.trained), Tape() if leaves.trained[0].is_cuda else by_itself)
            passes, why = recorded(forward, self.common, inputs)
        except RuntimeError as error:  # of whatever cannot be recorded, or of memory that is not enough for it
            passes, why = None, cause(error)
        if passes is not None:
            self.passes[key] = passes
            return
        self.passes, self.common, self.recordings_left = {}, None, 0
        self.say_once(f"the passes of packs are not recorded as CUDA graphs: {why}")
        give_back()


def recorded(forward: Forward, common: Common, inputs: Mapping[str, Any]) -> tuple[Passes | None, str]:
    """Recordings that compute of this pack what the model computes; or why there are none.

    Raises:
        RuntimeError: of what the model does there is something that cannot be recorded.
    """
    made = forward(**inputs)
    slopes = trial.uneven(made, inputs["input_ids"])
    wanted = torch.autograd.grad(made, common.leaves.trained, slopes)
    hidden = made.detach().clone()
    del made
    give_back()
    passes = Passes(forward, common, trial.with_other_rows(inputs), hidden)
    off = trial.farthest(passes.trial(inputs, slopes), [hidden, *wanted])
    return (passes, "") if off <= trial.TOLERANCE else (None, f"they compute something else, {off:.2g} off")


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
