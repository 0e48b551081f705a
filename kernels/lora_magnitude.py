"""dm = Σ_M dy ⊙ z / ‖V‖ [N], the gradient of DoRA's magnitude, from sums over y that are there already.

A program has one output. Nearly always it divides two numbers; where the gain is too small for that it goes
through all of x for its own z = x Wᵀ + s · h Bᵀ, slowly. That no other launch and no look at the gains from
the CPU is needed, which would wait for the GPU in every layer, is what it is for.

Bytes: 16 N; of an output of small gain 2 M K more. FLOPs: N; 2 M K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, architecture, find
from kernels.reference import SMALL_GAIN
from kernels.tiles import compiled_for

SMALL = tl.constexpr(SMALL_GAIN)


@triton.jit(do_not_specialize=["scale", "M", "N"])
def kernel(
    dots_ptr,  # [N], fp32
    magnitude_ptr,  # [N], fp32
    norm_ptr,  # [N], fp32
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    W_ptr,  # [N, K]
    h_ptr,  # [M, R], fp32
    Bt_ptr,  # [R, N], fp32
    dm_ptr,  # [N], fp32
    scale: tl.float32,
    M: tl.int32,
    N: tl.int32,
    K: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,  # R, padded
    COLUMNS: tl.constexpr,  # K, padded to a power of two
):
    n = tl.program_id(0)
    magnitude, norm = tl.load(magnitude_ptr + n), tl.load(norm_ptr + n)
    dm = tl.div_rn(tl.load(dots_ptr + n), magnitude)
    if tl.abs(magnitude) < SMALL * norm:
        columns, ranks = tl.arange(0, COLUMNS), tl.arange(0, RANKS)
        w = tl.load(W_ptr + n * K + columns, mask=columns < K, other=0.0).to(tl.float32)
        b = tl.load(Bt_ptr + ranks * N + n, mask=ranks < R, other=0.0) * scale
        total = norm * 0.0
        for i in range(M):
            x = tl.load(x_ptr + i * K + columns, mask=columns < K, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + i * R + ranks, mask=ranks < R, other=0.0)
            total += tl.load(dy_ptr + i * N + n).to(tl.float32) * (tl.sum(x * w) + tl.sum(h * b))
        dm = tl.div_rn(total, norm)
    tl.store(dm_ptr + n, dm)


def dora_magnitude(
    dots: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    Bt: Tensor,
    scaling: float,
    launch: Launch | None = None,
) -> Tensor:
    """As kernels.reference has it: [N] three times, [M, N], [M, K], [N, K], [M, r], [r, N] -> [N], fp32."""
    (M, K), (rank, N) = x.shape, Bt.shape
    launch = launch or find("magnitude", architecture(x.device), x.dtype, K)
    dm = torch.empty_like(norm)
    kernel[(N,)](
        dots,
        magnitude,
        norm,
        dy,
        x,
        weight,
        h,
        Bt,
        dm,
        scaling,
        M,
        N,
        **compiled_for(kernel, K, rank, None, launch),
    )
    return dm
