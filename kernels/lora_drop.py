"""x̃ = x ⊙ keep / (1 - p), stored: what matrix products need at ranks where they beat the fused kernels.

Bytes: x read and x̃ written (4 M K in half precision). FLOPs: M K, and Philox.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, ceil_div, find
from kernels.philox import Mask
from kernels.tiles import compiled_for, kept, load_tile, mask_arguments, store_tile


@triton.jit(do_not_specialize=["M", "scale", "seed", "step", "site", "first_row", "threshold"])
def kernel(
    x_ptr,  # [M, K]
    dropped_ptr,  # [M, K]
    M: tl.int32,
    scale: tl.float32,
    seed: tl.int64,
    step: tl.int32,
    site: tl.int32,
    first_row: tl.int32,
    threshold: tl.int32,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_column = tl.program_id(1) * COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    x = load_tile(x_ptr, rows, columns, M, K).to(tl.float32)  # [ROWS, COLUMNS]
    keep = kept(rows, first_column, seed, step, site, first_row, threshold, ROWS, COLUMNS)
    store_tile(dropped_ptr, tl.where(keep, x * scale, 0.0), rows, columns, M, K)


def lora_drop(x: Tensor, mask: Mask, launch: Launch | None = None) -> Tensor:
    """As kernels.reference has it: [M, K] -> [M, K]."""
    M, K = x.shape
    launch = launch or find("drop", architecture(x.device), x.dtype, 1)
    dropped = torch.empty_like(x)
    kernel[(ceil_div(M, launch.rows), ceil_div(K, launch.columns))](
        x,
        dropped,
        M,
        mask.scale,
        *mask_arguments(mask),
        **compiled_for(kernel, K, 1, mask, launch),
    )
    return dropped
