"""Tests of kernels, which conftest.py has run by triton's interpreter on CPU tensors."""

from importlib.util import find_spec

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
