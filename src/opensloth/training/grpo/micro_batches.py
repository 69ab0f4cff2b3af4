"""A batch of completions, cut into what goes through the model at once; and what each part's loss weighs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opensloth.data.plan.schedule import padded_batches
from opensloth.training.load import Load

Sizes = NDArray[np.int64]
Micro = tuple[list[int], float]  # places of completions, and the weight of their loss


def cut(
    prompts: Sizes,
    completions: Sizes,
    *,
    group: int,
    pack_tokens: int,
    batch_size: int | None,
    packs: bool,
) -> list[list[int]]:
    """Micro-batches of whole completions, by their places.

    Args:
        prompts, completions: tokens of each; `group` completions that follow each other have the same prompt.
        pack_tokens, batch_size: the size of a micro-batch, in tokens, or in completions where that is set.
        packs: False where rows are padded to the longest of a micro-batch.
    """
    places = list(range(len(prompts)))
    if batch_size is not None:
        return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    if not packs:
        return padded_batches(np.array(places), prompts + completions, pack_tokens)
    parts: list[list[int]] = []
    room = 0
    for place in places:
        new_prompt = not parts or parts[-1][-1] // group != place // group
        cost = int(completions[place] + (prompts[place] if new_prompt else 0))
        if cost > room:  # a prompt is paid for once in each micro-batch that has completions of it
            parts.append([])
            room, cost = pack_tokens, int(prompts[place] + completions[place])
        parts[-1].append(place)
        room -= cost
    return parts


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
        again: tokens of `AGAIN`.
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


def load_of(
    parts: Sequence[list[int]], prompts: Sizes, completions: Sizes, *, group: int, pack_tokens: int | None, packs: bool
) -> Load:
    """What the model computes in these micro-batches. `pack_tokens` is None where they are cut by completions."""
    tokens = slots = room = 0
    for places in parts:
        if packs:  # a prompt lies in a pack once, before the first completion of its group
            heads = [place for at, place in enumerate(places) if not at or places[at - 1] // group != place // group]
            real = width = int(completions[places].sum() + prompts[heads].sum())
        else:
            lengths = prompts[places] + completions[places]
            real, width = int(lengths.sum()), len(places) * int(lengths.max())
        tokens, slots, room = tokens + real, slots + width, room + max(width, pack_tokens or 0)
    return Load(tokens, slots, room)


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
