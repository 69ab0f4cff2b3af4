"""What a prepared directory holds, in figures: what `os-data` prints when it is done, and `os-data show` first."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensloth.data.prepared.directory import Prepared


@dataclass(frozen=True)
class Summary:
    """The figures of prepared data.

    Attributes:
        longest: tokens of the longest row, or prompt.
        padding: the share of the planned packs' room that no token fills, or None without packing.
        shard_tokens: tokens of each shard, train and eval split together.

    Data for GRPO has no packs: `packs` counts its prompts, and nothing of it is trained.
    """

    directory: Path
    method: str
    rows_in: int
    rows_kept: int
    eval_rows: int
    dropped: dict[str, int]
    truncated: int
    duplicates: int
    tokens: int
    trained_tokens: int
    longest: int
    packs: int
    pack_capacity: int
    padding: float | None
    shard_tokens: list[int]

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each figure, as people read them."""
        grpo = self.method == "grpo"
        rows = f"{self.rows_kept:,} of {self.rows_in:,}"
        if self.eval_rows:
            rows += f", {self.eval_rows:,} of them " + ("held out" if grpo else "for the eval loss")
        lines = [("prompts" if grpo else "rows", rows)]
        lines += [("dropped", f"{count:,} x {reason}") for reason, count in self.dropped.items()]
        if self.truncated:
            lines.append(("truncated", f"{self.truncated:,} rows were too long and lost their ends"))
        if self.duplicates:
            lines.append(("duplicates", f"{self.duplicates:,} rows repeat another exactly (kept)"))
        return lines + (self._prompt_lines() if grpo else self._token_lines())

    def _prompt_lines(self) -> list[tuple[str, str]]:
        mean = self.tokens / max(self.rows_kept, 1)
        lines = [
            ("prompt tokens", f"{self.tokens:,}, {mean:,.0f} a prompt"),
            ("longest prompt", f"{self.longest:,} tokens"),
        ]
        return [*lines, ("shards", self._shards())] if len(self.shard_tokens) > 1 else lines

    def _token_lines(self) -> list[tuple[str, str]]:
        share = self.trained_tokens / max(self.tokens, 1)
        packs = f"{self.packs:,} of at most {self.pack_capacity:,} tokens"
        if self.padding is not None:
            packs += f", {self.padding:.1%} empty"
        return [
            ("tokens", f"{self.tokens:,}, {self.trained_tokens:,} of them trained ({share:.0%})"),
            ("longest row", f"{self.longest:,} tokens"),
            ("packs", packs),
            ("shards", self._shards()),
        ]

    def _shards(self) -> str:
        shards = f"{len(self.shard_tokens):,}"
        if len(self.shard_tokens) > 1:
            shards += f" of {min(self.shard_tokens):,} to {max(self.shard_tokens):,} tokens"
        return shards


def summarize(prepared: Prepared) -> Summary:
    """Count what is in the plan; reads no token rows."""
    manifest, plan = prepared.manifest, prepared.plan
    packs = int(plan["pack"].max()) + 1
    packing = manifest.options["packing"] and manifest.method == "sft"
    capacity = int(manifest.options["max_seq_length"])
    return Summary(
        directory=prepared.directory,
        method=manifest.method,
        rows_in=manifest.rows_in,
        rows_kept=manifest.rows_kept,
        eval_rows=int(prepared.is_eval.sum()),
        dropped=manifest.dropped,
        truncated=manifest.truncated,
        duplicates=manifest.duplicates,
        tokens=manifest.tokens,
        trained_tokens=manifest.trained_tokens,
        longest=int(prepared.lengths.max()),
        packs=packs,
        pack_capacity=capacity,
        padding=1 - manifest.tokens / (packs * capacity) if packing else None,
        shard_tokens=np.bincount(plan["shard"], weights=plan["length"], minlength=manifest.shards)
        .astype(np.int64)
        .tolist(),
    )
