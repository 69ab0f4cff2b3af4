"""A GRPO job from its start to its result, as one of its processes: model, prompts, rewards, trainer, adapter."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from opensloth import log
from opensloth.config.jobs import GrpoJob
from opensloth.data.models.resolve import ModelRef
from opensloth.data.plan.batches import Batches, lay_out
from opensloth.data.prepared.directory import Prepared
from opensloth.data.tokens.prompts import PromptRow
from opensloth.data.tokens.stop import stop_ids
from opensloth.engine import Engine, attention, choose, load, native, policy
from opensloth.engine.fill import Sizes
from opensloth.errors import UserError
from opensloth.rewards import choose as rewards
from opensloth.rewards.gold import FAILURES
from opensloth.rewards.registry import OF_ANSWERS
from opensloth.rollout.graph import GraphDecoder
from opensloth.rollout.recorded import recorded
from opensloth.rollout.room import Room
from opensloth.rollout.sampling import Sampling
from opensloth.rollout.vllm import VllmWriter
from opensloth.training import plan
from opensloth.training.grpo import group_trainer, held_out
from opensloth.training.grpo.advice import Advice
from opensloth.training.grpo.completing import completions_of, room_for_rollouts, writer
from opensloth.training.grpo.metrics import BatchesMetrics
from opensloth.training.grpo.micro_batches import Cutter
from opensloth.training.grpo.plain_trl import grpo_config
from opensloth.training.grpo.prompts import Prompts
from opensloth.training.grpo.sizes import Batch, sizes_of_packs
from opensloth.training.place import Place
from opensloth.training.rehearsal import Attempt, rehearse
from opensloth.training.run import DueEvaluation, run_files, seed_of, train_to_the_end
from opensloth.training.trl_args import Frame, grpo_args


def train(run_dir: Path, job: GrpoJob, ref: ModelRef, prepared: Prepared, place: Place) -> None:
    """Train, or go on, until the last step. Rank 0 leaves the adapter and result.json.

    Raises:
        UserError: the model, the data or the rewards cannot be trained with as asked; with `--zero-signal stop`, a run
            that learns nothing.
        WorkerFailed: a loss that is not a number, a reward that fails.
        RunStopped: a signal; the last step is saved.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # that rollout_func may change
    seed = seed_of(job, prepared)
    laid_out = lay_out(prepared, job, seed=seed, processes=place.processes, left_out=left_out(run_dir))
    longest = int(prepared.lengths.max()) + job.max_new
    packing = bool(prepared.manifest.options["packing"])
    engine = load(job, ref, seed=seed, device=place.device, packing=packing, longest=longest)
    decoder = writer(job, ref, engine, place, longest)
    evaluates = bool(prepared.is_eval.any())
    room = room_for_rollouts(job, engine, decoder, place, longest, evaluates) if decoder else None
    chosen = plan.choose(engine, job, place.device, longest=longest, kept=room.kept if room else 0)
    if place.leads:
        for line in [*engine.notes, *plan.describe_batches(laid_out, job, chosen, place.processes)]:
            log.say(line)
    pack_tokens = chosen.pack_tokens
    if engine.packs_natively and job.batch_size is None:
        attempt = largest_pack(engine, scores(engine), longest - job.max_new, job.max_new, place.device)
        pack_tokens = rehearse(engine, chosen, longest, place.device, attempt, room.kept if room else 0)
    if choose.compilation(job, place.device, engine.packs_natively, tokens=0).value == "on":
        engine.compile(dynamic=True)
    batch = Batch(longest, completions_of(job, place), room)
    sizes = sizes_of_packs(engine, job, place, replace(chosen, pack_tokens=pack_tokens), batch)
    cutter = Cutter(
        group=job.group_size if attention.shares(place.device) else 1,
        pack_tokens=sizes.largest if sizes else pack_tokens,
        batch_size=job.batch_size,
        packs=engine.packs_natively,
        sizes=sizes,
    )
    run = describe_run(run_dir, job, ref, prepared, engine, laid_out, place, decoder, room, cutter)
    trainer = build_trainer(run, job, prepared, engine, chosen.checkpointing, place)
    if job.beta and job.full_finetuning:
        add_reference(trainer, job, ref, engine)
    if isinstance(decoder, VllmWriter):
        if place.leads:
            log.say("vLLM starts, which takes a minute")
        decoder.start(engine.model)
    updates = job.updates_per_batch
    advice = Advice(
        stop=job.zero_signal == "stop",
        speaks=place.leads,
        judges=not OF_ANSWERS.isdisjoint(trainer.reward_func_names),
        max_new=job.max_new,
        every=updates,
    )
    trainer.add_callback(advice)

    def finish(seconds: float) -> dict[str, Any]:
        if advice.stopped:
            raise UserError(advice.stopped, "The last step is saved; --zero-signal warn goes on.")
        return held_out.figures(trainer, seconds)

    train_to_the_end(trainer, job, run_dir, place, finish, every=updates)


def scores(engine: Engine, sizes: Sizes | None = None) -> Callable[..., policy.TokenScores]:
    """The log-probabilities of completions, as the engine can. Packs that train are filled up to `sizes`."""
    if engine.packs_natively:
        return partial(policy.packed, head=engine.head, sizes=sizes)
    return partial(policy.padded, head=engine.head)


def largest_pack(
    engine: Engine, scores: Callable[..., policy.TokenScores], prompt: int, max_new: int, device: torch.device
) -> Attempt:
    """As many completions of `max_new` tokens as fit behind the longest prompt."""

    def attempt(tokens: int) -> torch.Tensor:
        count = max((tokens - prompt) // max_new, 1)
        ids = torch.full((count, prompt + max_new), engine.pad_id, device=device)
        return scores(engine.model, ids, torch.ones_like(ids), max_new, 1.0).logps.sum()

    return attempt


def left_out(run_dir: Path) -> set[int]:
    """The rows whose own answer the rewards misjudge, as the check before this run found them."""
    path = run_dir / FAILURES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {int(json.loads(line)["row_id"]) for line in lines}


def held_out_prompts(run_dir: Path, prepared: Prepared) -> list[PromptRow]:
    """What the run is measured on: no answer to a misjudged row could be right."""
    held = [prepared.rows.prompt(int(row)) for row in np.flatnonzero(prepared.is_eval)]
    misjudged = left_out(run_dir)
    return [prompt for prompt in held if prompt.row_id not in misjudged]


def describe_run(
    run_dir: Path,
    job: GrpoJob,
    ref: ModelRef,
    prepared: Prepared,
    engine: Engine,
    laid_out: Batches,
    place: Place,
    decoder: GraphDecoder | VllmWriter | None,
    room: Room | None,
    cutter: Cutter,
) -> group_trainer.Run:
    held = held_out_prompts(run_dir, prepared)
    return group_trainer.Run(
        files=run_files(run_dir, job, ref, prepared, engine),
        prompts=Prompts(prepared, laid_out, job.group_size, place.rank, place.processes),
        contract=prepared.contract,
        tokenizer=engine.tokenizer,
        scores=scores(engine, cutter.sizes),
        cutter=cutter,
        sampling=Sampling(job.temperature, job.top_p, job.top_k, job.min_p),
        max_new=job.max_new,
        stops=stop_ids(engine.tokenizer, prepared.contract, job.stop),
        pad=engine.pad_id,
        seed=seed_of(job, prepared),
        write=recorded(run_dir, place.rank, decoder),
        at_once=room.rows if room else None,
        release=decoder.release if isinstance(decoder, GraphDecoder) and room and not room.stays else None,
        evaluates=bool(held),
        held_out=held[place.rank :: place.processes],
        columns=prepared.rows.prompt_columns() - group_trainer.NOT_FOR_REWARDS,
    )


def build_trainer(
    run: group_trainer.Run, job: GrpoJob, prepared: Prepared, engine: Engine, checkpointing: str, place: Place
) -> Any:
    frame = Frame(
        run_dir=run.files.directory,
        steps=run.prompts.plan.steps,
        seed=run.seed,
        device=place.device,
        engine=engine,
        checkpointing=checkpointing,
        evaluates=run.evaluates,
        backend=place.backend,
        processes=place.processes,
        recorded=run.cutter.sizes is not None,
    )
    judges = rewards.chosen(job, prepared.contract.tags)
    # TRL counts a completion as cut unless it ends with one of these
    model: Any = engine.model
    model.generation_config.eos_token_id = run.stops
    rows = Dataset.from_list([{"prompt": ""}])  # TRL wants one; the prompts come from our loader
    trainer = group_trainer.trainer_class()(
        run=run,
        model=engine.model,
        reward_funcs=[judge.function for judge in judges],
        args=grpo_config()(**grpo_args(job, frame, [judge.weight for judge in judges])),
        train_dataset=rows,
        eval_dataset=rows if run.evaluates else None,
        processing_class=engine.tokenizer,
    )
    if place.leads:
        board = "tensorboard" in job.report_to
        trainer.add_callback(BatchesMetrics(run.files.directory, run.prompts.plan, job.group_size, place.device, board))
    if run.evaluates:
        trainer.add_callback(DueEvaluation(trainer, first=True))
    return trainer


def add_reference(trainer: Any, job: GrpoJob, ref: ModelRef, engine: Engine) -> None:
    """Where all weights train, the reference of the KL is a second, frozen copy of the model that the run starts from.

    TRL would load it by the name in the config: another revision, perhaps, and with another attention.
    """
    reference = native.load_base(job, ref, engine.dtype, trainer.args.device)
    native.set_attention(reference, engine.packs_natively)
    trainer.ref_model = reference.requires_grad_(False).eval()
    trainer.beta = job.beta
