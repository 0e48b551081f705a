"""What a GPU would notice, on a machine without one: `pretended_cuda.py` says how.

The claims are tests of their own, in `pretended_runs.py` and, for real GPUs too, in `test_gpu.py`.
They run in a process that has the pretended device.
"""

import os
import subprocess
import sys
from pathlib import Path

import pretended_cuda
import pytest

HERE = Path(__file__).parent
REASON = pretended_cuda.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretended_cuda.compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize(("file", "chosen"), [("pretended_runs.py", ""), ("test_gpu.py", "cuda or noticed")])
def test_on_the_pretended_device(file: str, chosen: str, shim: Path) -> None:
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "-s", str(HERE / file), "-k", chosen]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, str(HERE / "pretended_cuda.py"), "--shim", str(shim), *tests]
    ended = subprocess.run(command, env=kept, capture_output=True, text=True)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
