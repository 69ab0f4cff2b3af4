"""Render one prompt from the installed wheel: proof that its templates came along and that nothing else is needed."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast  # noqa: TID253

import opensloth
from opensloth.data.prompt.choose import contract_for

here = Path(opensloth.__file__).resolve()
assert "site-packages" in here.parts, f"{here} is not the installed wheel"

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_only = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|endoftext|>")
prompt = contract_for(tokenizer, "reasoning").render(
    [{"role": "user", "content": "What is 6 times 7?"}], add_generation_prompt=True
)
print(prompt)
assert prompt.startswith("You are given a problem.\n")
assert prompt.endswith("<SOLUTION></SOLUTION><|endoftext|>What is 6 times 7?<start_working_out>")
