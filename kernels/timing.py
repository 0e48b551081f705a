"""How long calls take a GPU: medians of CUDA events, the calls in turn, the cache flushed before each."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

from kernels.costs import Limits

FLUSHED = 2**28  # bytes written before each call: several times the largest L2
WARM_UP = 10  # Triton compiles in the first call, cuBLAS chooses
HEAD_START = 1.5


class Timing(NamedTuple):
    """Medians, in seconds."""

    gpu: float  # from the first kernel's start to the last one's end
    cpu: float  # until all was launched


Timer = Callable[[Sequence[Callable[[], object]]], list[Timing]]


class CudaTimer:
    """Times calls by events on the current stream.

    Before each call a buffer larger than the L2 cache is written, so that operands come from DRAM, as they do
    in a training step; what a call itself writes and reads again may still come from the cache. There are
    as many of these writes as keep the GPU busy while the CPU launches the call: what launching costs is
    told apart, and is no part of the GPU's time, unless the call waits for the GPU itself.
    """

    def __init__(self, repeats: int, device: torch.device, flushed: int = FLUSHED):
        self.repeats = repeats
        self.buffer = torch.empty(flushed, dtype=torch.int8, device=device)

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[Timing]:
        """Which call is first rotates, so that a clock that sinks as the GPU warms up hits all alike."""
        launching = [launching_time(call) for call in calls]
        flush = self.elapsed([[marked(self.buffer.zero_) for _ in range(WARM_UP)]])[0]
        writes = math.ceil(HEAD_START * max(launching) / flush)
        marks: list[list] = [[] for _ in calls]
        for i in range(self.repeats):
            for j in range(len(calls)):
                which = (i + j) % len(calls)
                for _ in range(writes):
                    self.buffer.zero_()
                marks[which].append(marked(calls[which]))
        return [Timing(gpu, cpu) for gpu, cpu in zip(self.elapsed(marks), launching, strict=True)]

    def elapsed(self, marks: Sequence[Sequence[tuple]]) -> list[float]:
        torch.cuda.synchronize()
        return [median(start.elapsed_time(end) / 1e3 for start, end in each) for each in marks]


def marked(call: Callable[[], object]) -> tuple:
    """The events before and after a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return start, end


def launching_time(call: Callable[[], object]) -> float:
    """The CPU's seconds for a call once it has run often enough."""
    for _ in range(WARM_UP):
        call()
    seconds = []
    for _ in range(WARM_UP):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def sustained(
    timer: Timer, device: torch.device, dtype: torch.dtype, copied: int = FLUSHED, width: int = 4096
) -> Limits:
    """What the device reaches in a copy of many bytes and in a large product."""
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(width, width, dtype=dtype, device=device)
    copy, product = timer([lambda: target.copy_(source), lambda: matrix @ matrix])
    return Limits(2 * copied / copy.gpu, 2 * width**3 / product.gpu)
