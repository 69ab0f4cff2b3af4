"""The loader of GRPO: each item is one process's prompts of a batch of completions, each `--group-size` times."""

from typing import TypedDict

from torch.utils.data import DataLoader, Dataset

from opensloth.data.plan.batches import Batches
from opensloth.data.prepared.directory import Prepared
from opensloth.data.tokens.prompts import PromptRow


class Asked(TypedDict):
    """One process's share of a batch. `slots` are the places of its completions in the whole batch."""

    number: int
    prompts: list[PromptRow]
    slots: list[int]


class Prompts(Dataset[Asked]):
    """Item n is what optimizer step n trains on."""

    def __init__(self, prepared: Prepared, plan: Batches, group_size: int, rank: int, processes: int) -> None:
        self.prepared = prepared
        self.plan = plan
        self.group_size = group_size
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Asked:
        if step >= len(self):
            raise IndexError(step)
        number = self.plan.at(step)
        rows = self.plan.share(number, self.rank, self.processes)
        prompts = [self.prepared.rows.prompt(int(row)) for row in rows]
        first = self.rank * len(rows) * self.group_size
        repeated = [prompt for prompt in prompts for _ in range(self.group_size)]
        return Asked(number=number, prompts=repeated, slots=list(range(first, first + len(repeated))))

    def loader(self) -> DataLoader[Asked]:
        """In order, one batch an item. Resuming skips indices."""
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])
