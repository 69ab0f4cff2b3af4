"""`--rollout vllm`: completions by vLLM, in the process that trains, through TRL's own support (trl.generation).

TRL starts the engine on the process's card, merges the adapter for the moment in which it hands the weights over, and
asks for completions with the log-probabilities of their tokens. Here are the arguments of both, the base as it was
afterwards, bit for bit, and the share of the card that the engine takes. vLLM draws with numbers of its own: another
run, or one that was resumed, trains on other completions than this one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opensloth.engine.lora import base_of
from opensloth.engine.memory import GIB
from opensloth.errors import UserError
from opensloth.rollout.decode import Halt, go_on, never
from opensloth.rollout.merge import adapted, copies, put_back
from opensloth.rollout.room import Room
from opensloth.rollout.sampling import Sampling

OWN = 4 * GIB  # bytes that vLLM takes beside weights, keys and values: activations, its recordings
SHARE = 0.05  # of a card: what vLLM takes is a multiple of it
MOST_OF_A_CARD = 0.6


def room_of(completions: int, row_bytes: int, weights: int, total: int) -> Room:
    """What vLLM takes of a card of `total` bytes and keeps: weights, room for all completions, and OWN.

    At most MOST_OF_A_CARD: completions that do not fit wait in vLLM's own queue.

    Raises UserError where not even the weights fit.
    """
    if weights + OWN >= MOST_OF_A_CARD * total:
        raise UserError(
            f"--rollout vllm: the model's weights once more, {weights / GIB:.1f} GiB, leave too little of the card's "
            f"{total / GIB:.1f} GiB.",
            "Use --rollout auto, which needs no second copy of all weights.",
        )
    shares = math.ceil((weights + completions * row_bytes + OWN) / (SHARE * total))
    return Room(completions, int(min(shares * SHARE, MOST_OF_A_CARD) * total) // completions, stays=True)


def sampling_arguments(sampling: Sampling, stops: Sequence[int], max_new: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for completions as ours: nothing ends one but `stops`, and none has a habit
    that comes with the model."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 is all, as here
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "max_tokens": max_new,
        "stop_token_ids": list(stops),
        "ignore_eos": True,
    }


class VllmWriter:
    """Completes batches of prompts, as `generate.Write` says, once `start` was called by all processes.

    Args:
        source: the directory that the base was loaded from.
        longest: tokens of the longest prompt and its completion.
        completions: of a batch.
    Attributes:
        share: of the card's memory that vLLM may take, weights included.
    """

    share = MOST_OF_A_CARD

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        completions: int,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.trust_remote_code = trust_remote_code
        self.longest = longest
        self.completions = completions
        self.engine: Any = None
        self.layers: dict[str, Any] = {}
        self.bases: dict[str, torch.Tensor] = {}

    def start(self, policy: Any) -> None:
        """Start vLLM on the base's directory. Processes wait for each other here; the trainer has been made."""
        from accelerate import Accelerator
        from trl.generation.vllm_generation import VLLMGeneration

        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM looks at what the card has left
        base: Any = base_of(policy)
        name, base.name_or_path = base.name_or_path, self.source  # TRL has no other word for it, nor for a revision
        self.engine = VLLMGeneration(
            policy,
            Accelerator(),
            self.tokenizer,
            mode="colocate",
            gpu_memory_utilization=self.share,
            max_model_length=self.longest,
            max_num_seqs=self.completions,
            trust_remote_code=self.trust_remote_code,
        )
        base.name_or_path = name
        self.layers = adapted(policy)
        self.bases = copies(self.layers, on_card=False)  # what vLLM leaves of the card is counted for training

    def __call__(
        self,
        policy: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[int],
        pad: int,
        max_new: int,
        sampling: Sampling,
        uniforms: torch.Tensor | None,
        halt: Halt = never,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`uniforms` are not used. Log-probabilities are those after temperature and filters, as vLLM samples."""
        go_on(halt)
        with put_back(self.layers, self.bases):
            self.engine.sync_weights()
        self.engine.generation_kwargs = sampling_arguments(sampling, stops, max_new)
        _, tokens, logprobs, _ = self.engine.generate([list(prompt) for prompt in prompts], None, num_generations=1)
        go_on(halt)
        # TRL gives a list of the likeliest tokens at each place, of which we asked for none but the sampled one
        values = [[float("nan") if one[0] is None else one[0] for one in row] for row in logprobs]
        return [list(row) for row in tokens], values
