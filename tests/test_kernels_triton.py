"""The Triton kernels against float64, interpreted on any machine and compiled on a GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so kernel_parity.py runs in processes of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
PARITY = Path(__file__).with_name("kernel_parity.py")
LAYERS = Path(__file__).with_name("layer_parity.py")
# In two processes of about the same length, for pytest -n 2
PARTS = {"products": "test_down or test_up or test_outer or test_backward", "rest": "not (%s)"}
PARTS["rest"] %= PARTS["products"]


def run_parity(part: str, interpreted: bool, *files: Path) -> None:
    """Fails with what pytest said in there."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))
    }
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files), "-k", PARTS[part]]
    run = subprocess.run(command, cwd=PARITY.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout


@pytest.mark.parametrize("part", PARTS)
def test_every_operation_agrees_with_float64_under_the_interpreter(part: str):
    run_parity(part, True, PARITY, *([LAYERS] if part == "rest" else []))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", PARTS)
def test_every_operation_agrees_with_float64_on_the_gpu(part: str):
    run_parity(part, False, PARITY, *([LAYERS] if part == "rest" else []))
