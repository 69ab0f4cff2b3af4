"""Optimizer steps follow from data and settings; the hardware only decides how a step is divided."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensloth.config.run import SftOptions
from opensloth.data.plan.schedule import padded_batches, schedule
from opensloth.errors import UserError

ROWS = 40
SEED = 11


def data(rows=ROWS, held_out=(), packing=True):
    """Prepared data as far as a schedule reads it; row n has 5 + 7n mod 31 tokens, half of them trained."""
    lengths = 5 + 7 * np.arange(rows) % 31
    return SimpleNamespace(
        directory=Path("data"),
        manifest=SimpleNamespace(options={"packing": packing}),
        lengths=lengths,
        trained=lengths // 2,
        is_eval=np.isin(np.arange(rows), held_out),
    )


def lay_out(prepared=None, processes=1, seed=SEED, packing=None, **options):
    options = {"tokens_per_step": "auto" if "batch_size" in options else 100, **options}
    return schedule(prepared or data(), SftOptions(**options), seed=seed, processes=processes, packing=packing)


def rows_of(plan):
    return [sorted(step.tolist()) for step in plan.steps]


def test_an_epoch_holds_every_row_once():
    plan = lay_out(epochs=1)
    assert sorted(row for step in plan.steps for row in step) == list(range(ROWS))
    assert plan.epoch[-1] == 1.0
    assert sum(plan.tokens(step) for step in range(len(plan.steps))) == plan.lengths.sum()
    assert sum(plan.targets(step) for step in range(len(plan.steps))) == plan.trained.sum()


def test_epochs_differ_in_their_order_and_seeds_too():
    plan = lay_out(epochs=2)
    half = len(lay_out(epochs=1).steps)
    first, second = rows_of(plan)[:half], rows_of(plan)[half:]
    assert sorted(row for step in second for row in step) == list(range(ROWS))
    assert first != second
    assert rows_of(lay_out(epochs=1, seed=SEED + 1)) != first


def test_steps_do_not_depend_on_processes():
    assert rows_of(lay_out(processes=1)) == rows_of(lay_out(processes=7))


@pytest.mark.parametrize("epochs", [0.3, 0.5, 1.5, 2.25])
def test_fractions_of_an_epoch_are_whole_steps_of_its_order(epochs):
    whole, part = lay_out(epochs=3), lay_out(epochs=epochs)
    steps = len(part.steps)
    assert rows_of(part) == rows_of(whole)[:steps]
    # the first step that reaches the fraction is the last
    assert part.epoch[-1] >= epochs > (part.epoch[-2] if steps > 1 else 0)
    assert part.epoch == whole.epoch[:steps]


def test_max_steps_goes_round_the_data_as_often_as_it_must():
    one = len(lay_out(epochs=1).steps)
    plan = lay_out(max_steps=2 * one + 3, epochs=1)
    assert len(plan.steps) == 2 * one + 3
    assert plan.epoch[-1] > 2
    assert len(lay_out(max_steps=2, epochs=5).steps) == 2


def test_tokens_per_step_is_reached_by_whole_rows():
    plan = lay_out(tokens_per_step=100)
    for number, step in enumerate(plan.steps[:-1]):
        assert plan.tokens(number) >= 100 > plan.tokens(number) - plan.lengths[step[-1]]


def test_held_out_rows_are_never_trained():
    plan = lay_out(data(held_out=(0, 5, 39)), epochs=2)
    assert not {0, 5, 39} & {row for step in plan.steps for row in step}


def test_data_without_training_rows_is_refused():
    with pytest.raises(UserError, match="no training rows"):
        lay_out(data(rows=3, held_out=(0, 1, 2)))


@pytest.mark.parametrize(("processes", "rows_in_a_step"), [(1, 6), (2, 12)])
def test_batch_size_and_grad_accum_count_rows_per_process(processes, rows_in_a_step):
    plan = lay_out(batch_size=2, grad_accum=3, processes=processes)
    sizes = [len(step) for step in plan.steps]
    assert set(sizes[:-1]) == {rows_in_a_step}
    assert sum(sizes) == ROWS
    for step in range(len(sizes)):
        for process in plan.micro_batches(step, 10_000, processes):
            assert len(process) <= 3
            assert all(len(rows) <= 2 for rows in process)


def test_twice_the_processes_and_half_the_batch_are_the_same_steps():
    assert rows_of(lay_out(batch_size=2, processes=2)) == rows_of(lay_out(batch_size=4))


@given(
    processes=st.integers(1, 5),
    pack_tokens=st.integers(4, 200),
    packing=st.booleans(),
    batch_size=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_a_division_loses_no_row_and_keeps_processes_in_step(processes, pack_tokens, packing, batch_size):
    options = {} if batch_size is None else {"batch_size": batch_size}
    plan = lay_out(processes=processes, packing=packing, **options)
    for number, step in enumerate(plan.steps):
        dealt = plan.micro_batches(number, pack_tokens, processes)
        assert len(dealt) == processes
        assert len({len(process) for process in dealt}) == 1
        assert sorted(row for process in dealt for batch in process for row in batch) == sorted(step.tolist())


def test_padded_batches_count_the_padding():
    lengths = np.array([30, 3, 29, 4, 5, 100])
    batches = padded_batches(np.arange(6), lengths, 60)
    assert batches == [[5], [0, 2], [4, 3, 1]]
    assert all(len(batch) * lengths[batch].max() <= 60 for batch in batches[1:])


def test_an_engine_that_pads_gets_padded_batches_of_packed_data():
    """Else rows x longest row would go beyond the tokens that there is memory for."""
    plan = lay_out(data(packing=True), packing=False, tokens_per_step=400)
    for step in range(len(plan.steps)):
        for batch in plan.micro_batches(step, 40, 1)[0]:
            assert len(batch) * plan.lengths[batch].max() <= 40
