"""The rewards of a run, from its settings: `--rewards`, or else the preset of `--task`."""

from pathlib import Path
from typing import TYPE_CHECKING

from opensloth import paths
from opensloth.config.run import GrpoOptions
from opensloth.errors import UserError
from opensloth.rewards.registry import TOP, WeightedReward, load, task

if TYPE_CHECKING:
    from opensloth.data.prompt.contract import Tags

# What the trainer hands to every reward, beside the columns of the data.
OF_THE_TRAINER = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def chosen(options: GrpoOptions, tags: "Tags | None") -> list[WeightedReward]:
    """The rewards that `options` name, for completions with `tags` (those of the data's contract).

    Raises:
        UserError: an unknown task or reward, a file that cannot be loaded (see `registry.load`), or a reward that
            reads tags where the contract has none.
    """
    every = options.print_samples_every
    if options.rewards is None:
        found = task(options.task, tags=tags, print_every=every)
    else:
        found = load(options.rewards, tags=tags, print_every=every)
    reads_tags = [reward.name for reward in found if reward.name in TOP]
    if reads_tags and tags is None:
        named = f"--task {options.task}" if options.rewards is None else f"The reward {reads_tags[0]}"
        raise UserError(
            f"{named} looks for working and solution between tags, and the data's prompts ask for none.",
            "Prepare the data with --chat-template reasoning, or name other --rewards.",
        )
    return found


def in_words(rewards: list[WeightedReward]) -> str:
    """`math_format, math_answer x 0.5, brevity x 2`."""
    return ", ".join(f"{one.name}" + (f" x {one.weight:g}" if one.weight != 1 else "") for one in rewards)


def content(options: GrpoOptions, rewards: list[WeightedReward]) -> str:
    """What decides the scores: names and weights, and for a user's own file the digest of its text.

    Two runs with the same words here have the same rewards, wherever the files lie.
    """
    files = {}
    for word in filter(None, (part.strip() for part in (options.rewards or "").split(","))):
        path, colon, function = word.partition("=")[0].strip().rpartition(":")
        if colon:
            files[function] = paths.digest_file(Path(path).expanduser())[:16]
    return ", ".join(
        f"{one.name}={one.weight:g}" + (f" (file {files[one.name]})" if one.name in files else "") for one in rewards
    )
