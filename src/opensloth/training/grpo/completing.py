"""What completes prompts in a run, and the room that this takes of a card."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from opensloth.config.jobs import GrpoJob
from opensloth.data.models.resolve import ModelRef
from opensloth.engine import Engine, memory
from opensloth.errors import UserError
from opensloth.rollout import room as rooms
from opensloth.rollout.decode import why_not
from opensloth.rollout.generate import bytes_of_row
from opensloth.rollout.graph import GraphDecoder
from opensloth.rollout.room import Room
from opensloth.rollout.store import positions_of_row
from opensloth.rollout.vllm import VllmWriter, room_of
from opensloth.training.place import Place


def writer(job: GrpoJob, ref: ModelRef, engine: Engine, place: Place, longest: int) -> GraphDecoder | VllmWriter | None:
    """What completes prompts, of at most `longest` tokens with what is written; None: rollout.generate chooses.

    Where transformers' own `generate` is left, which is slower, a note of the engine says why.

    Raises:
        UserError: `--rollout graph` was asked for and cannot serve the model.
    """
    if job.rollout == "vllm":
        there = Path(ref.base).is_dir()
        source = ref.base if there else snapshot_download(ref.base, revision=ref.revision, local_files_only=True)
        return VllmWriter(source, engine.tokenizer, longest, completions_of(job, place), job.trust_remote_code)
    if engine.name != "native":
        reason = f"engine {engine.name} brings its own"
    elif reason := why_not(engine.model, longest):
        engine.notes.append(f"completions come from transformers' own generate: {reason}")
    elif job.load_in_8bit and place.device.type == "cuda":
        # LLM.int8 looks for outliers on the host at every layer, and what waits for the card cannot be recorded
        reason = "8-bit kernels cannot be recorded"
    if job.rollout == "graph" and reason:
        config: Any = engine.model.config
        raise UserError(
            f"--rollout graph cannot serve {config.model_type}: {reason}.",
            "Use --rollout generate (or auto) with this one.",
        )
    wanted = job.rollout == "graph" or (job.rollout == "auto" and place.device.type == "cuda")
    return GraphDecoder(longest=longest - job.max_new) if wanted and not reason else None


def room_for_rollouts(
    job: GrpoJob,
    engine: Engine,
    decoder: GraphDecoder | VllmWriter,
    place: Place,
    longest: int,
    held_out_too: bool,
) -> Room | None:
    """What completions take of a card; None on a CPU. What merging keeps is laid aside first."""
    free = memory.free_bytes(place.device)
    if free is None:
        return None
    config: Any = engine.model.config
    itemsize = engine.dtype.itemsize
    completions = completions_of(job, place)
    if isinstance(decoder, VllmWriter):
        total = torch.cuda.get_device_properties(place.device).total_memory
        weights = memory.Shape.of(config).parameters * itemsize
        room = room_of(completions, bytes_of_row(config, longest, itemsize), weights, total)
        decoder.share = room.kept / total
    else:
        decoder.merge.save(engine.model)
        state = memory.estimate(config, job, itemsize).adapter  # gradients and moments, which are yet to come
        share = 1.0 if held_out_too else 1 / job.group_size  # held-out prompts are completed once each
        positions = positions_of_row(longest - job.max_new, job.max_new, share, place.device, config)
        left = max((memory.free_bytes(place.device) or 0) - state, 0)
        room = rooms.choose(completions, bytes_of_row(config, positions, itemsize), left)
    engine.notes.append(str(room))
    return room


def completions_of(job: GrpoJob, place: Place) -> int:
    """Completions of a batch on each process."""
    return job.prompts_per_step * job.group_size // place.processes
