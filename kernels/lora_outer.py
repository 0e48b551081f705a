"""scale · hᵀ (g ⊙ x̃) [r, K]: the gradient of A as (dh, x), that of Bᵀ as (h, dy).

DoRA's magnitude needs Σ_M dy ⊙ z / ‖V‖ too: lora_outer_dot has it from the same pass over dy.

The rows are split among programs, each of which stores a partial sum. The last of them to end adds them up,
always in the same order: two runs give the same bits, which atomic additions would not.

Bytes: x once (2 M K in half precision), h once per block of columns, from the cache after the first
(4 M r); partial sums written and read (8 · splits · r K), the result written (4 r K). FLOPs: 2 M K r.
lora_outer_dot: z once (2 M N), a row more of partial sums, 2 M N more FLOPs.
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
    fma,
    kept,
    load_tile,
    load_transposed,
    mask_arguments,
    store_tile,
    sum_parts,
)

SCALARS = ["M", "rows_each", "scale", "seed", "step", "site", "first_row", "threshold"]


@triton.jit(do_not_specialize=SCALARS)
def kernel(
    h_ptr,  # [M, R], fp32, rows STRIDE apart
    x_ptr,  # [M, K]
    gain_ptr,  # [K] or None
    z_ptr,  # [M, K] or None
    norm_ptr,  # [K], with z
    partial_ptr,  # [splits, R, K], fp32; with z [splits, R + 1, K]
    total_ptr,  # [R, K], fp32; with z [R + 1, K]
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
    STRIDE: tl.constexpr,
):
    first_column = tl.program_id(0) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    ranks = tl.arange(0, RANKS)
    if FORM == "broadcast":
        total = tl.zeros((ROWS, RANKS, COLUMNS), tl.float32)
    else:
        total = tl.zeros((RANKS, COLUMNS), tl.float32)
    if z_ptr is not None:
        dots = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((split + 1) * rows_each, M)
    for start in range(split * rows_each, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = load_tile(x_ptr, rows, columns, end, K)  # [ROWS, COLUMNS]
        if z_ptr is not None:
            z = load_tile(z_ptr, rows, columns, end, K)
            dots = fma(x.to(tl.float32), z.to(tl.float32), dots)
        if DROPOUT:
            keep = kept(rows, first_column, seed, step, site, first_row, threshold, ROWS, COLUMNS)
            x = tl.where(keep, x, 0.0)
        if FORM == "broadcast":
            h = load_tile(h_ptr, rows, ranks, end, R, STRIDE)  # [ROWS, RANKS]
            total = fma(h.to(tl.float32)[:, :, None], x.to(tl.float32)[:, None, :], total)
        else:
            ht = load_transposed(h_ptr, rows, ranks, end, R, STRIDE)  # [RANKS, ROWS]
            if FORM == "dot-fp32":
                x = x.to(tl.float32)
            total = tl.dot(ht.to(x.dtype), x, total, input_precision="ieee")
    product = tl.sum(total, axis=0) if FORM == "broadcast" else total
    product = product * scale
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        product = product * gain[None, :]
    height: tl.constexpr = R if z_ptr is None else R + 1
    part_ptr = partial_ptr + split * height * K
    store_tile(part_ptr, product, ranks, columns, R, K)
    if z_ptr is not None:
        norm = tl.load(norm_ptr + columns, mask=columns < K, other=1.0)
        dm = tl.div_rn(tl.sum(dots, axis=0), norm)
        tl.store(part_ptr + R * K + columns, dm, mask=columns < K)
    splits = tl.num_programs(1)
    if arrives_last(arrived_ptr + tl.program_id(0), splits):
        sum_parts(partial_ptr, total_ptr, splits, ranks, columns, height, K, AT_ONCE)
        if height > RANKS:  # dm's row
            sum_parts(partial_ptr, total_ptr, splits, R + tl.arange(0, 1), columns, height, K, AT_ONCE)


def lora_outer(
    h: Tensor,
    x: Tensor,
    scale: float = 1.0,
    mask: Mask | None = None,
    gain: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """As kernels.reference has it: h [M, r], x [M, K], g [K] -> [r, K], fp32."""
    return _outer(h, x, scale, mask, gain, None, None, launch)


def lora_outer_dot(
    h: Tensor,
    dy: Tensor,
    z: Tensor,
    scale: float,
    gain: Tensor,
    norm: Tensor,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """As kernels.reference has it: h [M, r], dy, z [M, N], g, ‖V‖ [N] -> [r, N], [N], fp32."""
    both = _outer(h, dy, scale, None, gain, z, norm, launch)  # [r + 1, N]
    return both[:-1], both[-1]


def _outer(
    h: Tensor,
    x: Tensor,
    scale: float,
    mask: Mask | None,
    gain: Tensor | None,
    z: Tensor | None,
    norm: Tensor | None,
    launch: Launch | None,
) -> Tensor:
    (M, K), rank = x.shape, h.shape[1]
    launch = launch or find("outer", architecture(x.device), x.dtype, rank)
    blocks, (rows_each, splits) = ceil_div(K, launch.columns), row_splits(M, launch)
    height = rank if z is None else rank + 1
    partial = torch.empty(splits, height, K, dtype=torch.float32, device=x.device)
    total = torch.empty(height, K, dtype=torch.float32, device=x.device)
    kernel[(blocks, splits)](
        h,
        x,
        gain,
        z,
        norm,
        partial,
        total,
        arrivals(x.device, blocks),
        M,
        rows_each,
        scale * (1 if mask is None else mask.scale),
        *mask_arguments(mask),
        **compiled_for(kernel, K, rank, mask, launch, h.stride(0)),
    )
    return total
