"""What machine this is: its CPU's name, instructions and cores. Imports no torch."""

import os
import platform
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")  # Linux
# Instructions that multiply bf16: x86's AVX512-BF16, AMX and AVX10.2; Arm's FEAT_BF16.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16"}


def cpu() -> str:
    """The CPU's name, with family and model: CPUs that share a name can differ twofold in speed."""
    name = cpu_fact("model name") or platform.processor() or platform.machine()
    family, model = cpu_fact("cpu family"), cpu_fact("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def cpu_flags() -> set[str]:
    """The instruction sets that the first CPU lists. Arm calls them features."""
    return set((cpu_fact("flags") or cpu_fact("Features")).split())


def has_bf16() -> bool:
    """Whether the CPU lists instructions for bf16. Whether they are fast is another question."""
    return bool(cpu_flags() & BF16_FLAGS)


def cpu_fact(name: str) -> str:
    """One entry of /proc/cpuinfo for the first CPU; empty where the system has none."""
    text = CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.exists() else ""
    found = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
