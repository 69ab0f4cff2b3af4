"""Triton's interpreter, which runs kernels on CPU tensors: asked for before anything imports triton."""

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
