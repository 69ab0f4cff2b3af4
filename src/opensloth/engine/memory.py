"""How much memory a run needs, and how many tokens go through the model at once: by rule, before the first step."""

import math
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from opensloth.config.run import TrainOptions
from opensloth.engine.head import CHUNK_BYTES

SPARE = 0.10  # of the free memory, for what the rule does not count (fragmentation, kernels' work space)
MOST_TOKENS = 32_768  # about: beyond this a pack only adds latency between logs
MARGIN = 1.01  # parts of a step are nearly, not exactly, equal
ENOUGH_TOKENS = 4_096  # a pack of this size keeps a card busy; rather recompute than go below
ENOUGH_RECORDED = 2_048  # where the host does not launch a pack's kernels one by one
ROOM = 1.25  # longest rows: a pack that fits by rule alone may turn out too large, and must be able to shrink
CPU_TOKENS = 1_024  # larger packs are not faster on a CPU: measured with 135M parameters on two cores
GIB = 2**30
TWO_NORMS = ("llama", "mistral", "qwen2", "qwen3")  # in a layer; others may have one behind each part, too


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory and time depend on."""

    embeddings: int  # weights of them, and of a head of its own
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    queries_width: int
    heads_width: int  # query, key and value widths, summed

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        text = config.get_text_config()
        hidden, layers = text.hidden_size, text.num_hidden_layers
        head = head_size(config)
        queries = text.num_attention_heads * head
        keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head
        intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
        embeddings = text.vocab_size * hidden * (1 if text.tie_word_embeddings else 2)
        return cls(embeddings, layers, hidden, intermediate, text.vocab_size, queries, queries + 2 * keys)

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.hidden * (self.heads_width + self.queries_width + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.embeddings

    @property
    def outputs(self) -> int:
        """Numbers that come out of a layer's matmuls for each token."""
        return self.heads_width + 2 * self.intermediate + 2 * self.hidden


def head_size(config: PretrainedConfig) -> int:
    """Numbers of an attention head."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@dataclass(frozen=True)
class Means:
    """What an engine does in order to need less.

    Attributes:
        chunked: it makes logits of a chunk of tokens at a time (engine/head.py).
        in_place: what is made of them is written over them (engine/softmax.py).
        gated: a gated MLP is one function, which keeps half (engine/mlp.py).
    """

    chunked: bool = True
    in_place: bool = False
    gated: bool = False


ALL_LOGITS = Means(chunked=False)


@dataclass(frozen=True)
class Estimate:
    """Bytes a run needs on one device."""

    weights: int
    adapter: int  # with gradients and optimizer state; all weights' under full fine-tuning
    head: int  # logits of a chunk, however large a pack is (engine/head.py)
    per_token: int  # activations of one token of a pack; its logits too where they are made at once

    def total(self, pack_tokens: int) -> int:
        return self.weights + self.adapter + self.head + self.per_token * pack_tokens

    def __str__(self) -> str:
        fixed = (self.weights + self.adapter + self.head) / GIB
        room = self.per_token * 1024 / GIB
        return f"{fixed:.2f} GiB for weights, adapter and head, {room:.2f} GiB per 1,024 tokens of a pack"


def estimate(
    config: PretrainedConfig, options: TrainOptions, compute_bytes: int = 2, means: Means = Means()
) -> Estimate:
    """Bytes by the model's shape.

    Logits count once for a chunk of tokens, with what the loss or a policy's scores make of them there; a pack keeps
    its last hidden states and their gradients instead. Where the model makes all logits itself, they count for every
    token. An adapter adds nothing to the activations that its base keeps (engine/lora_layer.py); where PEFT's own layer
    runs, it keeps them once more, in fp32.

    Args:
        compute_bytes: of one number of the computation (2 for bfloat16).
    """
    shape = Shape.of(config)
    base_bytes = 0.56 if options.load_in_4bit else 1.06 if options.load_in_8bit else compute_bytes
    # per layer: A and B of seven linears, r columns each
    widths = 4 * shape.hidden + shape.heads_width + shape.heads_width // 2 + 3 * shape.intermediate + 3 * shape.hidden
    adapter_parameters = shape.layers * options.lora_r * widths
    state = 4 * 4  # fp32 weight, gradient and two moments
    trained = shape.parameters if options.full_finetuning else adapter_parameters
    weights = 0 if options.full_finetuning else math.ceil(shape.parameters * base_bytes)
    # kept of each layer: what two norms and the layers behind them read; heads before and after they are normalized and
    # turned, and attention's values; the MLP's parts. Held to measured peaks by tests/test_memory.py
    residuals = 4 if config.get_text_config().model_type in TWO_NORMS else 6
    of_attention = 2 * shape.heads_width + shape.queries_width
    of_mlp = (2 if means.gated else 4) * shape.intermediate
    saved = compute_bytes * (residuals * shape.hidden + of_attention + of_mlp)
    if options.lora_dropout or options.load_in_8bit or options.engine == "unsloth":
        saved += 4 * (3 * shape.hidden + shape.intermediate)
    working = 4 * compute_bytes * shape.intermediate  # of the layer that the backward pass is in
    layers = shape.layers * saved
    if options.gradient_checkpointing == "full":
        layers = shape.layers * compute_bytes * shape.hidden + saved
    elif options.gradient_checkpointing == "selective":
        layers = shape.layers // 2 * (saved + compute_bytes * shape.hidden)
    # as computed and its gradient, which may be the same place; else in fp32 too, with its probability and one more
    logit = 2 * compute_bytes + (0 if means.in_place else 3 * 4)
    if not means.chunked:
        return Estimate(weights, trained * state, 0, layers + working + shape.vocabulary * logit)
    head = CHUNK_BYTES // 4 * logit
    if options.full_finetuning:  # the gradient of its weight in fp32, and copies of both in the compute type
        head += shape.vocabulary * shape.hidden * (4 + 2 * compute_bytes)
    return Estimate(weights, trained * state, head, layers + working + 2 * compute_bytes * shape.hidden)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a card as this process may use it; None for a CPU, whose packs are small anyway."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device) - torch.cuda.memory_reserved(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(free, allowed) + reusable)


@dataclass(frozen=True)
class MemoryPlan:
    """Tokens that go through the model at once, and what is recomputed in the backward pass."""

    pack_tokens: int
    checkpointing: str


def plan(
    config: PretrainedConfig,
    options: TrainOptions,
    device: torch.device,
    longest: int,
    dtype: torch.dtype,
    kept: int = 0,
    means: Means = Means(),
    step: int | None = None,
    may_record: bool = False,
) -> MemoryPlan:
    """Decide, once the weights are loaded. Recomputing costs time, so it is chosen only where packs would be small.

    Args:
        longest: the longest row; a pack must hold it whole.
        kept: bytes that something else will take and keep (the buffers of rollouts).
        means: as `estimate` has them.
        step: tokens of this process's share of an optimizer step, where they are known: packs then divide it evenly.
        may_record: whether passes will be recorded if packs of the plan are worth it (engine/graphed.py).
    """
    free = free_bytes(device)
    free = None if free is None else max(free - kept, 0)
    asked = options.gradient_checkpointing
    wanted = max(int(ROOM * longest), ENOUGH_RECORDED if may_record else ENOUGH_TOKENS)
    if not isinstance(options.pack_tokens, str):
        wanted = max(longest, options.pack_tokens)
    chosen, fits = "none" if asked == "auto" else asked, wanted
    for mode in ("none", "selective", "full") if asked == "auto" else (asked,):
        if free is None:
            break
        chosen, fits = mode, tokens_that_fit(config, options, mode, free, dtype, means)
        if fits >= wanted:
            break
    if not isinstance(options.pack_tokens, str):
        return MemoryPlan(wanted, chosen)
    tokens = CPU_TOKENS if free is None else min(max(fits, 1) // 256 * 256, most_tokens(step))
    return MemoryPlan(max(longest, tokens), chosen)


def estimate_of(
    config: PretrainedConfig, options: TrainOptions, checkpointing: str, dtype: torch.dtype, means: Means
) -> Estimate:
    """The estimate with this way of checkpointing, whatever was asked for."""
    chosen = options.model_copy(update={"gradient_checkpointing": checkpointing})
    return estimate(config, chosen, dtype.itemsize, means)


def tokens_that_fit(
    config: PretrainedConfig, options: TrainOptions, checkpointing: str, free: int, dtype: torch.dtype, means: Means
) -> int:
    """Tokens whose activations so many free bytes hold, once the weights are loaded; less than 0 where none do."""
    need = estimate_of(config, options, checkpointing, dtype, means)
    return int((free * (1 - SPARE) - need.adapter - need.head) / need.per_token)


def most_tokens(step: int | None) -> int:
    """Tokens of a pack, where memory is no matter: about MOST_TOKENS, so that a step is a whole number of packs."""
    if step is None:
        return MOST_TOKENS
    packs = max(round(step / MOST_TOKENS), 1)
    return math.ceil(step * MARGIN / packs / 256) * 256
