"""`--dry-run` before the data is there: its first rows are tokenized and the rest is estimated, nothing is fetched."""

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from opensloth.cli.model_facts import is_local, local_model
from opensloth.config.jobs import DataJob

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import PromptContract

FIRST_ROWS = 1_000
BYTES_PER_TOKEN = 8  # an id and a label, four bytes each
GIB = 2**30

Figures = dict[str, str]


@dataclass(frozen=True)
class Judged:
    """Prepared data as far as it can be foreseen; 0 and None where it cannot.

    Attributes:
        figures: for people, by name.
        rows, tokens: of the whole, estimated unless `whole`.
        whole: all rows were seen.
        longest: tokens of the longest row that was seen.
    """

    figures: Figures
    rows: int = 0
    tokens: int = 0
    longest: int = 0
    contract: "PromptContract | None" = None
    whole: bool = False


def judge(job: DataJob) -> Judged:
    """What preparing `job` would give, by its first rows.

    Raises UserError for an input, mapping or template that preparing would refuse too.
    """
    from opensloth.data.messages.examples import detect_format, parse_mapping
    from opensloth.data.models.resolve import load_tokenizer
    from opensloth.data.prepared.prepare import recipe_for
    from opensloth.data.sources.open import is_path, open_source

    if not is_local(job.input) and not is_path(job.input):
        return Judged({"data": "not estimated: that would fetch the data set from the hub"})
    source = open_source(job.input, split=job.split, subset=job.subset, revision=job.data_revision, samples=job.samples)
    detect_format(source.columns, parse_mapping(list(job.map)), job.method)
    model = local_model(job.model, job.revision)
    if isinstance(model, str):
        return Judged({"data": f"not estimated: {model}"})
    tokenizer = load_tokenizer(model, job.trust_remote_code)
    recipe = recipe_for(job, source, model, tokenizer)
    first = list(islice(source.rows(), FIRST_ROWS))
    kept, dropped = recipe.builder(tokenizer).build(first)
    whole = len(first) < FIRST_ROWS
    rows_in = len(first) if whole else estimated_rows(job, source.size, first[-1].line)
    figures = {"judged by": f"all {len(first):,} rows" if whole else f"the first {len(first):,} rows: an estimate"}
    figures["row format"] = recipe.row_format.name
    unit, ids = ("prompts", "prompt tokens") if job.method == "grpo" else ("rows", "tokens")
    longest = max((len(row.input_ids) for row in kept), default=0)
    if rows_in is None:
        figures[unit] = f"{len(kept):,} of the first {len(first):,}"
        return Judged(figures, longest=longest, contract=recipe.contract)
    share = rows_in / max(len(first), 1)
    rows, tokens = round(len(kept) * share), round(sum(len(row.input_ids) for row in kept) * share)
    about = "" if whole else "about "
    figures[unit] = f"{about}{rows:,} of {rows_in:,}" + (
        f", {round(len(dropped) * share):,} dropped" if dropped else ""
    )
    figures[ids] = f"{about}{tokens:,}"
    if job.method == "grpo":
        figures["longest prompt"] = f"{longest:,} tokens" + ("" if whole else " so far")
        return Judged(figures, rows, tokens, longest, recipe.contract, whole)
    packs = max(math.ceil(tokens / job.max_seq_length), 1) if job.packing else rows
    figures["packs"] = f"about {packs:,} of at most {job.max_seq_length:,} tokens, shards: {job.gpus}"
    figures["disk"] = f"{about}{size(tokens * BYTES_PER_TOKEN)} of prepared data"
    return Judged(figures, rows, tokens, longest, recipe.contract, whole)


def estimated_rows(job: DataJob, known: int | None, last_line: int) -> int | None:
    """Rows of the whole input: as the source knows, else by the size of a plain text file, else None."""
    path = Path(job.input).expanduser()
    if known is None and path.suffix in (".jsonl", ".csv"):
        with path.open("rb") as file:
            read = sum(len(line) for line in islice(file, last_line))
        known = round(path.stat().st_size / max(read, 1) * FIRST_ROWS)
        known = min(known, job.samples) if job.samples else known
    return known


def size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"
