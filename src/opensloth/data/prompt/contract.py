"""The prompt contract: how a conversation becomes text, the same way in training, evaluation and serving.

It holds the chat template, the system prompt, the tags around working and solution, the special tokens and the texts
that end a turn. It is saved as `prompt.json` with the data, the adapter and every export.

Labels are made from `segments`, never from comparing ids with the pad token, so a tokenizer whose pad token is its end
token (or that has none) loses nothing: whoever pads a batch masks the padding by position.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from opensloth.data.messages.examples import BadRow, Example
from opensloth.data.prompt import segments as turns
from opensloth.data.prompt.segments import Segment
from opensloth.data.tokens.encode import encoder_of
from opensloth.errors import UserError
from opensloth.paths import digest, read_json, write_json

VERSION = 1
AGAIN = "Prepare the data, or train the adapter, again."
NO_WORKING = "answer without working"


@dataclass(frozen=True)
class Tags:
    """The texts around the working and the solution of an assistant turn."""

    working_start: str
    working_end: str
    solution_start: str
    solution_end: str

    def turn(self, working: str, answer: str) -> str:
        return f"{self.working_start}{working}{self.working_end}{self.solution_start}{answer}{self.solution_end}"

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A whole assistant turn; its groups are the working and the answer."""
        start, end, solution, close = map(re.escape, dataclasses.astuple(self))
        return re.compile(rf"{start}(.*?){end}\s*{solution}(.*?){close}\s*", re.DOTALL)


@dataclass(frozen=True)
class PromptContract:
    """See the module. `name` says where the template came from and is no part of the contract's identity.

    `special_tokens` are those that the template asks for by name: another pad token is no other contract.
    """

    name: str
    chat_template: str
    system: str | None
    tags: Tags | None
    stop: tuple[str, ...]
    eos_token: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of everything but the name."""
        return digest({key: value for key, value in dataclasses.asdict(self).items() if key != "name"})

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, tools: Any = None
    ) -> str:
        """The conversation as text, through transformers' sandbox. Raises BadRow where the template refuses it.

        A template that writes today's date gets the same date always: otherwise yesterday's data would not match.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                strftime_now=_same_day,
                **self.special_tokens,
            )
        except TemplateSyntaxError:
            raise
        except TemplateError as error:
            raise BadRow(f"refused by the chat template: {str(error).splitlines()[0][:100]}") from None
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # of the template's own expressions
            raise BadRow(f"does not fit the chat template ({type(error).__name__})") from None
        return str(rendered[0])

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """The whole conversation: this contract's system prompt where it has none, its tags around the answer.

        Raises BadRow for an assistant turn that lacks the tags.
        """
        messages = self._with_system(example.messages)
        last = next((message for message in reversed(messages) if message.get("role") == "assistant"), None)
        if self.tags is None or last is None:
            return messages
        if example.working is not None and example.answer is not None:
            if any(tag in example.working + example.answer for tag in dataclasses.astuple(self.tags)):
                raise BadRow("the contract's tags inside the working or the answer")
            last["content"] = self.tags.turn(example.working, example.answer)
        elif example.answer is not None:
            raise BadRow(NO_WORKING)
        elif not isinstance(last["content"], str) or not self.tags.pattern.fullmatch(last["content"]):
            raise BadRow("assistant turn without the contract's tags")
        return messages

    def prompt_messages(self, example: Example) -> list[dict[str, Any]]:
        """The conversation before its last assistant turn, for `prompt_ids`; tags are no matter."""
        messages = example.messages
        last = messages[-1:] and messages[-1].get("role") == "assistant"
        return self._with_system(messages[:-1] if last else messages)

    def _with_system(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        first = [] if self.system is None or (messages and messages[0].get("role") == "system") else [self.system]
        return [*({"role": "system", "content": text} for text in first), *(dict(message) for message in messages)]

    def segments(self, messages: Sequence[Mapping[str, Any]], target_only: bool = True) -> list[Segment]:
        """The rendering in pieces, each trained or not (segments.py says how). Raises BadRow."""
        return turns.split(self.render, messages, self.stop, target_only)

    def shield(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`messages` in which control tokens are marked as plain text for the encoder (encode.py says why)."""
        return encoder_of(tokenizer).shield(messages, self.frame)

    @cached_property
    def frame(self) -> str:
        """A text that holds every control token which the template writes around turns."""
        question = {"role": "user", "content": "."}
        try:
            text = self.render([{"role": "system", "content": "."}, question], add_generation_prompt=True)
        except BadRow:  # a template without a system role
            text = self.render([question], add_generation_prompt=True)
        return " ".join([text, *self.stop])

    def prompt_ids(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids up to and including the generation prompt: exactly what a training row has before the answer.

        Only the template writes a beginning-of-text token, so there is never a second one.
        """
        texts = turns.split_prompt(self.render, self.shield(tokenizer, messages), self.stop)
        return [token for piece in encoder_of(tokenizer).encode([texts])[0] for token in piece]

    def save(self, path: Path) -> None:
        """Write the contract, with its hash, as JSON."""
        write_json(path, {**dataclasses.asdict(self), "hash": self.hash})

    @classmethod
    def load(cls, path: Path) -> "PromptContract":
        """Read what `save` wrote. Raises UserError where it is missing, damaged, edited or of a later version."""
        value = read_json(path, "a place with a prompt contract")
        if not isinstance(value, dict) or not isinstance(value.get("version"), int):
            raise UserError(f"{path} holds no prompt contract.", AGAIN)
        if value["version"] > VERSION:
            raise UserError(f"{path} was written by a later version of OpenSloth.", "Update openslothai.")
        written = value.pop("hash", None)
        try:
            tags = Tags(**value.pop("tags")) if value.get("tags") else value.pop("tags")
            contract = cls(**{**value, "tags": tags, "stop": tuple(value["stop"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} holds no prompt contract ({error}).", AGAIN) from None
        if contract.hash != written:
            raise UserError(f"{path} was changed after it was written.", AGAIN)
        return contract


def _same_day(format: str) -> str:
    return datetime(2024, 7, 26).strftime(format)  # Llama 3.1's own default
