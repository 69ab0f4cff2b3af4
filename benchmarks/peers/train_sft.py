"""Unsloth or TRL on the rows of benchmarks/sft.py: a process that measures several settings, and keeps each at once.

usage: python benchmarks/peers/train_sft.py JOB.json    (as benchmarks/series.py writes it)

Nothing of ours takes part but the token ids. Adapters are float32 on a frozen base in bfloat16 or 4 bits, as both
libraries make them.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine
import models
from limited import limit
from series import await_turn, keep, keep_measured

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32
ENOUGH_SECONDS = 15  # of measured steps; no more are done then
LEAST_STEPS = 3
MOST_KEPT = 2**29  # bytes that may stay on the card from one measurement to the next


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    first = job["points"][0]
    if lacks_unsloth(job):
        return
    _ = importlib.import_module("trl").SFTTrainer  # it loads what it names when it is asked for
    await_turn(job)
    if first["memory_limit_gib"]:
        limit(first["memory_limit_gib"])
    for place, point in enumerate(job["points"]):
        keep_measured(Path(job["found"]), [point["name"]], lambda point=point: [{"row": measure(job, point)}])
        go_on_with(job, job["points"][place + 1 :])


def lacks_unsloth(job: dict[str, Any]) -> bool:
    """Import unsloth where the job is its own, before all others, which it changes; else say that it cannot be had."""
    if job["points"][0]["impl"] == "unsloth":
        try:
            importlib.import_module("unsloth")
        except (ImportError, NotImplementedError) as error:
            for point in job["points"]:
                keep(Path(job["found"]), point["name"], failed=f"unsloth: {str(error).splitlines()[0]}")
            return True
    return False


def go_on_with(job: dict[str, Any], points: list[dict[str, Any]]) -> None:
    """Free the card for the next model; where something holds on to the last one, begin the program anew."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    if points and torch.cuda.memory_allocated() > MOST_KEPT:
        Path(sys.argv[1]).write_text(json.dumps({**job, "points": points}))
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def measure(job: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Load, train some steps, and count: real tokens after the warm-up, and the allocator's peak with the loading."""
    import torch
    from datasets import load_from_disk

    on_card = torch.cuda.is_available()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    model, tokenizer = load_with_unsloth(job, point) if point["impl"] == "unsloth" else load(job, point)
    rows = load_from_disk(job["data"]).remove_columns(["row_id", "labels"])
    rows = rows.map(lambda row: {"attention_mask": [1] * len(row["input_ids"]), "labels": row["input_ids"]})
    trainer, clock = make_trainer(job, point, model, tokenizer, rows)
    trainer.train()
    if on_card:
        torch.cuda.synchronize()
    begin, *ends = clock.times[job["warm_up"] - 1 :]
    per_step = len(clock.tokens) // len(clock.times)
    tokens = sum(int(count) for count in clock.tokens[job["warm_up"] * per_step :])
    speed = tokens / (ends[-1] - begin)
    adapter = next(weight for weight in model.parameters() if weight.requires_grad)
    return {
        "adapter_dtype": str(adapter.dtype).removeprefix("torch."),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "tokens_per_second": round(speed, 1),
        "rows_per_second": round(speed * len(rows) / sum(map(len, rows["input_ids"])), 3),
        "share_of_limit": models.share_of_limit(Path(job["model_directory"]), speed),
        "peak_gib": machine.peak_gib(),
        "packed": bool(trainer.args.packing),  # unsloth may decide against it
        "steps": len(ends),
        "tokens_per_step": round(tokens / len(ends)),
        "loss": round(trainer.state.log_history[0]["loss"], 4),
        **({"xformers": xformers()} if point["impl"] == "unsloth" else {}),
    }


def load(job: dict[str, Any], point: dict[str, Any]) -> tuple[Any, Any]:
    """As TRL's documents do."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    on_card = torch.cuda.is_available()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model_directory"],
        dtype=torch.bfloat16 if on_card else torch.float32,
        attn_implementation="sdpa",
        device_map={"": 0 if on_card else "cpu"},
        quantization_config=four_bits if point["bits"] == 4 else None,
    )
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter), AutoTokenizer.from_pretrained(job["model_directory"])


def load_with_unsloth(job: dict[str, Any], point: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if point["checkpointing"] else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job["model_directory"],
        max_seq_length=job["longest"],
        dtype=torch.bfloat16,
        load_in_4bit=point["bits"] == 4,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )
    return model, tokenizer


def make_trainer(
    job: dict[str, Any], point: dict[str, Any], model: Any, tokenizer: Any, rows: Any
) -> tuple[Any, "Clock"]:
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_card, unsloth = torch.cuda.is_available(), point["impl"] == "unsloth"
    plain = point["checkpointing"] and not unsloth
    settings = SFTConfig(
        output_dir=str(Path(job["found"]).parent / "runs" / "peer"),
        per_device_train_batch_size=point["batch"],
        max_steps=job["steps"],
        learning_rate=2e-4,
        warmup_steps=2,
        optim=point["optimizer"],
        dataset_num_proc=1,
        max_length=job["longest"],
        packing=point["packed"],
        gradient_checkpointing=point["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if plain else None,
        bf16=on_card,
        use_cpu=not on_card,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # the default of trl 1.14 is a kernel that a CPU lacks
        **({} if on_card else {"loss_type": "nll"}),
    )
    clock = Clock(job["warm_up"])

    class OnStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= clock.step()

    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, args=settings, callbacks=[OnStep()]
    )
    inner = trainer.compute_loss

    def counted(model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        clock.tokens.append(real_tokens(inputs))
        return inner(model, inputs, *arguments, **named)

    trainer.compute_loss = counted
    return trainer, clock


class Clock:
    """When steps ended, and the real tokens of each micro-batch (counted on the card, read at the end)."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.times: list[float] = []
        self.tokens: list[Any] = []

    def step(self) -> bool:
        """Note the end of a step. Returns whether enough was measured."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        measured = self.times[self.warm_up - 1 :]
        return len(measured) > LEAST_STEPS and measured[-1] - measured[0] > ENOUGH_SECONDS


def real_tokens(inputs: dict[str, Any]) -> Any:
    """Tokens of a batch without its padding. Packs hold none, and come without a mask."""
    if inputs.get("packed_seq_lengths") is not None:
        return inputs["packed_seq_lengths"].sum()
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].sum()
    return inputs["input_ids"].numel()


def xformers() -> str:
    """Whether the attention that Unsloth prefers can be had here: without it, it computes with PyTorch's."""
    try:
        importlib.import_module("xformers.ops")
    except ModuleNotFoundError:
        return "not installed"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"does not load: {str(error).splitlines()[0][:120]}"
    return "loaded"


if __name__ == "__main__":
    main()
