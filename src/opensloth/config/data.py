"""Settings of data preparation: which rows, how they are rendered, cut, packed and divided."""

from opensloth.config.base import Settings, option

OVERLONG = ("drop", "truncate", "error")


class DataOptions(Settings):
    """What `os-data` and `os-train` share."""

    samples: int | None = option(None, "Use only the first N rows.", short="n", shown="all", ge=1)
    split: str = option("train", "The split of a hub data set or saved directory.")
    subset: str | None = option(None, "The subset (configuration) of a hub data set.")
    data_revision: str | None = option(None, "The revision (branch, tag, commit) of a hub data set.")
    map: tuple[str, ...] = option((), "Name the column of a role, as `problem=question`; may be repeated.")
    strict: bool = option(
        False, "Refuse the whole input if any row is bad, instead of dropping and counting it.", off="-"
    )
    chat_template: str = option(
        "auto",
        "auto (the adapter's prompt.json, else the tokenizer's template), chatml, reasoning, or a FILE.jinja.",
    )
    system: str | None = option(None, "The system prompt of conversations that have none.")
    target_only: bool = option(True, "Train on the assistant's turns alone.", off="full-conversation")
    max_seq_length: int = option(2048, "The longest row, and the size of a planned pack, in tokens.", ge=8)
    overlong: str = option("drop", "What to do with a row over --max-seq-length.", choices=OVERLONG)
    packing: bool = option(True, "Put several rows into one pack, with exact boundaries between them.")
    workers: int | None = option(None, "Processes that prepare rows.", short="w", shown="cores", ge=1)
    eval_fraction: float = option(0.0, "The share of rows held out for the eval loss.", ge=0, lt=1)
    seed: int = option(
        3407, "Seeds the order of rows, the eval split, and the adapter's first weights.", ge=0, lt=2**32
    )
