"""A reward that costs nothing and spreads every group, also over completions of random weights: for measuring speed."""

from typing import Any
from zlib import crc32


def spread(completions: list[Any], **_: Any) -> list[float]:
    """A number between 0 and 1 by the text of each completion (a string, or a list of messages)."""
    return [crc32(str(completion).encode()) % 1000 / 1000 for completion in completions]
