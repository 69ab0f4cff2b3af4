"""What all tests need before they begin.

Kernels run in Triton's interpreter where there is no card; it is asked for before anything imports triton. And Ctrl-C
is heard by the programs that tests start, also where a shell began the tests in the background, which ignores it.
Commands that run in the tests' own process have no others begin early, for workers that are not going to be started.
"""

import os
import signal

import pytest
import torch

from opensloth.launch import ahead

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if torch.version.cuda is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def no_early_processes():
    def refuse(*_):
        raise OSError("none in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "_begin", refuse)
        yield
