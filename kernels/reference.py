"""What each operation of the low-rank path computes, in plain PyTorch: the definition and the oracle.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`, but B is
passed as Bᵀ [r, N]: then every operation reads its rank-sized matrix as [r, columns], and the same ones
serve forward (x, A) and backward (dy, Bᵀ). Sums are in fp32, or in fp64 if any operand is.

    x̃ = x ⊙ keep / (1 - p), x itself without a mask; g is 1 where no gain is given
"""

import torch
from torch import Tensor

from kernels.philox import Masking

# Where |m/‖V‖| is smaller, y - b is mostly rounding.
SMALL_GAIN = 1 / 64


def lora_down(
    x: Tensor, A: Tensor, scale: float = 1.0, mask: Masking | None = None, gain: Tensor | None = None
) -> Tensor:
    """h = scale · (g ⊙ x̃) Aᵀ: x [M, K], A [r, K], g [K] -> [M, r], in fp32 or better.

    Also dh = s · (g ⊙ dy) B, as lora_down(dy, Bᵀ, s, gain=g).
    """
    dtype = wide(x, A)
    return scale * (_gained(_dropped(x, mask), gain).to(dtype) @ A.to(dtype).mT)


def lora_up(
    y: Tensor,
    h: Tensor,
    Bt: Tensor,
    scale: float = 1.0,
    mask: Masking | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y ← g ⊙ (y + scale · keep / (1 - p) ⊙ (h Bᵀ)) + b, in place: y [M, N], h [M, r], Bᵀ [r, N], g, b [N].

    Without a mask the second half of a forward pass; with one, dx += keep / (1 - p) ⊙ (dh A).
    """
    dtype = wide(y, h, Bt)
    update = _dropped(scale * (h.to(dtype) @ Bt.to(dtype)), mask)  # [M, N]
    total = _gained(y + update, gain)
    return y.copy_(total if bias is None else total + bias)


def lora_outer(
    h: Tensor, x: Tensor, scale: float = 1.0, mask: Masking | None = None, gain: Tensor | None = None
) -> Tensor:
    """scale · hᵀ (g ⊙ x̃): h [M, r], x [M, K], g [K] -> [r, K], in fp32 or better.

    dA = lora_outer(dh, x, mask=mask) and dBᵀ = lora_outer(h, dy, s, gain=g).
    """
    dtype = wide(h, x)
    return scale * _gained(h.to(dtype).mT @ _dropped(x, mask).to(dtype), gain)


def lora_outer_dot(
    h: Tensor,
    dy: Tensor,
    y: Tensor,
    scale: float = 1.0,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dBᵀ = scale · hᵀ (g ⊙ dy) [r, N] and Σ_M dy ⊙ (y - b) [N]: h [M, r], dy, y [M, N], g, b [N].

    What DoRA's B and m need of dy, as y - b = g ⊙ z and dm = Σ_M dy ⊙ z / ‖V‖.
    """
    z = y.to(wide(dy, y))
    dots = (dy * (z if bias is None else z - bias)).sum(0)
    return lora_outer(h, dy, scale, gain=gain), dots


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """W' = g ⊙ V with V = W + s·B A, and ‖V‖ and g = m/‖V‖; without a magnitude V, None and None.

    weight [N, K], lora_A [r, K], lora_B [N, r], magnitude [N] -> [N, K] in `dtype` (the weight's own if
    None), twice [N] in lora_B's dtype. V is summed in lora_B's dtype and rounded once.
    """
    V = torch.addmm(weight.to(lora_B.dtype), lora_B, lora_A, alpha=scaling)  # [N, K]
    dtype = weight.dtype if dtype is None else dtype
    if magnitude is None:
        return V.to(dtype), None, None
    norm = row_norm(V)  # [N]
    gain = magnitude / norm  # [N]
    return V.mul_(gain[:, None]).to(dtype), norm, gain


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B A‖ per output row (Liu et al. 2024, eq. 5), summed directly: [N], in lora_B's dtype.

    Of a row of zeros it is the smallest number instead of 0, so that m/‖V‖ starts at 1 there too.
    The factored form ‖w‖² + 2s⟨wAᵀ, b⟩ + s²⟨b(AAᵀ), b⟩ costs the same and cancels badly.
    """
    return row_norm(torch.addmm(weight.to(lora_B.dtype), lora_B, lora_A, alpha=scaling))


def dora_gain(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """‖V‖ and g = m/‖V‖, [N] each: what lora_merge gives beside W'."""
    norm = dora_norm(weight, lora_A, lora_B, scaling)
    return norm, magnitude / norm


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
) -> Tensor:
    """dm = Σ_M dy ⊙ z / ‖V‖ [N], z = x Wᵀ + s · h Bᵀ: dots / m, as dots = Σ_M dy ⊙ (y - b).

    Where |m/‖V‖| is below SMALL_GAIN, y - b holds too few digits of z to divide, and z is computed anew.
    dots, magnitude, norm [N], dy [M, N], x [M, K], weight [N, K], h [M, r], Bᵀ [r, N]
    """
    dm = dots / magnitude
    for n in ((magnitude / norm).abs() < SMALL_GAIN).nonzero().flatten():  # hardly ever any
        z = x.to(norm.dtype) @ weight[n].to(norm.dtype) + scaling * (h @ Bt[:, n]).to(norm.dtype)  # [M]
        dm[n] = (dy[:, n].to(norm.dtype) @ z) / norm[n]
    return dm


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


def _gained(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x.to(wide(x)) * gain
