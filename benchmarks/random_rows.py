"""Texts of random words whose lengths in tokens are log-normal, for measurements of speed. Seeded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Rows:
    """How many, and how long. `lengths` of a row: exp of a normal with mean log(median) and `spread`."""

    count: int = 1536
    median: float = 492.7  # exp(6.2)
    spread: float = 0.7
    shortest: int = 32
    longest: int = 2048


SMALL = Rows(count=64, median=40, shortest=8, longest=128)


def write_rows(tokenizer: Path, target: Path, rows: Rows, seed: int = 0) -> None:
    """Texts of random words that are a token each, so that a row has the wanted length; the end token is its last."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer))
    single = [reader.decode([token]) for token in range(reader.get_vocab_size())]
    words = [word for word in single if re.fullmatch(" [a-z]+", word) and len(reader.encode(word).ids) == 1]
    chance = np.random.default_rng(seed)
    lengths = chance.lognormal(np.log(rows.median), rows.spread, rows.count)
    lengths = np.clip(lengths, rows.shortest, rows.longest).astype(int)
    with target.open("w", encoding="utf-8") as file:
        for length in lengths:
            text = "".join(words[at] for at in chance.integers(len(words), size=length - 1))
            file.write(json.dumps({"text": text}) + "\n")
