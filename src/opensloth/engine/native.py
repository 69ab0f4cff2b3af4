"""Engine `native`: transformers' model and PEFT's adapter, with exact packing on every device."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from opensloth.config.jobs import RunJob
from opensloth.data.models.resolve import ModelRef, load_tokenizer
from opensloth.engine import attention, choose, flash, lora, matmul
from opensloth.engine import head as last_layer
from opensloth.engine.fused import fuse
from opensloth.engine.joint import gated, join
from opensloth.engine.lora_layer import will_be_plain
from opensloth.engine.loss import pack_loss, padded_loss
from opensloth.engine.memory import Means
from opensloth.engine.model import Engine
from opensloth.errors import UserError


def load(job: RunJob, ref: ModelRef, *, seed: int, device: torch.device, packing: bool) -> Engine:
    """Load weights onto `device` and attach or take over the adapter.

    Raises:
        UserError: quantization without bitsandbytes, an adapter that does not fit, a model without target layers.
    """
    chosen = choose.dtype(job, device)
    dtype: torch.dtype = getattr(torch, chosen.value)
    notes = [f"computing in {chosen.value}: {chosen.why}"]
    model = load_base(job, ref, weights_dtype(job, dtype), device)
    refusal = attention.why_not(model.config)
    head, why = last_layer.find(model)
    packs = packing and not refusal
    if refusal:
        padded = "rows are padded, not packed, with" if packing else "this model needs"
        notes.append(f"{padded} eager attention: {refusal}")
    set_attention(model, packs)
    if packs and device.type == "cuda":
        notes.append(f"attention over packs: {flash.use_fastest(model.config, device, dtype)}")
    if job.load_in_4bit and device.type == "cuda":
        notes.append(f"the kernel for weights in 4 bits: {matmul.use_kernel(model)}")
    if device.type == "cuda" and dtype == torch.bfloat16 and will_be_plain(job):
        notes.append(f"an adapter's share is added {matmul.choose_adding(model)}")
    if not job.full_finetuning:
        # peft's prepare_model_for_kbit_training would make embeddings, norms and head fp32, and all that passes through
        # the layers with them: twice the memory, and the packed attention kernel takes 16 bits alone
        model.requires_grad_(False)
        if device.type == "cuda":
            fuse(model)  # it leaves alone what trains
    trained = with_adapter(model, job, ref, seed, notes)
    join(trained)
    if head is not None and model.get_output_embeddings() is not head.linear:
        head, why = None, "its head has an adapter"
    if head is None:
        notes.append(f"logits of a whole micro-batch are made at once, which takes memory: {why}")
    return Engine(
        name="native",
        model=trained,
        tokenizer=load_tokenizer(ref, job.trust_remote_code),
        loss=partial(pack_loss if packs else padded_loss, head=head),
        packs=packs,
        dtype=dtype,
        autocast=job.full_finetuning and dtype != torch.float32,
        notes=notes,
        head=head,
        means=Means(head is not None, last_layer.in_place(dtype, device), gated(trained)),
    )


def set_attention(model: PreTrainedModel, packs: bool) -> None:
    """Attention over packed or over padded rows."""
    if attention.why_not(model.config):  # sdpa would leave a cap out, without a word
        model.set_attn_implementation("eager")
    elif packs:
        model.set_attn_implementation(attention.NAME)


def with_adapter(
    model: PreTrainedModel, job: RunJob, ref: ModelRef, seed: int, notes: list[str]
) -> PreTrainedModel | PeftModel:
    """The model with what trains: a new adapter, the given one, or all of its weights."""
    if job.full_finetuning:
        if ref.adapter is not None:
            raise UserError(f"--full-finetuning cannot start from the adapter {ref.adapter}.", "Merge it first.")
        model.requires_grad_(True)
        return model
    if ref.adapter is None:
        return lora.attach(model, job, seed)
    adapted = lora.take_over(model, ref.adapter)
    config = adapted.peft_config["default"]
    notes.append(f"training goes on from {ref.adapter}, with its own r={config.r} and alpha={config.lora_alpha}")
    return adapted


def weights_dtype(job: RunJob, dtype: torch.dtype) -> torch.dtype:
    """The type weights are kept in: fp32 where all of them train, the compute type where they are frozen."""
    return torch.float32 if job.full_finetuning else dtype


def load_base(job: RunJob, ref: ModelRef, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    options: dict[str, Any] = {
        "revision": ref.revision,
        "trust_remote_code": job.trust_remote_code,
        "use_safetensors": True,  # else a model without them is read from its pickles
        "dtype": dtype,
        "attn_implementation": "sdpa",
        "device_map": {"": device},
    }
    if job.load_in_4bit or job.load_in_8bit:
        options["quantization_config"] = quantization(job, dtype)
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(ref.base, **options)
    except (OSError, ValueError) as error:  # weights that only exist as pickles, or an unknown architecture
        raise UserError(f"{ref.base} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model.config.use_cache = False
    for module in model.modules():
        # bitsandbytes lays weights out anew for a CPU at the first forward without a gradient, and has no way back to
        # them from there: gradients would end at the layer, without a word (bitsandbytes 0.50, nn/modules.py)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quantization(job: RunJob, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings: nf4 with double quantization as in QLoRA (arXiv 2305.14314), or LLM.int8."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        flag = "--load-in-4bit" if job.load_in_4bit else "--load-in-8bit"
        raise UserError(
            f"{flag}: bitsandbytes is not installed.", 'Install it: pip install "openslothai[gpu]".'
        ) from None
    from transformers import BitsAndBytesConfig

    if job.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
