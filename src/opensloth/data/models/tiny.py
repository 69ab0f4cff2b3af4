"""`sample:tiny`: a model of random weights that is made on the spot in a second, for checks of the machinery.

It knows nothing and learns little, but it is a real llama with a real tokenizer: runs on it go through the same code.
"""

from pathlib import Path
from typing import Any

from opensloth import paths

DIRECTORY = "tiny-1"  # the number is that of this recipe: raise it when the model changes
WORDS = 600  # of the tokenizer
HIDDEN = 32
SEED = 7
TURN_START, TURN_END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_LOGIT = 6.5  # about one token in ten ends the turn, so that completions differ in length


def tiny() -> Path:
    """The model's directory in the cache, made on the first call. Raises UserError where that cannot be written."""
    target = (paths.cache_dir() / "models" / DIRECTORY).absolute()
    if not target.is_dir():
        with paths.one_at_a_time(target):
            if not target.is_dir():  # another process may have been first
                with paths.new_directory(target) as directory:
                    build(directory)
    return target


def build(directory: Path) -> None:
    """Write model and tokenizer as the hub's models lie on disk."""
    tokenizer = trained_tokenizer()
    tokenizer.save_pretrained(str(directory))
    random_model(tokenizer).save_pretrained(str(directory))


def trained_tokenizer() -> Any:
    """A byte-level BPE of the words of `sample:arithmetic`, with ChatML turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from opensloth.data.sources.arithmetic import arithmetic

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=[PADDING, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [" ".join(map(str, row.values())) for row in arithmetic("train", 300)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PADDING, chat_template=CHATML, model_max_length=4096
    )


def random_model(tokenizer: Any) -> Any:
    """Two layers in fp32 with seeded random weights; the end of a turn is likelier than other tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Llama's head has no bias: a channel that is the same for every token serves as one
        model.model.embed_tokens.weight[:, 0] = 0.5
        seen = model.model.norm(model.model.embed_tokens.weight)[:, 0].mean()
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = END_LOGIT / seen
    return model
