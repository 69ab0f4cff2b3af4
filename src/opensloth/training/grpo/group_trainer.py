"""GRPO on TRL's trainer (arXiv 2402.03300): its losses, advantages and metrics, our rollouts, packs and checkpoints.

One item of the loader is one batch of completions, and an optimizer step trains on all of it. Its micro-batches are cut
by tokens; each adds its part to a loss that is averaged over the completions of all processes, so that neither their
number nor that of the micro-batches changes a step.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opensloth.data.prompt.contract import PromptContract
from opensloth.data.tokens.prompts import PromptRow
from opensloth.engine.policy import TokenScores
from opensloth.errors import WorkerFailed
from opensloth.rollout.decode import Halted, never
from opensloth.rollout.generate import Rollout, Write, generate
from opensloth.rollout.sampling import Noise, Sampling
from opensloth.training.costs import Costs
from opensloth.training.everyone import of_all
from opensloth.training.grpo.held_out import HeldOut
from opensloth.training.grpo.host_rows import HostRows, places
from opensloth.training.grpo.importance import Gaps, corrected
from opensloth.training.grpo.micro_batches import AGAIN, Cutter, Micro, Share, StepFigures, weighted
from opensloth.training.grpo.prompts import Asked, Prompts
from opensloth.training.grpo.rollouts import KeepsRollouts
from opensloth.training.load import Load
from opensloth.training.stopping import StopOnSignal
from opensloth.training.trainer import Fault, KeepsRun, RunFiles, kept_weights

NOT_FOR_REWARDS = {"image", "images", "environment"}  # columns that TRL gives a meaning of its own


@dataclass(frozen=True)
class Run:
    """What the trainer needs to know beyond TRL's arguments.

    Attributes:
        scores: engine.policy.packed or padded, as the engine can.
        cutter: of batches into micro-batches. Packs that it fills up are recorded (engine/graphed.py): gradients then
            come beside autograd, where DDP does not see them.
        stops: ids that end a completion.
        evaluates: whether any prompts are held out; `held_out` are those of this process.
        write: what completes a batch, where it is not `--rollout generate`; `at_once` completions, where that is fixed.
        release: frees what completing took, where training needs the room.
        columns: the names of the data's other columns, which the rewards are given.
    """

    files: RunFiles
    prompts: Prompts
    contract: PromptContract
    tokenizer: PreTrainedTokenizerBase
    scores: Callable[..., TokenScores]
    cutter: Cutter
    sampling: Sampling
    max_new: int
    stops: list[int]
    pad: int
    seed: int
    evaluates: bool
    held_out: list[PromptRow]
    write: Write | None
    at_once: int | None
    release: Callable[[], None] | None
    columns: set[str]


def trainer_class() -> type[Any]:
    """Made on request, because `import unsloth` replaces TRL's classes."""
    from opensloth.training.grpo.plain_trl import grpo_trainer

    class GroupTrainer(KeepsRun, KeepsRollouts, HeldOut, grpo_trainer()):  # type: ignore[misc]
        """TRL's trainer; each item of its loader is the prompts of one batch of completions (`prompts.Asked`)."""

        control: Any  # transformers' TrainerControl
        stop: StopOnSignal | None = None

        def __init__(self, run: Run, **arguments: Any) -> None:
            self.run, self.files, self.cutter = run, run.files, run.cutter
            self.since_log = []
            self.costs = Costs(arguments["args"].device)
            self.asked: Asked | None = None
            self.batch: dict[str, Any] = {}
            self.micro_batches: list[Micro] = []
            self.loads: list[Load] = []  # of all processes, in the batch that is trained on
            self.rollout_seconds = 0.0  # of the last completions, on this process
            self.on_host = HostRows()  # the batch's
            self.part: dict[str, torch.Tensor] = {}  # the micro-batch that goes through the model
            self.part_on_host = HostRows()
            self.policy_logps = torch.empty(0)  # of its tokens
            none = -float("inf")
            self.best = self.best_so_far(self.figure, none), self.best_so_far("reward", none)
            put_back = kept_weights(arguments["model"])
            super().__init__(rollout_func=self.roll_out, **arguments)
            put_back()

        def get_train_dataloader(self) -> Any:
            # as it is: accelerate would divide the rank's own prompts among the ranks once more
            return self.run.prompts.loader()

        def training_step(self, model: torch.nn.Module, inputs: Asked, num_items_in_batch: Any = None) -> torch.Tensor:
            """One optimizer step on a batch of completions. Returns its loss; DDP takes the mean over processes."""
            self.ready(model, native=self.cutter.packs)
            self.costs.sync.watch(model)
            fresh = self.asked is None or self.asked["number"] != inputs["number"]
            if fresh:
                self.collect(inputs)
            begin = time.monotonic()
            total = torch.zeros((), device=self.args.device)
            gaps = Gaps(self.args.device)
            last = len(self.micro_batches) - 1
            asked_of = torch.zeros_like(self.batch["sampling_per_token_logps"])  # the policy before its first update
            metrics = self._metrics["train"]
            with StepFigures(self.accelerator, metrics, len(self.batch["completion_mask"])) as figures:
                for number, (rows, weight) in enumerate(self.micro_batches):
                    at = places(rows, self.args.device)
                    self.part = {name: value if value.dim() == 0 else value[at] for name, value in self.batch.items()}
                    self.part_on_host = self.on_host.of(rows)
                    figures.begin(weight)
                    by_ddp = number == last and self.cutter.sizes is None
                    with contextlib.nullcontext() if by_ddp else self.accelerator.no_sync(model):
                        loss = self._compute_loss(model, self.part) * weight
                        self.accelerator.backward(loss)
                    self.costs.sync.backward_done()
                    self.since_log.append(((self.state.global_step, rows), loss.detach()))
                    total += loss.detach()
                    if fresh and weight:
                        asked_of[at] = self.policy_logps
                        gaps.add(self.policy_logps, self.part)
                if self.cutter.sizes is not None:
                    self.costs.sync.mean(self.trained)
            self.costs.step_done(self.loads[self.accelerator.process_index].tokens, self.loads)
            if fresh:
                self.batch["old_per_token_logps"] = asked_of
                for name, value in gaps.figures().items():
                    metrics[name].append(value)
            self.costs.spend("train", time.monotonic() - begin)
            return total

        def collect(self, asked: Asked) -> None:
            """Have the prompts completed, scored and compared within their groups; cut the result for training."""
            self.asked = asked
            self.batch = self._generate_and_score_completions(self.as_rows(asked["prompts"]))
            self.batch = {name: value for name, value in self.batch.items() if isinstance(value, torch.Tensor)}
            self.on_host = HostRows.of_batch(self.batch)
            prompts, completions = self.on_host.lengths(self.batch["completion_mask"].shape[1])
            self.cutter.expect(prompts, completions)
            parts = self.cutter.cut(prompts, completions)
            load, again = (self.cutter.load(some, prompts, completions) for some in (parts, [AGAIN[0]]))
            mine = Share(len(parts), load, again.slots, self.rollout_seconds)
            self.share_out(parts, of_all(mine))
            self.keep_rollouts()
            self.count_flat_groups()

        def share_out(self, parts: list[list[int]], shares: list[Share]) -> None:
            """As many micro-batches for each process; and how long the slowest kept the others waiting."""
            most = max(share.parts for share in shares)
            own = weighted(parts, self.batch, self.loss_type, self.accelerator.num_processes)
            self.micro_batches = own + [AGAIN] * (most - len(own))
            self.loads = [share.with_as_many_as(most) for share in shares]
            mean = sum(share.seconds for share in shares) / len(shares)
            self.costs.spend("rollout", mean)
            self.costs.spend("wait", max(share.seconds for share in shares) - mean)

        def roll_out(self, prompts: Sequence[Any], _: Any) -> dict[str, Any]:
            """TRL's `rollout_func`: the completions of this process."""
            assert self.asked is not None
            ids = [prompt.input_ids for prompt in self.asked["prompts"]]
            noise = Noise(self.run.seed, self.asked["number"], tuple(self.asked["slots"]))
            self.rollouts = self.complete(ids, self.run.sampling, noise)
            return {
                "prompt_ids": ids,
                "completion_ids": [rollout.ids for rollout in self.rollouts],
                "logprobs": [rollout.logprobs for rollout in self.rollouts],
            }

        def complete(self, prompts: list[list[int]], sampling: Sampling, noise: Noise | None) -> list[Rollout]:
            """Raises Dropped on all processes, once each is through, where any of them was asked to stop meanwhile."""
            run, begin = self.run, time.monotonic()
            stop = self.stop if self.stop and self.stop.may_end(self.state) else None
            found: list[Rollout] = []
            try:
                with self.compute_loss_context_manager(), contextlib.suppress(Halted):
                    found = generate(
                        self.model,
                        prompts,
                        stops=run.stops,
                        pad=run.pad,
                        max_new=run.max_new,
                        sampling=sampling,
                        noise=noise,
                        write=run.write,
                        batch=run.at_once,
                        halt=stop.asked if stop else never,
                    )
            except FloatingPointError as error:
                raise WorkerFailed(
                    f"After step {self.state.global_step}: {error}.",
                    "Lower --lr, or start from another model. The last checkpoint is kept.",
                ) from error
            finally:
                if run.release is not None:
                    run.release()
            self.rollout_seconds = time.monotonic() - begin  # before others are waited for
            if stop:
                stop.drop_if_asked()
            return found

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
            begin = time.monotonic()
            # TRL's texts lack special tokens and keep a stop token that is an ordinary one
            self.texts = [self.text_of(one) for one in self.rollouts]
            completions = [[{"role": "assistant", "content": text}] for text in self.texts]
            found = super()._calculate_rewards(inputs, prompts, completions, ids)
            if "demo_reward" in self.reward_func_names and len(self.reward_func_names) > 1:
                # its 0 would make a completion that nobody could judge one with a total of 0
                demo = self.reward_func_names.index("demo_reward")
                others = [place for place in range(found.shape[1]) if place != demo]
                found[found[:, others].isnan().all(1), demo] = torch.nan
            self.costs.spend("rewards", time.monotonic() - begin)
            return found

        def _get_per_token_logps_and_entropies(
            self,
            model: torch.nn.Module,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **_: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
            """TRL's place for a forward of policy and reference. With gradients the rows are a micro-batch already."""
            trains = torch.is_grad_enabled()
            host = self.part_on_host if trains else HostRows(input_ids.cpu(), attention_mask.cpu())
            parts = [list(range(len(input_ids)))] if trains else self.cutter.cut(*host.lengths(logits_to_keep))
            # packs are laid out on the host
            rows_of = host if self.cutter.packs else HostRows(input_ids, attention_mask)
            found = []
            with self.compute_loss_context_manager():
                for rows in parts:
                    ids, mask = rows_of.of(rows)
                    found.append(self.run.scores(model, ids, mask, logits_to_keep, self.temperature))
            logps, entropy = (torch.cat(one) for one in zip(*found, strict=True))
            if len(parts) > 1:  # cut by length, they may be in another order
                order = torch.tensor([row for rows in parts for row in rows], device=logps.device).argsort()
                logps, entropy = logps[order], entropy[order]
            if trains:
                self.policy_logps = logps.detach()
                # TRL reads the advantages after this, and takes them for each token too
                self.part["advantages"] = corrected(self.part, self.part.get("old_per_token_logps", self.policy_logps))
            return logps, entropy if compute_entropy else None, None

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.check_finite(logs)
            super().log(logs | self.costs.a_step() if "loss" in logs else logs, start_time)

        def rows_of(self, step: int) -> list[int]:
            return [prompt.row_id for prompt in self.run.prompts[step]["prompts"]]

        def describe_fault(self, micro_batch: tuple[int, list[int]], loss: float) -> Fault:
            step, places = micro_batch
            prompts = self.run.prompts[step]["prompts"]
            return Fault(step + 1, loss, sorted({prompts[place].row_id for place in places}))

    return GroupTrainer
