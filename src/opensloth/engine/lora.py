"""The adapter: attached or taken over, kept in fp32, saved as plain PEFT, and hashed."""

import hashlib
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from opensloth import paths
from opensloth.config.run import SEVEN_LINEARS, TrainOptions
from opensloth.engine.lora_layer import layers_for
from opensloth.errors import UserError

WEIGHTS = "adapter_model.safetensors"
FUSED = ("qkv_proj", "gate_up_proj")  # what some architectures (phi3) have instead of five of the seven linears


def attach(model: PreTrainedModel, options: TrainOptions, seed: int) -> PeftModel:
    """Put a new adapter on a frozen base. Its first weights depend on `seed` alone.

    Raises UserError where the model lacks target layers.
    """
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets(model, options.lora_targets),
        use_rslora=options.use_rslora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return in_float32(get_peft_model(model, with_our_layers(config, model)))


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model under an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def with_our_layers(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """`config`, by which linear layers get those of engine/lora_layer.py. They are no part of what is saved."""
    if layers := layers_for(model):
        config._register_custom_module(layers)
    return config


def targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """The names of the layers that get an adapter: those wanted; for the default seven also their fused forms.

    Raises UserError where the model lacks a layer that was asked for, or has none of the default ones.
    """
    linears = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    by_default = wanted == SEVEN_LINEARS
    found = [name for name in (*wanted, *(FUSED if by_default else ())) if name in linears]
    missing = [name for name in wanted if name not in linears]
    if missing and not (by_default and found):
        hint = f"Its linear layers: {', '.join(sorted(linears))}."
        raise UserError(f"The model has no layer {', '.join(missing)} (--lora-targets).", hint)
    return found


def take_over(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Go on training an adapter that exists. Raises UserError where it does not fit the model."""
    check_weights(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft only warns where weights are missing
            config = PeftConfig.from_pretrained(str(adapter))
            if isinstance(config, LoraConfig):
                check_biases(adapter, config)
                config = with_our_layers(config, model)
            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True, config=config)
            found = adapted.load_adapter(str(adapter), "default", is_trainable=True)  # tells which weights matched
        stray = [*found.missing_keys, *(name for name in found.unexpected_keys if "lora_" in name)]
        if stray:
            raise ValueError(f"{len(stray)} weights are only in one of them, such as {stray[0]}")
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "It was trained on another base model: name the adapter's own base."
        raise UserError(f"The adapter {adapter} does not fit {model.config._name_or_path}: {first}", hint) from error
    return in_float32(adapted)


def check_weights(adapter: Path) -> None:
    """Raise UserError for an adapter without safetensors: peft would read it from a pickle."""
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"The adapter {adapter} has no {WEIGHTS}.", "Save its weights as safetensors.")


def check_biases(adapter: Path, config: LoraConfig) -> None:
    """Raise UserError for an adapter that changes biases: merging for a rollout puts back weights alone."""
    if config.bias != "none" or config.lora_bias:
        raise UserError(
            f"The adapter {adapter} trains biases too, which is not supported.", "Name an adapter without them."
        )


def in_float32(model: PeftModel) -> PeftModel:
    """Adapter weights in fp32: steps of a small learning rate vanish in bfloat16's 8 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The tensors that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_hash(model: torch.nn.Module) -> str:
    """A SHA-256 (hex) of all trained weights, bit for bit: equal on all processes, always."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trainable(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def name_base(directory: Path, base: str, revision: str | None) -> None:
    """Write into a saved adapter which base it belongs to: a hub id with its commit, or an absolute directory."""
    config = paths.read_json(directory / "adapter_config.json", "an adapter")
    config["base_model_name_or_path"] = base
    config["revision"] = revision
    paths.write_json(directory / "adapter_config.json", config)
