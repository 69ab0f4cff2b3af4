"""What a completion holds: its text, its tags, its solution.

The prompt ends in the tag that opens the working, so a completion begins behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import Tags


@dataclass(frozen=True)
class Reading:
    """`solution` is what stands between the solution tags, None without an opening tag or with several.

    `exact` means that the generation prompt and the completion are one assistant turn and nothing else: each tag once,
    in order, a solution that is not blank, nothing behind it. `missing_or_repeated` counts the tags that do not occur
    exactly once. `closed` is False where the solution has no end tag behind it.
    """

    exact: bool
    missing_or_repeated: int
    solution: str | None
    several: bool
    closed: bool


def read(text: str, tags: "Tags") -> Reading:
    """Find the parts of a completion."""
    counts = [text.count(tag) for tag in (tags.working_end, tags.solution_start, tags.solution_end)]
    again = text.count(tags.working_start)
    several = counts[1] > 1 or counts[2] > 1
    solution, closed = None, False
    if counts[1] and not several:
        rest = text.partition(tags.solution_start)[2]
        solution, end, _ = rest.partition(tags.solution_end)
        closed = bool(end)
    exact = counts == [1, 1, 1] and not again and bool(solution and solution.strip()) and ordered(text, tags)
    return Reading(exact, sum(count != 1 for count in counts) + bool(again), solution, several, closed)


def ordered(text: str, tags: "Tags") -> bool:
    return tags.pattern.fullmatch(tags.working_start + text) is not None


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: itself, or the content of its messages; content may be a list of parts with `text`."""
    if isinstance(completion, str):
        return completion
    return "".join(content_text(message.get("content")) for message in completion)


def content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
