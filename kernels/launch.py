"""How every kernel is launched, per architecture and rank: the one table, and what the letters in it mean.

A form is how a kernel multiplies:

    broadcast   a 3-D accumulator [rows, r, columns], one fused multiply-add per element and rank, summed once
                after the loop: nothing passes through shared memory within it
    rank-1      acc += h[:, i] b[i, :] for each rank i: no padding, no shared memory; for products that widen
    dot-fp32    tl.dot of fp32 operands at full precision, which is fused multiply-adds on every architecture
    dot         tl.dot of operands in the activations' dtype: tensor cores from sm_80 on

Triton has no tensor cores below sm_80 since 3.3, and on sm_75 a dot this narrow is bound by shared memory,
not by arithmetic: there the first two carry what is bound by memory, and matrix products do the rest. So it
is for fp32 activations on any architecture, which tensor cores would round to TF32.
"""

import functools
import os
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on the CPU
MAX_WIDTH = 8192  # of a row that lora_merge holds in registers
KERNEL_OF = {"outer_dot": "outer"}  # operations that have the kernel, and the launches, of another


class Launch(NamedTuple):
    form: str
    rows: int
    columns: int
    warps: int
    stages: int = 2
    splits: int = 1  # partial sums over the rows, which the last program to end adds up in a fixed order


# (operation, architecture) -> ((up to this rank, launch), ...); of merge, up to this width.
# fp32 activations use the row "fp32" where there is one, and that of sm_75 elsewhere.
# Above the last rank matrix products are the faster way, and no kernel is launched.
TABLE: dict[tuple[str, int | str], tuple[tuple[int, Launch], ...]] = {
    ("down", 75): ((4, Launch("broadcast", 16, 64, 4)), (16, Launch("broadcast", 8, 64, 4))),
    ("down", 80): ((32, Launch("dot", 32, 64, 4)), (64, Launch("dot", 64, 64, 8))),
    ("down", 90): ((32, Launch("dot", 32, 64, 4)), (64, Launch("dot", 64, 64, 8))),
    ("up", 75): ((64, Launch("rank-1", 32, 64, 4)),),
    ("up", 80): ((16, Launch("rank-1", 32, 64, 4)), (64, Launch("dot", 64, 64, 4))),
    ("up", 90): ((16, Launch("rank-1", 32, 64, 4)), (64, Launch("dot", 64, 64, 4))),
    ("outer", 75): (
        (2, Launch("broadcast", 16, 64, 4, splits=16)),
        (16, Launch("dot-fp32", 32, 64, 2, 1, splits=16)),
    ),
    # Half the rows of fp16, so as many bytes in a tile: with more, a thread runs out of registers.
    ("outer", "fp32"): (
        (2, Launch("broadcast", 16, 64, 4, splits=16)),
        (16, Launch("dot-fp32", 16, 64, 2, 1, splits=16)),
    ),
    ("outer", 80): ((64, Launch("dot", 32, 64, 4, splits=32)),),
    ("outer", 90): ((64, Launch("dot", 32, 64, 4, splits=32)),),
    ("backward_x", 75): ((32, Launch("dot-fp32", 32, 64, 4, splits=16)),),
    ("backward_x", 80): ((64, Launch("dot", 32, 64, 4, splits=32)),),
    ("backward_x", 90): ((64, Launch("dot", 32, 64, 4, splits=32)),),
    # As outer in fp32.
    ("backward_x", "fp32"): ((32, Launch("dot-fp32", 16, 64, 4, splits=16)),),
    ("backward_y", 80): (
        (32, Launch("dot", 32, 128, 4, splits=32)),
        (64, Launch("dot", 32, 128, 8, splits=32)),
    ),
    ("backward_y", 90): (
        (32, Launch("dot", 32, 128, 4, splits=32)),
        (64, Launch("dot", 32, 128, 8, splits=32)),
    ),
    ("merge", 75): (
        (1024, Launch("rank-1", 2, 1024, 4)),
        (2048, Launch("rank-1", 1, 2048, 4)),
        (4096, Launch("rank-1", 1, 4096, 8)),
        (8192, Launch("rank-1", 1, 8192, 16)),
    ),
    ("drop", 75): ((64, Launch("rank-1", 32, 64, 4)),),
}  # fmt: skip


def architecture(device: torch.device) -> int:
    """The table's row for a device: 75, 80 or 90, the next lower one for those between; 75 interpreted."""
    if device.type != "cuda":
        return 75
    major, minor = torch.cuda.get_device_capability(device)
    return max([row for row in (75, 80, 90) if row <= 10 * major + minor], default=75)


@functools.cache
def find(operation: str, row: int, dtype: torch.dtype, size: int) -> Launch | None:
    """The launch for activations in `dtype` and a rank (a width of merge), or None."""
    operation = KERNEL_OF.get(operation, operation)
    rows = ("fp32", 75) if dtype == torch.float32 else (row, 75)
    entries = next((TABLE[operation, key] for key in rows if (operation, key) in TABLE), ())
    return next((launch for limit, launch in entries if size <= limit), None)


def row_splits(M: int, launch: Launch) -> tuple[int, int]:
    """How many rows each partial sum is of, and how many sums there are: one even of no rows.

    The rows are a multiple of the tile's, so that no tile belongs to two partial sums.
    """
    rows_each = max(1, ceil_div(M, launch.splits * launch.rows)) * launch.rows
    return rows_each, max(1, ceil_div(M, rows_each))


def arrivals(device: torch.device, groups: int) -> torch.Tensor:
    """int32, a zero for each group of programs to count with how many have stored their part.

    Each stream has its own, since kernels of one stream follow one another. Kernels leave zeros behind.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _zeros(device, stream, max(1024, 1 << groups.bit_length()))


@functools.cache
def _zeros(device: torch.device, stream: int, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def ceil_div(number: int, by: int) -> int:
    """⌈number / by⌉; Triton's own takes 10 µs to say so on the host."""
    return -(-number // by)
