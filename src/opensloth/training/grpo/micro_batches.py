"""A batch of completions, cut into what goes through the model at once; and what each part's loss weighs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opensloth.data.plan.schedule import padded_batches
from opensloth.engine.fill import Need, Sizes
from opensloth.training.load import Load

Lengths = NDArray[np.int64]
Micro = tuple[list[int], float]  # places of completions, and the weight of their loss


@dataclass(frozen=True)
class Cutter:
    """Cuts a batch into micro-batches of whole completions.

    Attributes:
        group: completions that follow each other, have the same prompt and share it in a pack.
        pack_tokens, batch_size: the size of a micro-batch, in tokens, or in completions where that is set.
        packs: False where rows are padded to the longest of a micro-batch.
        sizes: that packs are filled up to, where they are: then `pack_tokens` is that of the largest.
    """

    group: int
    pack_tokens: int
    batch_size: int | None
    packs: bool
    sizes: Sizes | None = None

    def expect(self, prompts: Lengths, completions: Lengths) -> None:
        """Make room for packs of a batch, given the tokens of each of its prompts and completions."""
        if self.sizes is not None:
            room = Need(self.sizes.largest, sys.maxsize, sys.maxsize)
            parts = self.dealt(prompts, completions, room)
            self.sizes.expect([self.need(part, prompts, completions) for part in parts])

    def cut(self, prompts: Lengths, completions: Lengths) -> list[list[int]]:
        """Places of the completions of each micro-batch, given the tokens of each prompt and completion."""
        places = list(range(len(prompts)))
        if self.batch_size is not None:
            return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
        if not self.packs:
            return padded_batches(np.array(places), prompts + completions, self.pack_tokens)
        if self.sizes is None:
            return self.dealt(prompts, completions, Need(self.pack_tokens, sys.maxsize, sys.maxsize))
        fewest = self.dealt(prompts, completions, self.sizes.all[-1].room)
        tokens = self.need(places, prompts, completions).tokens
        for size in self.sizes.all:  # as few, of equal size
            if size.room.tokens * len(fewest) >= tokens:
                parts = self.dealt(prompts, completions, size.room)
                if len(parts) == len(fewest):
                    return parts
        return fewest

    def dealt(self, prompts: Lengths, completions: Lengths, room: Need) -> list[list[int]]:
        """Packs of completions in their order, none with more than there is room for but one that is itself more."""
        parts: list[list[int]] = []
        taken = Need(0, 0, 0)
        for place, (prompt, completion) in enumerate(zip(prompts.tolist(), completions.tolist(), strict=True)):
            # a prompt is paid for once in each micro-batch that has completions of it
            shares = bool(parts) and parts[-1][-1] // self.group == place // self.group
            more = taken.plus(Need(completion, 1, prompt) if shares else Need(prompt + completion, 1, 0))
            if not parts or not more.within(room):
                parts.append([])
                more = Need(prompt + completion, 1, 0)
            parts[-1].append(place)
            taken = more
        return parts

    def need(self, places: Sequence[int], prompts: Lengths, completions: Lengths) -> Need:
        """What these completions take of one pack: a prompt lies in it once, before the first of its group."""
        heads = [p for at, p in enumerate(places) if not at or places[at - 1] // self.group != p // self.group]
        own = int(prompts[heads].sum())
        return Need(int(completions[places].sum()) + own, len(places), int(prompts[places].sum()) - own)

    def load(self, parts: Sequence[list[int]], prompts: Lengths, completions: Lengths) -> Load:
        """What the model computes in these micro-batches."""
        tokens = slots = room = 0
        for places in parts:
            if self.packs:
                need = self.need(places, prompts, completions)
                size = self.sizes.smallest(need) if self.sizes else None
                real, width = need.tokens, size.tokens if size else need.tokens
            else:
                lengths = prompts[places] + completions[places]
                real, width = int(lengths.sum()), len(places) * int(lengths.max())
            tokens, slots = tokens + real, slots + width
            room += max(width, self.pack_tokens if self.batch_size is None else 0)
        return Load(tokens, slots, room)


def weighted(parts: Sequence[list[int]], batch: Mapping[str, torch.Tensor], loss: str, processes: int) -> list[Micro]:
    """The parts with what makes TRL's loss of each its share of the mean over all completions.

    TRL averages over the completions ("grpo", "dr_grpo") or the tokens ("bnpo") of a micro-batch; its "dapo" already
    divides by the tokens of the whole batch. DDP then takes the mean over processes.
    """
    mask = batch["completion_mask"]

    def weight(rows: list[int]) -> float:
        if loss == "dapo":
            return 1.0
        if loss == "bnpo":
            return float(mask[rows].sum() * processes / batch["num_items_in_batch"])
        return len(rows) / len(mask)

    return [(rows, weight(rows)) for rows in parts]


STAND_IN = 2.0**80  # its multiples, as float64, stand for figures that the card has yet to compute
AGAIN: Micro = ([0], 0.0)  # processes that lack a micro-batch run a completion of theirs again, with no weight


class Share(NamedTuple):
    """What one process says of its completions before it trains on them.

    Attributes:
        parts: micro-batches.
        again: tokens that the model computes of `AGAIN`.
        seconds: how long its completions took.
    """

    parts: int
    load: Load
    again: int
    seconds: float

    def with_as_many_as(self, parts: int) -> Load:
        """Its load where it runs so many micro-batches."""
        more = (parts - self.parts) * self.again
        return self.load._replace(slots=self.load.slots + more, room=self.load.room + more)


class StepFigures:
    """While it lasts, what TRL logs of each micro-batch; on leaving, one figure of the whole step in its place.

    TRL takes the mean over micro-batches of what it logs, as if they had equally many tokens, and gathers one number a
    completion as if those of all processes had equally many completions. It also waits for the card at each figure,
    before the backward pass is asked for: here it gets a stand-in, and the figures are read once the step is through.

    Attributes:
        sums, rows: what a stand-in is for: a sum over tokens and their number, or one number a completion.
        batch: the micro-batch of a stand-in, from 0.
        figures: means that stand-ins turned out to be.
    """

    def __init__(self, accelerator: Any, metrics: dict[str, list[float]], completions: int) -> None:
        self.accelerator, self.metrics, self.completions = accelerator, metrics, completions
        self.gather, self.reduce = accelerator.gather, accelerator.reduce
        self.before = {name: len(values) for name, values in metrics.items()}
        self.sums: dict[float, torch.Tensor] = {}
        self.rows: dict[float, torch.Tensor] = {}
        self.batch: dict[float, int] = {}
        self.figures: dict[float, float] = {}
        self.batches = 0
        self.counts = True

    def begin(self, weight: float) -> None:
        """The next micro-batch. One without weight is a completion that a process runs again."""
        self.counts = weight != 0
        self.batches += 1

    def stand_in(self) -> float:
        """A number that no figure is."""
        number = STAND_IN * (1 + len(self.batch))
        self.batch[number] = self.batches - 1
        return number

    def gather_later(self, numbers: torch.Tensor) -> Any:
        """Up to `completions` numbers of each process, filled up with NaN, which are left out."""
        if numbers.dim() == 0:
            return self.gather(numbers)
        number = self.stand_in()
        full = numbers.new_full((self.completions,), float("nan"))
        full[: len(numbers)] = numbers
        self.rows[number] = full
        return torch.tensor([number], dtype=torch.float64)

    def reduce_later(self, numbers: torch.Tensor, reduction: str) -> Any:
        """A sum over tokens and their number, over all processes."""
        number = self.stand_in()
        self.sums[number] = numbers.detach() * self.counts
        return torch.tensor([number, 1.0], dtype=torch.float64)

    def __enter__(self) -> "StepFigures":
        self.accelerator.gather, self.accelerator.reduce = self.gather_later, self.reduce_later
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.accelerator.gather, self.accelerator.reduce = self.gather, self.reduce
        if error is not None:
            return
        tokens = self.read_sums()
        least, most = self.read_rows()
        for name, values in self.metrics.items():
            start = self.before.get(name, 0)
            if len(values) - start == self.batches:
                known = self.figures | (least if name.endswith("_min") else most)
                values[start:] = [of_step(name, [known.get(value, value) for value in values[start:]], tokens)]

    def read_sums(self) -> list[float]:
        """Find the means of all stand-ins in one transfer. Returns the tokens of each micro-batch, of all processes."""
        tokens = [0.0] * self.batches
        if self.sums:
            totals = self.reduce(torch.stack(list(self.sums.values())), reduction="sum")
            means = totals[:, 0] / totals[:, 1].clamp(min=1.0)
            for number, (mean, count) in zip(self.sums, torch.stack([means, totals[:, 1]], 1).tolist(), strict=True):
                self.figures[number], tokens[self.batch[number]] = mean, count
        return tokens

    def read_rows(self) -> tuple[dict[float, float], dict[float, float]]:
        """The least and the most of all completions for each stand-in; NaN where there are none."""
        if not self.rows:
            return {}, {}
        found = self.gather(torch.stack(list(self.rows.values()), 1))
        none = found.isnan()
        least = found.masked_fill(none, torch.inf).amin(0).masked_fill(none.all(0), torch.nan)
        most = found.masked_fill(none, -torch.inf).amax(0).masked_fill(none.all(0), torch.nan)
        low, high = torch.stack([least, most]).tolist()
        return dict(zip(self.rows, low, strict=True)), dict(zip(self.rows, high, strict=True))


def of_step(name: str, values: Sequence[float], tokens: Sequence[float]) -> float:
    """One figure of several micro-batches: the least, the most, or the mean over all tokens."""
    if name.endswith("_min"):
        return min(values)
    if name.endswith("_max"):
        return max(values)
    return sum(value * count for value, count in zip(values, tokens, strict=True)) / max(sum(tokens), 1.0)
