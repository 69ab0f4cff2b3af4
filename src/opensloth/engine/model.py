"""What every engine gives the trainer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opensloth.engine import flash
from opensloth.engine.compiled import compile_layers
from opensloth.engine.fill import Sizes
from opensloth.engine.graphed import MOST_RECORDINGS, Graphed, shapes_of
from opensloth.engine.head import Head
from opensloth.engine.loss import pack_inputs
from opensloth.engine.memory import ALL_LOGITS, Means

UNRECORDED = 2  # packs of a size that come before it is recorded, which takes as long as some ten packs

Loss = Callable[[torch.nn.Module, Mapping[str, Any]], torch.Tensor]


@dataclass
class Engine:
    """A model ready to train.

    Attributes:
        model: a PeftModel, or the bare model under --full-finetuning.
        loss: the summed cross entropy of a micro-batch as `training.loader.Batcher` makes it.
        packs: whether rows may lie one behind the other; else micro-batches are padded, and `notes` says why.
        dtype: of the computation. float16 goes with a loss scaler.
        autocast: whether the trainer must cast the computation (the weights are kept in another type).
        notes: what the user should know of the choices made, one line each.
        head: of the model, where logits can be made of it chunk by chunk.
        means: what it does in order to need less memory.
    """

    name: str
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    loss: Loss
    packs: bool
    dtype: torch.dtype
    autocast: bool
    notes: list[str]
    head: Head | None = None
    means: Means = ALL_LOGITS

    def compile(self, *, dynamic: bool) -> None:
        """As compiled.compile_layers."""
        compile_layers(self.model, dynamic=dynamic)

    @property
    def recordable(self) -> bool:
        """Whether the host does the same for every pack of a shape: it never asks where rows end, how many tokens are
        trained, or for a random number."""
        device = next(self.model.parameters()).device
        config: Any = self.model.config
        return self.head is not None and not draws(self.model) and flash.serves(config, device, self.dtype)

    def record(self, example: Mapping[str, Any], say: Callable[[str], object]) -> None:
        """Record the passes of packs of the shape of an example (engine/graphed.py)."""
        assert self.head is not None, "what is recorded ends before the head"
        one = shapes_of(pack_inputs(example))
        self.head.graphed = Graphed(self.model, one.__eq__, say)

    def record_sizes(self, sizes: Sizes, say: Callable[[str], object]) -> None:
        """Record the passes of packs of completions that are filled up."""
        assert self.head is not None, "what is recorded ends before the head"
        self.head.graphed = Graphed(self.model, sizes.has, say, MOST_RECORDINGS * len(sizes.all), UNRECORDED)

    @property
    def packs_natively(self) -> bool:
        """Whether rows lie one behind the other under our own attention: what speaks to that alone asks for it."""
        return self.packs and self.name == "native"

    @property
    def pad_id(self) -> int:
        """Any id will do: padding is masked by position, and its labels are ignored."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0


def draws(model: torch.nn.Module) -> bool:
    """Whether a model may draw random numbers while it trains: by its modules, and by the names in its config."""
    config: Any = getattr(model, "config", None)
    told = {} if config is None else config.to_dict()
    dropouts = (module.p for module in model.modules() if isinstance(module, torch.nn.modules.dropout._DropoutNd))
    named = (value for name, value in told.items() if "drop" in name or "jitter" in name)
    return any(dropouts) or any(value for value in named if isinstance(value, int | float))
