"""Packs of completions that are filled up score and train as they are, and their passes can be recorded."""

import copy
import random

import numpy as np
import pytest
import torch

from grpo_fixtures import BATCH, RECORDS, make_place, metrics, record_packs, train, train_in_two_processes
from opensloth.engine import attention, choose, fill, graphed, head
from opensloth.engine.attention import Boundaries
from opensloth.engine.fill import PARTS, SHARES, Need, Size, Sizes
from opensloth.engine.graphed import Graphed, Passes
from opensloth.engine.memory import Shape
from opensloth.engine.policy import packed
from opensloth.training.grpo.micro_batches import Cutter
from test_attention import build
from test_lora_layer import away_from_zero

LONGEST = 30
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def rows_of_filling_are_as_short_as_others(monkeypatch):
    monkeypatch.setattr(fill, "LONG", 0)


def boundaries(lengths, seen):
    ends = (torch.tensor([0, *numbers]).cumsum(0).int() for numbers in (lengths, seen))
    return Boundaries(*ends, max(lengths), max(seen))


def test_what_fills_a_pack_up_has_rows_of_its_own():
    chooser = random.Random(0)
    for _ in range(200):
        tokens = chooser.randint(60, 400)
        size = Size(tokens, int(tokens * chooser.choice(SHARES)), 0, LONGEST)
        size = size._replace(rows=20 + size.fillers)
        lengths, extra = [], []
        while len(lengths) < 20:
            length, more = chooser.randint(1, 20), chooser.randint(0, 10)
            if not Need(sum(lengths) + length, 1, sum(extra) + more).within(size.room):
                break
            lengths.append(length)
            extra.append(more)
        if not lengths:
            continue
        real = boundaries(lengths, [length + more for length, more in zip(lengths, extra, strict=True)])
        full = size.fill(real)
        queries, keys = full.queries.diff(), full.keys.diff()
        assert full.queries[: len(lengths) + 1].equal(real.queries)
        assert full.keys[: len(lengths) + 1].equal(real.keys)
        assert len(queries) == len(keys) == size.rows
        assert (int(full.queries[-1]), int(full.keys[-1])) == (size.tokens, size.keys)
        assert full.queries.dtype == full.keys.dtype == torch.int32
        fillers = queries[len(lengths) :] > 0
        assert (queries <= keys).all()
        assert (keys <= LONGEST).all()
        assert int(fillers.sum()) >= 1
        assert not keys[len(lengths) :][~fillers].any()  # nothing that is seen by nobody


def test_a_pack_takes_the_smallest_size_that_holds_it():
    sizes = Sizes(100 * PARTS, LONGEST, completions=150, pad=0)
    sizes.expect(Need(1000, 100, 0))
    assert [size.tokens for size in sizes.all] == list(range(100, 100 * PARTS + 1, 100))
    assert [size.room.rows for size in sizes.all] == [min(100 * part // 8, 150) for part in range(1, PARTS + 1)]
    for size in sizes.all:
        assert sizes.smallest(size.room) == size
    first, second, *_ = sizes.all
    assert sizes.smallest(Need(first.room.tokens + 1, 1, 0)) == second
    assert sizes.smallest(Need(10, second.room.rows, 0)) == second
    assert sizes.smallest(Need(10, 151, 0)) is None
    assert sizes.smallest(Need(100 * PARTS, 1, 0)) is None
    assert sizes.smallest(Need(100, 1, 1)) is None  # no key is expected beyond the tokens yet


def test_there_is_room_for_as_many_keys_and_rows_as_came():
    sizes = Sizes(100 * PARTS, LONGEST, completions=150, pad=0)
    assert [size.room.rows for size in sizes.all] == [1] * PARTS
    sizes.expect(Need(1000, 10, 350))
    assert [size.keys for size in sizes.all] == list(range(150, 150 * PARTS + 1, 150))
    assert sizes.all[-1].room.rows == 100 * PARTS // 64
    before = sizes.all
    sizes.expect(Need(1000, 5, 100))
    assert sizes.all is before
    sizes.expect(Need(1000, 50, 100_000))  # more than SHARES have
    assert sizes.all[0].keys == pytest.approx(100 * (1 + 1.1 * 100), abs=1)
    assert sizes.all[-1].room.rows == 100 * PARTS // 16


GROUPS = ((5, (3, 9, 1)), (8, (2,)), (2, (7, 7)))  # tokens of a prompt, and of its completions


def batch(groups, seed=5):
    """Rows as TRL makes them, and the tokens of each prompt and completion."""
    chooser = torch.Generator().manual_seed(seed)
    left, right = max(prompt for prompt, _ in groups), max(max(lengths) for _, lengths in groups)
    rows = [(number, prompt, length) for number, (prompt, lengths) in enumerate(groups) for length in lengths]
    ids, mask = (torch.zeros(len(rows), left + right, dtype=torch.long) for _ in range(2))
    prompts = [torch.randint(5, 60, (prompt,), generator=chooser) for prompt, _ in groups]
    for row, (number, prompt, length) in enumerate(rows):
        ids[row, left - prompt : left] = prompts[number]
        ids[row, left : left + length] = torch.randint(5, 60, (length,), generator=chooser)
        mask[row, left - prompt : left + length] = 1
    return ids, mask, right


class Policy:
    """A model whose packs are filled up, and recorded from the third of a size on."""

    tolerance = 1e-5

    def __init__(self, arch="llama", recordings=8, first=2, prepare=lambda model: model):
        self.model = prepare(away_from_zero(build(arch)).train())
        self.plain = head.find(self.model.get_base_model())[0]
        self.model.set_attn_implementation(attention.NAME)
        self.sizes = Sizes(144, LONGEST, completions=12, pad=0)
        self.said = []
        self.head = copy.copy(self.plain)
        self.head.graphed = Graphed(self.model, self.sizes.has, self.said.append, recordings, first)

    def step(self, made, head, sizes=None):
        self.model.zero_grad()
        scores = packed(self.model, *made, TEMPERATURE, head, sizes)
        weights = torch.linspace(-1, 1, scores.logps.numel()).reshape(scores.logps.shape)
        (scores.logps * weights).sum().backward()
        gradients = {
            name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.requires_grad
        }
        return scores, gradients

    def check(self, groups, seed=5):
        made = batch(groups, seed)
        found, gradients = self.step(made, self.head, self.sizes)
        wanted, expected = self.step(made, self.plain)
        pairs = [(found.logps, wanted.logps), (found.entropy, wanted.entropy)]
        pairs += [(gradients[name], expected[name]) for name in expected]
        for one, exact in pairs:
            assert float((one - exact).norm()) <= self.tolerance * float(exact.norm())


@pytest.fixture
def replays(monkeypatch):
    done, replay = [], Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, inputs: done.append(self) or replay(self, inputs))
    return done


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_packs_of_several_sizes_are_scored_and_trained_as_they_are(arch, replays):
    policy = Policy(arch)
    policy.sizes.expect(Need(100, 24, 60))
    small, large = GROUPS[:1], GROUPS
    for seed in range(4):
        policy.check(small, seed)
        policy.check(large, seed)
    assert policy.said == []
    assert len(replays) == 4  # the first two of each size went through the model itself
    assert len(set(replays)) == 2
    shapes = {passes.inputs["input_ids"].shape[1] for passes in replays}
    assert len(shapes) == 2


def test_packs_whose_rows_share_nothing_have_no_more_keys_than_tokens(replays, monkeypatch):
    monkeypatch.setattr(attention, "shares", lambda device: False)
    policy = Policy()
    for seed in range(3):
        policy.check(GROUPS[1:2], seed)
    assert len(replays) == 1
    assert replays[0].inputs["key_places"] is None


def test_a_pack_that_no_size_holds_goes_through_the_model_itself(replays):
    policy = Policy(first=0)
    policy.sizes.expect(Need(100, 24, 0))
    policy.check(GROUPS[1:2])
    assert len(replays) == 1
    policy.check(GROUPS)  # more keys than tokens, which was not expected
    assert len(replays) == 1
    assert policy.head.graphed.passes == {}


def test_recordings_of_sizes_that_are_no_more_are_dropped(replays):
    policy = Policy(first=0)
    policy.check(GROUPS[1:2])
    policy.sizes.expect(Need(100, 24, 60))
    policy.check(GROUPS)
    assert len(policy.head.graphed.passes) == 1
    assert len(set(replays)) == 2


def test_without_a_gradient_nothing_is_filled_up(replays):
    policy = Policy(first=0)
    policy.sizes.expect(Need(100, 24, 60))
    made = batch(GROUPS)
    seen = []
    policy.model.get_base_model().model.register_forward_hook(lambda *_, **__: seen.append(1))
    with torch.no_grad():
        found = packed(policy.model, *made, TEMPERATURE, policy.head, policy.sizes)
    assert torch.allclose(found.logps, packed(policy.model, *made, TEMPERATURE, policy.plain).logps, atol=1e-6)
    assert replays == []


def test_where_a_second_size_cannot_be_recorded_the_first_is_given_up_too(monkeypatch, replays):
    policy = Policy(first=0)
    policy.sizes.expect(Need(100, 24, 60))
    policy.check(GROUPS[:1])

    def no_room(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(graphed, "recorded", no_room)
    policy.check(GROUPS)
    policy.check(GROUPS[:1])
    assert len(replays) == 1
    assert policy.head.graphed.passes == {}
    assert policy.said == ["the passes of packs are not recorded as CUDA graphs: out of memory"]


def test_a_batch_is_cut_into_as_few_packs_as_hold_it_of_equal_size():
    chooser = np.random.default_rng(0)
    prompts, completions = chooser.integers(5, 15, 8).repeat(4), chooser.integers(1, 16, 32)
    sizes = Sizes(12 * PARTS, LONGEST, completions=32, pad=0)
    cutter = Cutter(group=4, pack_tokens=12 * PARTS, batch_size=None, packs=True, sizes=sizes)
    cutter.expect(prompts, completions)
    parts = cutter.cut(prompts, completions)
    assert [place for part in parts for place in part] == list(range(32))
    assert len(parts) == len(cutter.dealt(prompts, completions, sizes.all[-1].room)) > 1
    needs = [cutter.need(part, prompts, completions) for part in parts]
    taken = {sizes.smallest(need) for need in needs}
    assert None not in taken
    smaller = sizes.all[sizes.all.index(max(taken)) - 1]
    assert len(cutter.dealt(prompts, completions, smaller.room)) > len(parts)
    load = cutter.load(parts, prompts, completions)
    assert load.tokens == sum(need.tokens for need in needs)
    assert load.slots == sum(sizes.smallest(need).tokens for need in needs)
    assert load.room == 12 * PARTS * len(parts)


SMALL = Shape(49_152 * 576, 30, 576, 1536, 49_152, 576, 960)  # of SmolLM2-135M
LARGE = Shape(151_936 * 4096, 36, 4096, 12_288, 151_936, 4096, 6144)  # of Qwen3-8B


def test_packs_are_as_large_as_takes_least_time():
    """With a small model the host is what takes the time, with a large one the card."""
    for batch in (1_000, 20_000, 72_000, 300_000):
        assert choose.largest_recorded(SMALL, 32_768, batch, slower=True) > min(batch, 30_000) / 2
        assert choose.largest_recorded(LARGE, 32_768, max(batch, 20_000), slower=True) == 0
    assert choose.largest_recorded(LARGE, 32_768, 4_000, slower=True) > 0


def test_a_run_is_the_same_with_packs_that_are_recorded(tmp_path, monkeypatch, replays):
    """By one process and by two, whose gradients DDP does not see."""
    make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    job = ("data", "--model", "model", *BATCH, "--rewards", "rewards.py:letters", "--processes", 1, "--max-steps", 5)
    job += ("--pack-tokens", 300)
    train(*job, "--output", "plain")
    assert replays == []
    train_in_two_processes((*job, "--output", "two"), **{RECORDS: "1"})
    record_packs(monkeypatch)
    train(*job, "--output", "recorded")
    assert len(replays) > 3
    plain = metrics(tmp_path / "plain")
    for output in ("recorded", "two"):
        for line, wanted in zip(metrics(tmp_path / output), plain, strict=True):
            for name in ("loss", "grad_norm", "reward", "entropy"):
                assert line[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), (output, name)
            assert line["padding"] > wanted["padding"] == 0  # of packs that are filled up
