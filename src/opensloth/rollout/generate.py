"""Completions of prompts by exactly the policy that trains: the model as it is, its adapter unmerged.

By our own loop (decode.py), or by transformers' `generate` for models that the loop does not serve. That one brings no
choice of its own: `sampling.choose` chooses the token of each step, and it is left with nothing else to pick.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from opensloth.engine import attention
from opensloth.engine.compiled import eager
from opensloth.engine.lora import base_of
from opensloth.engine.memory import free_bytes, head_size
from opensloth.rollout.decode import Halt, attention_by, decode, go_on, left_padded, never, why_not
from opensloth.rollout.room import fitting
from opensloth.rollout.sampling import Noise, Sampling, choose

ON_CPU = 64  # completions at once
# not cuDNN's: it plans anew for each length of a batch's prompts, 40 ms on the host
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHARE = 0.5  # of a card's free memory


Write = Callable[..., tuple[list[list[int]], list[list[float]]]]
"""`write(policy, prompts, stops, pad, max_new, sampling, uniforms, halt)`: tokens and log-probabilities, as decode."""


@dataclass(frozen=True)
class Rollout:
    """A completion: its ids with the stop token (unless it was cut), and the log-probability of each."""

    ids: list[int]
    logprobs: list[float]


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    pad: int,
    max_new: int,
    sampling: Sampling,
    noise: Noise | None = None,
    batch: int | None = None,
    write: Write | None = None,
    done: Callable[[int], None] | None = None,
    halt: Halt = never,
) -> list[Rollout]:
    """Completions, in the order of the prompts.

    Args:
        model: a causal model, with or without an adapter, or the DistributedDataParallel around it.
        prompts: ids; a prompt that stands there K times is completed K times.
        stops: ids that end a completion.
        pad: any id; padding is masked.
        max_new: tokens of a completion at most; a longer one is cut.
        noise: one slot for each prompt; None only for greedy.
        batch: completions made at once. What is written does not depend on it, but for rounding.
        write: what completes a batch; else our own loop, or transformers' where that does not serve.
        done: called with the number of finished completions.
        halt: says when they are no longer wanted.
    Raises:
        Halted: `halt` said so; the model is as it was.
        ValueError: sampling without noise, or with another number of slots than prompts; an empty prompt.
        FloatingPointError: the model's logits are not finite.
    """
    if not sampling.greedy and (noise is None or len(noise.slots) != len(prompts)):
        raise ValueError("sampling needs noise with one slot for each prompt")
    if not all(prompts) or max_new < 1:
        raise ValueError("a prompt needs at least one token, and so does a completion")
    uniforms = None if sampling.greedy or noise is None else torch.from_numpy(noise.uniforms(max_new))
    # similar lengths together, and the completions of one prompt beside each other
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), tuple(prompts[index])))
    found: dict[int, Rollout] = {}
    with as_policy(model) as policy:
        device = next(policy.parameters()).device
        longest = max(map(len, prompts)) + max_new if prompts else 1
        size = batch or at_once(policy, device, longest)
        complete = write or writer_for(policy, longest)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            numbers = None if uniforms is None else uniforms[rows].to(device)
            written = complete(policy, [prompts[row] for row in rows], stops, pad, max_new, sampling, numbers, halt)
            for row, tokens, logprobs in zip(rows, *written, strict=True):
                found[row] = rollout(tokens, logprobs, stops)
            if done is not None:
                done(len(found))
    return [found[index] for index in range(len(prompts))]


def writer_for(policy: torch.nn.Module, longest: int) -> Write:
    """Our own loop, or transformers' where that does not serve the model. `longest` as in decode.why_not."""
    return by_transformers if why_not(policy, longest) else decode


def at_once(policy: Any, device: torch.device, length: int) -> int:
    """Completions that are made at once. On a card as many as SHARE of its free memory holds, by room.fitting.

    A decoding step takes nearly the same time for ten rows and for a thousand there.

    Args:
        length: tokens of the longest prompt and completion.
    """
    if device.type != "cuda":
        return ON_CPU
    row = bytes_of_row(policy.config, 2 * length, policy.dtype.itemsize)  # twice the positions, while a batch shrinks
    return fitting(row, (free_bytes(device) or 0) * SHARE)


def bytes_of_row(config: Any, positions: float, itemsize: int) -> int:
    """What decoding one completion takes: keys and values of so many positions, `itemsize` bytes each, and a choice."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * head_size(config) * itemsize
    choosing = text.vocab_size * 40  # logits in 16, 32 and 64 bits, their probabilities and sums
    return int(cache * positions + choosing)


def by_transformers(
    policy: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    pad: int,
    max_new: int,
    sampling: Sampling,
    uniforms: torch.Tensor | None,
    halt: Halt = never,
) -> tuple[list[list[int]], list[list[float]]]:
    """What `decode` does, for any model. After a stop token there may be more, without a meaning."""
    ids, mask = left_padded(prompts, pad, next(policy.parameters()).device)
    chooser = Chooser(sampling, uniforms, halt)
    settings = GenerationConfig(
        max_new_tokens=max_new, do_sample=False, use_cache=True, eos_token_id=list(stops) or None, pad_token_id=pad
    )
    out = policy.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([chooser]),
    )
    return out[:, ids.shape[1] :].tolist(), torch.stack(chooser.logprobs, 1).tolist()


class Chooser(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token of each step and leaves only that one to `generate`."""

    def __init__(self, sampling: Sampling, uniforms: torch.Tensor | None, halt: Halt) -> None:
        self.sampling = sampling
        self.halt = halt
        self.uniforms = uniforms
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        go_on(self.halt)
        numbers = None if self.uniforms is None else self.uniforms[:, len(self.logprobs)]
        chosen, logprobs = choose(scores, self.sampling, numbers)
        self.logprobs.append(logprobs)
        return scores.fill_(-torch.inf).scatter_(1, chosen[:, None], 0.0)


def rollout(tokens: Sequence[int], logprobs: Sequence[float], stops: Sequence[int]) -> Rollout:
    """What stands up to the first stop token, with it."""
    end = next((at + 1 for at, token in enumerate(tokens) if token in stops), len(tokens))
    if any(value != value for value in logprobs[:end]):
        raise FloatingPointError("the model's logits are not finite: its weights or its number type are broken")
    return Rollout(list(tokens[:end]), list(logprobs[:end]))


@contextmanager
def as_policy(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model ready to write, and on leaving as it was, whatever happened.

    No dropout, no gradients, no recomputation (it drops the cache), nothing compiled (each length would be compiled
    anew), attention over padded batches, and none of the habits that come with a hub model: temperature, penalties and
    forced tokens of its generation_config would make another policy of it.
    """
    policy: Any = model.module if isinstance(model, DistributedDataParallel) else model
    base: Any = base_of(policy)
    modules = list(policy.modules())
    training = [(module, module.training) for module in modules]
    recomputing = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    habits = [(module, module.generation_config) for module in modules if "generation_config" in vars(module)]
    packs, cached = base.config._attn_implementation == attention.NAME, base.config.use_cache
    try:
        for module in modules:  # as eval() does, which takes ten milliseconds
            vars(module)["training"] = False
        for module in recomputing:
            module.gradient_checkpointing = False
        for module, _ in habits:
            module.generation_config = GenerationConfig()
        base.config.use_cache = True
        with torch.no_grad(), eager(), sdpa_kernel(BACKENDS), attention_by(policy, "sdpa") if packs else nullcontext():
            yield policy
    finally:
        base.config.use_cache = cached
        for module, config in habits:
            module.generation_config = config
        for module in recomputing:
            module.gradient_checkpointing = True
        for module, was in training:
            vars(module)["training"] = was
