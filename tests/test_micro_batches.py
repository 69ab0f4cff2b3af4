"""How a batch of completions is cut into micro-batches."""

import numpy as np

from opensloth.training.grpo.micro_batches import Cutter

PROMPTS = np.array([10, 10, 10, 4, 4, 4, 20, 20, 20])
COMPLETIONS = np.array([5, 1, 7, 3, 3, 9, 2, 2, 2])


def parts(**changed):
    asked = {"group": 3, "pack_tokens": 24, "batch_size": None, "packs": True, **changed}
    return Cutter(**asked).cut(PROMPTS, COMPLETIONS)


def tokens(part):
    return sum(COMPLETIONS[part]) + sum(PROMPTS[3 * number] for number in {place // 3 for place in part})


def test_every_completion_is_in_one_micro_batch_and_groups_stay_together():
    for found in (parts(), parts(pack_tokens=1000), parts(pack_tokens=1), parts(batch_size=2), parts(packs=False)):
        assert sorted(place for part in found for place in part) == list(range(9))
    for part in parts():
        assert part == list(range(part[0], part[-1] + 1))


def test_a_shared_prompt_is_counted_once():
    assert parts() == [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    assert [tokens(part) for part in parts()] == [23, 19, 24, 22]
    assert parts(pack_tokens=100) == [list(range(9))]


def test_a_completion_that_is_longer_than_a_pack_goes_alone():
    assert parts(pack_tokens=1) == [[place] for place in range(9)]


def test_micro_batches_by_hand_count_completions():
    assert [len(part) for part in parts(batch_size=4)] == [4, 4, 1]
