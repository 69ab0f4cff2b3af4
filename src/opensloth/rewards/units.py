"""Which units name the same thing. A unit that the answer or the gold answer leaves out is no matter."""

import re

# Only these can contradict each other: of two words that are not here, either may be loosely said (apples, fruits).
SAME = (
    "cm centimeter centimetre", "mm millimeter millimetre", "m meter metre", "km kilometer kilometre kms",
    "mi mile", "ft foot feet", "in inch", "yd yard", "kg kilogram kilo kgs", "g gram", "mg milligram",
    "lb pound lbs", "oz ounce", "h hr hour", "min minute", "s sec second", "day", "week", "month", "year yr",
    "l liter litre", "ml milliliter millilitre", "$ dollar usd", "€ euro eur", "£ gbp", "¥ yen jpy", "₹ rupee inr",
    "¢ cent", "mph", "kmh km/h", "^\\circ degree deg",
)  # fmt: skip
KNOWN = {word: words.split()[0] for words in SAME for word in words.split()}

PERCENT = "%"
PERCENT_WORDS = {"percent", "percentage", "pct"}
CURRENCY = "$€£¥₹"
SINGLE_LETTERS = set("msghlLKJWVNCFA")  # `5x` is a product, `5m` a length
NO_UNITS = {
    "and", "arccos", "arcsin", "arctan", "ceil", "choose", "cos", "cot", "csc", "dozen", "exp", "factorial", "floor",
    "gcd", "half", "hundred", "i", "lcm", "ln", "log", "max", "mod", "or", "pi", "quarter", "quarters", "sin", "sqrt",
    "tan", "third", "thirds", "vs",
}  # fmt: skip
# An answer with one of these does not say its number.
HEDGES = {
    "about", "above", "almost", "approximately", "around", "below", "either", "except", "guess", "least", "maybe",
    "most", "nearly", "neither", "never", "nor", "not", "perhaps", "probably", "roughly", "under", "unknown", "unless",
    "up", "wrong",
}  # fmt: skip
MULTIPLES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = r"[A-Za-z][A-Za-z.()'/-]*(?:\^\{?-?\d\}?)?"
UNIT = re.compile(rf"(?:\^\\circ\s*[CF]?|[$€£¥₹¢]|{_WORD})(?:[ */-]+\(?{_WORD}){{0,15}}")


def unit_of(rest: str) -> str | None:
    """The unit in the text behind a number, `""` for none, None where that text is something else."""
    rest = rest.strip()
    if not rest:
        return ""
    if (
        re.fullmatch(r"%(?:\s+[A-Za-z ]+)?", rest)
        or rest.split()[0].lower() in PERCENT_WORDS
        or rest.lower().startswith("per cent")
    ):
        return PERCENT
    if not UNIT.fullmatch(rest):
        return None
    words = re.split(r"[ */^-]+", rest)
    if len(words[0]) == 1 and words[0].isalpha() and words[0] not in SINGLE_LETTERS:
        return None
    return None if any(word.lower() in NO_UNITS | HEDGES for word in words) else rest


def contradict(one: str, other: str) -> bool:
    """Whether two units cannot be meant for the same thing: kilometres and miles, euros and dollars."""
    left, right = known(one), known(other)
    return left is not None and right is not None and left != right


def known(unit: str) -> str | None:
    words = unit.lower().replace("(s)", "").split()
    if not words:
        return None
    word = words[0].rstrip(".") if unit not in CURRENCY else unit
    return KNOWN.get(word) or KNOWN.get(word.rstrip("s")) or KNOWN.get(word.removesuffix("es"))


def without_unit(text: str) -> str:
    """An expression without the known unit at its end."""
    found = re.search(r"\s([A-Za-z]{2,})(?:\^\{?[0-9]\}?)?\s*$", text)
    return text[: found.start()] if found and known(found[1]) else text
