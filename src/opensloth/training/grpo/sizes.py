"""Whether packs of completions are recorded (engine/graphed.py), and up to which sizes they are filled then."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from opensloth import log
from opensloth.config.jobs import GrpoJob
from opensloth.engine import Engine, choose, matmul, memory
from opensloth.engine.choose import Choice
from opensloth.engine.fill import Sizes
from opensloth.engine.memory import MemoryPlan, Shape
from opensloth.rollout.room import Room
from opensloth.training.everyone import of_all
from opensloth.training.place import Place
from opensloth.training.plan import halvings

SHARES = 3  # of memory: a pack that is recorded, one that is not yet, and keys beyond the tokens of both


@dataclass(frozen=True)
class Batch:
    """What a process trains on at once.

    Attributes:
        longest: tokens of a prompt and its completion at most.
        completions: of a batch, on this process.
        room: what completing takes of the card, where that is known.
    """

    longest: int
    completions: int
    room: Room | None

    def tokens(self, job: GrpoJob) -> int:
        """Of a batch whose prompts and completions are as long as they may be; prompts lie there once a group."""
        return self.completions * job.max_new + self.completions // job.group_size * (self.longest - job.max_new)


def sizes_of_packs(engine: Engine, job: GrpoJob, place: Place, plan: MemoryPlan, batch: Batch) -> Sizes | None:
    """What packs are filled up to, where that pays: their passes are recorded then. The same on every process.

    Args:
        plan: what fits if passes are not recorded.
    """
    once = tokens_that_fit(engine, job, place.device, plan.checkpointing, batch.room.kept if batch.room else 0)
    largest, graphs = choose_largest(engine, job, place, plan, batch, once)
    if place.leads:
        log.say(f"CUDA graphs: {graphs.value}, {graphs.why}")
    if not largest:
        return None
    spare = once / (2 * largest) - 1  # of the memory of a pack's activations, where two packs fit
    most_keys = 1 + spare * keys_of_token(engine, job, plan.checkpointing)
    sizes = Sizes(largest, batch.longest, batch.completions, engine.pad_id, most_keys)
    if place.leads:
        log.say(f"packs are filled up to one of {len(sizes.all)} sizes, of which the largest has {largest:,} tokens")
    engine.record_sizes(sizes, place.say)
    return sizes


def choose_largest(
    engine: Engine, job: GrpoJob, place: Place, plan: MemoryPlan, batch: Batch, once: int
) -> tuple[int, Choice]:
    """Tokens of the largest pack that is recorded; 0 where none is, and why. `once` as `tokens_that_fit`."""
    config: Any = engine.model.config
    # every process asks all of this, whatever it finds itself
    recordable = all(of_all(engine.packs_natively and engine.recordable))
    stays = all(of_all(batch.room is None or batch.room.stays))
    slower = any(of_all(matmul.times != 1))
    fits = min(of_all(min(plan.pack_tokens, once // SHARES)))
    chosen = choose.may_record(job, place.device, recordable)
    if chosen.value == "off":
        return 0, chosen
    if choose.compilation(job, place.device, engine.packs_natively, tokens=0).value == "on":
        return 0, Choice("off", "compiled layers take packs of any size")
    if not stays:
        return 0, Choice("off", "completions need the memory that recordings keep")
    if fits < memory.ROOM * batch.longest:
        return 0, Choice("off", "packs have no room for more than the longest row")
    largest = choose.largest_recorded(Shape.of(config), fits, batch.longest, batch.tokens(job), slower)
    return (largest, chosen) if largest else (0, choose.FAST_HOST)


def tokens_that_fit(engine: Engine, job: GrpoJob, device: torch.device, checkpointing: str, kept: int) -> int:
    """Tokens whose activations fit into the card's memory at once; halved each time that it ran out."""
    config: Any = engine.model.config
    free = memory.free_bytes(device)
    if free is None:
        return sys.maxsize
    found = memory.tokens_that_fit(config, job, checkpointing, free - kept, engine.dtype, engine.means)
    return max(found, 0) >> halvings()


def keys_of_token(engine: Engine, job: GrpoJob, checkpointing: str) -> float:
    """What a token's activations take, as a multiple of what the keys and values of one take in all layers."""
    config: Any = engine.model.config
    shape, itemsize = Shape.of(config), engine.dtype.itemsize
    of_token = memory.estimate_of(config, job, checkpointing, engine.dtype, engine.means).per_token
    return of_token / (itemsize * shape.layers * (shape.heads_width - shape.queries_width))
