"""The adapter merged into the base for the time of a rollout, and the base put back bit for bit.

A decoding step of many small layers waits for the launch of kernels, and an unmerged adapter doubles their number.
PEFT's own way back, subtracting the adapter again, changes 15 % of bfloat16 weights: the frozen base would drift.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

SHARE = 0.25  # of a card's free memory that the copy of the base may take; beyond it lies in the machine's memory


class Merge:
    """Merges and restores. Keeps one copy of the adapted layers' weights; addresses never change."""

    def __init__(self) -> None:
        self.saved: dict[str, torch.Tensor] = {}

    @contextmanager
    def __call__(self, policy: torch.nn.Module) -> Iterator[None]:
        """Inside, each layer is one matrix. Quantized layers, and models without an adapter, stay as they are."""
        layers = adapted(policy)
        if not layers:
            yield
            return
        self.save(layers)
        model: Any = policy
        try:
            model.merge_adapter()
            yield
        finally:
            for name, layer in layers.items():
                layer.get_base_layer().weight.data.copy_(self.saved[name])
                layer.merged_adapters.clear()

    def save(self, layers: dict[str, Any]) -> None:
        """Copy the weights once: nothing trains them."""
        if self.saved.keys() == layers.keys():
            return
        weights = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}
        first = next(iter(weights.values()))
        here = first.device
        if here.type == "cuda":
            size = sum(weight.nbytes for weight in weights.values())
            if size > SHARE * torch.cuda.mem_get_info(here)[0]:
                here = torch.device("cpu")
        self.saved = {name: weight.to(here, copy=True) for name, weight in weights.items()}


def adapted(policy: torch.nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; none where one of them cannot be merged exactly."""
    if not isinstance(policy, PeftModel):
        return {}
    layers: dict[str, Any] = {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers.values()]
    if any(weight is None or not weight.dtype.is_floating_point or weight.requires_grad for weight in weights):
        return {}
    return layers
