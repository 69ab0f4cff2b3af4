"""TRL's own GRPO trainer, whatever other libraries have put in its place.

`import unsloth` replaces the classes of `trl.trainer.grpo_trainer` by rewritten copies, whose policy loss passes by the
methods that ours builds on. Its faster model code is wanted, its trainer is not.
"""

import importlib.util
import sys
from typing import Any

MODULE = "trl.trainer.grpo_trainer"
TWIN = "trl.trainer.grpo_trainer_of_trl"


def grpo_trainer() -> Any:
    """The class as TRL's source has it: the imported one, or one made from the source again where unsloth is."""
    if "unsloth" not in sys.modules:
        from trl import GRPOTrainer

        return GRPOTrainer
    if TWIN not in sys.modules:
        import trl.trainer.grpo_trainer as replaced

        spec = importlib.util.spec_from_file_location(TWIN, replaced.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[TWIN] = module
        spec.loader.exec_module(module)
    return sys.modules[TWIN].GRPOTrainer
