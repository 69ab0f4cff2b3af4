"""Which tokens end a completion."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opensloth.errors import UserError

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import PromptContract


def stop_ids(tokenizer: Any, contract: "PromptContract", asked: Sequence[str] = ()) -> list[int]:
    """The ids of the contract's stop tokens, and of `asked` (`--stop`), each once.

    Raises UserError for a text of `asked` that is not one token: generation looks at one token at a time.
    """
    vocabulary = tokenizer.get_vocab()
    found: list[int] = [vocabulary[text] for text in contract.stop if text in vocabulary]
    for text in asked:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = " ".join(repr(tokenizer.decode([token])) for token in ids) or "nothing"
            raise UserError(
                f"--stop {text!r} is {len(ids)} tokens of this tokenizer ({pieces}), and one is needed.",
                f"The contract's own, {', '.join(contract.stop)}, end a completion in any case.",
            )
        found += ids
    return list(dict.fromkeys(found))
