"""dh = scale · (g ⊙ dy) B [M, r] and dBᵀ = scale · hᵀ (g ⊙ dy) [r, N] in one pass over dy.

Pays where tensor cores make both products cheap, from sm_80 on. Below, lora_down and lora_outer read dy
twice and are still faster: the fused form is bound by shared memory. Both results are summed as in
lora_outer, dh over the blocks of columns and dBᵀ over the splits of the rows.

Bytes: dy once (2 M N in half precision), h once (4 M r), partial sums written and read
(8 M r · N / columns, 8 · splits · r N), both results written (4 M r + 4 r N). FLOPs: 4 M N r.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, arrivals, ceil_div, find, row_splits
from kernels.tiles import arrives_last, compiled_for, load_tile, store_tile, sum_parts


@triton.jit(do_not_specialize=["M", "rows_each", "scale"])
def kernel(
    dy_ptr,  # [M, N]
    h_ptr,  # [M, R], fp32, rows STRIDE apart
    B_ptr,  # [R, N]
    gain_ptr,  # [N] or None
    dhs_ptr,  # [N / COLUMNS, M, R], fp32
    dBs_ptr,  # [splits, R, N], fp32
    dh_ptr,  # [M, R], fp32
    dB_ptr,  # [R, N], fp32
    arrived_ptr,  # a zero for each block of columns, and then for each split of the rows
    M: tl.int32,
    rows_each: tl.int32,
    scale: tl.float32,
    N: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,  # R, padded
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    B = load_tile(B_ptr, ranks, columns, R, N).to(tl.float32)  # [RANKS, COLUMNS]
    dB = tl.zeros((RANKS, COLUMNS), tl.float32)
    if gain_ptr is not None:  # on the small factors: dy itself is never scaled
        gain = tl.load(gain_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        B = B * gain[None, :]
    end = tl.minimum((split + 1) * rows_each, M)
    for start in range(split * rows_each, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        dy = load_tile(dy_ptr, rows, columns, end, N)  # [ROWS, COLUMNS]
        h = load_tile(h_ptr, rows, ranks, end, R, STRIDE)  # [ROWS, RANKS]
        dh = tl.dot(dy, tl.trans(B.to(dy.dtype)), input_precision="ieee")  # [ROWS, RANKS]
        store_tile(dhs_ptr + block * M * R, dh * scale, rows, ranks, end, R)
        dB = tl.dot(tl.trans(h.to(dy.dtype)), dy, dB, input_precision="ieee")
    if gain_ptr is not None:
        dB = dB * gain[None, :]
    store_tile(dBs_ptr + split * R * N, dB * scale, ranks, columns, R, N)
    blocks, splits = tl.num_programs(0), tl.num_programs(1)
    if arrives_last(arrived_ptr + block, splits):
        sum_parts(dBs_ptr, dB_ptr, splits, ranks, columns, R, N, AT_ONCE)
    if arrives_last(arrived_ptr + blocks + split, blocks):
        for start in range(split * rows_each, end, ROWS):
            sum_parts(dhs_ptr, dh_ptr, blocks, start + tl.arange(0, ROWS), ranks, M, R, 2 * AT_ONCE)


def lora_backward_y(
    dy: Tensor,
    h: Tensor,
    Bt: Tensor,
    scale: float = 1.0,
    gain: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """As kernels.reference has it: dy [M, N], h [M, r], Bᵀ [r, N], g [N] -> [M, r], [r, N], fp32."""
    (M, N), rank = dy.shape, Bt.shape[0]
    launch = launch or find("backward_y", architecture(dy.device), dy.dtype, rank)
    blocks, (rows_each, splits) = ceil_div(N, launch.columns), row_splits(M, launch)
    shapes = (blocks, M, rank), (splits, rank, N), (M, rank), (rank, N)
    dhs, dBs, dh, dB = (torch.empty(shape, dtype=torch.float32, device=dy.device) for shape in shapes)
    kernel[(blocks, splits)](
        dy,
        h,
        Bt,
        gain,
        dhs,
        dBs,
        dh,
        dB,
        arrivals(dy.device, blocks + splits),
        M,
        rows_each,
        scale,
        **compiled_for(kernel, N, rank, None, launch, h.stride(0)),
    )
    return dh, dB
