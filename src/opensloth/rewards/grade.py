"""How good one answer is beside the gold answer: by text first, then as numbers, then by math-verify in its child."""

import re
from enum import Enum
from functools import lru_cache

from opensloth.rewards.checker import CHECKER
from opensloth.rewards.grammar import well_formed, well_formed_parts
from opensloth.rewards.notation import key, plain
from opensloth.rewards.quantities import Quantity, numbers_in, quantity, without_name
from opensloth.rewards.units import HEDGES, without_unit


class Grade(Enum):
    """From the best to the worst; UNJUDGED is outside the order: math-verify did not end in time."""

    EXACT = "the gold answer, in its form"
    EQUAL = "equal in another form"
    NEAR = "off by at most a tenth"
    WRONG = "one answer, and wrong"
    GUESSES = "several answers where one was asked for"
    NO_ANSWER = "no answer"
    UNJUDGED = "the comparison did not end in time"


MAX_LETTERS = 400  # a longer solution is prose; it is compared as text alone

COLLECTION = re.compile(
    r"[,;\n]|\\\\|\\pm|\\cup|\\(?:le|ge|in|infty|neq)(?![A-Za-z])|[<>{\[]|(?<![A-Za-z])(?:or|and)(?![A-Za-z])"
)
SEPARATOR = re.compile(
    r"[,;\n?]|\\\\|\\pm|\\mp|\\lor|\\vee|(?<![A-Za-z\\])(?:or|and|vs|versus|maybe)(?![A-Za-z])", re.IGNORECASE
)
SIDE_BY_SIDE = re.compile(r"(?<!_)(?<!_[0-9])[0-9.]\s+[.]?[0-9]")  # but not the base of a logarithm
SET_BRACES = re.compile(r"\\?[{}]|\\[lr]brace")
CHOICE = re.compile(r"(?<!\w)[A-J](?!\w)")
CHOOSES = re.compile(r"(?:(?:the\s+)?(?:option|choice|answer)\s*(?:is|:)?\s*)?\(?[A-J](?:[).:]|$)", re.IGNORECASE)
PRODUCT = re.compile(r"(?<=[0-9])\s*\((?![^()]*,)")  # math-verify takes 7(42) for a mixed number, 49
MATHS = re.compile(r"[0-9=^+*/]|\\(?:pi|sqrt|infty|frac|emptyset|varnothing|ln|log|alpha|beta|theta)(?![A-Za-z])")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
FUNCTIONS = {"sqrt", "pi", "log", "ln", "sin", "cos", "tan", "exp", "max", "min", "gcd", "lcm", "mod"}
VAGUE = HEDGES | {"between", "less", "more", "no", "over", "than"}


@lru_cache(maxsize=8192)
def grade(answer: str, gold: str) -> Grade:
    """Compare the text of a solution with the gold answer.

    Raises:
        WorkerFailed: the process that runs math-verify cannot start.
    """
    if not re.search(r"\w", answer):
        return Grade.EXACT if key(answer) and key(answer) == key(gold) else Grade.NO_ANSWER
    if key(answer) == key(gold):
        return Grade.EXACT
    if len(answer) > MAX_LETTERS:
        return Grade.NO_ANSWER
    expected = quantity(gold)
    if expected is not None:
        return as_number(answer, gold, expected)
    if is_text(gold):
        return as_text(answer, gold)
    return as_expression(answer, gold)


def as_number(answer: str, gold: str, expected: Quantity) -> Grade:
    """The grade where one number is expected."""
    given = quantity(answer)
    if given is not None:
        return between(given, expected)
    text = without_name(plain(answer))
    if re.search(r"\d\s*[,;]\s*[a-z]|\d\s*\([^()]*[A-Za-z]", text) and len(numbers_in(text)) == 1:
        return in_words(answer, expected)
    if not MATHS.search(text) and text not in ("e", "i"):
        return Grade.NO_ANSWER
    if SEPARATOR.search(text) or SIDE_BY_SIDE.search(text):
        return in_words(answer, expected) if len(numbers_in(text)) == 1 else Grade.GUESSES
    parts = text.split("=")
    if not all(well_formed(part) for part in parts):
        return in_words(answer, expected)
    return verified(parts, gold_expression(gold, expected))


def between(given: Quantity, expected: Quantity) -> Grade:
    if given.equals(expected):
        return Grade.EQUAL
    return Grade.NEAR if given.near(expected) else Grade.WRONG


def in_words(answer: str, expected: Quantity) -> Grade:
    """A sentence or an unknown expression: its only number counts, unless the words around it hedge."""
    text = plain(answer)
    found = numbers_in(text)
    said = {word.lower() for word in WORD.findall(text)} - FUNCTIONS
    if len(found) > 1:
        return Grade.GUESSES if said else Grade.WRONG
    if not found:
        return Grade.NO_ANSWER if said else Grade.WRONG
    if not said or said & VAGUE or re.search(r"[=^*/<>|_\\]", text.replace("^\\circ", "")):
        return Grade.WRONG
    unit = "%" if re.search(r"\d\s*(?:%|percent)", text) else ""
    return between(Quantity(found[0], unit), expected)


def as_expression(answer: str, gold: str) -> Grade:
    """The grade where an expression, a set, a point or an interval is expected."""
    text, expected = plain(answer), plain(gold)
    if not MATHS.search(text) and WORD.search(text):
        return Grade.NO_ANSWER
    if COLLECTION.search(outside_commands(expected)):
        if ordered(text) != ordered(expected) or (well_formed_parts(expected) and not well_formed_parts(text)):
            return Grade.WRONG
        return verified([listed(text)], listed(expected))
    if SEPARATOR.search(text) or SIDE_BY_SIDE.search(text):
        return Grade.GUESSES
    if {word.lower() for word in WORD.findall(text)} & VAGUE:
        return Grade.WRONG
    text = without_unit(text)
    parts = [text] if "=" in expected else without_name(text).split("=")
    if well_formed(expected) and not all(well_formed(part) for part in parts):
        return Grade.WRONG
    return verified(parts, expected)


def verified(parts: list[str], gold: str) -> Grade:
    """EQUAL where math-verify finds every part of an equation equal to the gold answer, so that none is a guess."""
    for part in parts:
        equal = CHECKER.equal(PRODUCT.sub("*(", part.strip()), PRODUCT.sub("*(", gold))
        if equal is None:
            return Grade.UNJUDGED
        if not equal:
            return Grade.WRONG
    return Grade.EQUAL


def gold_expression(gold: str, expected: Quantity) -> str:
    """The number of a gold answer without its unit, for math-verify."""
    value = expected.value / 100 if expected.unit == "%" else expected.value
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def ordered(text: str) -> bool:
    """Whether a collection stands in round or square brackets: a point or an interval, which no set equals.

    math-verify takes `(1,2)` and `{1,2}` for the same. An inequality is another way to write an interval.
    """
    text = without_name(text)
    return text.startswith(("(", "[")) or bool(re.search(r"[<>]|\\(?:le|ge|lt|gt|in|cup)(?![A-Za-z])", text))


def listed(text: str) -> str:
    """`1 or 2` and `1; 2` as `1, 2`."""
    return re.sub(r"\s*,?\s*(?<![A-Za-z])(?:or|and)(?![A-Za-z])\s*|\s*[;\n]\s*", ", ", text)


def outside_commands(text: str) -> str:
    """`text` without the braces that belong to commands and powers, so that those of sets are left."""
    previous = None
    while previous != text:
        previous = text
        text = re.sub(r"(?<=[A-Za-z}^_\]])\{([^{}]*)\}", lambda found: found[1].replace(",", " ") + "_", text)
    return text


def as_text(answer: str, gold: str) -> Grade:
    """The grade where words or a letter of a multiple choice are expected; `C) 42` and `option C` choose C."""
    if words(answer) == words(gold):
        return Grade.EQUAL
    if not CHOICE.fullmatch(gold.strip()):
        return Grade.WRONG
    chosen = CHOICE.findall(plain(answer))
    if len(chosen) > 1:
        return Grade.GUESSES
    return Grade.EQUAL if chosen == [gold.strip()] and CHOOSES.match(plain(answer)) else Grade.WRONG


def is_text(gold: str) -> bool:
    """Whether a gold answer is words or a letter of a multiple choice, with nothing to compute."""
    return not MATHS.search(plain(gold)) and not re.search(r"[\\<>|_-]|[^\W\d_]\(", plain(gold))


def words(text: str) -> list[str]:
    """The words of a text in lower case; a choice such as `(B)` or `b.` is its letter."""
    return re.findall(r"\w+", plain(text).lower())
