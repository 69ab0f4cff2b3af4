"""The model side: weights, adapters, attention, loss and memory. `load` gives a model ready to train."""

import torch

from opensloth.config.jobs import RunJob
from opensloth.data.models.resolve import ModelRef
from opensloth.engine import choose
from opensloth.engine.model import Engine


def load(job: RunJob, ref: ModelRef, *, seed: int, device: torch.device, packing: bool, longest: int) -> Engine:
    """Choose the engine by its written rule (engine/choose.py) and load the model with it.

    Args:
        packing: whether rows are wanted one behind the other; False pads them.
        longest: the longest row, in tokens.
    """
    chosen = choose.engine(job, device)
    if chosen.value == "unsloth":
        from opensloth.engine import unsloth

        engine = unsloth.load(job, ref, seed=seed, device=device, packing=packing, longest=longest)
    else:
        from opensloth.engine import native

        engine = native.load(job, ref, seed=seed, device=device, packing=packing)
    engine.notes.insert(0, f"engine {chosen.value}: {chosen.why}")
    return engine


__all__ = ["Engine", "load"]
