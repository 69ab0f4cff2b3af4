"""Whether packs of completions are recorded (engine/graphed.py), and up to which sizes they are filled then."""

import sys
from typing import Any

import torch

from opensloth import log
from opensloth.config.jobs import GrpoJob
from opensloth.engine import Engine, choose, matmul, memory
from opensloth.engine.choose import Choice
from opensloth.engine.fill import Need, Sizes
from opensloth.engine.memory import MemoryPlan, Shape
from opensloth.rollout.room import Room
from opensloth.training.everyone import of_all
from opensloth.training.place import Place


def choose_sizes(
    engine: Engine,
    job: GrpoJob,
    place: Place,
    plan: MemoryPlan,
    longest: int,
    completions: int,
    room: Room | None,
) -> tuple[Sizes | None, Choice]:
    """The sizes, or None, and why. The same choice on every process.

    Args:
        plan: what fits if passes are not recorded.
        longest: tokens of a prompt and its completion at most.
        completions: of a batch, on this process.
        room: what completing takes of the card, where that is known.
    """
    chosen = choose.may_record(job, place.device, all(of_all(engine.packs_natively and engine.recordable)))
    if chosen.value == "off":
        return None, chosen
    if job.compile == "on":
        return None, Choice("off", "compiled layers take packs of any size")
    if room is not None and not room.stays:
        return None, Choice("off", "completions need the memory that recordings keep")
    config: Any = engine.model.config
    slower = any(of_all(matmul.times != 1))
    kept = room.kept if room else 0
    fits = min(of_all(min(plan.pack_tokens, twice(engine, job, place.device, plan.checkpointing, kept))))
    batch = completions * job.max_new + completions // job.group_size * (longest - job.max_new)
    largest = choose.largest_recorded(Shape.of(config), fits, max(batch, longest), slower)
    sizes = Sizes(largest, longest, completions, engine.pad_id)
    if sizes.smallest(Need(longest, 1, 0)) is None:
        return None, Choice("off", "with this model and packs of this size the host is fast enough")
    return sizes, chosen


def sizes_of_packs(
    engine: Engine, job: GrpoJob, place: Place, plan: MemoryPlan, longest: int, completions: int, room: Room | None
) -> Sizes | None:
    """What packs are filled up to, where that pays: their passes are recorded then. As `choose_sizes`."""
    sizes, graphs = choose_sizes(engine, job, place, plan, longest, completions, room)
    if place.leads:
        log.say(f"CUDA graphs: {graphs.value}, {graphs.why}")
    if sizes is not None:
        if place.leads:
            log.say(f"packs are filled up to one of {len(sizes.all)} sizes, {sizes.largest:,} tokens at most")
        process = "" if place.leads else f"process {place.rank}: "
        engine.record_sizes(sizes, lambda line: log.say(process + line))
    return sizes


def twice(engine: Engine, job: GrpoJob, device: torch.device, checkpointing: str, kept: int) -> int:
    """Tokens of a pack that fits twice: recordings keep the memory of one while another size is recorded."""
    config: Any = engine.model.config
    free = memory.free_bytes(device)
    if free is None:
        return sys.maxsize
    return memory.tokens_that_fit(config, job, checkpointing, free - kept, engine.dtype, engine.means) // 2
