"""GRPO on a card: recorded decoding steps, the merged adapter, both engines, two processes on one card."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from decode_kernel_fixtures import hold_to_reference
from grpo_fixtures import make_place, metrics
from opensloth.engine.fused import fuse
from opensloth.rollout.generate import generate
from opensloth.rollout.graph import GraphDecoder
from opensloth.rollout.sampling import Noise, Sampling, choose
from opensloth.rollout.store import BUCKET, OwnRows, SharedPrompts
from tiny import tiny_model, tiny_tokenizer
from training_fixtures import environment

PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 10, 11, 12, 13], [9, 10, 11, 12, 13], [4] * (BUCKET + 6)]
SECONDS = 300
JOB = ("rows.jsonl", "--model", "model", "--chat-template", "reasoning", "--max-new", 12, "--prompts-per-step", 4)
JOB += ("--group-size", 4, "--max-steps", 2, "--lr", 1e-3)


def policy(arch="llama", dtype=torch.float32):
    model = tiny_model(tiny_tokenizer(), arch).to("cuda", dtype).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
    fuse(model)  # as engine native does
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config).to("cuda", dtype)


def asked(count, **changed):
    noise = Noise(1, 2, tuple(range(count)))
    return {"stops": [3], "pad": 0, "max_new": 40, "sampling": Sampling(), "noise": noise, **changed}


@pytest.mark.parametrize(("groups", "size"), [(1, 8), (2, 128), (4, 64), (7, 80), (4, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_is_attention_over_prompt_and_own_keys(groups, size, dtype):
    for at in (0, 64, 70):
        hold_to_reference(groups, size, dtype, at, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7), Sampling(temperature=0)], ids=str)
def test_a_card_draws_what_a_cpu_draws(sampling, dtype):
    chooser = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(300, 151_936, generator=chooser)).to(dtype)
    numbers = None if sampling.greedy else torch.rand(300, dtype=torch.float64, generator=chooser)
    expected, logprobs = choose(logits, sampling, numbers)
    found, values = choose(logits.cuda(), sampling, None if numbers is None else numbers.cuda())
    alike = found.cpu() == expected
    assert alike.float().mean() > 0.98  # a sum in another order moves the edges between tokens
    assert torch.allclose(values.cpu()[alike], logprobs[alike], atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_the_kernel_turns_the_heads_of_every_architecture(arch):
    model, decoder = policy(arch), GraphDecoder(SharedPrompts)
    generate(model, PROMPTS, write=decoder, **asked(5))
    assert decoder.turned


@pytest.mark.parametrize("kind", [SharedPrompts, OwnRows])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_recorded_steps_write_what_the_plain_loop_writes(arch, kind):
    model, decoder = policy(arch), GraphDecoder(kind)
    others = []
    for count in (5, 3, 5):  # the second and third time from the recordings
        others += [torch.randn(64, device="cuda") for _ in range(500)]  # where something was that is no longer
        plain = generate(model, PROMPTS[:count], **asked(count))
        recorded = generate(model, PROMPTS[:count], write=decoder, **asked(count))
        for one, other in zip(plain, recorded, strict=True):
            assert one.ids == other.ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_rows_that_have_ended_leave_the_recordings():
    """Forty completions end one after the other; each smaller number of rows has recordings of its own."""
    model, decoder = policy(), GraphDecoder()
    prompts = PROMPTS * 8
    how = asked(40, stops=[3, *range(50, 66)], max_new=150)
    plain = generate(model, prompts, **how)
    for _ in range(2):
        recorded = generate(model, prompts, write=decoder, **how)
        assert [one.ids for one in recorded] == [one.ids for one in plain]
        for one, other in zip(plain, recorded, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert len({rows for rows, _, _ in decoder.buffers.graphs}) > 2


def test_one_recording_serves_all_lengths_and_the_batches_that_follow():
    model, decoder = policy(), GraphDecoder(SharedPrompts)
    for _ in range(2):
        generate(model, PROMPTS, write=decoder, **asked(5, stops=[], max_new=150))
        assert len(decoder.buffers.graphs) == 1


def test_recordings_follow_the_weights():
    model, decoder = policy(), GraphDecoder()
    greedy = asked(5, sampling=Sampling(temperature=0), noise=None, stops=[])
    before = generate(model, PROMPTS, write=decoder, **greedy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    after = generate(model, PROMPTS, write=decoder, **greedy)
    assert [one.ids for one in after] != [one.ids for one in before]
    assert [one.ids for one in after] == [one.ids for one in generate(model, PROMPTS, **greedy)]


def test_the_base_comes_back_bit_for_bit():
    model = policy(dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, PROMPTS, write=GraphDecoder(), **asked(5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def train(place, output, *more):
    """`os-train grpo` in processes of its own. Returns the logs of its steps."""
    own = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "OPENSLOTH_CACHE": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "opensloth.cli.train", "grpo", *map(str, (*JOB, *more)), "--output", output],
        cwd=place,
        env=environment(**own),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return metrics(place / output)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("grpo"))


def save_larger_heads(directory):
    """Random weights, with heads that unsloth's kernels take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes, **tokens)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("rollout", ["graph", "generate"])
def test_native_trains_on_a_card(place, rollout, train_here):
    steps = train_here(place, "grpo", *JOB, "--engine", "native", "--rollout", rollout, "--output", rollout)
    assert len(steps) == 2
    assert all(step["logp_gap/mean"] < 0.05 for step in steps)
    weights = load_file(place / rollout / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


def test_unsloth_trains_too(place):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    save_larger_heads(place / "larger")
    steps = train(place, "unsloth", "--gpus", 1, "--engine", "unsloth", "--model", "larger")
    assert len(steps) == 2
    assert all(step["logp_gap/mean"] < 0.05 for step in steps)  # padding that rows see would show here


def test_two_processes_that_share_a_card_end_with_one_adapter(place):
    """The processes compare their weights after every step, and the run fails where they differ."""
    assert len(train(place, "shared", "--gpus", "0,0", "--check-every", 1)) == 2
