"""Engine `native`: what it loads weights from, and the types it keeps them in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import ModelRef, resolve_model
from opensloth.engine import attention, choose, fused, memory, native, pace
from opensloth.engine.lora_layer import LoraLinear
from opensloth.engine.model import Engine
from opensloth.errors import UserError
from opensloth.training.trl_args import Frame, shared
from test_attention import ARCHITECTURES, build
from tiny import save_tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


def load(ref: ModelRef, **options):
    job = SftJob(data=Path("data"), **options)
    return native.load(job, ref, seed=1, device=CPU, packing=True)


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
def test_on_a_card_all_norms_of_a_16_bit_base_are_one_kernel(tmp_path, monkeypatch, arch):
    """Only the type of the device is a card's: the model stays where it is."""
    path = save_tiny_model(tmp_path / "model", arch)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    monkeypatch.setattr(native, "load_base", lambda *_: base)
    monkeypatch.setattr(native.flash, "use_fastest", lambda *_: "")
    monkeypatch.setattr(fused, "fuse_rotary", lambda modeling: None)
    job = SftJob(data=Path("data"), dtype="bfloat16")
    native.load(job, resolve_model(str(path)), seed=1, device=torch.device("cuda"), packing=True)
    norms = [module for module in base.modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) == 2 * base.config.num_hidden_layers * (3 if arch == "gemma3_text" else 2) + 1
    assert all(isinstance(norm, fused.Normed) for norm in norms)


def as_pickle(weights: Path, name: str) -> None:
    """Keep the tensors of a safetensors file as a pickle instead."""
    torch.save(load_file(weights), weights.with_name(name))
    weights.unlink()


def test_a_model_that_only_exists_as_pickles_is_refused(model):
    as_pickle(model / "model.safetensors", "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(resolve_model(str(model)))


def test_an_adapter_that_only_exists_as_a_pickle_is_refused(model, tmp_path):
    adapter = tmp_path / "adapter"
    load(resolve_model(str(model))).model.save_pretrained(adapter)
    ref = ModelRef(str(adapter), str(model), None, adapter, "adapter")
    load(ref)
    as_pickle(adapter / "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load(ref)


@pytest.mark.parametrize("special", [{"bias": "all"}, {"lora_bias": True}])
def test_an_adapter_that_trains_biases_is_refused(model, tmp_path, special):
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **special)).save_pretrained(tmp_path / "adapter")
    ref = ModelRef("adapter", str(model), None, tmp_path / "adapter", "adapter")
    with pytest.raises(UserError, match="trains biases too"):
        load(ref)


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_attention_computes_in_bfloat16_on_a_quantized_base_too(model, monkeypatch, bits):
    seen = []

    def watched(q, *rest):
        seen.append(q.dtype)
        return row_by_row(q, *rest)

    row_by_row = attention.row_by_row
    monkeypatch.setattr(attention, "row_by_row", watched)
    engine = load(resolve_model(str(model)), dtype="bfloat16", **bits)
    engine.model.train()
    ids, boundaries = torch.arange(8)[None], torch.tensor([0, 8], dtype=torch.int32)
    places = torch.arange(7)
    ends = {
        "predictors": places,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 8,
        "max_length_k": 8,
    }
    engine.loss(engine.model, {"input_ids": ids, "labels": ids, "position_ids": ids, **ends}).backward()
    assert set(seen) == {torch.bfloat16}
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in trained)
    assert all("lora_" in name for name, parameter in engine.model.named_parameters() if parameter.requires_grad)


def save(directory, arch, **changes):
    """A model of another kind, beside the tokenizer of tiny.py."""
    build(arch, **changes).get_base_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return resolve_model(str(directory))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_architectures_that_are_promised_take_the_fast_path(arch, tmp_path):
    engine = load(save(tmp_path / arch, arch))
    assert engine.packs
    assert engine.head is not None
    assert [note for note in engine.notes if "computing" not in note] == []
    assert any(isinstance(module, LoraLinear) for module in engine.model.modules())


def test_what_falls_back_says_so_in_one_line_each(tmp_path):
    engine = load(save(tmp_path / "gemma2", "gemma2", attn_logit_softcapping=50.0))
    assert not engine.packs
    assert engine.head.cap == 30.0
    assert [note for note in engine.notes if "padded" in note] == [
        "rows are padded, not packed, with eager attention: it caps attention logits, which the packed kernel cannot"
    ]
    engine = load(save(tmp_path / "granite", "granite", logits_scaling=8.0))
    assert engine.packs
    assert engine.head is None
    assert [note for note in engine.notes if "logits" in note] == [
        "logits of a whole micro-batch are made at once, which takes memory: it changes the logits that its head gives"
    ]


@pytest.fixture
def old_card(monkeypatch):
    """What torch says of a T4 (sm75)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    return torch.device("cuda", 0)


def test_a_head_with_an_adapter_makes_its_logits_itself(model):
    engine = load(resolve_model(str(model)), lora_targets=("q_proj", "lm_head"))
    assert engine.head is None
    assert any("its head has an adapter" in note for note in engine.notes)


def test_a_card_before_sm80_computes_in_float16_with_a_loss_scaler(old_card, tmp_path):
    options = SftJob(data=Path("data"))
    chosen = choose.dtype(options, old_card)
    assert chosen.value == "float16"
    assert "sm75" in chosen.why
    assert "loss scaler" in chosen.why
    engine = Engine("native", None, None, None, True, torch.float16, False, [])
    frame = Frame(tmp_path, 3, 1, old_card, engine, "none", False, "nccl", 1)
    arguments = shared(options, frame)
    assert arguments["fp16"] is True
    assert arguments["bf16"] is False


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 64), (torch.bfloat16, 64)])
def test_a_card_before_sm80_attends_row_by_row(old_card, monkeypatch, dtype, size):
    q = SimpleNamespace(device=old_card, dtype=dtype, shape=(10, 4, size))
    assert not attention.has_kernel(q)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert attention.has_kernel(q)


def test_the_kernel_is_not_asked_for_what_it_cannot(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    card = torch.device("cuda", 0)
    for dtype, size in ((torch.float32, 64), (torch.bfloat16, 60), (torch.bfloat16, 264)):
        assert not attention.has_kernel(SimpleNamespace(device=card, dtype=dtype, shape=(10, 4, size)))


def test_a_newer_card_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert choose.dtype(SftJob(data=Path("data")), torch.device("cuda", 0)).value == "bfloat16"


def test_long_runs_on_a_card_are_compiled_by_themselves():
    card, tokens = torch.device("cuda", 0), choose.WORTH_COMPILING
    for options, device, packs, length, expected in (
        ({}, card, True, tokens, "on"),
        ({}, card, True, tokens - 1, "off"),
        ({}, card, False, tokens, "off"),
        ({}, torch.device("cpu"), True, tokens, "off"),
        ({"compile": "off"}, card, True, tokens, "off"),
        ({"compile": "on"}, torch.device("cpu"), True, 1, "on"),
        ({"compile": "on", "load_in_4bit": True}, card, True, tokens, "off"),
        ({"load_in_8bit": True}, card, True, tokens, "off"),
    ):
        chosen = choose.compilation(SftJob(data=Path("data"), **options), device, packs, length)
        assert (chosen.value, bool(chosen.why)) == (expected, True)


def test_passes_are_recorded_on_a_card_where_the_host_does_the_same_for_each_pack():
    card = torch.device("cuda", 0)
    for options, device, recordable, expected in (
        ({}, card, True, "on"),
        ({"load_in_4bit": True}, card, True, "on"),
        ({"cuda_graphs": "off"}, card, True, "off"),
        ({}, torch.device("cpu"), True, "off"),
        ({"batch_size": 4}, card, True, "off"),
        ({"full_finetuning": True}, card, True, "off"),
        ({"load_in_8bit": True}, card, True, "off"),
        ({}, card, False, "off"),
    ):
        chosen = choose.may_record(SftJob(data=Path("data"), **options), device, recordable)
        assert (chosen.value, bool(chosen.why)) == (expected, True), options


QWEN_06, QWEN_4, SMOL = (
    memory.Shape(10**8, layers, hidden, wide, 49_152, queries, queries + 2 * keys)
    for layers, hidden, wide, queries, keys in (
        (28, 1_024, 3_072, 2_048, 1_024),
        (36, 2_560, 9_728, 4_096, 1_024),
        (30, 576, 1_536, 576, 192),
    )
)


@pytest.mark.parametrize(
    ("shape", "tokens", "filled", "slower", "expected"),
    [  # as an H200 was measured: docs/performance.md
        (QWEN_4, 4_096, 0.96, True, "on"),
        (QWEN_4, 3_328, 0.94, True, "on"),
        (QWEN_4, 32_512, 0.98, True, "off"),
        (QWEN_06, 33_792, 0.98, False, "on"),
        (QWEN_06, 33_792, 0.98, True, "off"),  # as fast either way
        (QWEN_06, 16_384, 0.98, True, "on"),
        (QWEN_06, 33_792, 0.80, False, "off"),
        (QWEN_06, 2_048, 0.90, True, "on"),
        (SMOL, 33_000, 0.80, True, "on"),  # what is not real costs the card less than the host would take
        (SMOL, 4_096, 0.70, True, "off"),
    ],
)
def test_passes_are_recorded_where_the_host_is_what_a_pack_waits_for(shape, tokens, filled, slower, expected):
    assert choose.worth_recording(shape, tokens, filled, slower).value == expected


@pytest.mark.parametrize(
    ("shape", "tokens", "recorded", "measured"),
    [
        (QWEN_06, 33_792, False, 113_984),
        (QWEN_06, 33_792, True, 110_314),
        (QWEN_06, 16_384, True, 124_449),
        (QWEN_06, 8_192, True, 117_329),
        (QWEN_4, 32_512, False, 28_822),
        (QWEN_4, 4_096, True, 25_558),
        (QWEN_4, 4_096, False, 18_856),
        (QWEN_06, 16_384, False, 68_033),
        (QWEN_06, 8_192, False, 36_358),
        (SMOL, 33_280, True, 345_094),
        (SMOL, 33_280, False, 150_210),
        (SMOL, 8_448, True, 286_413),
        (SMOL, 8_448, False, 39_497),
    ],
)
def test_the_rule_foresees_what_was_measured(shape, tokens, recorded, measured):
    """Tokens per second of the runs that it was fitted to, within a fifth."""
    seconds = pace.recorded(shape, tokens, slower=True) if recorded else pace.launched(shape, tokens)
    assert tokens / seconds == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, True), (0.1, False)])
def test_a_model_that_draws_random_numbers_is_not_recorded(model, dropout, expected, monkeypatch):
    engine = load(resolve_model(str(model)), lora_dropout=dropout)
    assert not engine.recordable  # on a CPU the host reads where rows end
    monkeypatch.setattr(attention, "has_kernel", lambda q: True)
    assert engine.recordable is expected


@pytest.mark.parametrize("step", [1_000, 33_000, 66_500, 130_000])
def test_a_step_is_a_whole_number_of_packs_where_memory_is_no_matter(step):
    tokens = memory.most_tokens(step)
    packs = -(-step // tokens)
    assert packs == max(round(step / memory.MOST_TOKENS), 1)
    assert step <= packs * tokens <= step * memory.MARGIN + packs * 256


def test_an_evaluation_changes_nothing_of_a_base_in_four_bits(model):
    """On some CPUs bitsandbytes laid its weights out anew in the first pass without a gradient; from then on gradients
    ended there, without a word."""
    engine = load(resolve_model(str(model)), load_in_4bit=True, dtype="float32")
    four_bits = [module for module in engine.model.modules() if type(module).__name__ == "Linear4bit"]
    assert four_bits
    engine.model.set_attn_implementation("sdpa")
    ids = torch.arange(5, 25)[None]

    def gradients():
        engine.model.zero_grad()
        engine.model.train()(input_ids=ids).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        engine.model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) > 7
    assert before.keys() == after.keys()
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    assert not any(getattr(one.weight.quant_state, "packing_format_for_cpu", False) for one in four_bits)
