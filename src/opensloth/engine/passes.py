"""A pack through the model as two recordings, a forward and a backward, which gradients come beside autograd from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Forward = Callable[..., torch.Tensor]
"""Of named inputs of a pack: hidden states, (1, tokens, hidden size)."""

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function does on fixed buffers; what it returns does that again."""


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
        self.packs = 0  # that went through recordings

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
        sums: where gradients are added.
        inputs: of a pack; their tensors become the buffers.
        hidden: the hidden states of any pack of the shape.
    """

    def __init__(
        self, forward: Forward, sums: Sums, inputs: Mapping[str, Any], hidden: torch.Tensor, record: Record
    ) -> None:
        self.model, self.sums = forward, sums
        self.inputs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        self.hidden, self.slopes = torch.zeros_like(hidden), torch.zeros_like(hidden)
        self.made: torch.Tensor | None = None  # by the forward, for the backward that follows it
        self.forward = record(self.run_forward)
        self.backward = record(self.run_backward)

    def run_forward(self) -> None:
        with torch.enable_grad():  # in the forward of a function there is none
            self.made = self.model(**self.inputs)
        self.hidden.copy_(self.made.detach())

    def run_backward(self) -> None:
        made, self.made = self.made, None
        assert made is not None, "a backward pass follows each forward pass"
        found = torch.autograd.grad(made, self.sums.trained, self.slopes)
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
        kept = self.sums.flat.clone()
        self.load(inputs)
        self.forward()
        self.slopes.copy_(slopes)
        self.sums.flat.zero_()
        self.backward()
        found = self.sums.flat.clone()
        self.sums.flat.copy_(kept)
        return [self.hidden, *self.sums.divided(found)]


class Replay(torch.autograd.Function):
    """The recordings, as autograd sees them: parameters get their gradients beside it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, passes: Passes) -> torch.Tensor:
        passes.sums.packs += 1
        ctx.passes, ctx.number = passes, passes.sums.packs
        passes.forward()
        return passes.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, None]:
        passes: Passes = ctx.passes
        assert ctx.number == passes.sums.packs, "another pack went through the model before this one's backward pass"
        passes.slopes.copy_(upstream[0])
        passes.sums.take_over()
        passes.backward()
        return None, None
