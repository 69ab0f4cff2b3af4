"""Which prompt contract a model gets, and whether two contracts are the same."""

import re
from dataclasses import replace
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from opensloth.data.messages.examples import BadRow
from opensloth.data.prompt.contract import PromptContract, Tags
from opensloth.data.tokens.encode import encoder_of
from opensloth.errors import UserError, nearest

__all__ = [
    "CONTRACT_FILE",
    "REASONING_SYSTEM",
    "REASONING_TAGS",
    "PromptContract",
    "Tags",
    "check_same",
    "contract_for",
]

CONTRACT_FILE = "prompt.json"
REASONING_TAGS = Tags("<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>")
REASONING_SYSTEM = """You are given a problem.
Think about the problem and provide your working out.
Place it between <start_working_out> and <end_working_out>.
Then, provide your solution between <SOLUTION></SOLUTION>"""
CHOICES = ("auto", "chatml", "reasoning")
OTHERS = "Choose one with --chat-template: chatml, reasoning, or a FILE.jinja."
PLAIN_TEXT = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"

# A conversation to try templates with
QUESTION = "How many legs have 3 cats?"
ANSWER = "They have 12 legs."
SYSTEM = "Answer in one sentence."
ASKED: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
ANSWERED = [*ASKED, {"role": "assistant", "content": ANSWER}]


def contract_for(
    tokenizer: Any,
    choice: str = "auto",
    system: str | None = None,
    adapter: Path | None = None,
    text_only: bool = False,
) -> PromptContract:
    """The contract that `--chat-template` and `--system` mean for a model.

    `auto` takes the prompt.json of `adapter` (a directory), or of the model's own directory; else the tokenizer's chat
    template (the contract's name is then `inferred`, which the caller says). `text_only` allows a model without
    a template, for data that is plain text. Raises UserError where there is none, or where it cannot work with this
    tokenizer.
    """
    if choice == "auto":
        places = [adapter, Path(tokenizer.name_or_path) if tokenizer.name_or_path else None]
        saved = next((place / CONTRACT_FILE for place in places if place and (place / CONTRACT_FILE).is_file()), None)
        if saved is not None:
            contract = PromptContract.load(saved)
            return contract if system is None else checked(with_system(contract, system), tokenizer)
        name, template = own_template(tokenizer, text_only)
    elif choice in ("chatml", "reasoning"):
        name, template = choice, shipped_template(tokenizer, choice)
    elif choice.endswith(".jinja") or Path(choice).is_file():
        name, template = Path(choice).name, template_file(Path(choice))
    else:
        did_you_mean = nearest(choice, CHOICES)
        raise UserError(f"--chat-template {choice} is no template and no file. {did_you_mean}".strip(), OTHERS)

    contract = PromptContract(
        name=name,
        chat_template=template,
        system=None,
        tags=REASONING_TAGS if choice == "reasoning" else None,
        stop=(),
        eos_token=tokenizer.eos_token or "",
        special_tokens={
            name: text
            for name, text in tokenizer.special_tokens_map.items()
            if isinstance(text, str) and name in template
        },
    )
    if system is None and choice == "reasoning":
        system = REASONING_SYSTEM
    return checked(contract if system is None else with_system(contract, system), tokenizer)


def own_template(tokenizer: Any, text_only: bool) -> tuple[str, str]:
    """The name and source of the tokenizer's own template (of several, the one called `default`)."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        return "inferred", template
    if text_only:
        return "text", PLAIN_TEXT
    raise UserError(f"{model_name(tokenizer)} has no chat template.", OTHERS)


def shipped_template(tokenizer: Any, name: str) -> str:
    """The source of `chatml` or `reasoning`. Raises UserError where the tokenizer lacks a token that it writes."""
    known = tokenizer.get_added_vocab()
    needed = ["<|im_start|>", "<|im_end|>"] if name == "chatml" else [tokenizer.eos_token or "eos (end of text)"]
    missing = [token for token in needed if token not in known and token != tokenizer.eos_token]
    if missing:
        raise UserError(
            f"--chat-template {name} needs the token {missing[0]}, which {model_name(tokenizer)} lacks.",
            "Choose a FILE.jinja made for this model.",
        )
    source = files("opensloth.data.prompt").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    # Models whose tokenizer puts a beginning token before every text were trained with it
    return "{{- bos_token -}}" + source if encoder_of(tokenizer).bos else source


def template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read --chat-template {path}: {error.strerror}.", OTHERS) from None
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {path} is no UTF-8 text.", OTHERS) from None


def with_system(contract: PromptContract, system: str) -> PromptContract:
    """`contract` with another system prompt, written into the template, so that whoever renders it gets the prompt."""
    text = system.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    first = "{%- if not messages or messages[0]['role'] != 'system' -%}"
    insert = f"{{%- set messages = [{{'role': 'system', 'content': \"{text}\"}}] + messages -%}}{{%- endif -%}}"
    return replace(contract, system=system, chat_template=first + insert + contract.chat_template)


def checked(contract: PromptContract, tokenizer: Any) -> PromptContract:
    """`contract` with its turn ends, found by rendering.

    Raises UserError for a template that is no jinja, refuses or loses a question, an answer or the system prompt, or
    ends an answer without a token of the model's: the model would never stop.
    """
    from jinja2 import TemplateSyntaxError

    name = f"The chat template ({contract.name})"
    try:
        asked, answered = contract.render(ASKED, add_generation_prompt=True), contract.render(ANSWERED)
    except TemplateSyntaxError as error:
        raise UserError(f"{name} is no jinja template: {error.message} (line {error.lineno}).", OTHERS) from None
    except BadRow as error:
        system = " It may allow no system message." if contract.system is not None else ""
        raise UserError(f"{name} cannot render a question and its answer: {error.reason}.{system}", OTHERS) from None
    for what, text, rendering in (
        ("the user's question", QUESTION, asked),
        ("the user's question", QUESTION, answered),
        ("the assistant's answer", ANSWER, answered),
        ("the system prompt", (contract.system or "").strip(), asked),
    ):
        if text not in rendering:
            raise UserError(f"{name} drops {what}.", OTHERS)
    if contract.name == "text":
        return replace(contract, stop=(contract.eos_token,))
    tail = answered[answered.rindex(ANSWER) + len(ANSWER) :]
    tokens = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)
    end = re.search("|".join(map(re.escape, filter(None, tokens))), tail)
    if not tokens or end is None:
        raise UserError(
            f"{name} ends an answer with {tail!r}, which holds no special token of {model_name(tokenizer)}, so that "
            "a model trained with it would never stop.",
            "Write {{ eos_token }} after the assistant's text, or choose --chat-template reasoning.",
        )
    return replace(contract, stop=(end.group(),), eos_token=contract.eos_token or end.group())


def check_same(expected: PromptContract, actual: PromptContract, tokenizer: Any) -> None:
    """Raises UserError, with the first token that differs, where an adapter's contract is not that of the data."""
    if expected.hash == actual.hash:
        return
    raise UserError(
        f"The prompt contracts differ: {first_difference(expected, actual, tokenizer)}.",
        "Prepare the data anew with this adapter as --model: it brings its template and system prompt.",
    )


def first_difference(expected: PromptContract, actual: PromptContract, tokenizer: Any) -> str:
    """What a person needs to see: a token of a short conversation, else the setting that differs."""
    long = [{"role": "system", "content": SYSTEM}, *ANSWERED, *ANSWERED]
    for probe, prompt in ((ASKED, True), (ANSWERED, False), (long, False), (long[:-1], True)):
        wanted, given = (probe_ids(contract, probe, prompt, tokenizer) for contract in (expected, actual))
        for place, (want, have) in enumerate(zip_longest(wanted, given)):
            if want != have:
                there, here = shown(tokenizer, want), shown(tokenizer, have)
                return f"token {place} of a short conversation is {there} for the adapter, but {here} in the data"
    for what in ("stop", "eos_token", "system", "tags", "special_tokens", "version"):
        there, here = getattr(expected, what), getattr(actual, what)
        if there != here:
            return f"{what} is {there!r} for the adapter, but {here!r} in the data"
    texts = expected.chat_template, actual.chat_template
    place = next((i for i, (a, b) in enumerate(zip_longest(*texts)) if a != b), 0)
    excerpts = [text[max(0, place - 20) : place + 20] for text in texts]
    return f"their templates part at character {place}: {excerpts[0]!r} and {excerpts[1]!r}"


def probe_ids(
    contract: PromptContract, messages: list[dict[str, Any]], add_generation_prompt: bool, tokenizer: Any
) -> list[int]:
    try:
        text = contract.render(messages, add_generation_prompt)
    except BadRow:  # no system role
        return []
    return encoder_of(tokenizer).encode([[text]])[0][0]


def shown(tokenizer: Any, token: int | None) -> str:
    return "the end" if token is None else f"{tokenizer.decode([token])!r} (id {token})"


def model_name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or "this model")
