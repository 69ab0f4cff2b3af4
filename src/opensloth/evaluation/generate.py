"""Models as they answer held-out problems: loaded without what only training needs, completions as text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opensloth.data.models.resolve import ModelRef
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.tokens.stop import stop_ids
from opensloth.engine import lora
from opensloth.rollout.generate import Rollout, generate
from opensloth.rollout.sampling import Noise, Sampling


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


def complete(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    contract: PromptContract,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    max_new: int,
    temperature: float = 0.0,
    seed: int = 0,
    done: Callable[[int], None],
) -> list[Completion]:
    """Completions, in the order of the conversations.

    Args:
        conversations: messages up to the turn that the model is to write.
        max_new: tokens of a completion at most; a longer one is cut.
        temperature: 0 is greedy.
        seed: of what is sampled.
        done: called with the number of finished conversations.
    """
    stops = stop_ids(tokenizer, contract)
    written = generate(
        model,
        [contract.prompt_ids(tokenizer, messages) for messages in conversations],
        stops=stops,
        pad=tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else stops[0],
        max_new=max_new,
        sampling=Sampling(temperature),
        noise=Noise(seed, 0, tuple(range(len(conversations)))),
        done=done,
    )
    return [completion(tokenizer, one, stops) for one in written]


def completion(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, stops: Sequence[int]) -> Completion:
    """A rollout as text, without the token that ended it."""
    text = rollout.ids[:-1] if rollout.ids[-1] in stops else rollout.ids
    return Completion(str(tokenizer.decode(text)), len(rollout.ids))
