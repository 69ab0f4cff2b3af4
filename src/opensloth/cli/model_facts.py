"""What a model's small files tell about it: whether it is on this machine, its sizes, the rank of an adapter."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth import paths
from opensloth.errors import UserError

if TYPE_CHECKING:
    from opensloth.data.models.resolve import ModelRef


def config_of(ref: "ModelRef", trust_remote_code: bool = False) -> Any:
    """The transformers config of a model's base. Raises UserError where it cannot be read."""
    from transformers import AutoConfig

    # unless told, transformers asks on the terminal whether the model's code may run
    try:
        return AutoConfig.from_pretrained(ref.base, revision=ref.revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # an unknown architecture, or one with code of its own
        raise UserError(f"{ref.base} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def without_weights(config: Any, trust_remote_code: bool = False) -> Any:
    """A model of this config that takes no memory. Raises UserError where it cannot be built."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # no language model, or one with code of its own
        raise UserError(f"This model cannot be built: {str(error).strip().splitlines()[0]}") from error


def context_length(config: Any) -> int | None:
    """Positions that the model knows, in tokens; None where its config names none."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def rank_and_alpha(ref: "ModelRef") -> tuple[int, float] | None:
    """LoRA's r and alpha of the adapter that training goes on from; None where there is none."""
    if ref.adapter is None:
        return None
    config = paths.read_json(ref.adapter / "adapter_config.json", "an adapter")
    return int(config["r"]), float(config["lora_alpha"])


def is_local(spec: str) -> bool:
    return spec.startswith("sample:") or Path(spec).expanduser().exists()


def local_model(spec: str, revision: str | None) -> Any:
    """The model's ModelRef if it lies on this machine, else a sentence that says why there is nothing to read."""
    from opensloth.data.models.resolve import is_made, resolve_model

    if not is_made(spec):
        return "the sample model has not been made yet, which the first real run does"
    if is_local(spec) or spec.startswith(("/", "./", "../", "~")):  # which no hub id does
        return resolve_model(spec, revision)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a dry run fetches nothing; the hub client's cache may have it
    try:
        return resolve_model(spec, revision)
    except UserError:
        return f"{spec} is not on this machine yet"
