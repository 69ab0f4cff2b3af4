"""Completions of prompts, in batches, on any device: the plain path through transformers' `generate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opensloth.data.models.resolve import ModelRef
from opensloth.data.prompt.contract import PromptContract
from opensloth.engine import lora

BATCH = {"cpu": 25, "cuda": 256}  # prompts at once; on two cores a larger batch is not faster


@dataclass(frozen=True)
class Completion:
    """What a model wrote, without the token that ended it, and how many tokens it took with that one."""

    text: str
    tokens: int


def load_for_inference(
    ref: ModelRef, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """The model with its adapter, if it has one, unmerged: exactly the policy that was trained."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        ref.base,
        revision=ref.revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
    )
    if ref.adapter is not None:
        lora.check_weights(ref.adapter)
        return PeftModel.from_pretrained(model, ref.adapter).eval()
    return model.eval()


@torch.no_grad()
def complete(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    contract: PromptContract,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    max_new: int,
    temperature: float = 0.0,
    done: Callable[[int], None],
) -> list[Completion]:
    """Completions, in the order of the conversations.

    Args:
        conversations: messages up to the turn that the model is to write.
        max_new: tokens of a completion at most; a longer one is cut.
        temperature: 0 is greedy.
        done: called with the number of finished conversations.
    """
    prompts = [contract.prompt_ids(tokenizer, messages) for messages in conversations]
    stops = [token for token in map(tokenizer.convert_tokens_to_ids, contract.stop) if isinstance(token, int)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # similar lengths together
    found: dict[int, Completion] = {}
    size = BATCH["cuda" if model.device.type == "cuda" else "cpu"]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = max(len(prompts[index]) for index in batch)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new,
            eos_token_id=stops,
            pad_token_id=pad,
            use_cache=True,
            **sampling,
        )
        for index, row in zip(batch, out[:, longest:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), len(row))
            found[index] = Completion(str(tokenizer.decode(row[:end])), min(end + 1, len(row)))
        done(min(start + size, len(order)))
    return [found[index] for index in range(len(prompts))]
