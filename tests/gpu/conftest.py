"""Tests that need a CUDA card (`make test-gpu`): skipped, with the reason, where there is none."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    build = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch sees no CUDA card"
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA card: {build}"))
