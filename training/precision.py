"""Where a run computes, and in which dtype: chosen well, never emulated."""

import torch

from minibert.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` is a CUDA GPU where there is one.

    Raises:
        InputError: if the name is no device, or none of that name is there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise InputError(f"--device {name}: this machine has {there} CUDA devices")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 where the hardware computes in it, fp16 on older GPUs, else fp32.

    Raises:
        InputError: if the device cannot compute in the precision asked for.
    """
    if device.type == "cuda":
        # A T4 answers True unless emulation is left out, and is slow at it.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        best = "bf16" if bf16 else "fp16"
    else:
        bf16 = cpu_has_fast_bf16()
        best = "bf16" if bf16 else "fp32"
    if name == "bf16" and not bf16:
        raise InputError(f"--precision bf16: this {device.type} has no bf16 arithmetic; best here is {best}")
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: expected a GPU; a CPU has fp32 and bf16")
    return best if name == "auto" else name


def cpu_has_fast_bf16() -> bool:
    """Whether matrix products in bf16 have instructions of their own (AVX512-BF16 or AMX on x86)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
