"""Completions written down, and given back to another run of the same job, for `os-train verify`.

N processes draw what one would, but for the rounding that tips a draw now and then; one other token makes another
training step. With the completions of the first run the steps of both can be compared to the last digits.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from opensloth import paths
from opensloth.rollout.decode import Halt, never
from opensloth.rollout.generate import Write, rollout, writer_for
from opensloth.rollout.sampling import Sampling

ASKED = "completions.json"  # in a run directory: its completions are recorded; `replay` names a run to take them from
FOLDER = "completions"


def recorded(run_dir: Path, rank: int, inner: Write | None) -> Write | None:
    """`inner`, with its completions recorded where the run directory asks for it."""
    if not (run_dir / ASKED).exists():
        return inner
    replay = paths.read_json(run_dir / ASKED, "a run that records its completions")["replay"]
    return Recorder(run_dir / FOLDER / f"rank_{rank}.jsonl", inner, load(Path(replay)) if replay else {})


def load(run_dir: Path) -> dict[str, list[tuple[list[int], list[float]]]]:
    """The recorded completions of all processes of a run, by the number that drew their first token.

    That number is a hash of seed, batch and place: it tells a completion from all others of a run. One that was drawn
    twice stands there twice.
    """
    found: dict[str, list[tuple[list[int], list[float]]]] = {}
    for path in sorted((run_dir / FOLDER).glob("rank_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            found.setdefault(one["draw"], []).append((one["ids"], one["logprobs"]))
    return found


class Recorder:
    """What completes prompts (`generate.Write`): as `inner` does, but what is in `replay` is given back instead.

    What this process drew itself is recorded in either case, so that both runs' draws can be compared. Greedy
    completions are left alone: nothing is trained on them.
    """

    def __init__(self, path: Path, inner: Write | None, replay: dict[str, list[tuple[list[int], list[float]]]]) -> None:
        self.path = path
        self.inner = inner
        self.replay = replay

    def __call__(
        self,
        policy: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[int],
        pad: int,
        max_new: int,
        sampling: Sampling,
        uniforms: torch.Tensor | None,
        halt: Halt = never,
    ) -> tuple[list[list[int]], list[list[float]]]:
        complete = self.inner or writer_for(policy, max(map(len, prompts)) + max_new)
        written = complete(policy, prompts, stops, pad, max_new, sampling, uniforms, halt)
        if uniforms is None:
            return written
        own = [rollout(tokens, logprobs, stops) for tokens, logprobs in zip(*written, strict=True)]
        draws = [float(number).hex() for number in uniforms[:, 0]]
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for draw, one in zip(draws, own, strict=True):
                file.write(json.dumps({"draw": draw, "ids": one.ids, "logprobs": one.logprobs}) + "\n")
        given = [
            self.replay[draw][0] if draw in self.replay else (one.ids, one.logprobs)
            for draw, one in zip(draws, own, strict=True)
        ]
        return [ids for ids, _ in given], [logprobs for _, logprobs in given]
