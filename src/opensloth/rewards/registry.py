"""The rewards by name, the presets of `--task`, and the words of `--rewards`."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from opensloth.errors import UserError, nearest
from opensloth.rewards import math as maths
from opensloth.rewards.custom import load_function
from opensloth.rewards.demo import PRINT_EVERY, demo_reward
from opensloth.rewards.watch import LIMIT_SECONDS, watched

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import Tags

Reward = Callable[..., list[float | None]]
"""`f(prompts=, completions=, answer=, **columns)`: a score for each completion, None where nobody can say.

`prompts` and `completions` are texts or lists of messages, every column a list with one value for each completion.
"""

REWARDS: dict[str, str] = {
    "math_format": "the solution in the exact form: up to 3",
    "math_answer": "the gold answer between the solution tags: up to 5",
    "math_number": "the right value, in any form: up to 3.5",
    "demo_reward": "0; shows a sample now and then",
}
OF_ANSWERS = {"math_answer", "math_number"}  # compare with the data's own
TOP = {"math_format": maths.FORMAT_EXACT, "math_answer": 5.0, "math_number": 3.5}

TASKS: dict[str, tuple[str, ...]] = {"math": ("math_format", "math_answer", "math_number", "demo_reward")}


class WeightedReward(NamedTuple):
    """One reward of a run. `name` is unique in the run; TensorBoard and tables use it."""

    name: str
    function: Reward
    weight: float


def get(name: str, *, tags: "Tags | None" = None, print_every: int = PRINT_EVERY) -> Reward:
    """The reward called `name`, for completions with `tags` (those of the contract `reasoning` if None).

    Raises:
        UserError: there is none of that name; the hint has the nearest.
    """
    if name.endswith(".py"):
        raise UserError(f"The reward {name} names no function.", f"Write {name}:FUNCTION.")
    if name not in REWARDS:
        raise UserError(
            f"There is no reward {name!r}.", f"{nearest(name, REWARDS)} Rewards: {', '.join(REWARDS)}.".strip()
        )
    if name == "demo_reward":
        return demo_reward(print_every)
    function: Reward = getattr(maths, name)

    @functools.wraps(function)
    def reward(**columns: object) -> list[float | None]:
        return function(**{**columns, "tags": tags or default_tags()})

    return reward


def task(name: str, *, tags: "Tags | None" = None, print_every: int = PRINT_EVERY) -> list[WeightedReward]:
    """The rewards of a preset, each with weight 1. Raises UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}.", f"{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}.".strip())
    return [WeightedReward(reward, get(reward, tags=tags, print_every=print_every), 1.0) for reward in TASKS[name]]


def load(
    words: str, *, tags: "Tags | None" = None, print_every: int = PRINT_EVERY, limit: float = LIMIT_SECONDS
) -> list[WeightedReward]:
    """The rewards that `--rewards` names: `math_answer,math_format=0.5,my_rewards.py:brevity=2`.

    A name or `FILE.py:FUNCTION`, each with a weight or 1. The user's own are checked at every call, see `watch`.

    Raises:
        UserError: an unknown name, a file or function that cannot be loaded, a weight that is no number, a reward that
            is named twice, nothing at all.
    """
    found: list[WeightedReward] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        name, _, weight = word.partition("=") if "=" in word else (word, "", "1")
        path, colon, function = name.strip().rpartition(":")
        if colon:
            reward = WeightedReward(
                function, watched(load_function(path, function), limit=limit), weight_of(weight, word)
            )
        else:
            reward = WeightedReward(
                function, get(function, tags=tags, print_every=print_every), weight_of(weight, word)
            )
        if any(reward.name == other.name for other in found):
            raise UserError(f"--rewards names {reward.name!r} twice.", "Name it once, or rename one of the functions.")
        found.append(reward)
    if not found:
        raise UserError("--rewards names no reward.", f"Rewards: {', '.join(REWARDS)}, or FILE.py:FUNCTION.")
    return found


def weight_of(text: str, word: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"The weight in --rewards {word!r} is no number.", "Write NAME=0.5.")
    return weight


@functools.cache
def default_tags() -> "Tags":
    """Those of the contract `reasoning`. Imported late: a list of the rewards needs no prompt contract."""
    from opensloth.data.prompt.choose import REASONING_TAGS

    return REASONING_TAGS
