"""h = scale · (g ⊙ x̃) Aᵀ [M, r]: dropout, DoRA's gain and the down projection in one pass over x.

Serves the forward pass as (x, A), and the backward pass as (dy, Bᵀ): dh = s · (g ⊙ dy) B.

Bytes: x once (2 M K in half precision), h once (4 M r); A (4 r K) stays in the cache.
FLOPs: 2 M K r. Neither mask nor x̃ is stored: the first is computed where it is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, ceil_div, find
from kernels.philox import Mask
from kernels.tiles import compiled_for, fma, kept, load_tile, mask_arguments, store_tile

SCALARS = ["M", "scale", "seed", "step", "site", "first_row", "threshold"]


@triton.jit(do_not_specialize=SCALARS)
def kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [R, K]
    gain_ptr,  # [K] or None
    h_ptr,  # [M, R], fp32
    M: tl.int32,
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
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    if FORM == "broadcast":
        total = tl.zeros((ROWS, RANKS, COLUMNS), tl.float32)
    else:
        total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = load_tile(x_ptr, rows, columns, M, K)  # [ROWS, COLUMNS]
        if DROPOUT:  # before A is loaded: the mask needs many registers, and with A's some would spill
            keep = kept(rows, start, seed, step, site, first_row, threshold, ROWS, COLUMNS)
            x = tl.where(keep, x, 0.0)
        A = load_tile(A_ptr, ranks, columns, R, K).to(tl.float32)  # [RANKS, COLUMNS]
        if gain_ptr is not None:  # on A, the smaller of the two: (g ⊙ x) Aᵀ = x (g ⊙ A)ᵀ
            gain = tl.load(gain_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
            A = A * gain[None, :]
        if FORM == "broadcast":
            total = fma(x.to(tl.float32)[:, None, :], A[None, :, :], total)
        else:
            total = tl.dot(x, tl.trans(A.to(x.dtype)), total, input_precision="ieee")
    h = tl.sum(total, axis=2) if FORM == "broadcast" else total
    store_tile(h_ptr, h * scale, rows, ranks, M, R)


def lora_down(
    x: Tensor,
    A: Tensor,
    scale: float = 1.0,
    mask: Mask | None = None,
    gain: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """As kernels.reference has it: x [M, K], A [r, K], g [K] -> [M, r], fp32."""
    (M, K), rank = x.shape, A.shape[0]
    launch = launch or find("down", architecture(x.device), x.dtype, rank)
    h = torch.empty(M, rank, dtype=torch.float32, device=x.device)
    kernel[(ceil_div(M, launch.rows),)](
        x,
        A,
        gain,
        h,
        M,
        scale * (1 if mask is None else mask.scale),
        *mask_arguments(mask),
        **compiled_for(kernel, K, rank, mask, launch),
    )
    return h
