"""A tokenizer and a model small enough to be built inside a test: real classes, random weights, no network."""

from functools import cache
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SENTENCES = (
    "You are given a problem. Think about the problem and provide your working out.",
    "Place it between <start_working_out> and <end_working_out>.",
    "Then, provide your solution between <SOLUTION></SOLUTION>",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "Natalia sold 48 clips to her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? How much does each apple cost?",
    "First, 48 / 2 = 24. Then 48 + 24 = 72. So the answer is 72.",
    "A baker makes 12 loaves each hour and works 5 hours; he sells 37 of them. How many are left?",
    "<start_working_out>12 * 5 = 60. 60 - 37 = 23.<end_working_out><SOLUTION>23</SOLUTION>",
    "Why is the sky blue? Because air scatters short waves of light more than long ones.",
)


@cache
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML, **special: Any) -> Any:
    """A fast byte-level BPE tokenizer (a new object on each call; the training is cached).

    `<|im_end|>` ends a turn and is eos, `<|endoftext|>` is pad. Other special tokens by keyword, as `bos_token=`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(tokenizer: Any, arch: str = "llama", seed: int = 0) -> Any:
    """A two-layer causal LM in fp32 with seeded random weights; `arch` is a model type (llama, qwen2, ...)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.set_rng_state(state)
    return model


def save_tiny_model(path: Path, arch: str = "llama", **special: Any) -> Path:
    """Write a tiny model and its tokenizer into the directory `path`, as the hub's models lie on disk."""
    tokenizer = tiny_tokenizer(**special)
    tiny_model(tokenizer, arch).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
