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
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opensloth.data.plan.schedule import padded_batches
from opensloth.data.plan.shards import deal_step
from opensloth.data.prompt.contract import PromptContract
from opensloth.data.tokens.prompts import PromptRow
from opensloth.engine.policy import TokenScores
from opensloth.evaluation.generate import Completion
from opensloth.evaluation.score import Judged, judge
from opensloth.rollout.generate import Rollout, Write, generate
from opensloth.rollout.sampling import Noise, Sampling
from opensloth.training.prompts import Asked, Prompts
from opensloth.training.rollouts import Written, write
from opensloth.training.trainer import Fault, KeepsRun, RunFiles, kept_weights

NOT_FOR_REWARDS = {"image", "images", "environment"}  # columns that TRL gives a meaning of its own
Micro = tuple[list[int], float]  # places of completions, and the weight of their loss


@dataclass(frozen=True)
class Run:
    """What the trainer needs to know beyond TRL's arguments.

    Attributes:
        scores: engine.policy.packed or padded, as the engine can.
        pack_tokens, batch_size: the size of a micro-batch, in tokens, or in completions where that is set.
        stops: ids that end a completion.
        held_out: this process's share of the held-out prompts.
        write: what completes a batch, where it is not `--rollout generate`.
        columns: the names of the data's other columns, which the rewards are given.
    """

    files: RunFiles
    prompts: Prompts
    contract: PromptContract
    tokenizer: PreTrainedTokenizerBase
    scores: Callable[..., TokenScores]
    packs: bool
    pack_tokens: int
    batch_size: int | None
    sampling: Sampling
    max_new: int
    stops: list[int]
    pad: int
    seed: int
    held_out: list[PromptRow]
    write: Write | None
    columns: set[str]


def trainer_class() -> type[Any]:
    """Made on request, because `import unsloth` replaces TRL's classes."""
    from opensloth.training.plain_trl import grpo_trainer

    class GroupTrainer(KeepsRun, grpo_trainer()):  # type: ignore[misc]
        """TRL's trainer; each item of its loader is the prompts of one batch of completions (`prompts.Asked`)."""

        control: Any  # transformers' TrainerControl

        def __init__(self, run: Run, **arguments: Any) -> None:
            self.run, self.files = run, run.files
            self.since_log = []
            self.asked: Asked | None = None
            self.batch: dict[str, Any] = {}
            self.micro_batches: list[Micro] = []
            self.seconds: dict[str, float] = {}
            self.policy_logps: torch.Tensor | None = None
            self.best_figure = self.best_so_far(self.figure, -float("inf"))
            put_back = kept_weights(arguments["model"])
            super().__init__(rollout_func=self.roll_out, **arguments)
            put_back()

        @property
        def figure(self) -> str:
            """What the best adapter is chosen by: right answers, or rewards where no tags tell an answer."""
            return "pass_at_1" if self.run.contract.tags else "reward"

        def get_train_dataloader(self) -> Any:
            # as it is: accelerate would divide the rank's own prompts among the ranks once more
            return self.run.prompts.loader()

        def training_step(self, model: torch.nn.Module, inputs: Asked, num_items_in_batch: Any = None) -> torch.Tensor:
            """One optimizer step on a batch of completions. Returns its loss; DDP takes the mean over processes."""
            model.train()
            fresh = self.asked is None or self.asked["number"] != inputs["number"]
            if fresh:
                self.collect(inputs)
            begin = time.monotonic()
            total = torch.zeros((), device=self.args.device)
            gaps = Gaps(self.args.device)
            last = len(self.micro_batches) - 1
            for number, (rows, weight) in enumerate(self.micro_batches):
                part = {name: value if value.dim() == 0 else value[rows] for name, value in self.batch.items()}
                sync = contextlib.nullcontext() if number == last else self.accelerator.no_sync(model)
                with sync:
                    loss = self._compute_loss(model, part) * weight
                    self.accelerator.backward(loss)
                self.since_log.append((rows, loss.detach()))
                total += loss.detach()
                if fresh and weight and self.policy_logps is not None:
                    gaps.add(self.policy_logps, part)
            metrics = self._metrics["train"]
            if fresh:
                for name, value in gaps.figures().items():
                    metrics[name].append(value)
            self.seconds["train"] = time.monotonic() - begin
            for name, value in self.seconds.items():
                metrics[f"seconds/{name}"].append(value)
            self.seconds = {}
            return total

        def collect(self, asked: Asked) -> None:
            """Have the prompts completed, scored and compared within their groups; cut the result for training."""
            self.asked = asked
            begin = time.monotonic()
            self.batch = self._generate_and_score_completions(self.as_rows(asked["prompts"]))
            self.batch = {name: value for name, value in self.batch.items() if isinstance(value, torch.Tensor)}
            self.micro_batches = self.cut()
            self.keep_rollouts()
            self.seconds["batch"] = time.monotonic() - begin

        def as_rows(self, prompts: Sequence[PromptRow]) -> list[dict[str, Any]]:
            """The prompts as TRL and the rewards see them; a column that a row lacks is None there."""
            return [
                {
                    **{name: prompt.columns.get(name) for name in self.run.columns},
                    **{"prompt": prompt.messages, "answer": prompt.answer, "row_id": prompt.row_id},
                }
                for prompt in prompts
            ]

        def roll_out(self, prompts: Sequence[Any], _: Any) -> dict[str, Any]:
            """TRL's `rollout_func`: the completions of this process."""
            assert self.asked is not None
            begin = time.monotonic()
            ids = [prompt.input_ids for prompt in self.asked["prompts"]]
            noise = Noise(self.run.seed, self.asked["number"], tuple(self.asked["slots"]))
            self.rollouts = self.complete(ids, self.run.sampling, noise)
            self.seconds["rollout"] = time.monotonic() - begin
            return {
                "prompt_ids": ids,
                "completion_ids": [rollout.ids for rollout in self.rollouts],
                "logprobs": [rollout.logprobs for rollout in self.rollouts],
            }

        def complete(self, prompts: list[list[int]], sampling: Sampling, noise: Noise | None) -> list[Rollout]:
            run = self.run
            with self.compute_loss_context_manager():
                return generate(
                    self.model,
                    prompts,
                    stops=run.stops,
                    pad=run.pad,
                    max_new=run.max_new,
                    sampling=sampling,
                    noise=noise,
                    write=run.write,
                )

        def _calculate_rewards(self, *arguments: Any) -> Any:
            begin = time.monotonic()
            found = super()._calculate_rewards(*arguments)
            self.seconds["rewards"] = time.monotonic() - begin
            return found

        def cut(self) -> list[Micro]:
            """Micro-batches of whole completions, equally many on every process."""
            lengths = (self.batch["prompt_mask"].sum(1) + self.batch["completion_mask"].sum(1)).cpu().numpy()
            places = list(range(len(lengths)))
            if self.run.batch_size is not None:
                size = self.run.batch_size
                parts = [places[start : start + size] for start in range(0, len(places), size)]
            elif self.run.packs:
                parts = deal_step(places, lengths, self.run.pack_tokens, 1)[0]
            else:
                parts = padded_batches(torch.tensor(places).numpy(), lengths, self.run.pack_tokens)
            micro = [(rows, self.weight(rows)) for rows in parts]
            if dist.is_initialized():
                counts = [0] * dist.get_world_size()
                dist.all_gather_object(counts, len(micro))
                micro += [([0], 0.0)] * (max(counts) - len(micro))
            return micro

        def weight(self, rows: list[int]) -> float:
            """What makes TRL's loss of a micro-batch its part of the mean over all completions.

            TRL averages over the completions ("grpo", "dr_grpo") or the tokens ("bnpo") of a micro-batch; its "dapo"
            already divides by the tokens of the whole batch. DDP then takes the mean over processes.
            """
            if self.loss_type == "dapo":
                return 1.0
            if self.loss_type == "bnpo":
                tokens = float(self.batch["completion_mask"][rows].sum())
                return float(tokens * self.accelerator.num_processes / self.batch["num_items_in_batch"])
            return float(len(rows) / len(self.batch["completion_mask"]))

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
            temperature = self.temperature
            if torch.is_grad_enabled():
                parts = [list(range(len(input_ids)))]
            else:
                lengths = attention_mask.sum(1).cpu().numpy()
                parts = deal_step(range(len(lengths)), lengths, self.run.pack_tokens, 1)[0]
            logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
            entropy = torch.zeros_like(logps)
            with self.compute_loss_context_manager():
                for rows in parts:
                    found = self.run.scores(model, input_ids[rows], attention_mask[rows], logits_to_keep, temperature)
                    at = torch.tensor(rows, device=logps.device)
                    logps = logps.index_copy(0, at, found.logps)
                    entropy = entropy.index_copy(0, at, found.entropy)
            if torch.is_grad_enabled():
                self.policy_logps = logps.detach()
            return logps, entropy if compute_entropy else None, None

        def keep_rollouts(self) -> None:
            """Judge this process's completions, and write those of all processes to rollouts/."""
            assert self.asked is not None
            judged = [
                self.judged(rollout, prompt.answer)
                for rollout, prompt in zip(self.rollouts, self.asked["prompts"], strict=True)
            ]
            mine = [
                Written.of(prompt, rollout, one, self.run.stops)
                for prompt, rollout, one in zip(self.asked["prompts"], self.rollouts, judged, strict=True)
            ]
            found = gathered(mine)
            if self.run.contract.tags:
                share = sum(bool(one.right) for one in found) / len(found)
                self._metrics["train"]["pass_rate"].append(share)
            if self.leads:
                scores = {name: list(self._logs["rewards"][name]) for name in self.reward_func_names}
                step = self.state.global_step + 1
                write(self.files.directory / "rollouts", step, found, scores, list(self._logs["advantages"]))

        def judged(self, rollout: Rollout, answer: str) -> Judged:
            """Of a contract without tags: the text alone, neither right nor wrong."""
            ids = rollout.ids[:-1] if rollout.ids[-1] in self.run.stops else rollout.ids
            completion = Completion(str(self.run.tokenizer.decode(ids)), len(rollout.ids))
            if self.run.contract.tags is None:
                return Judged(completion.text, completion.tokens, in_format=False, right=False)
            return judge(self.run.contract, completion, answer)

        @torch.no_grad()
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Greedy answers to the held-out prompts: the share of right ones, and the mean reward."""
            prompts = self.run.held_out
            rollouts = self.complete([prompt.input_ids for prompt in prompts], Sampling(temperature=0), None)
            judged = [self.judged(one, prompt.answer) for one, prompt in zip(rollouts, prompts, strict=True)]
            found = gathered(list(zip(judged, self.rewards_of(prompts, rollouts, judged), strict=True)))
            answers = [one for one, _ in found]
            metrics = {"eval_reward": mean([reward for _, reward in found])}
            if self.run.contract.tags:
                metrics["eval_pass_at_1"] = mean([one.right for one in answers])
                metrics["eval_format_rate"] = mean([one.in_format for one in answers])
            metrics["eval_mean_length"] = mean([one.tokens for one in answers])
            self.model.eval()  # so that TRL keeps the metrics of training for their own log
            self.log(metrics)
            self.model.train()
            if metrics[f"eval_{self.figure}"] > self.best_figure:
                self.best_figure = metrics[f"eval_{self.figure}"]
                self.save_best({self.figure: self.best_figure})
            # without this the trainer would evaluate the last step twice
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def rewards_of(
            self, prompts: Sequence[PromptRow], rollouts: Sequence[Rollout], answers: Sequence[Judged]
        ) -> list[float]:
            """The weighted sum of each answer's rewards; a reward that cannot judge adds nothing."""
            totals = [0.0] * len(prompts)
            if not prompts:
                return totals
            rows = self.as_rows(prompts)
            given: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
            given["prompts"] = given.pop("prompt")
            given["completions"] = [[{"role": "assistant", "content": answer.text}] for answer in answers]
            given["completion_ids"] = [rollout.ids for rollout in rollouts]
            # what a reward logs of held-out problems would be mixed with the figures of training
            given |= {"trainer_state": self.state, "log_extra": ignore, "log_metric": ignore}
            for reward, weight in zip(self.reward_funcs, self.reward_weights.tolist(), strict=True):
                if getattr(reward, "__name__", "") == "demo_reward":  # which counts its calls
                    continue
                scores = reward(**given)
                totals = [total + weight * (score or 0.0) for total, score in zip(totals, scores, strict=True)]
            return totals

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.check_finite(logs)
            super().log(logs, start_time)

        def describe_fault(self, micro_batch: list[int], loss: float) -> Fault:
            assert self.asked is not None
            rows = sorted({self.asked["prompts"][place].row_id for place in micro_batch})
            return Fault(self.state.global_step, loss, rows)

    return GroupTrainer


class Gaps:
    """How far the trainer's log-probabilities are from those that the rollout drew with. 0 but for rounding."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)  # of the gaps, and how many
        self.most = torch.zeros(1, device=device, dtype=torch.float64)

    def add(self, logps: torch.Tensor, part: dict[str, torch.Tensor]) -> None:
        mask = part["completion_mask"].bool()
        gap = (logps - part["sampling_per_token_logps"]).abs()[mask].double()
        self.sums += torch.stack([gap.sum(), mask.sum().double()])
        self.most = torch.maximum(self.most, gap.max()[None])

    def figures(self) -> dict[str, float]:
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.most, op=dist.ReduceOp.MAX)
        return {"logp_gap/mean": float(self.sums[0] / self.sums[1].clamp(min=1)), "logp_gap/max": float(self.most)}


def gathered(mine: list[Any]) -> list[Any]:
    """The lists of all processes as one, in the order of ranks."""
    if not dist.is_initialized():
        return mine
    found: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [one for part in found for one in part]


def ignore(*_: Any) -> None:
    """In place of TRL's functions by which a reward logs."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def figures(trainer: Any, seconds: float) -> dict[str, Any]:
    """What result.json says of the run."""
    logged = trainer.state.log_history

    def last(name: str) -> float | None:
        return next((entry[name] for entry in reversed(logged) if entry.get(name) is not None), None)

    best = trainer.best_figure
    return {
        "steps": trainer.state.global_step,
        "reward": last("reward"),
        "pass_rate": last("pass_rate"),
        "eval_pass_at_1": last("eval_pass_at_1"),
        "eval_reward": last("eval_reward"),
        f"best_eval_{trainer.figure}": best if best > -float("inf") else None,
        "seconds": round(seconds, 1),
    }
