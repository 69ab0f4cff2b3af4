"""Small tokenizers built as other families are: SentencePiece with and without a leading blank, Qwen's pattern."""

import json
from typing import Any

from tiny import SENTENCES, SPECIAL, tiny_tokenizer

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece_like(kind: str) -> Any:
    """`llama` prepends a blank to every stretch of text, `mistral` to the first, `gemma` to none."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokens = ["<unk>", "<s>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=tokens + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator([sentence.replace("\n", " ") for sentence in SENTENCES], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [added for added in spec["added_tokens"] if added["content"] in tokens]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    blank = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = None
    if kind == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * (kind == "llama") + [blank])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (kind != "gemma"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")


def qwen_like() -> Any:
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.normalizer = normalizers.NFC()
    return tokenizer


def beginning_with_bos(tokenizer: Any) -> Any:
    """`tokenizer`, putting its bos token before every text by itself, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer
