"""How much memory a process has taken; keeping what it will need again, and giving back what it will not."""

import ctypes
import importlib
import re
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
C_LIBRARY = ctypes.CDLL(None)


def peak_memory_mib(device: torch.device) -> float:
    """The process's peak: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage counts what started this program too, if it was larger
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given; a CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_once_imported() -> float:
    """MiB resident before anything of a run is loaded, with what torch.optim and scoring import when used."""
    for name in ("torch._dynamo", "scipy.stats"):
        importlib.import_module(name)
    return peak_memory_mib(torch.device("cpu"))


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed for the next step, but for blocks above 32 MiB.

    A step frees all its activations, and malloc would let the system have them: the next step would get
    them back page by page, each zeroed anew, at a fault each: 15,000 for a thousand tokens of MiniLM.
    """
    set_option = getattr(C_LIBRARY, "mallopt", None)  # other C libraries have none
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 2**25)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Let the system have what has been freed, wherever it lies."""
    trim = getattr(C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
