"""Whether a text is one mathematical expression from its first letter to its last.

math-verify reads as much of a text as it understands: `42}43`, `42..43` and `43) 42` are all 42 to it, which is an
invitation to guess. Only what is well formed goes there. Nothing is computed here.

    sum     = [sign] product {sign product}
    product = power {[* or /] power}            a product without a sign goes on with a bracket, a command or a letter
    power   = atom [! or ^\\circ or ^ (number, letters or group)]
    atom    = number | letters | (sum) | {sum} | \\frac{sum}{sum} | \\sqrt[sum]{sum} | \\sin power | \\pi ...
"""

import re
from functools import lru_cache

TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\S))")
CONSTANTS = {
    "\\pi",
    "\\infty",
    "\\alpha",
    "\\beta",
    "\\gamma",
    "\\theta",
    "\\lambda",
    "\\phi",
    "pi",
}
TWO_GROUPS = {"\\frac", "\\binom"}
FUNCTIONS = {
    f"\\{name}"
    for name in (
        "ln",
        "log",
        "exp",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "gcd",
        "lcm",
        "max",
        "min",
    )
} | {"ln", "log", "exp", "sin", "cos", "tan", "sqrt"}
FENCES = {"\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "(": ")", "{": "}", "[": "]"}
PARTS = re.compile(
    r"\\(?:cup|cap|leq?|geq?|lt|gt|in|pm|mid|infty)(?![A-Za-z])|[,;<>=|\n]|(?<![A-Za-z])(?:or|and)(?![A-Za-z])"
)


class _Malformed(Exception):
    pass


@lru_cache(maxsize=4096)
def well_formed(text: str) -> bool:
    """Whether all of `text`, in the form that `notation.plain` gives, is one expression."""
    try:
        parser = _Parser(text)
        parser.sum()
        return parser.ended
    except (_Malformed, RecursionError):
        return False


@lru_cache(maxsize=4096)
def well_formed_parts(text: str) -> bool:
    """Whether every element of a list, set, point, interval, union or chain of inequalities is an expression."""
    parts = [part.strip() for part in PARTS.split(text)]
    return any(parts) and all(
        not part or well_formed(part) or well_formed(inside(part)) or not inside(part) for part in parts
    )


def inside(part: str) -> str:
    """A part of a collection without the bracket that opens or closes the collection."""
    return re.sub(r"^(?:\\?\{|[(\[+-])\s*|\s*(?:\\?\}|[)\]])$", "", part)


class _Parser:
    """Recursive descent over the tokens of a text; raises _Malformed where they are no expression."""

    def __init__(self, text: str) -> None:
        self.tokens = [(str(found.lastgroup), found[found.lastgroup or 0]) for found in TOKEN.finditer(text)]
        self.at = 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.tokens)

    @property
    def token(self) -> str:
        return "" if self.ended else self.tokens[self.at][1]

    @property
    def kind(self) -> str:
        return "" if self.ended else self.tokens[self.at][0]

    def take(self, *wanted: str) -> bool:
        if self.token and self.token in wanted:
            self.at += 1
            return True
        return False

    def demand(self, wanted: str) -> None:
        if not self.take(wanted):
            raise _Malformed

    def sum(self) -> None:
        self.take("+", "-")
        self.product()
        while self.take("+", "-"):
            self.product()

    def product(self) -> None:
        self.power()
        while True:
            if self.take("*", "/"):
                self.take("-")
            elif not (self.token == "(" or self.kind in ("command", "word")) or self.token in FENCES.values():
                return
            self.power()

    def power(self) -> None:
        self.atom()
        if self.take("^"):
            if not self.take("\\circ"):
                self.group()
        else:
            self.take("!")

    def atom(self) -> None:
        token, kind = self.token, self.kind
        self.at += 1
        if kind == "number":
            return
        if token in CONSTANTS or (kind == "word" and len(token) <= 2 and token not in FUNCTIONS):
            if token not in ("e", "i"):
                self.subscript()
        elif token in FENCES and token != "[":
            self.sum()
            self.demand(FENCES[token])
        elif token in TWO_GROUPS:
            self.group()
            self.group()
        elif token == "\\sqrt":
            if self.take("["):
                self.sum()
                self.demand("]")
            self.group()
        elif token in FUNCTIONS:
            self.subscript()
            if self.take("^"):
                self.group()
            self.power()
        else:
            raise _Malformed

    def subscript(self) -> None:
        if self.take("_"):
            self.group()

    def group(self) -> None:
        """What a command takes: a group in brackets, a number or a symbol."""
        if self.token in ("{", "("):
            self.atom()
        elif self.kind in ("number", "word") or self.token in CONSTANTS:
            self.at += 1
        else:
            raise _Malformed
