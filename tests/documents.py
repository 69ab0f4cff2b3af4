"""What a page of documentation tells its reader to type."""

import re


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands(text: str) -> list[str]:
    """The command lines of its shell blocks, continued lines joined."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]
