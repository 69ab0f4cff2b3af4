"""Layers compiled: what stands between the matmuls of a layer becomes a few kernels instead of fifty.

Each layer is compiled alone, so that one compilation serves them all. torch keeps what it compiled on the disk, and the
next run finds it there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from opensloth.engine.lora import base_of


def compile_layers(model: torch.nn.Module, *, dynamic: bool) -> None:
    """Compile each layer of a model in its place, at its first forward.

    Args:
        dynamic: whether packs have many sizes; else each size is compiled for itself.
    """
    base: Any = base_of(model)
    for layer in base.get_decoder().layers:
        layer.compile(dynamic=True if dynamic else None)


@contextmanager
def eager() -> Iterator[None]:
    """While it lasts nothing is compiled, and nothing compiled is used: for passes of other shapes, which are few."""
    with torch.compiler.set_stance("force_eager"):
        yield
