"""TRL's own GRPO classes, whatever other libraries have put in their place.

`import unsloth` replaces the trainer by a rewritten copy, whose policy loss passes by the methods that ours builds on,
and its arguments by a copy that overrides what it is given: with the loss "dapo" it leaves completions that were cut
out of the loss and moves the upper clip. Its faster model code is wanted, its trainer is not.
"""

import importlib
import importlib.util
import sys
from typing import Any


def grpo_trainer() -> Any:
    return original("grpo_trainer").GRPOTrainer


def grpo_config() -> Any:
    return original("grpo_config").GRPOConfig


def original(name: str) -> Any:
    """A module of trl.trainer as TRL's source has it: the imported one, or made from the source again for unsloth."""
    imported = importlib.import_module(f"trl.trainer.{name}")
    if "unsloth" not in sys.modules:
        return imported
    twin = f"trl.trainer.{name}_of_trl"
    if twin not in sys.modules:
        spec = importlib.util.spec_from_file_location(twin, imported.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[twin] = module
        spec.loader.exec_module(module)
    return sys.modules[twin]
