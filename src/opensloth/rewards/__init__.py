"""Scores of completions: a registry of plain functions, the user's own beside them.

    get("math_answer")(prompts=[...], completions=[...], answer=[...])    # [5.0, -1.5, None]

docs/rewards.md has the exact scores. Nothing here loads a model library.
"""

from opensloth.rewards.gold import GoldFailure, gold_check
from opensloth.rewards.registry import REWARDS, TASKS, Reward, WeightedReward, get, load, task

__all__ = ["REWARDS", "TASKS", "GoldFailure", "Reward", "WeightedReward", "get", "gold_check", "load", "task"]
