"""Token ids word by word from a memory, for tokenizers that never merge over a blank between two words.

Most of a data set's words have been seen before, and a look-up is several times cheaper than a byte-pair encoding.
The ids are those of the tokenizer's own call: `splits_at_blanks` says when that holds, and why.
"""

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

LONGEST = 24  # characters; longer words hardly come again
MOST = 200_000  # words kept: some 40 MB

# One text of every class that the patterns of byte-level tokenizers tell apart
_CLASSES = ("ab", "Ab", "12", "1", "!?", "'s", "漢字", "é", "e\u0301", "\u0301", "😀", "_x", "(a", "a)", "$5", "٣", "ª")


class WordEncoder:
    """Encodes texts with `backend` (a `tokenizers.Tokenizer`); the caller has checked `splits_at_blanks`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._words: dict[str, list[int]] = {}  # ids of a word and the blank before it

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, without special tokens. What a text begins with, and unseen words, go to the tokenizer."""
        if len(self._words) > MOST:
            self._words.clear()
        known = self._words
        direct: dict[str, int] = {}  # texts for the tokenizer, with their places in its batch
        unseen: dict[str, None] = {}
        parts = []  # of each text: its beginning, words, its end
        for text in texts:
            first, *words = text.split(" ")
            # White space at the end of a text stands beside no blank
            last = " " + words.pop() if words and words[-1][-1:].isspace() and not words[-1][0].isspace() else ""
            new = [word for word in words if word not in known]
            if first[-1:].isspace() or any(not word or word[0].isspace() or word[-1].isspace() for word in new):
                first, words, last = text, [], ""  # white space beside a blank, which the tokenizer may take together
            else:
                unseen.update(dict.fromkeys(new))
            parts.append((direct.setdefault(first, len(direct)), words, direct.setdefault(last, len(direct))))
        encoded = self._call([*direct, *(f" {word}" for word in unseen)])
        known.update(zip(unseen, encoded[len(direct) :], strict=True))
        look_up = known.__getitem__
        result = [
            list(chain(encoded[first], chain.from_iterable(map(look_up, words)), encoded[last]))
            for first, words, last in parts
        ]
        for word in unseen:
            if len(word) > LONGEST:
                del known[word]
        return result

    def _call(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def splits_at_blanks(backend: Any) -> bool:
    """Whether a single blank between two characters that are no white space always begins a new piece.

    Then byte-pair encoding cannot reach over it, and the ids of a text are those of its words, each with the blank
    before it. It holds where the text is not rewritten across a blank (no normalizer, or NFC), byte-level pieces are
    cut by a pattern that looks at what follows only, the pattern cuts there for every class of characters, and no
    added token holds or swallows a blank.
    """
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    if any(step["type"] != "NFC" for step in steps_of(backend.normalizer, "normalizers")):
        return False
    *before, last = steps_of(backend.pre_tokenizer, "pretokenizers") or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if any(step["type"] not in ("Split", "Digits") or "(?<" in str(step.get("pattern")) for step in before):
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(" " in token.content or token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    cut = backend.pre_tokenizer.pre_tokenize_str
    return all(
        any(span[0] == len(left) for _, span in cut(f"{left} {right}")) for left in _CLASSES for right in _CLASSES
    )


def steps_of(part: Any, name: str) -> list[dict[str, Any]]:
    """The settings of a normalizer's or pre-tokenizer's steps, which may be none, one, or sequences of sequences."""
    waiting = [json.loads(part.__getstate__())] if part is not None else []
    steps = []
    while waiting:
        step = waiting.pop(0)
        if name in step:
            waiting = [*step[name], *waiting]
        else:
            steps.append(step)
    return steps
