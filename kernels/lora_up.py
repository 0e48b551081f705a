"""y ← y + scale · keep / (1 - p) ⊙ (h Bᵀ), in place: the low-rank term in one pass over y.

Without a mask the second half of the forward pass, y being x Wᵀ; with one, dx += keep / (1 - p) ⊙ (dh A).

Bytes: y read and written (4 M N in half precision), h once (4 M r); Bᵀ (4 r N) stays in the cache.
FLOPs: 2 M N r.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, ceil_div, find
from kernels.philox import Mask
from kernels.tiles import compiled_for, kept, load_tile, mask_arguments, rank_1_updates, store_tile

SCALARS = ["M", "scale", "seed", "step", "site", "first_row", "threshold"]


@triton.jit(do_not_specialize=SCALARS)
def kernel(
    y_ptr,  # [M, N], changed
    h_ptr,  # [M, R], fp32
    B_ptr,  # [R, N]
    M: tl.int32,
    scale: tl.float32,
    seed: tl.int64,
    step: tl.int32,
    site: tl.int32,
    first_row: tl.int32,
    threshold: tl.int32,
    N: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,  # R, padded
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    FORM: tl.constexpr,
):
    first_column = tl.program_id(1) * COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    y = load_tile(y_ptr, rows, columns, M, N)  # [ROWS, COLUMNS]
    if FORM == "rank-1":
        update = rank_1_updates(h_ptr, B_ptr, rows, columns, M, R, N, ROWS, COLUMNS)
    else:
        ranks = tl.arange(0, RANKS)
        h = load_tile(h_ptr, rows, ranks, M, R).to(y.dtype)  # [ROWS, RANKS]
        B = load_tile(B_ptr, ranks, columns, R, N).to(y.dtype)  # [RANKS, COLUMNS]
        update = tl.dot(h, B, input_precision="ieee")
    if DROPOUT:
        keep = kept(rows, first_column, seed, step, site, first_row, threshold, ROWS, COLUMNS)
        update = tl.where(keep, update, 0.0)
    store_tile(y_ptr, y.to(tl.float32) + scale * update, rows, columns, M, N)


def lora_up(
    y: Tensor,
    h: Tensor,
    Bt: Tensor,
    scale: float = 1.0,
    mask: Mask | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """As kernels.reference has it: y [M, N], h [M, r], Bᵀ [r, N] -> y."""
    (M, N), rank = y.shape, Bt.shape[0]
    launch = launch or find("up", architecture(y.device), y.dtype, rank)
    kernel[(ceil_div(M, launch.rows), ceil_div(N, launch.columns))](
        y,
        h,
        Bt,
        M,
        scale * (1 if mask is None else mask.scale),
        *mask_arguments(mask),
        **compiled_for(kernel, N, rank, mask, launch),
    )
    return y
