"""Numbers as answers give them: exact fractions with a unit, read without computing anything large."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from opensloth.rewards.notation import plain
from opensloth.rewards.units import CURRENCY, MULTIPLES, PERCENT, contradict, unit_of

NEAR = Fraction(1, 10)  # a near miss is off by at most this share of the gold answer

_D = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>[{CURRENCY}]?)\s*(?P<minus>-?)(?:"
    rf"(?P<whole>[0-9]+)\s*(?:\\frac\s*\{{\s*(?P<a>[0-9]+)\s*\}}\s*\{{\s*(?P<b>[0-9]+)\s*\}}"
    rf"|\s(?P<c>[0-9]+)\s*/\s*(?P<d>[0-9]+))"
    rf"|\\frac\s*\{{\s*(?P<top>-?{_D})\s*\}}\s*\{{\s*(?P<bottom>{_D})\s*\}}"
    rf"|\\frac\s*(?P<t>[0-9])\s*(?P<u>[0-9])"
    rf"|(?P<left>{_D})\s*/\s*(?P<right>{_D})"
    rf"|(?P<number>{_D})(?:[eE](?P<power>[+-]?[0-9]{{1,3}})(?![0-9])|\s*\*\s*10\s*\^\s*(?:\{{\s*(?P<in_braces>[+-]?[0-9]{{1,3}})\s*\}}|(?P<exponent>[+-]?[0-9]{{1,3}})(?![0-9])))?"
    r")"
)
NAME = re.compile(
    r"(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result|solution|total)\s*(?:is|=|:)\s*[:=]?\s*", re.IGNORECASE
)
VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\(\w\))?\s*=\s*")


@dataclass(frozen=True)
class Quantity:
    """`value` in `unit`; `""` is no unit, `%` leaves the value as written (50 for `50%`)."""

    value: Fraction
    unit: str = ""

    def equals(self, gold: "Quantity") -> bool:
        """Whether this answer means what `gold` means.

        A percentage equals the number it stands for (50 % and 1/2). Where the gold answer is a bare number above 1, the
        sign may also have been left to the question ("what percentage ...?"), so `10%` is right for 10; and it may be
        left out where the gold answer has it.
        """
        if (self.unit == PERCENT) != (gold.unit == PERCENT):
            percent, other = (self, gold) if self.unit == PERCENT else (gold, self)
            as_unit = percent.value == other.value and (percent is gold or (not other.unit and abs(other.value) > 1))
            return percent.value / 100 == other.value or as_unit
        return self.value == gold.value and not contradict(self.unit, gold.unit)

    def near(self, gold: "Quantity") -> bool:
        """Whether it misses the gold value, which is not 0, by at most a tenth."""
        if contradict(self.unit, gold.unit):
            return False
        return 0 < abs(self.value - gold.value) <= NEAR * abs(gold.value)


@lru_cache(maxsize=8192)
def quantity(text: str) -> Quantity | None:
    """The one number that `text` is, with or without a unit; None where it is anything else."""
    text = without_name(plain(text))
    found = NUMBER.match(text)
    if found is None:
        return None
    rest = text[found.end() :].strip()
    value = value_of(found)
    if value is None:
        return None
    first = rest.split(maxsplit=1)[0].lower() if rest else ""
    if first in MULTIPLES:
        value, rest = value * MULTIPLES[first], rest[len(first) :]
    unit = unit_of(rest)
    if unit is None:
        return None
    return Quantity(value, found["currency"] or unit)


def value_of(found: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER; None for a division by zero."""
    part = found.groupdict()
    over = next(
        (
            (part[a], part[b])
            for a, b in (("top", "bottom"), ("t", "u"), ("left", "right"), ("a", "b"), ("c", "d"))
            if part[a]
        ),
        None,
    )
    if over is not None:
        bottom = Fraction(over[1])
        if not bottom:
            return None
        value = Fraction(part["whole"] or 0) + Fraction(over[0]) / bottom
    else:
        power = part["power"] or part["in_braces"] or part["exponent"] or 0
        value = Fraction(part["number"]) * Fraction(10) ** int(power)
    return -value if (part["sign"] == "-") != (part["minus"] == "-") else value


def without_name(text: str) -> str:
    """`text` behind `x =`, `f(2) =` or `The answer is`."""
    text = NAME.sub("", text, count=1) if NAME.match(text) else text
    variable = VARIABLE.match(text)
    return text[variable.end() :] if variable else text


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a sentence, from the left."""
    return [value for found in NUMBER.finditer(plain(text)) if (value := value_of(found)) is not None]
