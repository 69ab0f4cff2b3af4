"""Imports what a training process needs, in one that begins before its run is known (`launch/ahead.py`)."""

import importlib
from contextlib import suppress

from opensloth import log, paths
from opensloth.launch.device import claim_device

TRAINERS = {"sft": "trl.trainer.sft_trainer", "grpo": "trl.trainer.grpo_trainer"}


def load(method: str) -> None:
    """Import the libraries of `method`. What a worker imports only when it gets there would cost its time then."""
    log.quiet_libraries()
    paths.keep_compiled()
    device = claim_device()  # before torch is imported, which may look for cards
    importlib.import_module(f"opensloth.training.{method}.run")
    importlib.import_module(TRAINERS[method])
    importlib.import_module("torch.utils.tensorboard")
    if device != "cpu":
        from opensloth.engine import flash4

        with suppress(ImportError):  # it is not installed
            flash4.package()
