"""Packs of one shape through the model as two CUDA graphs: a forward up to the head, and a backward.

A layer with an adapter is about 130 kernels, each of which costs the host 10 to 40 microseconds to launch. With packs
of a few thousand tokens, which is what fits small cards, that takes longer than the card takes for the work. Recorded
once, a whole pass is one launch (torch.cuda.CUDAGraph; the pattern is that of torch.cuda.make_graphed_callables).

The recordings read a pack from fixed buffers, and add the gradients of what trains to fixed ones. The loss, whose size
depends on how many tokens of a pack are trained, stays outside. Before they are used they are tried on a real pack: a
model whose passes cannot be recorded, or come out different, trains as before, and a line says so.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[..., torch.Tensor]
"""A forward of named inputs: hidden states, (1, tokens, hidden size)."""

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function does on fixed buffers; what it returns does that again."""

# Of the length of each gradient. Attention's backward sums in no fixed order, and in 16 bits a last digit that differs
# becomes another rounding in every layer below. Passes that read another pack's rows are as far apart as the gradients
# are long.
TOLERANCE = 0.25
MOST_RECORDINGS = 3  # packs of another shape in between cost a recording each


def again(work: Callable[[], None]) -> Callable[[], object]:
    """A recording where there are no graphs: the work itself, each time."""
    return work


class Tape:
    """CUDA graphs that share one pool of memory: they are replayed in the order in which they were recorded."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's watchdog) may ask the card for things meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Passes:
    """The two recordings, and the buffers that they read and write.

    Args:
        run: the forward, of a model that trains.
        trained: the parameters that take a gradient.
        inputs: of a pack; their tensors become the buffers.
        hidden: what `run` makes of a pack of this shape; any values.
    """

    def __init__(
        self,
        run: Run,
        trained: Sequence[torch.nn.Parameter],
        inputs: Mapping[str, Any],
        hidden: torch.Tensor,
        record: Record,
    ) -> None:
        self.run, self.trained = run, list(trained)
        self.inputs = {
            name: x.to(hidden.device, copy=True) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()
        }
        self.hidden, self.slopes = torch.zeros_like(hidden), torch.zeros_like(hidden)
        sizes = [parameter.numel() for parameter in self.trained]
        self.flat = torch.zeros(sum(sizes), dtype=self.trained[0].dtype, device=hidden.device)
        parts = zip(torch.split(self.flat, sizes), self.trained, strict=True)
        self.gradients = [part.view_as(parameter) for part, parameter in parts]
        self.places = [parameter.data_ptr() for parameter in self.trained]
        self.made: torch.Tensor | None = None  # by the forward, for the backward that follows it
        self.turn = 0
        self.forward = record(self.run_forward)
        self.backward = record(self.run_backward)

    def run_forward(self) -> None:
        with torch.enable_grad():  # in the forward of a function there is none
            self.made = self.run(**self.inputs)
        self.hidden.copy_(self.made.detach())

    def run_backward(self) -> None:
        made, self.made = self.made, None
        assert made is not None, "a backward pass follows each forward pass"
        found = torch.autograd.grad(made, self.trained, self.slopes)
        torch._foreach_add_(self.gradients, found)

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

    def once(self, inputs: Mapping[str, Any], slopes: torch.Tensor) -> None:
        """One pack through the recordings, with these gradients of its hidden states: ours are of it alone."""
        self.load(inputs)
        self.forward()
        self.slopes.copy_(slopes)
        self.flat.zero_()
        self.backward()

    def receive(self) -> None:
        """Let the gradients of the step, so far, be in our buffers."""
        if self.trained[0].grad is self.gradients[0]:
            return
        self.flat.zero_()
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    @property
    def holds(self) -> bool:
        """Whether what trains still lies where the recordings read it."""
        return all(parameter.data_ptr() == place for parameter, place in zip(self.trained, self.places, strict=True))


class Replay(torch.autograd.Function):
    """The recordings, as autograd sees them: parameters get their gradients beside it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, passes: Passes) -> torch.Tensor:
        passes.turn += 1
        ctx.passes, ctx.turn = passes, passes.turn
        passes.forward()
        return passes.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, None]:
        passes: Passes = ctx.passes
        assert ctx.turn == passes.turn, "another pack went through the model before this one's backward pass"
        passes.slopes.copy_(upstream[0])
        passes.receive()
        passes.backward()
        return None, None


def shape_of(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two packs must have in common to go through the same recordings."""
    return tuple((name, x.shape if isinstance(x, torch.Tensor) else x) for name, x in sorted(inputs.items()))


class Graphed:
    """Recordings of the passes of a model, made when the first pack of the shape comes.

    Args:
        blank: inputs of a pack of the shape, other than all that will come: what is recorded must not depend on a pack.
        say: is told once where the passes cannot be recorded, and why.
    """

    def __init__(self, trained: Sequence[torch.nn.Parameter], blank: Mapping[str, Any], say: Callable[[str], object]):
        self.trained, self.blank, self.say = list(trained), blank, say
        self.shape = shape_of(blank)
        self.passes: Passes | None = None
        self.left = MOST_RECORDINGS

    def hidden(self, run: Run, inputs: Mapping[str, Any]) -> torch.Tensor:
        """As `run` of the inputs; where a gradient is wanted and the pack has the shape, by the recordings."""
        if not torch.is_grad_enabled():
            return run(**inputs)
        if shape_of(inputs) != self.shape:
            self.forget()  # there may be no memory for the activations of both
            return run(**inputs)
        if self.passes is not None and not self.passes.holds:
            self.forget()
        if self.passes is None and self.left:
            self.left -= 1
            self.passes = self.recorded(run, inputs)
        return run(**inputs) if self.passes is None else self.passes(inputs)

    def forget(self) -> None:
        if self.passes is None:
            return
        for parameter in self.trained:
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        self.passes = None
        give_back()

    def recorded(self, run: Run, inputs: Mapping[str, Any]) -> Passes | None:
        """Recordings that compute of this pack what the model computes; None, for good, where they do not."""
        try:
            hidden = run(**inputs)
            slopes = uneven(hidden)
            wanted = torch.autograd.grad(hidden, self.trained, slopes)
            hidden = hidden.detach().clone()
            give_back()
            passes = Passes(run, self.trained, self.blank, hidden, Tape() if hidden.is_cuda else again)
            passes.once(inputs, slopes)
            off = farthest([passes.hidden, *passes.gradients], [hidden, *wanted])
            why = "" if off <= TOLERANCE else f"they compute something else, {off:.2g} off"
        except RuntimeError as error:  # of whatever cannot be recorded, or of memory that is not enough for it
            why = str(error).strip().splitlines()[0]
            draw_again()
        if not why:
            return passes
        self.left = 0
        self.say(f"the passes of packs are not recorded as CUDA graphs: {why}")
        give_back()
        return None


def uneven(like: torch.Tensor) -> torch.Tensor:
    """Numbers between -1 and 1 of which no two tokens have the same; random ones would change those of the run."""
    return torch.arange(like.numel(), device=like.device, dtype=torch.float32).sin_().view_as(like).to(like.dtype)


def farthest(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest length of a difference, over the length of what is wanted."""
    apart = torch._foreach_norm(torch._foreach_sub([x.float() for x in found], [x.float() for x in wanted]))
    size = torch._foreach_norm([x.float() for x in wanted])
    return float((torch.stack(list(apart)) / torch.stack(list(size)).clamp(min=1e-30)).max())


def draw_again() -> None:
    """A recording that failed leaves the card's random numbers as if it went on, and the next that is drawn fails."""
    if torch.cuda.is_available():
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())


def give_back() -> None:
    """Memory that nothing uses, to the card: what is recorded takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def draws(model: torch.nn.Module) -> bool:
    """Whether a model that trains draws random numbers."""
    return any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
