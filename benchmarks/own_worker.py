"""A command of ours that starts a program of this folder as its workers, to change one thing in them."""

import os
from functools import partial
from pathlib import Path


def use(module: str) -> None:
    """Commands that are run by this process from here on start `module` in place of opensloth.training.worker."""
    from opensloth.launch import launcher, run_directory

    folders = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    run_directory.run_workers = partial(launcher.run_workers, module=module)
