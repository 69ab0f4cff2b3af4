"""One way of writing for answers that mean the same: wrappers, LaTeX dress and separators taken off.

Nothing here computes. `plain` gives the text that parsers read; `key` the text by which two answers are the same in
form: `$1{,}000.0$.`, `\\boxed{1000}` and `1,000` all have the key `1000`.
"""

import re
from functools import lru_cache

LETTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "％": "%", "，": ",", "π": "\\pi ",
        "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "±": "\\pm ", "°": "^\\circ ", "²": "^2",
        "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}", "’": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "\u200b": "",
    }
)  # fmt: skip

PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
WRAPPING = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mathit|mbox|displaystyle|operatorname)\s*(?=\{)"
)
INNER_WRAPPING = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
)
EDGES = re.compile(r"^(?:\s|\\[,;:! ]|\\quad|\\displaystyle|~)+|(?:\s|\\[,;:!]|\\ |\\quad|~)+$")
REPLACED = (
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\!|\\displaystyle(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"\\([%$&#_])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\*\*([^*]*[A-Za-z][^*]*)\*\*"), r"\1"),  # bold words; 2**3 is a power
    (re.compile(r"\s+\^"), "^"),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~"), " "),
)
SEPARATED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}([,_' ])\d{3}(?:\1\d{3})*(?![\d_'])(?!\1\d)")
# between brackets a comma parts the elements of a set, a point or an interval
SEPARATED_IN_BRACKETS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}([_' ])\d{3}(?:\1\d{3})*(?![\d_'])(?!\1\d)")
BRACKETED = re.compile(r"(?:[\[({]|\\\{).*[\])}]", re.DOTALL)
PLAIN_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
IDLE_SPACE = re.compile(r"(?<![0-9.])\s+|\s+(?![0-9.\s])")  # not that between two numbers
DECIMAL = re.compile(r"([+-]?)\s*([0-9]*)(?:\.([0-9]*))?")


@lru_cache(maxsize=8192)
def plain(text: str) -> str:
    """`text` without wrappers, LaTeX spacing and thousands separators; in LaTeX where it was in LaTeX."""
    text = text.strip()
    if PLAIN_INTEGER.fullmatch(text):
        return text
    text = unwrap(text.translate(LETTERS))
    if text.count("$") > 1:  # several formulas, or one within words: the signs are no currency
        text = text.replace("$", " ")
    text = INNER_WRAPPING.sub(r" \1 ", text)
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = unwrap(text)
    separated = SEPARATED_IN_BRACKETS if BRACKETED.fullmatch(text) else SEPARATED
    return separated.sub(lambda found: found[0].replace(found[1], ""), text)


@lru_cache(maxsize=8192)
def key(text: str) -> str:
    """What two answers of one form share: `plain` without idle white space, numbers without idle zeros."""
    bare = IDLE_SPACE.sub("", plain(text))
    number = DECIMAL.fullmatch(bare)
    if number is None or not (number[2] or number[3]):
        return bare
    whole, rest = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    sign = "-" if number[1] == "-" and (whole != "0" or rest) else ""
    return f"{sign}{whole}.{rest}" if rest else sign + whole


def unwrap(text: str) -> str:
    """Take off what stands around the whole text: `$..$`, `\\boxed{..}`, braces, bold, a final full stop."""
    while True:
        inner = _unwrap_once(text)
        if inner == text:
            return text
        text = inner


def _unwrap_once(text: str) -> str:
    text = EDGES.sub("", text)
    if text.endswith((".", "。")) and not text.endswith(".."):
        return text[:-1]
    for start, end in PAIRS:
        if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
            inner = text[len(start) : -len(end)]
            if start not in inner and end not in inner:
                return inner
    if wrapping := WRAPPING.match(text):
        return _braces_off(text[wrapping.end() :]) or text
    if text.startswith("(") and text.endswith(")") and re.fullmatch(r"\(\s*(?:[A-Za-z]|[-+]?[\d.]+)\s*\)", text):
        return text[1:-1]
    return _braces_off(text) or text if "," not in text else text


def _braces_off(text: str) -> str | None:
    """The inside of `{...}` where the first brace is closed by the last; None otherwise, or where nothing is inside."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0 and position < len(text) - 1:
            return None
    return text[1:-1] if depth == 0 and text[1:-1].strip() else None
