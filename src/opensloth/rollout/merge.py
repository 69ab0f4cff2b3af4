"""The adapter merged into the base for the time of a rollout, and the base as it was afterwards, bit for bit.

A decoding step of many small layers waits for the launch of kernels, and an unmerged adapter doubles their number.
Where memory allows, merged weights lie beside the base, which is then never touched, and layers that read the same
input are one matmul. Else the base itself is merged and put back from a copy in the machine's memory: PEFT's own way
back, subtracting the adapter again, changes 15 % of bfloat16 weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from opensloth.engine.lora_layer import is_plain

SHARE = 0.25  # of a card's free memory that merged weights may take
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of a module that read the same input


class Merge:
    """Merges for a while. Keeps its copy of a policy's adapted layers; addresses never change."""

    def __init__(self) -> None:
        self.policy: nn.Module | None = None
        self.layers: dict[str, Any] = {}
        self.fused: list[Fused] = []
        self.saved: dict[str, torch.Tensor] = {}

    @contextmanager
    def __call__(self, policy: torch.nn.Module) -> Iterator[None]:
        """Inside, each layer is one matrix. Quantized layers, and models without an adapter, stay as they are."""
        self.save(policy)
        if not self.layers:
            yield
            return
        with merged_beside(self.fused) if self.fused else merged_in_place(policy, self.layers, self.saved):
            yield

    def save(self, policy: torch.nn.Module) -> None:
        """Take the memory that it needs, once."""
        if self.policy is policy:
            return
        self.policy, self.layers, self.fused, self.saved = policy, adapted(policy), [], {}
        layers, fit = self.layers, fits(self.layers)
        if fit and all(map(folds, layers.values())):
            self.fused = [Fused(group) for group in grouped(layers)]
        else:
            self.saved = copies(layers, on_card=fit)


class Fused:
    """Layers that read the same input, as one matrix with their adapters in it."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.bases: list[nn.Linear] = [layer.get_base_layer() for layer in layers]
        self.sizes = [base.out_features for base in self.bases]
        self.weight = torch.cat([base.weight.data for base in self.bases])
        zeros = [base.weight.new_zeros(base.out_features) for base in self.bases]
        biases = [zero if base.bias is None else base.bias.data for base, zero in zip(self.bases, zeros, strict=True)]
        self.bias = torch.cat(biases) if any(base.bias is not None for base in self.bases) else None
        self.members = [Member(*pair) for pair in zip(layers, torch.split(self.weight, self.sizes), strict=True)]
        self.input: torch.Tensor | None = None
        self.parts: Sequence[torch.Tensor] = ()
        self.taken = 0

    def forward_of(self, member: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A forward for one of the layers. The first that is asked computes for all."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self.input is not x:
                self.input, self.taken = x, 0
                self.parts = torch.split(F.linear(x, self.weight, self.bias), self.sizes, -1)
            part = self.parts[member]
            self.taken += 1
            if self.taken == len(self.sizes):
                self.input, self.parts = None, ()
            return part

        if len(self.sizes) == 1 and self.bias is None:
            forward.matrix = self.weight  # type: ignore[attr-defined]  # for who can add to it as it multiplies
        return forward


class Member:
    """One of the layers of a matrix: where its rows are there, and the adapter's factors in the base's type.

    The factors are rounded to it, as in training.
    """

    def __init__(self, layer: Any, rows: torch.Tensor) -> None:
        name = layer.active_adapters[0]
        self.rows, self.base = rows, layer.get_base_layer()
        self.adapter: list[nn.Parameter] = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        self.factors = [torch.empty_like(factor, dtype=rows.dtype) for factor in self.adapter]
        self.scaling: float = layer.scaling[name]


def projected(projection: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """x (rows, 1, in) through a linear layer, and the residual added: where the layer is one matrix, by its matmul.

    That adds in place, since torch would copy the residual first: who calls this needs it no more.
    """
    if residual is None:
        found: torch.Tensor = projection(x)
        return found
    matrix = matrix_of(projection)
    if matrix is None or matrix.dtype != residual.dtype or torch.is_autocast_enabled(x.device.type):
        summed: torch.Tensor = residual + projection(x)
        return summed
    residual[:, 0].addmm_(x[:, 0], matrix.T)
    return residual


def matrix_of(projection: Any) -> torch.Tensor | None:
    """The one matrix that a layer is now, or None."""
    merged = vars(projection).get("forward")
    if merged is not None:
        return getattr(merged, "matrix", None)
    return projection.weight if type(projection) is nn.Linear and projection.bias is None else None


def fold(members: Sequence[Member]) -> None:
    """Fold the adapters in as they are now. A launch for each copy of each layer would take longer than the copies."""
    with torch.no_grad():
        torch._foreach_copy_([one.rows for one in members], [one.base.weight for one in members])
        torch._foreach_copy_([x for one in members for x in one.factors], [x for one in members for x in one.adapter])
        for one in members:
            a, b = one.factors
            one.rows.addmm_(b, a, alpha=one.scaling)


@contextmanager
def merged_beside(fused: Sequence[Fused]) -> Iterator[None]:
    try:
        fold([member for group in fused for member in group.members])
        for group in fused:
            for member, layer in enumerate(group.layers):
                layer.forward = group.forward_of(member)  # of the instance: it goes before the class's method
        yield
    finally:
        for group in fused:
            group.input, group.parts = None, ()
            for layer in group.layers:
                vars(layer).pop("forward", None)


@contextmanager
def merged_in_place(policy: Any, layers: dict[str, Any], saved: dict[str, torch.Tensor]) -> Iterator[None]:
    with put_back(layers, saved):
        policy.merge_adapter()
        yield


@contextmanager
def put_back(layers: dict[str, Any], saved: dict[str, torch.Tensor]) -> Iterator[None]:
    """The layers' bases afterwards as they were, whatever is merged into them inside. `saved` as `copies` made it."""
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.get_base_layer().weight.data.copy_(saved[name])
            layer.merged_adapters.clear()


def copies(layers: dict[str, Any], on_card: bool) -> dict[str, torch.Tensor]:
    """The layers' base weights once more, beside themselves or in the machine's memory."""
    weights = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}
    return {name: weight.to(weight.device if on_card else "cpu", copy=True) for name, weight in weights.items()}


def fits(layers: dict[str, Any]) -> bool:
    """Whether the layers' weights fit once more beside themselves."""
    weights = [layer.get_base_layer().weight for layer in layers.values()]
    if not weights or weights[0].device.type != "cuda":
        return True
    room: float = SHARE * torch.cuda.mem_get_info(weights[0].device)[0]
    return bool(sum(weight.nbytes for weight in weights) <= room)


def folds(layer: Any) -> bool:
    """Whether a layer with its adapter is one matrix and nothing else."""
    names = layer.active_adapters
    return type(layer.get_base_layer()) is nn.Linear and len(names) == 1 and is_plain(layer, names[0])


def grouped(layers: dict[str, Any]) -> list[list[Any]]:
    """The layers, those beside each other that read the same input."""
    groups: dict[tuple[str, Any], list[Any]] = {}
    order = {name: place for names in SIBLINGS for place, name in enumerate(names)}
    for path in sorted(layers, key=lambda path: order.get(path.rpartition(".")[2], 0)):
        parent, _, name = path.rpartition(".")
        kind = next((names for names in SIBLINGS if name in names), name)
        groups.setdefault((parent, kind), []).append(layers[path])
    return list(groups.values())


def adapted(policy: torch.nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; none where one of them cannot be merged exactly."""
    if not isinstance(policy, PeftModel):
        return {}
    layers: dict[str, Any] = {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers.values()]
    if any(weight is None or not weight.dtype.is_floating_point or weight.requires_grad for weight in weights):
        return {}
    return layers
