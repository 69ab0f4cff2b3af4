"""`sample:arithmetic`: word problems of one and two steps with their working, in the shape of OpenMathReasoning rows.

Made, not stored: the same split gives the same rows everywhere. Both splits tell the same stories, but the test split
with other names and things, and with other numbers (no pair of first operands in common), so that no problem of it was
seen in training. Rows are short and numbers small: a 135M model learns their form on a CPU, and solves some of them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

VERSION = 2  # part of the data's digest: raise it when the rows change
DEFAULT_ROWS = {"train": 2000, "test": 500}
MOST_ROWS = 100_000
HELD_OUT = 5  # one pair of first operands in five belongs to the test split


@dataclass(frozen=True)
class Template:
    """`ops` are applied from left to right to the numbers a, b (and c); each step's result has a label."""

    ops: str
    problem: str
    labels: tuple[str, ...]


STORIES = (
    Template("+", "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", ("Altogether",)),
    Template("-", "There are {a} {thing} in a box. {name} takes out {b}. How many {thing} stay in the box?", ("Left",)),
    Template("*", "{name} packs {a} bags with {b} {thing} each. How many {thing} are packed?", ("Packed",)),
    Template("/", "{name} shares {a} {thing} equally among {b} friends. How many does each friend get?", ("Each",)),
    Template(
        "*-",
        "{name} fills {a} boxes with {b} {thing} each and sells {c} of the {thing}. How many {thing} are left?",
        ("In boxes", "Left"),
    ),
    Template(
        "*+",
        "{name} buys {a} packs of {b} {thing} and finds {c} more at home. How many {thing} is that in all?",
        ("Bought", "In all"),
    ),
    Template(
        "+-",
        "{name} has {a} {thing}, gets {b} from a neighbour and gives {c} away. How many {thing} remain?",
        ("Before giving", "Remaining"),
    ),
    Template(
        "-+",
        "{name} had {a} {thing}, lost {b} of them and later found {c}. How many {thing} does {name} have?",
        ("After losing", "Now"),
    ),
    Template(
        "+*",
        "Each day {name} makes {a} {thing} before noon and {b} after it. How many {thing} is that in {c} days?",
        ("Each day", "All days"),
    ),
    Template(
        "-*",
        "A tray holds {a} {thing}, and {b} of them are broken. {name} has {c} such trays. How many {thing} are whole?",
        ("Whole on a tray", "Whole in all"),
    ),
    Template(
        "/+",
        "{name} puts {a} {thing} into {b} equal piles and adds {c} to one pile. How many {thing} are in that pile?",
        ("In a pile", "In that pile"),
    ),
    Template(
        "**",
        "{name} has {a} shelves with {b} jars each, and {c} {thing} in each jar. How many {thing} are there?",
        ("Jars", "In all"),
    ),
    Template("+", "A shop sold {a} {thing} on Monday and {b} on Tuesday. How many {thing} did it sell?", ("Sold",)),
    Template("-", "Of {a} {thing}, {name} has painted {b}. How many {thing} are still to be painted?", ("To paint",)),
    Template("*", "One {place} needs {b} {thing}. How many {thing} do {a} such places need?", ("Needed",)),
    Template("/", "{name} loads {a} {thing} onto {b} carts, the same on each. How many are on a cart?", ("On a cart",)),
    Template(
        "*-",
        "{name} orders {a} crates of {b} {thing}. On the way {c} {thing} are lost. How many {thing} arrive?",
        ("Ordered", "Arrived"),
    ),
    Template(
        "*+",
        "In a {place} stand {a} rows of {b} {thing}, and {c} {thing} by the door. How many {thing} stand there?",
        ("In rows", "In the {place}"),
    ),
    Template(
        "+-",
        "A {place} owns {a} {thing}. It receives {b} and lends {c}. How many {thing} does it hold then?",
        ("After receiving", "Held"),
    ),
    Template(
        "+*",
        "A team gets {a} red and {b} blue {thing}. How many {thing} do {c} teams get?",
        ("One team", "All teams"),
    ),
    Template(
        "/+",
        "{a} {thing} are split evenly between {b} rooms, then {name} brings {c} to the first. How many are in it?",
        ("In a room", "In the first"),
    ),
)
NAMES = {
    "train": ("Ana", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo"),
    "test": ("Maya", "Noah", "Olga", "Paul", "Rosa", "Sami", "Tara", "Viktor"),
}
THINGS = {
    "train": ("apples", "books", "coins", "eggs", "marbles", "nuts", "pencils", "stamps", "shells", "buttons"),
    "test": ("chairs", "lamps", "plates", "bricks", "tickets", "ropes", "tiles", "flags"),
}
PLACES = ("hall", "museum", "school", "theatre")


def arithmetic(split: str, samples: int | None = None) -> Iterator[dict[str, str]]:
    """The first `samples` rows (of at most MOST_ROWS; by default DEFAULT_ROWS) of "train" or "test", none twice.

    A row has `problem`, `generated_solution` (its working between <think> marks) and `expected_answer` (an integer).
    """
    rng = random.Random(f"arithmetic {VERSION} {split}")
    seen: set[str] = set()
    wanted = DEFAULT_ROWS[split] if samples is None else samples
    while len(seen) < wanted:
        template = rng.choice(STORIES)
        numbers = _numbers(rng, template.ops)
        names = {"name": rng.choice(NAMES[split]), "thing": rng.choice(THINGS[split]), "place": rng.choice(PLACES)}
        if held_out(numbers) != (split == "test"):
            continue
        row = _row(template, numbers, names)
        if row["problem"] not in seen:
            seen.add(row["problem"])
            yield row


def held_out(numbers: tuple[int, ...]) -> bool:
    """Whether problems with these numbers belong to the test split: the first two operands decide."""
    return crc32(f"{numbers[0]} {numbers[1]}".encode()) % HELD_OUT == 0


def _numbers(rng: random.Random, ops: str) -> tuple[int, ...]:
    """Operands for which every intermediate result is a whole number and none is negative."""
    if ops[0] == "+":
        a, b = rng.randint(3, 50), rng.randint(3, 50)
    elif ops[0] == "-":
        b = rng.randint(2, 30)
        a = b + rng.randint(2, 40)
    elif ops[0] == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 12)
    else:
        b = rng.randint(2, 9)
        a = b * rng.randint(2, 12)
    if len(ops) == 1:
        return a, b
    first = apply(ops[0], a, b)
    if ops[1] == "-":
        c = rng.randint(1, min(first - 1, 30))
    elif ops[1] == "*":
        c = rng.randint(2, 4)
    else:
        c = rng.randint(2, 30)
    return a, b, c


def apply(op: str, a: int, b: int) -> int:
    match op:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case _:
            return a // b


def _row(template: Template, numbers: tuple[int, ...], names: dict[str, str]) -> dict[str, str]:
    steps, value = [], numbers[0]
    for op, operand, label in zip(template.ops, numbers[1:], template.labels, strict=True):
        result = apply(op, value, operand)
        steps.append(f"{label.format(**names)}: {value} {op} {operand} = {result}.")
        value = result
    operands = dict(zip("abc", numbers, strict=False))
    return {
        "problem": template.problem.format(**names, **operands),
        "generated_solution": f"<think>\n{' '.join(steps)}\n</think>",
        "expected_answer": str(value),
    }
