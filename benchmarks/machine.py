"""The machine that is measured: what it is, and how fast it multiplies matrices.

`python -m benchmarks.machine` prints the rates of one product, x Wᵀ of 1900 tokens with the first matrix of
all-MiniLM-L6-v2's feed-forward layers: what a training step could reach if it were nothing else.
"""

import json
import platform
import re
import sys
import time
from importlib import metadata

from training.machine import cores, cpu, cpu_flags

SHAPE = (1900, 384, 1536)  # M, K, N
REPEATS = 40  # products are short; the fastest is what the machine can do
ENOUGH = 2.0  # seconds: a CPU without bf16 instructions takes one for a single product
# Of /proc/cpuinfo's flags those that matrix products depend on.
TELLING = re.compile(r"avx|amx|fma$|f16c$|asimd|bf16|sve|i8mm")


def describe(threads: int) -> dict[str, object]:
    """CPU, cores, threads, flags, versions. Imports no torch."""
    return {
        "cpu": cpu(),
        "cores": cores(),
        "threads": threads,
        "flags": sorted(flag for flag in cpu_flags() if TELLING.search(flag)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def product_rates(device: str = "cpu") -> dict[str, float]:
    """FLOPs a second of x Wᵀ by dtype: 2 M K N over the shortest of some repeats."""
    import torch

    from training.memory import wait_for

    rows, inputs, outputs = SHAPE
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, weight = (torch.randn(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
        seconds = []
        for _ in range(REPEATS):
            if sum(seconds) > ENOUGH:
                break
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            wait_for(x.device)
            seconds.append(time.perf_counter() - started)
        rates[name] = 2 * rows * inputs * outputs / min(seconds)
    return rates


if __name__ == "__main__":
    json.dump(product_rates(*sys.argv[1:]), sys.stdout)
