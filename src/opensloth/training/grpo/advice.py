"""Advice instead of silence: what a GRPO run that learns nothing should change."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from opensloth import log

PATIENCE = 5  # logs in a row without a spread of rewards
MOST_CUT = 0.5  # share of completions that reach --max-new


class Advice(TrainerCallback):
    """Watches what is logged. All processes see the same figures, and with `stop` all of them end at the same step.

    Args:
        judges: whether answers that are right are rewarded: else it does not matter how many are.
    Attributes:
        stopped: why the run was ended; None where it was not.
    """

    def __init__(self, *, stop: bool, speaks: bool, judges: bool, max_new: int, every: int) -> None:
        self.stop = stop
        self.speaks = speaks
        self.judges = judges
        self.max_new = max_new
        self.every = every
        self.flat = 0
        self.told: set[str] = set()
        self.no_signal: str | None = None  # said while there is none
        self.stopped: str | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What a run that goes on logged before counts too."""
        for logs in state.log_history:
            self.count(logs)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "frac_reward_zero_std" in logs:  # no log of a step that trains on completions again
            self.look(args, state, logs)
        between = state.global_step % self.every == 0
        if self.stop and self.no_signal and between and state.global_step < state.max_steps:
            self.stopped = self.no_signal
            control.should_save = control.should_training_stop = True

    def look(self, args: Any, state: TrainerState, logs: dict[str, Any]) -> None:
        """Say what the figures of new completions call for."""
        self.count(logs)
        rate = logs.get("pass_rate") if self.judges else None
        if "start" not in self.told and state.global_step <= args.logging_steps:
            self.told.add("start")
            if rate == 0:
                self.say(
                    "none",
                    "No completion of the first batch is right. GRPO can only make likelier what the model does now "
                    "and then: train the answer format by SFT first, take easier problems, or raise --group-size.",
                )
            elif rate == 1:
                self.say("all", "Every completion of the first batch is right: these problems have nothing to teach.")
        if (logs.get("completions/clipped_ratio") or 0) > MOST_CUT:
            self.say(
                "cut",
                f"{logs['completions/clipped_ratio']:.0%} of the completions reach --max-new {self.max_new} and are "
                "cut before an answer: raise it, or train the model to end its answers by SFT first.",
            )
        self.no_signal = None
        if self.flat >= PATIENCE:
            level = "" if rate is None else f" ({rate:.0%} of the completions are right)"
            way = "easier" if rate is not None and rate < 0.5 else "harder"
            self.no_signal = (
                f"In the last {self.flat} logs no group had a spread of rewards{level}, so nothing was learned: take "
                f"{way} problems, raise --group-size or --temperature, or add a reward that tells completions apart."
            )
            self.say("flat", self.no_signal)

    def count(self, logs: dict[str, Any]) -> None:
        if "frac_reward_zero_std" in logs:
            self.flat = self.flat + 1 if logs["frac_reward_zero_std"] == 1 else 0

    def say(self, kind: str, text: str) -> None:
        if self.speaks and kind not in self.told:
            log.warn(text)
        self.told.add(kind)
