"""Runs of two processes that are killed at random moments end with the bytes of one that was left alone.

`make soak` does the same at 40 moments.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import kills

SEED = 4


@pytest.mark.skipif(sys.platform != "linux", reason="the workers are found in /proc")
def test_runs_that_are_killed_three_times_each_end_with_the_same_bytes(place):
    def ends_alike(method):
        expected, _ = kills.whole(place, method)
        told = kills.disturbed(place, method, 0, 3, random.Random(f"{SEED} {method}"))
        return told, kills.adapter(place / f"{method}-0") == expected

    with ThreadPoolExecutor(2) as both:  # a start is mostly waiting
        for told, alike in both.map(ends_alike, ("sft", "grpo")):
            assert len(told) == 3
            assert alike, told


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return kills.make_place(tmp_path_factory.mktemp("soak"))
