"""Passes that are recorded compute what the model computes, pack by pack. Here a recording is the work done again; what
graphs add to that only a card can show (tests/gpu/test_fast_path_on_cuda.py)."""

import pytest
import torch

from opensloth.engine import attention, graphed, head
from opensloth.engine.graphed import Graphed, Passes
from opensloth.engine.loss import pack_inputs, pack_loss
from opensloth.training.sft.loader import Shape
from test_attention import ARCHITECTURES, batcher, build, rows
from test_lora_layer import away_from_zero

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
        self.head.graphed = Graphed(self.trained, pack_inputs(self.batcher([])), self.said.append)

    @property
    def passes(self):
        return self.head.graphed.passes

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
    done, call = [], Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, inputs: done.append(self) or call(self, inputs))
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

    monkeypatch.setattr(graphed, "again", at_once)
    monkeypatch.setattr(attention, "row_by_row", remembers)


def cannot(monkeypatch):
    def fails(work):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(graphed, "again", fails)


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


def test_a_model_with_dropout_draws():
    assert not graphed.draws(torch.nn.Sequential(torch.nn.Dropout(0.0)))
    assert graphed.draws(torch.nn.Sequential(torch.nn.Dropout(0.1)))
