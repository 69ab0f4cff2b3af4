"""Which prompts each batch of a GRPO run holds, and which process completes them."""

from types import SimpleNamespace

import numpy as np
import pytest

from opensloth.config.run import GrpoOptions
from opensloth.data.plan.batches import lay_out
from opensloth.errors import UserError
from opensloth.training.grpo.prompts import Prompts

ROWS = 22


def prompt_row(index):
    return SimpleNamespace(row_id=index + 1000, input_ids=[index], messages=[], answer="", columns={})


def prepared(count=ROWS, held_out=()):
    is_eval = np.zeros(count, bool)
    is_eval[list(held_out)] = True
    rows = SimpleNamespace(prompt=prompt_row, ids=lambda: np.arange(count) + 1000)
    return SimpleNamespace(directory="data", is_eval=is_eval, rows=rows)


def laid_out(data=None, *, processes=1, seed=0, left_out=(), **options):
    settings = GrpoOptions(**{"prompts_per_step": 4, "epochs": 3, **options})
    return lay_out(data or prepared(), settings, seed=seed, processes=processes, left_out=left_out)


def rows_of(plan):
    return np.concatenate(plan.batches).tolist()


def test_each_row_comes_exactly_once_an_epoch():
    stream = rows_of(laid_out())
    assert len(stream) >= 3 * ROWS
    for epoch in range(3):
        assert sorted(stream[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))
    assert stream[:ROWS] != stream[ROWS : 2 * ROWS]


def test_each_batch_is_whole_and_no_step_is_left_over():
    plan = laid_out(epochs=1)
    assert [len(batch) for batch in plan.batches] == [4] * 6
    assert (plan.steps, len(plan.epoch)) == (6, 6)
    assert plan.epoch[-1] == pytest.approx(24 / ROWS)


def test_the_order_follows_from_the_seed_alone():
    assert rows_of(laid_out(seed=1)) == rows_of(laid_out(seed=1))
    assert rows_of(laid_out(seed=1)) != rows_of(laid_out(seed=2))


def test_held_out_rows_and_rows_that_are_left_out_are_not_trained_on():
    data = prepared(held_out=[3, 5])
    stream = rows_of(laid_out(data, left_out=[1000, 1021], epochs=2))
    assert set(stream) == set(range(ROWS)) - {3, 5, 0, 21}


def test_batches_do_not_depend_on_the_number_of_processes():
    one = laid_out(processes=1)
    for processes in (2, 4):
        plan = laid_out(processes=processes)
        assert rows_of(plan) == rows_of(one)
        for number, batch in enumerate(plan.batches):
            shares = [plan.share(number, rank, processes) for rank in range(processes)]
            assert np.concatenate(shares).tolist() == batch.tolist()
            assert {len(share) for share in shares} == {4 // processes}


def test_each_process_is_asked_for_whole_groups_and_all_together_for_the_batch():
    plan = laid_out(updates_per_batch=2, save_steps=2)
    whole = Prompts(prepared(), plan, group_size=3, rank=0, processes=1)
    shares = [Prompts(prepared(), plan, group_size=3, rank=rank, processes=2) for rank in (0, 1)]
    assert len(whole) == plan.steps
    for step in range(plan.steps):
        parts = [share[step] for share in shares]
        asked = whole[step]
        assert [row.row_id for part in parts for row in part["prompts"]] == [row.row_id for row in asked["prompts"]]
        assert [slot for part in parts for slot in part["slots"]] == asked["slots"] == list(range(12))
        ids = [row.row_id for row in asked["prompts"]]
        assert all(len(set(ids[at : at + 3])) == 1 for at in range(0, 12, 3))
        assert {part["number"] for part in parts} == {asked["number"]} == {step // 2}


def test_the_loader_gives_one_batch_a_step_in_order():
    plan = laid_out(max_steps=5)
    prompts = Prompts(prepared(), plan, group_size=2, rank=0, processes=1)
    assert [asked["number"] for asked in prompts.loader()] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        prompts[5]


def test_each_batch_serves_as_many_steps_as_there_are_updates():
    plan = laid_out(max_steps=5, updates_per_batch=2, save_steps=2)
    assert [plan.at(step) for step in range(plan.steps)] == [0, 0, 1, 1, 2]
    assert len(plan.batches) == 3
    assert plan.epoch == pytest.approx([4 / ROWS, 4 / ROWS, 8 / ROWS, 8 / ROWS, 12 / ROWS])
    assert laid_out(epochs=1, updates_per_batch=3, save_steps=3).steps == 18


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 3), (1.0, 6)])
def test_a_part_of_an_epoch_has_at_least_one_step(epochs, steps):
    assert laid_out(epochs=epochs).steps == steps


@pytest.mark.parametrize(
    ("prompts", "processes", "says"),
    [(4, 3, "3 or 6"), (7, 2, "6 or 8"), (1, 2, "of 2: 2."), (2, 8, "of 8: 8.")],
)
def test_groups_that_do_not_divide_among_the_processes_are_refused(prompts, processes, says):
    with pytest.raises(UserError, match=f"--prompts-per-step {prompts} over {processes} processes") as error:
        laid_out(prompts_per_step=prompts, processes=processes)
    assert says in (error.value.hint or "")


def test_fewer_prompts_than_a_batch_needs_are_refused():
    with pytest.raises(UserError, match="holds 3 prompts to train on, fewer than --prompts-per-step 4"):
        laid_out(prepared(5, held_out=[0]), left_out=[1001])
    assert laid_out(prepared(4), epochs=1).steps == 1
