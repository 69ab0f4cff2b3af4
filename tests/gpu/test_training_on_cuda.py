"""What only a CUDA card can show: the varlen kernel is exact between rows, and both engines train, also in 4-bit."""

import importlib.util
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from grpo_fixtures import metrics
from opensloth.engine import attention
from opensloth.training.sft import pack_trainer
from tiny import tiny_tokenizer
from training_fixtures import begin, end, write_rows

pytestmark = pytest.mark.gpu
VOCABULARY = 1024
LENGTHS = (1, 70, 3, 128, 40)
JOB = ("rows.jsonl", "--model", "model", "--max-steps", 3, "--tokens-per-step", 600, "--warmup-steps", 0)
# rounding of bfloat16, eight bits of which are kept, on values around 1
BFLOAT16 = 0.03
CYCLES = 10**9  # of a card: about half a second


def boundaries():
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return ends.int().cuda(), max(LENGTHS)


def heads(seed=0):
    """Query, key and value in bfloat16 with grouped heads: (1, heads, tokens, 64)."""
    torch.manual_seed(seed)
    shapes = ((8, sum(LENGTHS), 64), (2, sum(LENGTHS), 64), (2, sum(LENGTHS), 64))
    return [torch.randn(1, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_equals_attention_row_by_row(window):
    ends, longest = boundaries()
    packed, reference = heads(), [x.detach().float().requires_grad_() for x in heads()]
    assert attention.has_kernel(packed[0].transpose(1, 2)[0])
    out, _ = attention.varlen(
        None, *packed, None, scaling=0.125, sliding_window=window, cu_seq_lens_q=ends, max_length_q=longest
    )
    rows = (x.transpose(1, 2)[0] for x in reference)
    expected = attention.row_by_row(*rows, attention.Boundaries(ends, ends, longest, longest), 0.125, window)[None]
    assert out.shape == expected.shape
    assert float((out.float() - expected).abs().max()) < BFLOAT16
    weight = torch.randn_like(expected)
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for got, wanted in zip(packed, reference, strict=True):
        error = (got.grad.float() - wanted.grad).abs().max() / wanted.grad.abs().max()
        assert float(error) < BFLOAT16


def test_rows_that_share_their_beginnings_come_out_right():
    assert attention.shares(torch.device("cuda", 0))


def test_no_bit_of_a_row_depends_on_its_neighbours():
    ends, longest = boundaries()
    outs = []
    for seed in (1, 2):
        q, k, v = (x.detach() for x in heads(seed))
        fixed = [x.detach() for x in heads(0)]
        for changed, kept in zip((q, k, v), fixed, strict=True):
            changed[:, :, ends[3] : ends[4]] = kept[:, :, ends[3] : ends[4]]  # the fourth row alone is the same
        out, _ = attention.varlen(None, q, k, v, None, cu_seq_lens_q=ends, max_length_q=longest)
        outs.append(out[0])
    fourth = slice(int(ends[3]), int(ends[4]))
    assert torch.equal(outs[0][fourth], outs[1][fourth])
    assert not torch.equal(outs[0][: ends[3]], outs[1][: ends[3]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A two-layer llama whose heads are large enough for unsloth's kernels, and rows of uneven length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("cuda")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_rows(directory / "rows.jsonl")
    return directory


@pytest.fixture(scope="module")
def native(place, train_here):
    return losses(train_here(place, "sft", *JOB, "--engine", "native", "--output", "native"))


def losses(steps):
    return [step["loss"] for step in steps]


def by_unsloth(place, output, *more):
    """The losses of a run with engine unsloth, in a process of its own: it replaces parts of the libraries."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    own = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "OPENSLOTH_CACHE": str(place / "cache")}
    code, out = end(begin(place, *JOB, "--gpus", 1, "--engine", "unsloth", *more, "--output", output, **own))
    assert code == 0, out
    return losses(metrics(place / output))


def check_adapter(run):
    weights = load_file(run / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(bool(tensor.any()) for tensor in weights.values())


def test_native_trains_in_bfloat16_on_packs(place, native):
    assert len(native) == 3
    assert native == pytest.approx([math.log(VOCABULARY)] * 3, abs=0.5)  # what random weights lose
    check_adapter(place / "native")
    assert "cuda" in json.loads((place / "native" / "job.json").read_text())["world"]["devices"][0]


def test_a_step_has_its_own_time_whether_the_card_or_the_host_is_the_slower_one(place, native, train_here, monkeypatch):
    """Logs come one step late, and what the host does before it launches a step is part of that step."""
    made, told = pack_trainer.trainer_class, []

    def trainer_class():
        class Slow(made()):
            def training_step(self, model, inputs, num_items_in_batch=None):
                if inputs["number"] + 1 == 3:
                    torch.cuda._sleep(CYCLES)
                elif inputs["number"] + 1 == 5:
                    torch.randn(1500, 1500, dtype=torch.float64).svd()  # about a second of the host alone
                return super().training_step(model, inputs, num_items_in_batch)

            def tell(self, held):
                told.append((held.step, self.state.global_step))
                super().tell(held)

        return Slow

    monkeypatch.setattr(pack_trainer, "trainer_class", trainer_class)
    steps = train_here(place, "sft", *JOB, "--max-steps", 6, "--engine", "native", "--output", "slow")
    assert told == [(step, step + 1) for step in range(1, 6)]
    assert [step["step"] for step in steps] == list(range(1, 7))
    seconds = {step["step"]: step["seconds/step"] for step in steps[1:]}  # the first one warms up
    assert set(sorted(seconds, key=seconds.get)[-2:]) == {3, 5}
    assert seconds[3] > 0.05
    assert seconds[6] > 0


def test_four_bit_trains(place, native, train_here):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    found = train_here(place, "sft", *JOB, "--engine", "native", "--load-in-4bit", "--output", "native-4bit")
    assert losses(found) == pytest.approx(native, abs=0.1)
    check_adapter(place / "native-4bit")


def test_checkpointing_changes_no_loss(place, native, train_here):
    saving = ("--engine", "native", "--gradient-checkpointing", "full", "--output", "saving")
    assert losses(train_here(place, "sft", *JOB, *saving)) == pytest.approx(native, abs=1e-2)


def test_unsloth_trains_as_native_does(place, native):
    assert by_unsloth(place, "unsloth") == pytest.approx(native, abs=BFLOAT16)
    check_adapter(place / "unsloth")


def test_unsloth_trains_in_four_bit(place, native):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    assert by_unsloth(place, "unsloth-4bit", "--load-in-4bit") == pytest.approx(native, abs=0.1)
    check_adapter(place / "unsloth-4bit")
