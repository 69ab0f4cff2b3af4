"""What a step costs: padding, unfilled packs, uneven processes, and the gradients' way between the processes."""

import numpy as np
import pytest
import torch

from opensloth.engine.policy import lay_out
from opensloth.training import gradient_sync
from opensloth.training.costs import Costs
from opensloth.training.gradient_sync import Buckets, GradientSync, SyncSeconds, seconds_of
from opensloth.training.grpo.micro_batches import Cutter, Share
from opensloth.training.load import Load, evenness

PROMPTS, COMPLETIONS = np.array([7, 7, 7, 7, 3, 3, 3, 3]), np.array([5, 9, 1, 4, 2, 8, 6, 1])
GROUP = 4


def test_figures_are_sums_over_steps_and_processes():
    even = [Load(90, 100, 200), Load(90, 100, 200)]
    uneven = [Load(120, 120, 200), Load(60, 80, 200)]
    assert evenness([even]) == {"padding": 0.1, "unfilled": 0.55, "imbalance": 1.0}
    assert evenness([uneven]) == {"padding": 0.1, "unfilled": 0.55, "imbalance": round(120 / 90, 4)}
    assert evenness([even, uneven])["imbalance"] == round((90 + 120) / 180, 4)
    flipped = evenness([uneven, uneven[::-1]])
    assert flipped["imbalance"] == round(120 / 90, 4)  # each step waits for its own slowest process
    assert evenness([]) == {}


def masks():
    """Prompts padded on the left and completions on the right, as TRL makes them; each group has its own prompt."""
    left, right = int(PROMPTS.max()), int(COMPLETIONS.max())
    mask = torch.zeros(len(PROMPTS), left + right, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mask[row, left - prompt : left + completion] = 1
    ids = (torch.arange(left + right)[None] + 100 * (torch.arange(len(PROMPTS)) // GROUP)[:, None]) * mask
    return ids, mask, right


@pytest.mark.parametrize("size", [{"pack_tokens": 16}, {"pack_tokens": 40}, {"batch_size": 3}])
def test_the_load_of_packed_completions_is_what_lies_in_the_packs(size):
    ids, mask, length = masks()
    cutter = Cutter(group=GROUP, packs=True, **{"pack_tokens": 1000, "batch_size": None, **size})
    parts = cutter.cut(PROMPTS, COMPLETIONS)
    assert len(parts) > 1
    load, limit = cutter.load(parts, PROMPTS, COMPLETIONS), size.get("pack_tokens")
    computed = sum(int(lay_out(ids[rows], mask[rows].bool(), length).keep.sum()) for rows in parts)
    assert load.tokens == load.slots == computed
    assert load.room == (limit * len(parts) if limit else computed)


def test_the_load_of_padded_completions_counts_what_is_padded():
    parts = [[0, 1], [4, 5]]
    cutter = Cutter(group=GROUP, pack_tokens=40, batch_size=None, packs=False)
    load = cutter.load(parts, PROMPTS, COMPLETIONS)
    assert load == Load(tokens=12 + 16 + 5 + 11, slots=2 * 16 + 2 * 11, room=80)


def test_micro_batches_that_are_run_again_are_padding():
    share = Share(parts=2, load=Load(100, 100, 128), again=10, seconds=1.0)
    assert share.with_as_many_as(2) == share.load
    assert share.with_as_many_as(4) == Load(100, 120, 148)


@pytest.mark.parametrize(
    ("ready", "done", "end", "total", "exposed"),
    [
        ([1.0], [3.0], 3.0, 2.0, 2.0),  # nothing to hide behind
        ([1.0, 6.0], [2.0, 7.0], 7.5, 2.0, 1.5),  # the first was hidden by the backward pass
        ([1.0, 2.0], [4.0, 5.0], 5.0, 4.0, 3.0),  # the second waited for the first
        ([1.0, 2.0], [5.0, 4.0], 5.0, 4.0, 3.0),  # or ran beside it
    ],
)
def test_all_reduces_are_counted_once_and_exposed_from_the_last_bucket_on(ready, done, end, total, exposed):
    found = seconds_of(Buckets(ready, done, end))
    assert (found.steps, found.total, found.exposed) == (1, total, exposed)


def test_a_step_that_the_card_has_not_passed_is_read_later(monkeypatch):
    """To read an event that is yet to come would make the host wait for the card."""
    sync = GradientSync(torch.device("cpu"))
    clock = iter([5.0, 25.0])
    monkeypatch.setattr(gradient_sync, "now", lambda device: next(clock))
    monkeypatch.setattr(gradient_sync, "passed", lambda moment: moment < 10)
    for start in (1.0, 21.0):
        sync.current = Buckets([start], [start + 2])
        sync.backward_done()
    assert sync.read() == SyncSeconds(1, 2.0, 4.0)
    assert sync.read() == SyncSeconds()
    monkeypatch.setattr(gradient_sync, "passed", lambda moment: True)
    assert sync.read() == SyncSeconds(1, 2.0, 4.0)
    assert sync.so_far == SyncSeconds(2, 4.0, 8.0)


def test_a_log_that_comes_late_tells_of_its_own_steps_alone():
    costs = Costs(torch.device("cpu"))

    def step(seconds):
        costs.sync.unread.append(Buckets([0.0], [seconds], 2 * seconds))
        costs.spend("train", 10 * seconds)
        costs.step_done(7)

    def told():
        found = costs.a_step()
        return [found[f"seconds/{name}"] for name in ("communication", "sync", "train")]

    step(1.0)
    step(3.0)
    costs.close()
    step(5.0)
    costs.close()
    assert told() == [2.0, 4.0, 20.0]
    step(6.0)
    assert told() == [5.0, 10.0, 50.0]
    step(8.0)
    assert told() == [7.0, 14.0, 70.0]  # at once
    assert costs.so_far() == {"tokens": 35, "communication_seconds": 23.0, "sync_seconds": 46.0}


def test_a_process_that_is_alone_has_nothing_to_synchronize():
    sync = GradientSync(torch.device("cpu"))
    sync.watch(torch.nn.Linear(2, 2))
    sync.backward_done()
    assert sync.read() == SyncSeconds()


def mean_of_two(rank, place):
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,))]
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, float(10 * number + rank))
    sync = GradientSync(torch.device("cpu"))
    sync.mean(weights)
    assert [weight.grad.unique().tolist() for weight in weights] == [[0.5], [10.5]]
    found = sync.read()
    assert found.steps == 1
    assert found.total == found.exposed > 0
    torch.distributed.destroy_process_group()


def test_gradients_that_ddp_does_not_see_become_their_mean_over_processes(tmp_path):
    torch.multiprocessing.spawn(mean_of_two, (tmp_path / "store",), nprocs=2)


def test_a_process_that_is_alone_keeps_its_gradients():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    sync = GradientSync(torch.device("cpu"))
    sync.mean([weight])
    assert weight.grad.tolist() == [1.0, 1.0]
    assert sync.read() == SyncSeconds()
