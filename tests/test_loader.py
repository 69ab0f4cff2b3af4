"""From prepared data to micro-batches and their loss: however a step is divided, it adds up to the same."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from opensloth.config.jobs import DataJob, SftJob
from opensloth.config.run import SftOptions
from opensloth.data.plan.schedule import schedule
from opensloth.data.prepared.prepare import prepare
from opensloth.engine import attention, choose, matmul, pace
from opensloth.engine.loss import IGNORED, pack_loss, padded_loss
from opensloth.engine.memory import MemoryPlan
from opensloth.training.place import Place
from opensloth.training.sft import loader, run
from opensloth.training.sft.loader import Batcher, Steps, eval_packs
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from training_fixtures import write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loader")
    save_tiny_model(directory / "model")
    rows = write_rows(directory / "rows.jsonl", 30)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:4], "{broken", *lines[4:]]) + "\n")
    return directory


@pytest.fixture(scope="module")
def prepared(place):
    job = {"input": str(place / "rows.jsonl"), "model": str(place / "model"), "workers": 1, "eval_fraction": 0.2}
    return prepare(DataJob(**job, output=place / "data"))


@pytest.fixture(scope="module")
def whole_conversations(place):
    """Rows whose every token is a target, the first one too."""
    job = {"input": str(place / "rows.jsonl"), "model": str(place / "model"), "workers": 1, "target_only": False}
    return prepare(DataJob(**job, output=place / "whole"))


@pytest.fixture
def model():
    """In fp64, so that sums differ by rounding alone."""
    return tiny_model(tiny_tokenizer()).double()


def steps_of(prepared, packing=True, rank=0, processes=1, pack_tokens=160):
    plan = schedule(prepared, SftOptions(tokens_per_step=400), seed=1, processes=processes, packing=packing)
    return Steps(plan, Batcher(prepared, packing, pad_id=0), pack_tokens, rank, processes)


def loss_of(model, batches, packing):
    model.set_attn_implementation(attention.NAME if packing else "sdpa")
    with torch.no_grad():
        return sum(float((pack_loss if packing else padded_loss)(model, batch)) for batch in batches)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_processes_of_a_step_have_its_rows_between_them(prepared, packing, processes):
    ranks = [steps_of(prepared, packing, rank, processes) for rank in range(processes)]
    assert len({len(rank) for rank in ranks}) == 1
    for number, step in enumerate(ranks[0].plan.steps):
        assert len({len(rank[number]["packs"]) for rank in ranks}) == 1
        rows = [row for rank in ranks for batch in rank.rows(number) for row in batch]
        assert sorted(rows) == sorted(step.tolist())


def test_a_step_has_the_same_loss_however_it_is_divided(prepared, model):
    one = steps_of(prepared)
    for number in range(len(one)):
        expected = loss_of(model, one[number]["packs"], packing=True)
        assert expected > 0
        for packing, processes, pack_tokens in ((True, 3, 130), (True, 1, 10_000), (False, 1, 300), (False, 2, 130)):
            ranks = [steps_of(prepared, packing, rank, processes, pack_tokens) for rank in range(processes)]
            total = sum(loss_of(model, rank[number]["packs"], packing) for rank in ranks)
            assert total == pytest.approx(expected, rel=1e-6)
            assert {rank[number]["targets"] for rank in ranks} == {one[number]["targets"]}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_load_of_a_step_is_what_its_tensors_hold(prepared, packing, processes):
    ranks = [steps_of(prepared, packing, rank, processes) for rank in range(processes)]
    for number in range(len(ranks[0])):
        for rank, load in zip(ranks, ranks[0].loads(number), strict=True):
            packs = rank[number]["packs"]
            real = sum(int(prepared.lengths[rows].sum()) for rows in rank.rows(number))
            assert rank[number]["tokens"] == load.tokens == real
            assert load.slots == sum(pack["input_ids"].numel() for pack in packs)
            assert load.room == 160 * len(packs) >= load.slots
        assert sum(load.tokens for load in ranks[0].loads(number)) == ranks[0].plan.tokens(number)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("data", ["prepared", "whole_conversations"])
def test_the_targets_of_a_step_are_the_tokens_its_loss_is_summed_over(request, data, packing):
    steps = steps_of(request.getfixturevalue(data), packing)
    for number in range(len(steps)):
        packs = steps[number]["packs"]
        assert steps[number]["targets"] == sum(int((pack["labels"][:, 1:] != IGNORED).sum()) for pack in packs)


def test_the_mean_over_tokens_is_transformers_own_loss_of_single_rows(prepared, model):
    batcher = Batcher(prepared, packing=False, pad_id=0)
    for row in range(3):
        batch = batcher([row])
        with torch.no_grad():
            expected = float(model(**batch).loss)
        assert loss_of(model, [batch], False) / int(prepared.trained[row]) == pytest.approx(expected, rel=1e-5)


def test_packs_of_one_shape_have_the_loss_of_packs_as_they_come(prepared, model):
    plain, filled = steps_of(prepared), steps_of(prepared)
    longest = int(prepared.lengths.max())
    shape = plain.shape(longest)
    filled.fill_up(shape)
    for number in range(len(plain)):
        packs = filled[number]["packs"]
        assert {pack["input_ids"].shape[1] for pack in packs} == {shape.tokens}
        assert {pack["max_length_q"] for pack in packs} == {longest}
        assert all(int(pack["cu_seq_lens_q"].diff().max()) <= longest for pack in packs)
        assert {len(pack["cu_seq_lens_q"]) for pack in packs} == {shape.rows + 1}
        taken, least = (sum(load.slots for load in steps.loads(number)) for steps in (filled, plain))
        assert taken == shape.tokens * len(packs) >= least
        expected = loss_of(model, plain[number]["packs"], packing=True)
        assert loss_of(model, packs, packing=True) == pytest.approx(expected, rel=1e-6)
    assert filled.batcher([])["input_ids"].shape == (1, shape.tokens)
    assert filled.batcher.filling(shape, shape.tokens) == filled.batcher.filling(shape, shape.tokens + 1) == []


def test_no_step_has_packs_of_another_shape(prepared, monkeypatch):
    """One that just goes into a single pack has more tokens in it than each half of those that do not."""
    monkeypatch.setattr(loader, "LOOKED_AT", 1)
    steps = steps_of(prepared)
    sizes = sorted({steps.plan.tokens(number) for number in range(len(steps))})
    steps.pack_tokens = sizes[-2]  # all steps but the largest go into one pack
    shape = steps.shape(int(prepared.lengths.max()))
    assert shape.tokens < sizes[-2]
    steps.fill_up(shape)
    for number in range(len(steps)):
        assert {pack["input_ids"].shape[1] for pack in steps[number]["packs"]} == {shape.tokens}
    assert steps.filled(shape) > 0.5


def test_a_long_row_in_a_step_that_was_not_looked_at_has_the_shape_too(prepared, monkeypatch):
    monkeypatch.setattr(loader, "LOOKED_AT", 1)
    steps = steps_of(prepared)
    lengths = steps.plan.lengths.copy()
    largest = max(range(len(steps)), key=steps.plan.tokens)
    row = steps.plan.steps[(largest + 1) % len(steps)][0]
    lengths[row] = 150
    steps.plan = replace(steps.plan, lengths=lengths)
    steps.pack_tokens = 150
    shape = steps.shape(150)
    assert shape.tokens == 150
    steps.fill_up(shape)
    for number in range(len(steps)):
        assert all(int(lengths[rows].sum()) <= shape.tokens for rows in steps.rows(number))


def test_the_step_that_follows_is_made_while_one_trains(prepared, monkeypatch):
    steps, made = steps_of(prepared), []
    make = Steps.make
    monkeypatch.setattr(Steps, "make", lambda self, number: made.append(number) or make(self, number))
    for number in (1, 2, 0):  # a run that goes on begins in the middle
        assert steps[number]["number"] == number
    steps.maker.shutdown()
    assert sorted(made) == [0, 1, 1, 2, 3]


def test_a_fault_in_the_making_of_a_step_is_raised_where_it_is_asked_for(prepared, monkeypatch):
    steps = steps_of(prepared)
    make = Steps.make

    def fail(self, number):
        if number == 1:
            raise OSError("the disk is gone")
        return make(self, number)

    monkeypatch.setattr(Steps, "make", fail)
    assert steps[0]["number"] == 0
    with pytest.raises(OSError, match="the disk is gone"):
        steps[1]


def test_the_predictors_of_a_pack_stand_before_its_trained_tokens(prepared):
    pack = Batcher(prepared, True, pad_id=0)([1, 2])
    trained = (pack["labels"][0] != IGNORED).nonzero()[:, 0]
    assert len(trained)
    assert torch.equal(pack["predictors"], trained - 1)


@pytest.mark.parametrize("packing", [True, False])
def test_the_first_token_of_a_row_is_never_trained(whole_conversations, packing):
    stored = whole_conversations.rows.row(3)
    batch = Batcher(whole_conversations, packing, pad_id=0)([2, 3, 4])
    if packing:
        starts = batch["cu_seq_lens_q"][:-1].long()
        assert batch["labels"][0, starts].tolist() == [IGNORED] * 3
        assert batch["labels"][0, starts[1] + 1] == stored.labels[1] != IGNORED
        assert batch["position_ids"][0, starts].tolist() == [0, 0, 0]
    else:
        assert batch["labels"][:, 0].tolist() == [IGNORED] * 3
        assert batch["labels"][1, 1] == stored.labels[1] != IGNORED
        assert batch["attention_mask"].sum(1).tolist() == whole_conversations.lengths[[2, 3, 4]].tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_an_empty_pack_weighs_nothing_and_gives_every_gradient(prepared, model, packing):
    """Without gradients another process would wait for this one's for ever."""
    model.set_attn_implementation(attention.NAME if packing else "sdpa")
    loss = (pack_loss if packing else padded_loss)(model, Batcher(prepared, packing, pad_id=0)([]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 9])
def test_held_out_rows_are_divided_among_the_processes(prepared, packing, processes):
    batcher = Batcher(prepared, packing, pad_id=0)
    shares = [eval_packs(prepared, batcher, 160, rank, processes) for rank in range(processes)]
    rows = [row for share in shares for batch in share for row in batch]
    assert sorted(rows) == prepared.is_eval.nonzero()[0].tolist()
    assert len(rows) == 6


def test_the_rows_of_a_step_are_named_as_os_data_show_names_them(prepared, place):
    """By their number in the source, where a dropped row counts too."""
    steps = steps_of(prepared)
    named = sorted(row_id for step in steps.plan.steps for row_id in steps.row_ids(step.tolist()))
    assert len(named) == 24
    assert 4 not in named
    assert max(named) <= 30
    source = (place / "rows.jsonl").read_text().splitlines()
    tokenizer = tiny_tokenizer()
    for row in steps.rows(0)[0]:
        stored = prepared.rows.row(row)
        asked = json.loads(source[stored.row_id])["messages"][0]["content"]
        assert asked in tokenizer.decode(stored.input_ids)


def test_the_loader_gives_whole_steps_in_order(prepared):
    steps = steps_of(prepared)
    assert [step["number"] for step in steps.loader(pinned=False)] == list(range(len(steps)))
    with pytest.raises(IndexError):
        steps[len(steps)]


@pytest.mark.parametrize(
    ("changed", "times", "expected"),
    [
        ({}, 1.0, ("none", "on")),
        ({}, 2.0, ("none", "on")),
        ({"LAUNCHING": 1e-9}, 2.0, ("selective", "off")),  # the host is faster than the card
        ({"ADDING": 1.0}, 1.0, ("none", "on")),
        ({"ADDING": 1.0}, 2.0, ("selective", "off")),  # shares are added far more slowly
        ({"LEAST_FILLED": 1.1}, 1.0, ("selective", "off")),  # rows do not fill them
    ],
)
def test_packs_are_small_only_where_they_are_recorded(prepared, changed, times, expected, monkeypatch):
    def plan(*_, longest, step, may_record=False):
        return MemoryPlan(160, "none") if may_record else MemoryPlan(400, "selective")

    monkeypatch.setattr(run.plan, "choose", plan)
    monkeypatch.setattr(choose, "may_record", lambda *_: choose.RECORDED)
    for name, value in {"LAUNCHING": 1.0, "LEAST_FILLED": 0.0, **changed}.items():
        monkeypatch.setattr(pace, name, value)
    monkeypatch.setattr(matmul, "times", times)
    job, engine = (
        SftJob(data=prepared.directory, tokens_per_step=400),
        SimpleNamespace(packs_natively=1, recordable=1, model=tiny_model(tiny_tokenizer())),
    )
    laid_out = schedule(prepared, job, seed=1, processes=1, packing=True)
    longest, place = int(prepared.lengths.max()), Place(0, 1, torch.device("cpu"), "gloo")
    memory, graphs = run.fitted(engine, job, laid_out, Batcher(prepared, True, pad_id=0), longest, place)
    assert (memory.checkpointing, graphs.value) == expected
