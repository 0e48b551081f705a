"""How much memory a process has taken, and giving back what it no longer needs."""

import ctypes
import importlib
import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory_mib(device: torch.device) -> float:
    """The process's peak: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage counts what started this program too, if it was larger
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def memory_once_imported() -> float:
    """MiB resident before anything of a run is loaded, with what torch.optim and scoring import when used."""
    for name in ("torch._dynamo", "scipy.stats"):
        importlib.import_module(name)
    return peak_memory_mib(torch.device("cpu"))


def give_back_memory() -> None:
    """Let the system have what has been freed: glibc's malloc keeps the pages between two blocks in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
