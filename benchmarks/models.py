"""Models with random weights in named shapes, for measurements of speed, which does not depend on the weights.

usage: python benchmarks/models.py qwen3-0.6b OUT --tokenizer M

M is a model directory whose tokenizer is taken over, or a sample (sample:smollm2 serves all shapes); nothing comes from
a network. The weights are made on the card where there is one: 0.6B take seconds, 8B half a minute, most of it writing.
`tiny-qwen3` is for rehearsals on a CPU.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# hidden size, layers, query heads, key heads, size of a head, width of the MLP, whether the embeddings are tied
SHAPES = {
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, True),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, True),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, False),
    "tiny-qwen3": (32, 2, 4, 2, 8, 64, True),
}
VOCABULARY = 151_936
PARAMETERS = "parameters.json"  # beside the weights: how many there are
LARGEST_FILE = "4GB"
FLOPS = 798e12  # a second, in bf16 matmuls: measured on an H100
PER_PARAMETER = 4  # FLOP per parameter and token: forward, and backward without gradients of the frozen weights


def make(name: str, tokenizer_of: Path, output: Path, seed: int = 0) -> Path:
    """The directory `output` with the model and the tokenizer, in bfloat16; one that is there already is kept."""
    if (output / PARAMETERS).exists():
        return output
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    settings = config(name, tokenizer)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        model.save_pretrained(temporary, max_shard_size=LARGEST_FILE)
        tokenizer.save_pretrained(temporary)
        (temporary / PARAMETERS).write_text(json.dumps({"parameters": model.num_parameters()}) + "\n")
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def tokenizer_directory(spec: str) -> Path:
    """The directory of a tokenizer, given as a directory or a sample."""
    if Path(spec).is_dir():
        return Path(spec)
    from opensloth.data.models.resolve import resolve_model

    return Path(resolve_model(spec).base)


def config(name: str, tokenizer: Any) -> Any:
    from transformers import Qwen3Config

    hidden, layers, heads, keys, head, intermediate, tied = SHAPES[name]
    return Qwen3Config(
        vocab_size=len(tokenizer) if name.startswith("tiny") else max(VOCABULARY, len(tokenizer)),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def parameters(model: Path) -> int:
    """How many weights a model that `make` left has."""
    return int(json.loads((model / PARAMETERS).read_text())["parameters"])


def share_of_limit(model: Path, tokens_per_second: float) -> float:
    """Of the speed at which an H100 would train an adapter if it did nothing but its matmuls."""
    return tokens_per_second * PER_PARAMETER * parameters(model) / FLOPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", required=True, metavar="M")
    arguments = parser.parse_args()
    made = make(arguments.name, tokenizer_directory(arguments.tokenizer), arguments.output)
    print(f"{made}: {parameters(made) / 1e9:.3f} billion weights")


if __name__ == "__main__":
    main()
