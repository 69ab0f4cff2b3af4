"""What all tests need before they begin.

Kernels run in Triton's interpreter where there is no card; it is asked for before anything imports triton. And Ctrl-C
is heard by the programs that tests start, also where a shell began the tests in the background, which ignores it.
"""

import os
import signal

import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if torch.version.cuda is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
