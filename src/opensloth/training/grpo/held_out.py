"""What a GRPO run makes of problems that it does not train on: right answers, and rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from opensloth.data.tokens.prompts import PromptRow
from opensloth.evaluation.generate import Completion
from opensloth.evaluation.score import Judged, judge
from opensloth.rollout.generate import Rollout
from opensloth.rollout.sampling import Sampling
from opensloth.training.everyone import of_all


class HeldOut:
    """A mixin of the trainer: evaluation, and the verdict on a completion, which training logs too."""

    run: Any  # grpo.Run
    state: Any
    model: Any
    control: Any
    args: Any
    callback_handler: Any
    reward_funcs: list[Callable[..., list[float | None]]]
    reward_weights: torch.Tensor
    best: tuple[float, float]  # of the adapter in best/: what it was chosen by, and its reward
    complete: Callable[..., list[Rollout]]
    log: Callable[..., None]
    save_best: Callable[[dict[str, Any]], None]

    @property
    def figure(self) -> str:
        """What the best adapter is chosen by: right answers, or rewards where no tags tell an answer. Of equally many
        right answers the higher reward decides."""
        return "pass_at_1" if self.run.contract.tags else "reward"

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Greedy answers to the held-out prompts: the share of right ones, and the mean reward."""
        prompts = self.run.held_out
        rollouts = self.complete([prompt.input_ids for prompt in prompts], Sampling(temperature=0), None)
        judged = [
            self.judged(one, self.text_of(one), prompt.answer) for one, prompt in zip(rollouts, prompts, strict=True)
        ]
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
        these = (metrics[f"eval_{self.figure}"], metrics["eval_reward"])
        if these > self.best:
            self.best = these
            self.save_best({"reward": these[1], self.figure: these[0]})
        # without this the trainer would evaluate the last step twice
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def rewards_of(
        self, prompts: Sequence[PromptRow], rollouts: Sequence[Rollout], answers: Sequence[Judged]
    ) -> list[float]:
        """The weighted sum of each answer's rewards; a reward that cannot judge adds nothing."""
        size = self.args.per_device_train_batch_size  # as many at once as in training: a call's time is limited
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        return [total for at in parts for total in self.rewards_of_some(prompts[at], rollouts[at], answers[at])]

    def rewards_of_some(
        self, prompts: Sequence[PromptRow], rollouts: Sequence[Rollout], answers: Sequence[Judged]
    ) -> list[float]:
        """Those of one call of each reward."""
        totals = [0.0] * len(prompts)
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

    def judged(self, rollout: Rollout, text: str, answer: str) -> Judged:
        """Of a contract without tags: the text alone, neither right nor wrong. `text` as `text_of` has it."""
        if self.run.contract.tags is None:
            return Judged(text, len(rollout.ids), in_format=False, right=False)
        return judge(self.run.contract, Completion(text, len(rollout.ids)), answer)

    def text_of(self, rollout: Rollout) -> str:
        """What rewards and verdicts judge: all but the token that ended it."""
        ids = rollout.ids[:-1] if rollout.ids[-1] in self.run.stops else rollout.ids
        return str(self.run.tokenizer.decode(ids))

    def as_rows(self, prompts: Sequence[PromptRow]) -> list[dict[str, Any]]:
        """The prompts as TRL and the rewards see them; a column that a row lacks is None there."""
        return [
            {
                **{name: prompt.columns.get(name) for name in self.run.columns},
                **{"prompt": prompt.messages, "answer": prompt.answer, "row_id": prompt.row_id},
            }
            for prompt in prompts
        ]


def gathered(mine: list[Any]) -> list[Any]:
    """The lists of all processes as one, in the order of ranks."""
    return [one for part in of_all(mine) for one in part]


def ignore(*_: Any) -> None:
    """In place of TRL's functions by which a reward logs."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def figures(trainer: Any, seconds: float) -> dict[str, Any]:
    """What result.json says of the run."""
    logged = trainer.state.log_history

    def last(name: str) -> float | None:
        return next((entry[name] for entry in reversed(logged) if entry.get(name) is not None), None)

    best, _ = trainer.best
    return {
        "steps": trainer.state.global_step,
        "reward": last("reward"),
        "pass_rate": last("pass_rate"),
        "eval_pass_at_1": last("eval_pass_at_1"),
        "eval_reward": last("eval_reward"),
        f"best_eval_{trainer.figure}": best if best > -float("inf") else None,
        "seconds": round(seconds, 1),
    }
