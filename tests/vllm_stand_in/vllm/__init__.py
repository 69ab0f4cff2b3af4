"""What TRL's support of vLLM 0.30 asks of vLLM, computed by transformers: vLLM itself wants a card.

Names, defaults and the meaning of each argument are vLLM's; what it does not know is refused, as there.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """Writes what it was started with into a folder that the environment names."""

    def __init__(
        self, model, *, tensor_parallel_size, gpu_memory_utilization, max_model_len, max_num_seqs, enable_sleep_mode,
        model_impl, distributed_executor_backend, seed, max_num_batched_tokens, logprobs_mode, quantization,
        trust_remote_code,
    ):  # fmt: skip
        assert distributed_executor_backend == "external_launcher"
        assert logprobs_mode == "processed_logprobs"
        assert quantization is None
        started = {"model": model, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "seed": seed}
        Path(os.environ["VLLM_STAND_IN"], f"{seed}.json").write_text(json.dumps(started))
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.generator = torch.Generator().manual_seed(seed)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    @torch.no_grad()
    def load_weights(self, weights):
        mine = dict(self.model.named_parameters())
        for name, weight in weights:
            mine[name].copy_(weight)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm=True):
        return [self.complete(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    @torch.no_grad()
    def complete(self, prompt, asked):
        ids, found = list(prompt), []
        assert asked.top_p == 1
        assert asked.top_k == 0
        for _ in range(asked.max_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            logprobs = (logits / (asked.temperature or 1.0)).log_softmax(-1)
            draw = torch.multinomial(logprobs.exp(), 1, generator=self.generator)
            token = int(draw if asked.temperature else logits.argmax())
            found.append({token: Logprob(float(logprobs[token]), int((logprobs > logprobs[token]).sum()) + 1)})
            ids.append(token)
            if token in asked.stop_token_ids:
                break
        return RequestOutput(list(prompt), [CompletionOutput(ids[len(prompt) :], found)])
