"""V = W + scale · B A, and DoRA's ‖V‖ and g = m / ‖V‖ per row, in one pass over W.

A program holds whole rows in registers, so that the norm, which needs all of a row, costs no second read.

Bytes: W once (4 N K, kept in fp32), V once (2 N K in half precision), norms and gains
(12 N with m), g ⊙ V where it is wanted (2 N K); A (4 r K) stays in the cache. FLOPs: 2 N K r + 2 N K. The
norm alone writes no V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, ceil_div, find
from kernels.tiles import compiled_for, fma, load_tile, store_tile

SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit(do_not_specialize=["scale", "N", "row_stride", "rank_stride"])
def kernel(
    W_ptr,  # [N, K]
    A_ptr,  # [R, K]
    B_ptr,  # [N, R], of any strides
    magnitude_ptr,  # [N] or None
    merged_ptr,  # [N, K] or None
    gained_ptr,  # [N, K] or None: g ⊙ V, with a magnitude
    norm_ptr,  # [N] or None, fp32
    gain_ptr,  # [N] or None, fp32
    scale: tl.float32,
    N: tl.int32,
    row_stride: tl.int32,
    rank_stride: tl.int32,
    K: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # K, padded to a power of two
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    BA = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(R):
        b = tl.load(B_ptr + rows * row_stride + r * rank_stride, mask=rows < N, other=0.0).to(tl.float32)
        a = tl.load(A_ptr + r * K + columns, mask=columns < K, other=0.0).to(tl.float32)
        BA = fma(b[:, None], a[None, :], BA)
    V = load_tile(W_ptr, rows, columns, N, K).to(tl.float32) + scale * BA
    if norm_ptr is not None:
        norm = tl.maximum(tl.sqrt_rn(tl.sum(V * V, axis=1)), SMALLEST)  # as row_norm has it
        tl.store(norm_ptr + rows, norm, mask=rows < N)
        if magnitude_ptr is not None:
            magnitude = tl.load(magnitude_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
            gain = tl.div_rn(magnitude, norm)
            tl.store(gain_ptr + rows, gain, mask=rows < N)
            if gained_ptr is not None:
                store_tile(gained_ptr, V * gain[:, None], rows, columns, N, K)
    if merged_ptr is not None:
        store_tile(merged_ptr, V, rows, columns, N, K)


def lora_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    dtype: torch.dtype | None = None,
    gV: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As kernels.reference has it: [N, K], [r, K], [N, r] (of any strides), [N] -> [N, K], [N], [N]."""
    merged = torch.empty_like(weight, dtype=dtype)
    norm = gain = None
    if magnitude is not None:
        norm, gain = torch.empty(2, len(weight), device=weight.device)
    _launch(weight, lora_A, lora_B, magnitude, (merged, gV, norm, gain), scaling, launch)
    return merged, norm, gain


def dora_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, launch: Launch | None = None
) -> Tensor:
    """As kernels.reference has it: ‖W + s·B A‖ [N], fp32."""
    norm = torch.empty(len(weight), device=weight.device)
    _launch(weight, lora_A, lora_B, None, (None, None, norm, None), scaling, launch)
    return norm


def dora_gain(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """As kernels.reference has it: ‖W + s·B A‖ and m / ‖W + s·B A‖, [N] each, fp32."""
    norm, gain = torch.empty(2, len(weight), device=weight.device)
    _launch(weight, lora_A, lora_B, magnitude, (None, None, norm, gain), scaling, launch)
    return norm, gain


def _launch(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    results: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scaling: float,
    launch: Launch | None,
) -> None:
    """`results`: V, g ⊙ V, ‖V‖ and g, as far as they are wanted."""
    (N, K), rank = weight.shape, lora_A.shape[0]
    launch = launch or find("merge", architecture(weight.device), weight.dtype, K)
    kernel[(ceil_div(N, launch.rows),)](
        weight,
        lora_A,
        lora_B,
        magnitude,
        *results,
        scaling,
        N,
        *lora_B.stride(),
        **compiled_for(kernel, K, rank, None, launch),
    )
