"""What each operation of the low-rank path computes, in plain PyTorch: the definition and the oracle.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`, but B is
passed as Bᵀ [r, N]: then every operation reads its rank-sized matrix as [r, columns], and the same ones
serve forward (x, A) and backward (dy, Bᵀ). Sums are in fp32, or in fp64 if any operand is.

    x̃ = x ⊙ keep / (1 - p), x itself without a mask; g is 1 where no gain is given
"""

import torch
from torch import Tensor

from kernels.philox import Masking


def lora_down(
    x: Tensor, A: Tensor, scale: float = 1.0, mask: Masking | None = None, gain: Tensor | None = None
) -> Tensor:
    """h = scale · (g ⊙ x̃) Aᵀ: x [M, K], A [r, K], g [K] -> [M, r], in fp32 or better.

    Also dh = s · (g ⊙ dy) B, as lora_down(dy, Bᵀ, s, gain=g).
    """
    dtype = wide(x, A)
    A = A.to(dtype)
    return scale * (_dropped(x, mask).to(dtype) @ (A if gain is None else A * gain).mT)


def lora_up(y: Tensor, h: Tensor, Bt: Tensor, scale: float = 1.0, mask: Masking | None = None) -> Tensor:
    """y ← y + scale · keep / (1 - p) ⊙ (h Bᵀ), in place: y [M, N], h [M, r], Bᵀ [r, N].

    Without a mask the second half of a forward pass; with one, dx += keep / (1 - p) ⊙ (dh A).
    """
    dtype = wide(y, h, Bt)
    return y.copy_(y + _dropped(scale * (h.to(dtype) @ Bt.to(dtype)), mask))


def lora_outer(
    h: Tensor, x: Tensor, scale: float = 1.0, mask: Masking | None = None, gain: Tensor | None = None
) -> Tensor:
    """scale · hᵀ (g ⊙ x̃): h [M, r], x [M, K], g [K] -> [r, K], in fp32 or better.

    dA = lora_outer(dh, x, mask=mask) and dBᵀ = lora_outer(h, dy, s, gain=g).
    """
    dtype = wide(h, x)
    product = scale * (h.to(dtype).mT @ _dropped(x, mask).to(dtype))
    return product if gain is None else product * gain


def lora_outer_dot(
    h: Tensor, dy: Tensor, z: Tensor, scale: float, gain: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """dBᵀ = scale · hᵀ (g ⊙ dy) [r, N] and dm = Σ_M dy ⊙ z / ‖V‖ [N]: what DoRA's B and m need of dy.

    h [M, r], dy, z [M, N], gain, norm [N]
    """
    return lora_outer(h, dy, scale, gain=gain), (dy * z.to(wide(dy, z))).sum(0) / norm


def lora_backward_x(x: Tensor, dx: Tensor, dh: Tensor, A: Tensor, mask: Masking | None = None) -> Tensor:
    """dx ← dx + keep / (1 - p) ⊙ (dh A), in place, and dA = dhᵀ x̃: x, dx [M, K], dh [M, r], A [r, K]."""
    lora_up(dx, dh, A, mask=mask)
    return lora_outer(dh, x, mask=mask)


def lora_backward_y(
    dy: Tensor, h: Tensor, Bt: Tensor, scale: float = 1.0, gain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dh = scale · (g ⊙ dy) B [M, r] and dBᵀ = scale · hᵀ (g ⊙ dy) [r, N]: dy [M, N], h [M, r], Bᵀ [r, N]."""
    return lora_down(dy, Bt, scale, gain=gain), lora_outer(h, dy, scale, gain=gain)


def lora_drop(x: Tensor, mask: Masking) -> Tensor:
    """x̃ = x ⊙ keep / (1 - p), stored: [M, K] -> [M, K]. For ranks at which matrix products are worth it."""
    return _dropped(x, mask).to(x.dtype)


def lora_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    dtype: torch.dtype | None = None,
    gV: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """V = W + s·B A, and DoRA's ‖V‖ and g = m/‖V‖; without a magnitude None and None.

    weight [N, K], lora_A [r, K], lora_B [N, r], magnitude [N] -> [N, K] in `dtype` (the weight's own if
    None), twice [N] in lora_B's dtype. V is summed in lora_B's dtype and rounded once. A gV [N, K] that is
    given is filled with g ⊙ V.
    """
    V = torch.addmm(weight.to(lora_B.dtype), lora_B, lora_A, alpha=scaling)  # [N, K]
    dtype = weight.dtype if dtype is None else dtype
    if magnitude is None:
        return V.to(dtype), None, None
    norm = row_norm(V)  # [N]
    gain = magnitude / norm
    if gV is not None:
        torch.mul(V, gain[:, None], out=gV)
    return V.to(dtype), norm, gain


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B A‖ per output row (Liu et al. 2024, eq. 5), summed directly: [N], in lora_B's dtype.

    Of a row of zeros it is the smallest number instead of 0, so that m/‖V‖ starts at 1 there too.
    The factored form ‖w‖² + 2s⟨wAᵀ, b⟩ + s²⟨b(AAᵀ), b⟩ costs the same and cancels badly.
    """
    return row_norm(torch.addmm(weight.to(lora_B.dtype), lora_B, lora_A, alpha=scaling))


def dora_gain(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """‖V‖ and g = m/‖V‖, [N] each: what lora_merge gives beside V."""
    norm = dora_norm(weight, lora_A, lora_B, scaling)
    return norm, magnitude / norm


def row_norm(V: Tensor) -> Tensor:
    """‖V‖ per row, [N]; of a row of zeros the smallest number instead of 0."""
    norm = V.norm(dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def wide(*tensors: Tensor) -> torch.dtype:
    """What the operands are summed in: fp64 if any of them is, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _dropped(x: Tensor, mask: Masking | None) -> Tensor:
    """x̃"""
    return x if mask is None else mask(x)
