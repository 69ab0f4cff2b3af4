"""Packed attention: rows that lie one behind the other give what each gives alone, for every architecture."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opensloth.config.run import SEVEN_LINEARS
from opensloth.engine import attention, lora
from opensloth.engine.loss import pack_loss, padded_loss
from opensloth.training.sft.loader import Batcher

VOCABULARY = 97
WINDOW = 8
LENGTHS = (1, 19, 2, 40, 9)  # shorter and longer than the window, and a single token
EXACT = 1e-5

LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, **LAYERS},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "phi": {"partial_rotary_factor": 0.5},  # its head has a bias
    "phi3": {"sliding_window": WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma3_text": {"query_pre_attn_scalar": 8, **LAYERS},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None, **LAYERS},
}


def build(arch, **changes):
    """A tiny model with random weights and an adapter whose B is not zero, in fp32."""
    config = AutoConfig.for_model(
        arch,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **{"num_hidden_layers": 2, "head_dim": 8, **ARCHITECTURES.get(arch, {}), **changes},
    )
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in base.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    options = SimpleNamespace(lora_targets=SEVEN_LINEARS, lora_r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=False)
    model = lora.attach(base, options, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def rows(lengths=LENGTHS):
    """Random rows; every third token is masked, and the first one is labelled although it must not be trained."""
    torch.manual_seed(2)
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,))
        labels = torch.where(torch.arange(length) % 3 == 2, -100, ids)
        made.append(SimpleNamespace(input_ids=ids.numpy(), labels=labels.numpy()))
    return made


def batcher(made, packing):
    return Batcher(SimpleNamespace(rows=SimpleNamespace(row=made.__getitem__)), packing, pad_id=0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    assert len(one) > 0
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def boundaries(*ends):
    rows = torch.tensor(ends, dtype=torch.int32)
    longest = int(rows.diff().max())
    return attention.Boundaries(rows, rows, longest, longest)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_logits_and_adapter_gradients_equal_those_of_separate_rows(arch):
    alone, packed, made = build(arch), build(arch), rows()
    assert attention.why_not(packed.config) == ""
    packed.set_attn_implementation(attention.NAME)
    one_by_one = batcher(made, packing=False)
    expected_logits, expected_loss = [], 0.0
    targets = sum(int((row.labels[1:] != -100).sum()) for row in made)
    for number in range(len(made)):
        batch = one_by_one([number])
        ids = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            expected_logits.append(alone(**ids, use_cache=False).logits[0])
        loss = padded_loss(alone, batch) / targets
        loss.backward()
        expected_loss += float(loss.detach())

    pack = batcher(made, packing=True)(list(range(len(made))))
    inputs = {name: value for name, value in pack.items() if name != "labels"}
    with torch.no_grad():
        logits = packed(**inputs, use_cache=False).logits[0]
    loss = pack_loss(packed, pack) / targets
    loss.backward()

    assert float((logits - torch.cat(expected_logits)).abs().max()) <= EXACT
    assert float(loss.detach()) == pytest.approx(expected_loss, abs=EXACT)
    assert largest_difference(gradients(packed), gradients(alone)) <= EXACT


def test_without_boundaries_rows_would_see_each_other():
    """The control: the same pack as one long row differs by far more than rounding."""
    model, made = build("llama"), rows((20, 20))
    model.set_attn_implementation(attention.NAME)
    pack = batcher(made, packing=True)([0, 1])
    inputs = {name: value for name, value in pack.items() if name != "labels"}
    ends = torch.tensor([0, 40], dtype=torch.int32)
    with torch.no_grad():
        exact = model(**inputs, use_cache=False).logits
        whole = model(**{**inputs, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40}).logits
    assert float((exact - whole)[0, :20].abs().max()) <= EXACT
    assert float((exact - whole)[0, 20:].abs().max()) > 0.1


def test_gradient_checkpointing_gets_the_boundaries_too():
    plain, saving, made = build("llama"), build("llama"), rows()
    pack = batcher(made, packing=True)(list(range(len(made))))
    for model in (plain, saving):
        model.set_attn_implementation(attention.NAME)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    saving.enable_input_require_grads()
    saving.train()
    for model in (plain, saving):
        pack_loss(model, pack).backward()
    assert largest_difference(gradients(plain), gradients(saving)) <= EXACT


def test_a_window_counts_the_token_itself():
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert attention.band(5, 5, 3, torch.device("cpu")).int().tolist() == expected


def test_padding_entries_at_the_end_of_the_boundaries_change_nothing():
    torch.manual_seed(0)
    q, k, v = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    exact = attention.row_by_row(q, k, v, boundaries(0, 4, 10), None, None)
    padded = attention.row_by_row(q, k, v, boundaries(0, 4, 10, 10, 10), None, None)
    assert torch.equal(exact, padded)


@pytest.mark.parametrize(
    "change",
    [
        {"cu_seq_lens_q": None},
        {"attention_mask": torch.ones(1, 6)},
        {"query": torch.zeros(2, 1, 6, 8)},
        {"dropout": 0.1},
    ],
)
def test_what_packed_attention_cannot_do_is_refused(change):
    one = torch.zeros(1, 1, 6, 8)
    arguments = {
        "module": None,
        "query": one,
        "key": one,
        "value": one,
        "attention_mask": None,
        "cu_seq_lens_q": torch.tensor([0, 6]),
        "max_length_q": 6,
    }
    with pytest.raises(ValueError, match="packed attention"):
        attention.varlen(**{**arguments, **change})


def test_models_that_packed_attention_does_not_fit_are_known():
    assert "caps attention logits" in attention.why_not(AutoConfig.for_model("gemma2"))
    assert "dropout" in attention.why_not(AutoConfig.for_model("llama", attention_dropout=0.1))
    assert attention.why_not(AutoConfig.for_model("gemma3_text")) == ""


def test_padded_rows_with_eager_attention_and_capped_logits_equal_separate_rows():
    """What gemma2 falls back to. Its cap makes sdpa wrong, so eager attention must be in use."""
    model, made = build("gemma2", attn_logit_softcapping=2.0), rows()
    together = batcher(made, packing=False)(list(range(len(made))))
    apart = [batcher(made, packing=False)([number]) for number in range(len(made))]
    with torch.no_grad():
        loss = float(padded_loss(model, together))
        assert loss == pytest.approx(sum(float(padded_loss(model, batch)) for batch in apart), rel=EXACT)
        assert loss != pytest.approx(float(padded_loss(build("gemma2"), together)), rel=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_the_last_queries_of_a_row_see_what_they_see_in_the_whole_row(window):
    q, k, v = (torch.randn(9, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    whole = attention.row_by_row(q, k, v, boundaries(0, 9), None, window)
    rows = attention.Boundaries(torch.tensor([0, 4]), torch.tensor([0, 9]), 4, 9)
    part = attention.row_by_row(q[5:], k, v, rows, None, window)
    assert torch.allclose(part, whole[5:], atol=1e-6)
