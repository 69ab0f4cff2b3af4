"""Engine `unsloth`: the same job through `FastLanguageModel`, on CUDA. Its adapters are plain PEFT adapters too.

Unsloth replaces parts of transformers, peft and trl when it is imported, so it must come before all of them: the worker
imports it first when the job asks for this engine.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from opensloth.config.jobs import RunJob
from opensloth.data.models.resolve import ModelRef, load_tokenizer
from opensloth.engine import choose, lora
from opensloth.engine.loss import IGNORED
from opensloth.engine.model import Engine


def load(job: RunJob, ref: ModelRef, *, seed: int, device: torch.device, packing: bool, longest: int) -> Engine:
    """Load weights through unsloth and attach or take over the adapter."""
    from unsloth import FastLanguageModel

    chosen = choose.dtype(job, device)
    dtype: torch.dtype = getattr(torch, chosen.value)
    notes = [f"computing in {chosen.value}: {chosen.why}"]
    if ref.adapter is not None:
        lora.check_weights(ref.adapter)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(ref.adapter or ref.base),
        revision=None if ref.adapter else ref.revision,
        max_seq_length=longest,
        dtype=dtype,
        load_in_4bit=job.load_in_4bit,  # its own default is 4-bit
        load_in_8bit=job.load_in_8bit,
        full_finetuning=job.full_finetuning,
        device_map={"": device.index or 0},
        trust_remote_code=job.trust_remote_code,
        use_exact_model_name=True,  # else it may take another repository's weights
    )
    if ref.adapter is not None:
        notes.append(f"training goes on from {ref.adapter}, with its own rank and alpha")
    elif not job.full_finetuning:
        model = FastLanguageModel.get_peft_model(
            model,
            r=job.lora_r,
            lora_alpha=job.lora_alpha,
            lora_dropout=job.lora_dropout,
            target_modules=lora.targets(model, job.lora_targets),
            use_rslora=job.use_rslora,
            use_gradient_checkpointing="unsloth" if job.gradient_checkpointing in ("full", "selective") else False,
            random_state=seed,
        )
    lora.in_float32(model)
    if job.compile == "on":
        notes.append("--compile on means nothing here: unsloth compiles what it wants to")
    packs = packing and packs_exactly(model.eval())  # dropout would tell two equal passes apart
    if packing and not packs:
        notes.append("rows are padded, not packed: packed rows see each other in this version of unsloth")
    tokenizer = load_tokenizer(ref, job.trust_remote_code)
    return Engine("unsloth", model, tokenizer, loss, packs=packs, dtype=dtype, autocast=True, notes=notes)


def loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The summed cross entropy of a pack or a padded batch, through unsloth's own fused loss."""
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "labels": labels}
    if "cu_seq_lens_q" in batch:
        inputs["position_ids"] = batch["position_ids"]
        inputs["packed_seq_lengths"] = batch["cu_seq_lens_q"].diff()
    else:
        inputs["attention_mask"] = batch["attention_mask"]
    targets = int((labels[:, 1:] != IGNORED).sum())
    if targets == 0:
        inputs["labels"] = torch.where(labels == IGNORED, batch["input_ids"], labels)
    count = max(targets, 1)
    mean: torch.Tensor = model(**inputs, use_cache=False, num_items_in_batch=count).loss
    return mean * (count if targets else 0)


@torch.no_grad()
def packs_exactly(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the second row of a pack has the same loss whatever row lies before it, to the bit."""
    device = next(model.parameters()).device
    vocabulary = int(model.config.vocab_size)
    second = torch.arange(24, device=device) % vocabulary
    losses = []
    for start in (30, 300):
        first = (start + torch.arange(16, device=device)) % vocabulary
        labels = torch.cat([torch.full_like(first, IGNORED), second])
        labels[len(first)] = IGNORED
        boundaries = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32, device=device)
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).to(device)
        batch = {
            "input_ids": torch.cat([first, second])[None],
            "labels": labels[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": boundaries,
        }
        losses.append(float(loss(model, batch)))
    return losses[0] == losses[1]
