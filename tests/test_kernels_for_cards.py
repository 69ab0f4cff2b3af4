"""Every kernel compiles for cards that are not here (tests/kernels_for_cards.py)."""

import re
import subprocess
import sys
from pathlib import Path

from interpreted import needs_triton
from training_fixtures import environment

KERNELS = {
    *("_gate", "_gate_back", "_numbers", "_normalize", "_rotate", "_cross_entropy", "_score", "_slope"),
    *("_attend", "_summarize", "_draw"),
}


@needs_triton
def test_every_kernel_compiles_for_cards(tmp_path):
    script = Path(__file__).with_name("kernels_for_cards.py")
    done = subprocess.run(
        [sys.executable, script, "80", "90"],
        env=environment(TRITON_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in done.stdout.splitlines()]
    for capability in ("80", "90"):
        assert {line[0] for line in made if line[1] == capability} == KERNELS
    assert all(int(line[-1]) > 0 for line in made)


def test_no_kernel_is_left_out():
    """A launch is written `_kernel[grid](`."""
    sources = (Path(__file__).parents[1] / "src").rglob("*.py")
    launches = (re.findall(r"^ +(_\w+)\[\(", path.read_text(), re.MULTILINE) for path in sources)
    assert {name for found in launches for name in found} == KERNELS
