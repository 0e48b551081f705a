"""Start Python with a CUDA device that is not there: `python tests/pretended_cuda.py -m pytest FILE`.

Tensors say that they are on cuda:0 and are computed on the CPU, so a machine without a GPU finds tensors on
two devices, host waits and pageable copies, and counts launches: see `pretended_device.py`. Without arguments
it prints what a training step of each case costs, and where the host waits.

The shim must be loaded before torch, so this file must not import torch.
"""

import ctypes
import importlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("pretended_guard.cpp")
KNOWN = ("2.13.", "2.14.")  # the shim uses torch's internal C++ interfaces, which change between versions


def why_not() -> str | None:
    """Why this machine cannot pretend; None if it can."""
    if sys.platform != "linux":
        return "the shim is written for Linux"
    if shutil.which("g++") is None:
        return "needs g++ to compile the shim"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: its kernels are what is launched"
    if not version("torch").startswith(KNOWN):
        return f"the shim is known to work with torch {' and '.join(KNOWN)}, this is {version('torch')}"
    return None


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def compile_shim(folder: Path) -> Path:
    """The shim for the installed torch; it takes some seconds."""
    library, torch = folder / "pretended_guard.so", torch_folder()
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    build = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(library), *include]
    subprocess.run([*build, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
    return library


def pretend(library: Path) -> None:
    """From here on this process has the device cuda:0."""
    assert "torch" not in sys.modules, "the shim must be loaded before torch"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    shim = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    importlib.import_module("torch")
    shim.pretend_guard()
    importlib.import_module("pretended_device").install()


def main(arguments: list[str]) -> None:
    """[--shim LIBRARY] -m MODULE ARGUMENTS: run the module; without one, print the table of costs."""
    sys.path.insert(0, str(SOURCE.parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        if arguments[:1] == ["--shim"]:
            pretend(Path(arguments[1]))
            arguments = arguments[2:]
        elif reason := why_not():
            sys.exit(reason)
        else:
            pretend(compile_shim(Path(folder)))
        if arguments[:1] == ["-m"]:
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            importlib.import_module("pretended_costs").print_table()


if __name__ == "__main__":
    main(sys.argv[1:])
