"""Packs of completions that are filled up score and train as they are, and their passes can be recorded."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from grpo_fixtures import BATCH, RECORDS, make_place, metrics, record_packs, replays_of, train, train_in_two_processes
from opensloth.config.jobs import GrpoJob
from opensloth.engine import attention, choose, fill, graphed, head, matmul, memory
from opensloth.engine.attention import Boundaries
from opensloth.engine.fill import KEYS_PER_TOKEN, PARTS, Need, Size, Sizes
from opensloth.engine.graphed import Graphed
from opensloth.engine.memory import Means, MemoryPlan, Shape
from opensloth.engine.policy import packed
from opensloth.launch.launcher import HALVINGS
from opensloth.rollout.room import Room
from opensloth.training.grpo import sizes
from opensloth.training.grpo.micro_batches import Cutter
from opensloth.training.grpo.sizes import Batch
from opensloth.training.place import Place
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
        size = Size(tokens, int(tokens * chooser.choice(KEYS_PER_TOKEN)), 0, LONGEST)
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
    some = Sizes(100 * PARTS, LONGEST, completions=150, pad=0)
    some.expect([Need(1000, 100, 0)])
    assert [size.tokens for size in some.all] == list(range(100, 100 * PARTS + 1, 100))
    assert [size.room.rows for size in some.all] == [min(100 * part // 8, 150) for part in range(1, PARTS + 1)]
    for size in some.all:
        assert some.smallest(size.room) == size
    first, second, *_ = some.all
    assert some.smallest(Need(first.room.tokens + 1, 1, 0)) == second
    assert some.smallest(Need(10, second.room.rows, 0)) == second
    assert some.smallest(Need(10, 151, 0)) is None
    assert some.smallest(Need(100 * PARTS, 1, 0)) is None
    assert some.smallest(Need(100, 1, 1)) is None  # no key is expected beyond the tokens yet


def test_there_is_room_for_as_many_keys_and_rows_as_came():
    some = Sizes(100 * PARTS, LONGEST, completions=150, pad=0)
    assert [size.room.rows for size in some.all] == [1] * PARTS
    some.expect([Need(1000, 10, 350), Need(600, 3, 100), Need(100, 50, 900)])  # the last has room in a larger size
    assert [size.keys for size in some.all] == list(range(150, 150 * PARTS + 1, 150))
    assert some.all[-1].room.rows == 100 * PARTS // 64
    before = some.all
    some.expect([Need(1000, 5, 100)])
    assert some.all is before
    some.expect([Need(1000, 50, 100_000)])  # more than KEYS_PER_TOKEN has
    assert some.all[0].keys == 100 * (1 + 100)
    assert some.all[-1].room.rows == 100 * PARTS // 16


def test_what_one_odd_batch_needed_is_given_up_after_a_while():
    some = Sizes(100 * PARTS, LONGEST, completions=150, pad=0, most_keys=9.0)
    some.expect([Need(1000, 200, 20_000)])
    assert some.keys_per_token == 9.0  # of 21: there is memory for no more
    for _ in range(fill.LATELY - 1):
        some.expect([Need(1000, 10, 200)])
        assert (some.keys_per_token, some.tokens_per_row) == (9.0, 4)
    some.expect([Need(1000, 10, 200)])
    assert (some.keys_per_token, some.tokens_per_row) == (1.25, 64)


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

    def __init__(self, arch="llama", recordings=8, unrecorded=2, prepare=lambda model: model):
        self.model = prepare(away_from_zero(build(arch)).train())
        self.plain = head.find(self.model.get_base_model())[0]
        self.model.set_attn_implementation(attention.NAME)
        self.sizes = Sizes(144, LONGEST, completions=12, pad=0)
        self.said = []
        self.head = copy.copy(self.plain)
        self.head.graphed = Graphed(self.model, self.sizes.has, self.said.append, recordings, unrecorded)

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
    return replays_of(monkeypatch)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_packs_of_several_sizes_are_scored_and_trained_as_they_are(arch, replays):
    policy = Policy(arch)
    policy.sizes.expect([Need(100, 24, 60)])
    small, large = GROUPS[:1], GROUPS
    for seed in range(4):
        policy.check(large, seed)
        policy.check(small, seed)
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
    policy = Policy(unrecorded=0)
    policy.sizes.expect([Need(100, 24, 0)])
    policy.check(GROUPS[1:2])
    assert len(replays) == 1
    policy.check(GROUPS)  # more keys than tokens, which was not expected
    assert len(replays) == 1
    assert policy.head.graphed.passes == {}


def test_sizes_that_grow_are_recorded_anew_however_often_that_is(replays, monkeypatch):
    """As completions become shorter there are more rows, and more keys, for as many tokens."""
    monkeypatch.setattr(graphed, "WORTH_IT", 2)
    policy = Policy(recordings=1, unrecorded=0)
    for keys in (0, 40, 90, 150):
        policy.sizes.expect([Need(100, 24, keys)])
        policy.check(GROUPS[1:2], 1)
        policy.check(GROUPS[1:2], 2)
        assert len(policy.head.graphed.passes) == 1
    assert len(set(replays)) == 4
    assert policy.said == []


def test_recordings_that_never_pay_are_given_up_and_a_line_says_so(replays):
    policy = Policy(recordings=2, unrecorded=0)
    for keys in (0, 40, 90, 150):
        policy.sizes.expect([Need(100, 24, keys)])
        policy.check(GROUPS[1:2])
    assert len(set(replays)) == 2
    assert policy.head.graphed.passes == {}
    assert policy.said == ["no more sizes of packs are recorded as CUDA graphs: too many came"]
    made = batch(GROUPS)
    widths = []
    embeddings = policy.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    packed(policy.model, *made, TEMPERATURE, policy.head, policy.sizes)
    assert widths == [44]  # for what is not recorded nothing is filled up


def test_the_memory_of_recordings_begins_with_the_largest(replays):
    """What it gave back of a smaller one is in pieces too small for a larger one."""
    policy = Policy(unrecorded=0)
    policy.sizes.expect([Need(100, 24, 60)])
    small, large = GROUPS[1:2], GROUPS
    for groups, there in ((small, 1), (large, 1), (small, 2), (large, 2)):
        policy.check(groups)
        assert len(policy.head.graphed.passes) == there
    assert len(set(replays)) == 3


def test_without_a_gradient_nothing_is_filled_up(replays):
    policy = Policy(unrecorded=0)
    policy.sizes.expect([Need(100, 24, 60)])
    made = batch(GROUPS)
    widths = []
    embeddings = policy.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        found = packed(policy.model, *made, TEMPERATURE, policy.head, policy.sizes)
        assert torch.equal(found.logps, packed(policy.model, *made, TEMPERATURE, policy.plain).logps)
    packed(policy.model, *made, TEMPERATURE, policy.plain, policy.sizes)
    tokens = sum(prompt + sum(lengths) for prompt, lengths in GROUPS)
    assert widths == [tokens, tokens, policy.sizes.smallest(Need(tokens, 6, 12)).tokens]
    assert widths[-1] > tokens
    assert replays == []


def test_where_a_second_size_cannot_be_recorded_the_first_is_given_up_too(monkeypatch, replays):
    policy = Policy(unrecorded=0)
    policy.sizes.expect([Need(100, 24, 60)])
    policy.check(GROUPS)

    def no_room(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(graphed, "recorded", no_room)
    policy.check(GROUPS[:1])
    policy.check(GROUPS)
    assert len(replays) == 1
    assert policy.head.graphed.passes == {}
    assert policy.said == ["the passes of packs are not recorded as CUDA graphs: out of memory"]


def test_a_batch_is_cut_into_as_few_packs_as_hold_it_of_equal_size():
    chooser = np.random.default_rng(0)
    prompts, completions = chooser.integers(5, 15, 8).repeat(4), chooser.integers(1, 16, 32)
    some = Sizes(12 * PARTS, LONGEST, completions=32, pad=0)
    cutter = Cutter(group=4, pack_tokens=12 * PARTS, batch_size=None, packs=True, sizes=some)
    cutter.expect(prompts, completions)
    parts = cutter.cut(prompts, completions)
    assert [place for part in parts for place in part] == list(range(32))
    assert len(parts) == len(cutter.dealt(prompts, completions, some.all[-1].room)) > 1
    needs = [cutter.need(part, prompts, completions) for part in parts]
    taken = {some.smallest(need) for need in needs}
    assert None not in taken
    smaller = some.all[some.all.index(max(taken)) - 1]
    assert len(cutter.dealt(prompts, completions, smaller.room)) > len(parts)
    load = cutter.load(parts, prompts, completions)
    assert load.tokens == sum(need.tokens for need in needs)
    assert load.slots == sum(some.smallest(need).tokens for need in needs)
    assert load.room == 12 * PARTS * len(parts)


def test_a_batch_of_uneven_groups_is_cut_into_as_few_packs():
    """Four groups of short completions, and four of long ones: no pack is full of rows, or of keys, and half empty."""
    prompts, completions = np.full(256, 100), np.repeat([20, 20, 20, 20, 1_000, 1_000, 1_000, 1_000], 32)
    cutter = Cutter(group=32, pack_tokens=24_000, batch_size=None, packs=True, sizes=Sizes(24_000, 1_100, 256, pad=0))
    cutter.expect(prompts, completions)
    parts = cutter.cut(prompts, completions)
    load = cutter.load(parts, prompts, completions)
    assert len(parts) == 6
    assert load.slots <= 1.1 * load.tokens


SMALL = Shape(49_152 * 576, 30, 576, 1536, 49_152, 576, 960)  # of SmolLM2-135M
MIDDLE = Shape(151_936 * 1024, 28, 1024, 3072, 151_936, 2048, 4096)  # of Qwen3-0.6B
LARGE = Shape(151_936 * 4096, 36, 4096, 12_288, 151_936, 4096, 6144)  # of Qwen3-8B


def test_packs_are_as_large_as_takes_least_time():
    """With a small model the host is what takes the time, with a large one the card."""
    for batch in (1_000, 20_000, 72_000, 300_000):
        assert choose.largest_recorded(SMALL, 32_768, 300, batch, slower=True) > min(batch, 30_000) / 2
        assert choose.largest_recorded(LARGE, 32_768, 300, max(batch, 20_000), slower=True) == 0
    # measured faster: 64 completions of 256 tokens in one pack, 256 of them in three (docs/performance.md)
    assert 17_000 < choose.largest_recorded(MIDDLE, 32_768, 319, 17_000, slower=True) < 22_000
    assert 17_000 < choose.largest_recorded(MIDDLE, 32_768, 319, 68_000, slower=True) < 30_000
    small = choose.largest_recorded(LARGE, 32_768, 300, 4_000, slower=True)
    assert small > 0
    assert choose.largest_recorded(LARGE, 32_768, 2 * small, 4_000, slower=True) > 2 * small
    assert choose.largest_recorded(SMALL, 1_000, 999, 4_000, slower=True) == 0


def card(monkeypatch, free):
    """What a rule is told on a card with so many free bytes: an engine, a job, a place and a plan."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    engine = SimpleNamespace(
        model=SimpleNamespace(config=config), packs_natively=True, recordable=True, dtype=torch.bfloat16, means=Means()
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(matmul, "times", 1.0)
    return engine, GrpoJob(data="data"), Place(0, 1, torch.device("cuda", 0), "nccl"), MemoryPlan(32_768, "none")


def largest(monkeypatch, free=100 * 2**30, stays=True, others=None, **changes):
    """Tokens of the largest pack that is recorded, and the reason. `others`: what another process says to each question
    that is asked of all."""
    engine, job, place, plan = card(monkeypatch, free)
    asked = iter(("recordable", "stays", "slower", "fits"))

    def of_all(mine):
        question = next(asked)
        return [mine, others[question]] if others and question in others else [mine]

    monkeypatch.setattr(sizes, "of_all", of_all)
    batch = Batch(longest=600, completions=64, room=Room(64, 2**20, stays))
    job = job.model_copy(update=changes)
    once = sizes.tokens_that_fit(engine, job, place.device, plan.checkpointing, batch.room.kept)
    found = sizes.choose_largest(engine, job, place, plan, batch, once)
    assert next(asked, None) is None  # whatever is found, all processes ask the same
    return found


def test_packs_are_recorded_where_it_pays_and_there_is_room(monkeypatch):
    tokens, chosen = largest(monkeypatch)
    assert (tokens > 600, chosen) == (True, choose.RECORDED)
    assert largest(monkeypatch, load_in_4bit=True, compile="on")[1] == choose.RECORDED  # which compiles nothing
    for change, why in (
        ({"cuda_graphs": "off"}, "as asked"),
        ({"batch_size": 4}, "they are for packs of one size"),
        ({"compile": "on"}, "compiled layers take packs of any size"),
        ({"stays": False}, "completions need the memory that recordings keep"),
        ({"free": 2**30}, "packs have no room for more than the longest row"),
        ({"free": 0}, "packs have no room for more than the longest row"),
    ):
        assert largest(monkeypatch, **change) == (0, choose.Choice("off", why)), change


def test_processes_record_together_or_not_at_all(monkeypatch):
    """Another has no room for completions that stay, cannot record, or has less memory."""
    alone, _ = largest(monkeypatch)
    assert largest(monkeypatch, others={"stays": False})[1].why == "completions need the memory that recordings keep"
    assert largest(monkeypatch, others={"recordable": False})[0] == 0
    fewer, _ = largest(monkeypatch, others={"fits": 1_000})
    assert 600 < fewer <= 1_000 < alone


def test_memory_that_ran_out_leaves_smaller_packs(monkeypatch):
    monkeypatch.delenv(HALVINGS, raising=False)  # a launcher in this process leaves it
    before, _ = largest(monkeypatch, free=8 * 2**30)
    monkeypatch.setenv(HALVINGS, "1")
    after, _ = largest(monkeypatch, free=8 * 2**30)
    assert 0 < after < before


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
