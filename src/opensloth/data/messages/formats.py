"""The row formats: their names, the columns that tell them, and how `--map role=column` is read.

What a row of each format becomes is the business of messages.py.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from opensloth.errors import UserError, nearest


@dataclass(frozen=True)
class Shape:
    """The roles of a format. `gold` is the one that holds a final answer apart, as GRPO needs it."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    gold: str | None = None


# In order of preference where a row has the columns of several.
SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), ("system",)),
    "conversations": Shape(("conversations",), ("system",)),
    "prompt-completion": Shape(("prompt", "completion"), ("system",)),
    "alpaca": Shape(("instruction", "output"), ("input", "system")),
    "openmath": Shape(("problem", "generated_solution", "expected_answer"), ("system",), gold="expected_answer"),
    "prompt-solution": Shape(("prompt", "solution"), ("system",), gold="solution"),
    "problem-answer": Shape(("problem", "answer"), ("solution", "system"), gold="answer"),
    "gsm8k": Shape(("question", "answer"), ("system",), gold="answer"),
    "text": Shape(("text",)),
}
PROMPT_ROLES = ("prompt", "problem", "question", "system")  # of the formats with a gold answer
ROLES = tuple(dict.fromkeys(role for shape in SHAPES.values() for role in (*shape.required, *shape.optional)))

# Names that other data sets use for a role: they make the suggestion of a --map better.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": ("query", "question", "user", "human", "source", "inputs"),
    "completion": ("response", "reply", "target", "chosen", "assistant", "output", "answer", "targets"),
    "problem": ("question", "query", "task", "prompt"),
    "answer": ("final_answer", "expected_answer", "gold", "gold_answer", "ground_truth", "label", "target", "result"),
    "solution": ("answer", "final_answer", "gold", "ground_truth", "label"),
    "messages": ("conversation", "chat", "dialogue", "dialog", "turns", "message"),
    "text": ("content", "body", "document", "raw"),
    "instruction": ("task", "question"),
    "output": ("response", "answer", "target"),
}
# Formats that are worth suggesting for columns of other names.
SUGGESTED = ("messages", "prompt-completion", "problem-answer", "openmath", "text")


def parse_mapping(pairs: Iterable[str]) -> dict[str, str]:
    """`["problem=question"]` to `{"problem": "question"}`. Raises UserError for anything else."""
    mapping: dict[str, str] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        role, column = role.strip().replace("-", "_"), column.strip()
        if not equals or not role or not column:
            raise UserError(f"--map {pair} is not of the form role=column.", "For example: --map problem=question")
        if role not in ROLES:
            raise UserError(
                f"--map {pair}: there is no role {role}.", nearest(role, ROLES) or f"Roles: {', '.join(ROLES)}."
            )
        if mapping.get(role, column) != column:
            raise UserError(f"--map gives {role} two columns: {mapping[role]} and {column}.", "Give each role one.")
        mapping[role] = column
    return mapping


def choose_format(columns: list[str], mapping: Mapping[str, str], method: str = "sft") -> tuple[str, dict[str, str]]:
    """The format's name and its role -> column. The first format that has its columns and uses every mapped role.

    For `method="grpo"` only formats that hold an answer come into question. Raises UserError that lists the columns
    and the formats, and the nearest --map.
    """
    for role, column in mapping.items():
        if role not in ROLES:
            raise UserError(f"--map {role}={column}: there is no role {role}.", nearest(role, ROLES))
        if column not in columns:
            hint = nearest(column, columns) or f"Columns: {', '.join(columns)}."
            raise UserError(f"--map {role}={column}: the rows have no column {column}.", hint)
    present = set(columns)
    shapes = {name: shape for name, shape in SHAPES.items() if shape.gold or method != "grpo"}
    for name, shape in shapes.items():
        # A column that was given to one role is no longer its namesake: --map prompt=answer takes `answer` away.
        roles = {
            role: mapping.get(role, role)
            for role in (*shape.required, *shape.optional)
            if role in mapping or (role in present and role not in mapping.values())
        }
        if set(mapping) <= set(roles) and all(role in roles for role in shape.required):
            return name, roles
    raise _unknown(columns, mapping, shapes, method)


def _unknown(columns: list[str], mapping: Mapping[str, str], shapes: Mapping[str, Shape], method: str) -> UserError:
    known = "; ".join(f"{name} ({', '.join(shape.required)})" for name, shape in shapes.items())
    if method == "grpo":
        message = f"No row format with an answer has the columns {', '.join(columns)}."
    else:
        message = f"No row format has the columns {', '.join(columns)}."
    suggestion = _suggest(columns, mapping, shapes)
    needed = "Every row needs its gold answer, also with rewards of your own. " if method == "grpo" else ""
    return UserError(message, f"{needed}{f'Try {suggestion}. ' if suggestion else ''}Formats: {known}.")


def _suggest(columns: list[str], mapping: Mapping[str, str], shapes: Mapping[str, Shape]) -> str:
    """The `--map` options that complete the format which is nearest to the columns, or an empty string.

    The nearest has the fewest roles missing; of two, the one whose roles the columns are called like.
    """
    best: tuple[int, int, list[str]] | None = None
    for name in (*(n for n in SUGGESTED if n in shapes), *shapes):
        required = shapes[name].required
        used = {mapping[role] for role in required if role in mapping}
        used |= {role for role in required if role in columns and role not in mapping}
        maps: list[str] = [f"--map {role}={mapping[role]}" for role in required if role in mapping]
        missing = [role for role in required if role not in mapping and role not in columns]
        others = 0  # columns of another name
        for role in missing:
            column = _nearest_column(role, [column for column in columns if column not in used])
            if column is None:
                break
            used.add(column)
            maps.append(f"--map {role}={column}")
            others += folded(column) != role
        else:
            distance = (len(missing), others)
            if best is None or distance < best[:2]:
                best = (*distance, maps)
    return " ".join(best[2]) if best else ""


def _nearest_column(role: str, columns: list[str]) -> str | None:
    names = {folded(column): column for column in columns}
    for name in (role, *SYNONYMS.get(role, ())):
        if name in names:
            return names[name]
    close = difflib.get_close_matches(role, list(names), n=1, cutoff=0.7)
    return names[close[0]] if close else None


def folded(column: str) -> str:
    return column.lower().strip().replace(" ", "_").replace("-", "_")
