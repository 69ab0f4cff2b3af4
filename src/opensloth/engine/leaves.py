"""What trains in a model, for as long as a recording lasts, as leaves of autograd that nothing else has seen.

Autograd sums the gradient of a leaf on the stream on which the leaf was first used, for as long as anything holds that
graph: DDP does, and so may a loss that is kept. Where that was outside, a recording would have to wait for work that
is not in it, which CUDA refuses.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from opensloth.engine.lora import trainable


class Leaves:
    """Parameters that share their memory with those of a model that train.

    Attributes:
        trained: the model's own.
        fresh: ours, in the same order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trained = list(trainable(model).values())
        self.fresh = [nn.Parameter(parameter.detach()) for parameter in self.trained]
        order = {parameter: place for place, parameter in enumerate(self.trained)}
        self.places = [  # a parameter may have several, where layers share it
            (module, name, order[parameter])
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with ours meanwhile."""
        self.put(self.fresh)
        try:
            yield
        finally:
            self.put(self.trained)

    def put(self, parameters: list[nn.Parameter]) -> None:
        for module, name, place in self.places:
            setattr(module, name, parameters[place])
