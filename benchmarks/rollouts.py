"""Rollouts of ours alone, called as the trainer calls them: a process of benchmarks/grpo.py.

usage: python benchmarks/rollouts.py JOB.json    (as benchmarks/series.py writes it)

The engine, the decoder and the number of completions at once are those that `os-grpo` chooses for such a step; in the
setting NOT_MERGED alone the adapter stays beside its base. The first calls record graphs and do not count.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import machine
from series import keep_measured

WARM_UP = 2  # calls that do not count
CALLS = 5  # at most, and no more after so many seconds:
ENOUGH_SECONDS = 10
NOT_MERGED = "graph, adapter not merged"


def main() -> None:
    from opensloth import log
    from opensloth.launch.device import claim_device

    log.quiet_libraries()
    device = claim_device()
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch

    from opensloth.training.place import join

    place = join(device)
    for point in job["points"]:
        keep_measured(Path(job["found"]), [point["name"]], lambda point=point: [{"row": measure(job, point, place)}])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(told: dict[str, Any], point: dict[str, Any], place: Any) -> dict[str, Any]:
    """The median of some calls: seconds, and tokens that were made in them."""
    import torch

    from opensloth.config.jobs import GrpoJob
    from opensloth.data.models.resolve import resolve_model
    from opensloth.data.prepared.directory import open_prepared
    from opensloth.data.tokens.stop import stop_ids
    from opensloth.engine import load
    from opensloth.rollout.generate import generate
    from opensloth.rollout.sampling import Noise, Sampling
    from opensloth.training.grpo.run import room_for_rollouts, writer

    prepared = open_prepared(Path(told["data"]))
    group, completions, new = point["group"], point["completions"], point["new_tokens"]
    settings = {
        "data": told["data"],
        "model": told["model_directory"],
        "max_new": new,
        "rollout": point["setting"].split(",")[0],
    }
    job = GrpoJob.model_validate({**settings, "prompts_per_step": completions // group, "group_size": group})
    longest = int(prepared.lengths.max()) + new
    ref = resolve_model(told["model_directory"])
    engine = load(job, ref, seed=0, device=place.device, packing=True, longest=longest)
    decoder = writer(job, ref, engine, place, longest)
    if point["setting"] == NOT_MERGED:
        decoder.merge.save = lambda policy: None  # it then has no layers to merge
    room = room_for_rollouts(job, engine, decoder, place, longest, False) if decoder else None
    at_once = room.rows if room else None
    prompts = [prepared.rows.prompt(row // group).input_ids for row in range(completions)]
    on_card = place.device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    seconds, tokens = [], []
    for call in range(WARM_UP + CALLS):
        begin = time.monotonic()
        made = generate(
            engine.model,
            prompts,
            stops=stop_ids(engine.tokenizer, prepared.contract, ()),
            pad=engine.pad_id,
            max_new=new,
            sampling=Sampling(),
            noise=Noise(0, call, tuple(range(completions))),
            write=decoder,
            batch=at_once,
        )
        if on_card:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begin)
        tokens.append(sum(len(one.ids) for one in made))
        if call >= WARM_UP and sum(seconds[WARM_UP:]) > ENOUGH_SECONDS:
            break
    median = statistics.median(seconds[WARM_UP:])
    return {
        "seconds": round(median, 4),
        "tokens_per_second": round(statistics.fmean(tokens[WARM_UP:]) / median, 1),
        "peak_gib": machine.peak_gib(),
        "first_seconds": round(seconds[0], 2),
        **({"at_once": at_once} if at_once else {}),
        "steps": len(seconds) - WARM_UP,
    }


if __name__ == "__main__":
    main()
