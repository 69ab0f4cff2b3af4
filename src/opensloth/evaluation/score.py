"""How good completions are: in the contract's format, and with the right answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensloth import log
from opensloth.data.messages.examples import Example
from opensloth.data.prompt.contract import PromptContract


@dataclass(frozen=True)
class Score:
    """Counts over `problems` completions. `right` needs the format too: nobody can find an answer without it."""

    problems: int
    in_format: int
    right: int

    @property
    def format_rate(self) -> float:
        return self.in_format / self.problems

    @property
    def accuracy(self) -> float:
        return self.right / self.problems


def score(contract: PromptContract, completions: Sequence[str], answers: Sequence[str]) -> Score:
    """Judge completions as they follow the generation prompt.

    A completion is in the format when it and the generation prompt before it are exactly one assistant turn. Its answer
    is right when it is the expected text, white space and thousands separators aside.

    Raises:
        ValueError: a contract without tags, which has no format to judge.
    """
    if contract.tags is None:
        raise ValueError(f"the contract {contract.name} has no tags")
    matches = [contract.tags.pattern.fullmatch(contract.tags.working_start + text) for text in completions]
    right = [
        match is not None and plain(match[2]) == plain(answer) for match, answer in zip(matches, answers, strict=True)
    ]
    return Score(len(completions), sum(match is not None for match in matches), sum(right))


def plain(answer: str) -> str:
    return "".join(answer.split()).replace(",", "")


def score_model(model: str, contract: PromptContract, examples: Sequence[Example], *, max_new: int) -> Score:
    """Load a model or adapter, let it answer, and judge. Shows progress."""
    import torch

    from opensloth.data.models.resolve import load_tokenizer, resolve_model
    from opensloth.engine import choose
    from opensloth.evaluation.generate import complete, load_for_inference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or choose.cpu_has_bfloat16() else torch.float32
    ref = resolve_model(model)
    conversations = [contract.messages(example)[:-1] for example in examples]
    name = Path(model).name
    with log.progress(f"answers of {name}", len(examples), "problems") as report:
        loaded = load_for_inference(ref, device, dtype)
        tokenizer = load_tokenizer(ref)
        completions = complete(loaded, tokenizer, contract, conversations, max_new=max_new, done=report)
    return score(contract, completions, [example.answer or "" for example in examples])
