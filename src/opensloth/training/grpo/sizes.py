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
    largest, graphs = largest_pack(engine, job, place, plan, batch)
    if place.leads:
        log.say(f"CUDA graphs: {graphs.value}, {graphs.why}")
    if not largest:
        return None
    sizes = Sizes(largest, batch.longest, batch.completions, engine.pad_id)
    if place.leads:
        log.say(f"packs are filled up to one of {len(sizes.all)} sizes, of which the largest has {largest:,} tokens")
    engine.record_sizes(sizes, place.say)
    return sizes


def largest_pack(engine: Engine, job: GrpoJob, place: Place, plan: MemoryPlan, batch: Batch) -> tuple[int, Choice]:
    """Tokens of the largest pack that is recorded; 0 where none is, and why."""
    config: Any = engine.model.config
    room = batch.room
    # every process asks all of this, whatever it finds itself
    recordable, stays = all(of_all(engine.packs_natively and engine.recordable)), all(of_all(not room or room.stays))
    slower = any(of_all(matmul.times != 1))
    kept = room.kept if room else 0
    fits = min(of_all(min(plan.pack_tokens, twice(engine, job, place.device, plan.checkpointing, kept))))
    chosen = choose.may_record(job, place.device, recordable)
    if chosen.value == "off":
        return 0, chosen
    if choose.compilation(job, place.device, engine.packs_natively, tokens=0).value == "on":
        return 0, Choice("off", "compiled layers take packs of any size")
    if not stays:
        return 0, Choice("off", "completions need the memory that recordings keep")
    if fits < batch.longest:
        return 0, Choice("off", "there is no memory for two packs at once")
    largest = choose.largest_recorded(Shape.of(config), fits, batch.longest, batch.tokens(job), slower)
    return (largest, chosen) if largest else (0, choose.FAST_HOST)


def twice(engine: Engine, job: GrpoJob, device: torch.device, checkpointing: str, kept: int) -> int:
    """Tokens of a pack that fits twice: recordings keep the memory of one while another size is recorded."""
    config: Any = engine.model.config
    free = memory.free_bytes(device)
    if free is None:
        return sys.maxsize
    return memory.tokens_that_fit(config, job, checkpointing, free - kept, engine.dtype, engine.means) // 2
