"""The turns of one conversation: their roles under one set of names, their content as text, an order that makes sense.

messages.py says how the cases are decided that the formats leave open.
"""

import json
from collections.abc import Sequence
from typing import Any

Turn = dict[str, Any]

NO_ASSISTANT = "no assistant turn"
WRONG_ORDER = "wrong order of roles"
UNKNOWN_ROLE = "unknown role"

# Our roles, under the names that `messages` and `conversations` (ShareGPT) rows give them.
SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
AFTER: dict[str | None, set[str]] = {  # what may come after a role; None is the beginning
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}


class BadRow(Exception):
    """A row that cannot be used. `reason` is short and stable: rows are counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def read_turns(value: Any, column: str) -> list[Turn]:
    """A list of turns (or its JSON text) with our role names, in the order given. Raises BadRow."""
    turns = _parsed(value)
    if turns is None or turns == [] or turns == "":
        raise BadRow(f"empty field: {column}")
    if type(turns) is not list:
        raise BadRow(f"wrong type: {column}")
    return [_turn(turn, column) for turn in turns]


def ordered(turns: Sequence[Turn], system: str = "") -> tuple[Turn, ...]:
    """The turns up to the last assistant's, after `system` where they bring no system text. Raises BadRow."""
    turns = list(turns)
    if turns[0]["role"] == "system" and is_blank(turns[0]["content"]):
        turns = turns[1:]
    if system and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": system}, *turns]
    last = len(turns)
    while last and turns[last - 1]["role"] != "assistant":
        last -= 1
    if not last:
        raise BadRow(NO_ASSISTANT)
    before: str | None = None
    for turn in turns:
        if turn["role"] not in AFTER[before]:
            raise BadRow(WRONG_ORDER)
        before = turn["role"]
    return tuple(turns[:last])


def _turn(given: Any, column: str) -> Turn:
    turn = _parsed(given)
    if type(turn) is not dict:
        raise BadRow(f"wrong type: {column}")
    speaker, name = turn.get("role"), "content"
    if speaker is None and "from" in turn:
        speaker, name = turn["from"], "value"
    if type(speaker) is not str:
        raise BadRow(f"missing field: {column}.role" if speaker is None else f"wrong type: {column}.role")
    role = SPEAKERS.get(speaker) or SPEAKERS.get(speaker.strip().lower())
    if role is None:
        raise BadRow(UNKNOWN_ROLE)
    content, extra = turn.get(name), {}
    if type(content) is not str or len(turn) > 2:
        content = _content(content, f"{column}.{name}")
        extra = {k: v for k, v in turn.items() if v is not None and k not in ("role", "content", "from", "value")}
        if "tool_calls" in extra and not extra["tool_calls"]:
            del extra["tool_calls"]
    if is_blank(content) and role in ("user", "assistant") and "tool_calls" not in extra:
        raise BadRow(f"empty field: {column}.{name}")
    return {"role": role, "content": content, **extra}


def _content(content: Any, field: str) -> str:
    """Text, the texts of parts joined, or nothing."""
    if content is None:
        return ""
    if type(content) is str:
        return content
    if type(content) is list:
        parts = [part.get("text") if type(part) is dict else part for part in content]
        texts = [part for part in parts if type(part) is str]
        if len(texts) == len(parts):
            return "".join(texts)
    raise BadRow(f"wrong type: {field}")


def _parsed(value: Any) -> Any:
    """A list or a turn that is kept as JSON text is read; anything else stays what it is."""
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
