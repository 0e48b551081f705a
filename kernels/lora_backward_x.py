"""dx ← dx + keep / (1 - p) ⊙ (dh A), in place, and dA = dhᵀ x̃ [r, K]: what the layer's input still needs.

Both meet the same mask and the same dh; in one kernel each is made once. dA is summed as in lora_outer.

Bytes: x read, dx read and written (6 M K in half precision), dh once (4 M r), partial sums written and
read (8 · splits · r K), dA written (4 r K). FLOPs: 4 M K r.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, arrivals, ceil_div, find, row_splits
from kernels.philox import Mask
from kernels.tiles import (
    arrives_last,
    compiled_for,
    kept,
    load_tile,
    load_transposed,
    mask_arguments,
    rank_1_updates,
    store_tile,
    sum_parts,
)

SCALARS = ["M", "rows_each", "scale", "seed", "step", "site", "first_row", "threshold"]


@triton.jit(do_not_specialize=SCALARS)
def kernel(
    x_ptr,  # [M, K]
    dx_ptr,  # [M, K], changed
    dh_ptr,  # [M, R], fp32
    A_ptr,  # [R, K]
    partial_ptr,  # [splits, R, K], fp32
    dA_ptr,  # [R, K], fp32
    arrived_ptr,  # a zero for each block of columns
    M: tl.int32,
    rows_each: tl.int32,
    scale: tl.float32,
    seed: tl.int64,
    step: tl.int32,
    site: tl.int32,
    first_row: tl.int32,
    threshold: tl.int32,
    K: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,  # R, padded
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    FORM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    first_column = tl.program_id(0) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    ranks = tl.arange(0, RANKS)
    A = load_tile(A_ptr, ranks, columns, R, K)  # [RANKS, COLUMNS]
    dA = tl.zeros((RANKS, COLUMNS), tl.float32)
    end = tl.minimum((split + 1) * rows_each, M)
    for start in range(split * rows_each, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = load_tile(x_ptr, rows, columns, end, K)  # [ROWS, COLUMNS]
        dx = load_tile(dx_ptr, rows, columns, end, K).to(tl.float32)
        dht = load_transposed(dh_ptr, rows, ranks, end, R)  # [RANKS, ROWS]
        if FORM == "dot":
            update = tl.dot(tl.trans(dht.to(x.dtype)), A.to(x.dtype), input_precision="ieee")
        else:
            update = rank_1_updates(dh_ptr, A_ptr, rows, columns, end, R, K, ROWS, COLUMNS)
        if DROPOUT:
            keep = kept(rows, first_column, seed, step, site, first_row, threshold, ROWS, COLUMNS)
            x = tl.where(keep, x, 0.0)
            update = tl.where(keep, update, 0.0)
        store_tile(dx_ptr, dx + scale * update, rows, columns, end, K)
        if FORM == "dot-fp32":
            x = x.to(tl.float32)
        dA = tl.dot(dht.to(x.dtype), x, dA, input_precision="ieee")
    store_tile(partial_ptr + split * R * K, dA * scale, ranks, columns, R, K)
    splits = tl.num_programs(1)
    if arrives_last(arrived_ptr + tl.program_id(0), splits):
        sum_parts(partial_ptr, dA_ptr, splits, ranks, columns, R, K, AT_ONCE)


def lora_backward_x(
    x: Tensor, dx: Tensor, dh: Tensor, A: Tensor, mask: Mask | None = None, launch: Launch | None = None
) -> Tensor:
    """As kernels.reference has it: x, dx [M, K], dh [M, r], A [r, K] -> dA [r, K], fp32; dx is changed."""
    (M, K), rank = x.shape, A.shape[0]
    launch = launch or find("backward_x", architecture(x.device), x.dtype, rank)
    blocks, (rows_each, splits) = ceil_div(K, launch.columns), row_splits(M, launch)
    partial = torch.empty(splits, rank, K, dtype=torch.float32, device=x.device)
    dA = torch.empty(rank, K, dtype=torch.float32, device=x.device)
    kernel[(blocks, splits)](
        x,
        dx,
        dh,
        A,
        partial,
        dA,
        arrivals(x.device, blocks),
        M,
        rows_each,
        1.0 if mask is None else mask.scale,
        *mask_arguments(mask),
        **compiled_for(kernel, K, rank, mask, launch),
    )
    return dA
