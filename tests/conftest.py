"""Kernels run in Triton's interpreter where there is no card. It is asked for before anything imports triton."""

import os

import torch

if torch.version.cuda is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
