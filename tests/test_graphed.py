"""Passes that are recorded compute what the model computes, pack by pack. Here a recording is the work done again; what
graphs add to that only a card can show (tests/gpu/test_fast_path_on_cuda.py)."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opensloth.engine import attention, choose, graphed, head
from opensloth.engine.graphed import Graphed, Passes, shapes_of
from opensloth.engine.leaves import Leaves
from opensloth.engine.loss import pack_inputs, pack_loss
from opensloth.engine.model import draws
from opensloth.training.sft.loader import Shape
from test_attention import ARCHITECTURES, batcher, build, rows
from test_lora_layer import away_from_zero
from tiny import save_tiny_model
from training_fixtures import call, write_rows  # noqa: F401

SHAPE = Shape(tokens=80, rows=6, longest=40)
PACKS = ([0, 1], [2, 3, 4], [1, 4], [])


class Recorded:
    """A model whose passes are recorded, and the same one whose passes are not."""

    tolerance = 1e-5

    def __init__(self, arch="llama", prepare=lambda model: model, **changes):
        self.model = prepare(away_from_zero(build(arch, **changes)).train())
        self.plain, self.head = (head.find(self.model.get_base_model())[0] for _ in range(2))
        self.model.set_attn_implementation(attention.NAME)
        self.batcher = batcher(rows(), packing=True)
        self.batcher.shape = SHAPE
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.said = []
        self.head.graphed = Graphed(self.model, shapes_of(pack_inputs(self.batcher([]))).__eq__, self.said.append)

    @property
    def passes(self):
        return next(iter(self.head.graphed.passes.values()), None)

    def step(self, packs, last):
        """The losses of packs, and the gradients of their sum."""
        self.model.zero_grad()
        losses = []
        for pack in packs:
            made = pack if isinstance(pack, dict) else self.batcher(pack)
            made = {name: x.to(self.model.device) if isinstance(x, torch.Tensor) else x for name, x in made.items()}
            loss = pack_loss(self.model, made, last)
            loss.backward()
            losses.append(loss.item())
        return losses, [weight.grad.clone() for weight in self.trained]

    def check(self, packs):
        losses, gradients = self.step(packs, self.head)
        wanted, expected = self.step(packs, self.plain)
        assert losses == pytest.approx(wanted, rel=self.tolerance)
        for found, exact in zip(gradients, expected, strict=True):
            assert torch.allclose(
                found, exact, rtol=10 * self.tolerance, atol=self.tolerance * float(exact.abs().max())
            )


@pytest.fixture
def replays(monkeypatch):
    done, replay = [], Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, inputs: done.append(self) or replay(self, inputs))
    return done


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_model(arch, replays):
    model = Recorded(arch)
    for _ in range(2):  # gradients begin anew with each step
        model.check(PACKS)
    assert len(replays) == 2 * len(PACKS)
    assert len(set(replays)) == 1
    assert model.said == []


def test_layers_that_are_computed_again_in_the_backward_pass_are_recorded_too(replays):
    model = Recorded()
    model.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.check(PACKS)
    assert len(replays) == len(PACKS)


def test_a_pack_of_another_shape_in_a_step_goes_through_the_model_itself(replays):
    model = Recorded()
    odd = batcher(rows(), packing=True)([0, 2])
    model.check([PACKS[0], odd, PACKS[1]])
    assert len(replays) == 2
    assert len(set(replays)) == 2
    for _ in range(graphed.MOST_RECORDINGS):
        model.check([odd, PACKS[0]])
    assert len(set(replays)) == graphed.MOST_RECORDINGS  # not for ever


def test_recordings_that_were_used_for_long_are_made_again(replays, monkeypatch):
    monkeypatch.setattr(graphed, "WORTH_IT", 2)
    model = Recorded()
    odd = batcher(rows(), packing=True)([0, 2])
    for _ in range(graphed.MOST_RECORDINGS + 2):
        model.check([PACKS[0], PACKS[1], odd])
    assert len(set(replays)) == graphed.MOST_RECORDINGS + 2
    assert model.said == []


def test_without_a_gradient_the_model_itself_computes(replays):
    model = Recorded()
    with torch.no_grad():
        assert not pack_loss(model.model, model.batcher(PACKS[0]), model.head).requires_grad
    assert replays == []


def test_weights_that_lie_elsewhere_now_are_read_there(replays):
    model = Recorded()
    model.check(PACKS[:1])
    for weight in model.trained:
        weight.data = weight.data * 1.5
    model.check(PACKS)
    assert len(set(replays)) == 2


def test_weights_that_change_in_their_place_are_seen(replays):
    model = Recorded()
    model.check(PACKS[:1])
    with torch.no_grad():
        for weight in model.trained:
            weight.mul_(1.5)
    model.check(PACKS)
    assert len(set(replays)) == 1


def frozen_rows(monkeypatch):
    """The host remembers where the rows of the pack end that is recorded, and no other's."""
    recording, attend = [], attention.row_by_row

    def at_once(work):
        recording.append([])
        work()
        return work

    def remembers(q, k, v, ends, *rest):
        if recording:
            recording[0].append(ends._replace(queries=ends.queries.clone(), keys=ends.keys.clone()))
            ends = recording[0][0]
        return attend(q, k, v, ends, *rest)

    monkeypatch.setattr(graphed, "by_itself", at_once)
    monkeypatch.setattr(attention, "row_by_row", remembers)


def cannot(monkeypatch):
    def fails(work):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(graphed, "by_itself", fails)


@pytest.mark.parametrize(
    ("odd", "why"),
    [(cannot, "operation not permitted when stream is capturing"), (frozen_rows, "they compute something else")],
)
def test_what_cannot_be_recorded_trains_as_before_and_a_line_says_so(odd, why, replays, monkeypatch):
    model = Recorded()
    wanted = model.step(PACKS[1:2], model.plain)
    with monkeypatch.context() as patch:
        odd(patch)
        model.step(PACKS[1:2], model.head)
    (said,) = model.said
    assert said.startswith(f"the passes of packs are not recorded as CUDA graphs: {why}")
    losses, gradients = model.step(PACKS[1:2], model.head)
    assert replays == []
    assert losses == wanted[0]
    assert all(map(torch.equal, gradients, wanted[1]))


def test_a_pack_between_another_and_its_backward_pass_is_refused():
    model = Recorded()
    model.check(PACKS[:1])
    first = pack_loss(model.model, model.batcher(PACKS[0]), model.head)
    pack_loss(model.model, model.batcher(PACKS[1]), model.head)
    with pytest.raises(AssertionError, match="another pack went through"):
        first.backward()


def test_a_recording_is_tried_on_a_pack_that_tells_something(replays):
    model = Recorded()
    model.check([[], [], PACKS[0], []])
    assert len(replays) == 2


def test_padding_that_is_embedded_as_zeros_does_not_spoil_the_trial(replays):
    """Every norm of a deep model makes the gradient of such a token hundreds of times larger: it would be infinite."""

    def zeros(model):
        model.get_base_model().get_input_embeddings().weight.data[0] = 0.0  # the id that fills packs up
        return model

    model = Recorded("qwen3", zeros, num_hidden_layers=14)
    model.check(PACKS)
    assert model.said == []
    assert len(replays) == len(PACKS)


def test_what_breaks_off_is_told_by_its_first_cause():
    def breaks():
        try:
            raise NotImplementedError
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as raised:
        breaks()
    assert graphed.cause(raised.value) == "NotImplementedError"
    assert graphed.cause(ValueError("one line\nand more")) == "one line"


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("llama", {}, False),
        ("llama", {"attention_dropout": 0.1}, True),
        ("phi", {"resid_pdrop": 0.1}, True),
        ("opt", {"dropout": 0.1, "ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    ],
)
def test_models_that_draw_random_numbers_are_known(arch, changes, expected):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = AutoConfig.for_model(arch, vocab_size=64, **size, **changes)
    assert draws(AutoModelForCausalLM.from_config(config)) is expected


JOB = ("rows.jsonl", "--model", "model", "--tokens-per-step", 200, "--pack-tokens", 120, "--processes", 1, "--lr", 1e-3)
JOB += ("--eval-fraction", 0.2, "--eval-steps", 3, "--max-steps", 8, "--save-steps", 4, "--max-grad-norm", 0.5)


def test_a_run_is_the_same_with_recorded_passes(tmp_path, call, replays, monkeypatch):  # noqa: F811
    """Clipped, evaluated in between, and once more from its middle."""
    save_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)

    def logged(output, *more):
        code, out = call(*JOB, "--dtype", "float32", "--output", output, *more)
        assert code == 0, out
        lines = map(json.loads, (tmp_path / output / "metrics.jsonl").read_text().splitlines())
        names = ("step", "loss", "eval_loss", "grad_norm")
        return [{name: line[name] for name in names if name in line} for line in lines]

    plain = logged("plain")
    assert replays == []
    for half in ("may_record", "worth_recording"):
        monkeypatch.setattr(choose, half, lambda *_: choose.RECORDED)
    found = logged("recorded")
    assert len(found) == len(plain)
    for line, wanted in zip(found, plain, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)
    assert len(replays) > 8
    half = logged("half", "--max-steps", 8)
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "checkpoint-8")
    (tmp_path / "half" / "result.json").unlink()
    assert logged("half")[-len(half) :] == half


def test_a_model_with_dropout_draws():
    assert not draws(torch.nn.Sequential(torch.nn.Dropout(0.0)))
    assert draws(torch.nn.Sequential(torch.nn.Dropout(0.1)))


def test_leaves_of_a_recording_stand_in_for_what_trains():
    """A weight that two layers share is one leaf; what is frozen stays; and afterwards all is as before."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    before, frozen = list(model.parameters()), model[1].bias
    leaves, x = Leaves(model), torch.randn(2, 3)
    with leaves.in_place():
        assert model[0].weight is model[1].weight is leaves.fresh[0]
        assert model[1].bias is frozen
        found = torch.autograd.grad(model(x).square().sum(), leaves.fresh)
    wanted = torch.autograd.grad(model(x).square().sum(), leaves.trained)
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.Tensor.is_set_to, leaves.fresh, leaves.trained))
    with pytest.raises(RuntimeError), leaves.in_place():
        model(x[:, :2])
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
