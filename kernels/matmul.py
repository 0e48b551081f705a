"""The low-rank operations as matrix products in the activations' dtype: on a CPU, and where cuBLAS is faster.

Where a mask is given, x̃ is regenerated and stored for the length of one operation. Signatures and meaning
are those of kernels.reference; what passes between the operations stays in fp32.
"""

import torch
from torch import Tensor

from kernels.launch import INTERPRETED
from kernels.philox import Mask, Masking


def lora_down(
    x: Tensor, A: Tensor, scale: float = 1.0, mask: Masking | None = None, gain: Tensor | None = None
) -> Tensor:
    """h = scale · (g ⊙ x̃) Aᵀ [M, r], with g on A, the smaller of the two."""
    A = A if gain is None else A * gain
    return scale * (_dropped(x, mask) @ A.to(x.dtype).mT).float()


def lora_up(y: Tensor, h: Tensor, Bt: Tensor, scale: float = 1.0, mask: Masking | None = None) -> Tensor:
    """y ← y + scale · keep / (1 - p) ⊙ (h Bᵀ), in place [M, N]."""
    h, Bt = h.to(y.dtype), Bt.to(y.dtype)
    if mask is None:
        return y.addmm_(h, Bt, alpha=scale)
    return y.add_(_dropped(h @ Bt, mask), alpha=scale)


def lora_outer(
    h: Tensor, x: Tensor, scale: float = 1.0, mask: Masking | None = None, gain: Tensor | None = None
) -> Tensor:
    """scale · hᵀ (g ⊙ x̃) [r, K]"""
    product = scale * (h.to(x.dtype).mT @ _dropped(x, mask)).float()
    return product if gain is None else product * gain


def lora_outer_dot(
    h: Tensor, dy: Tensor, z: Tensor, scale: float, gain: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """dBᵀ = scale · hᵀ (g ⊙ dy) [r, N] and dm = Σ_M dy ⊙ z / ‖V‖ [N]"""
    return lora_outer(h, dy, scale, gain=gain), (dy * z).sum(0, dtype=torch.float32) / norm


def lora_backward_x(x: Tensor, dx: Tensor, dh: Tensor, A: Tensor, mask: Masking | None = None) -> Tensor:
    """dx ← dx + keep / (1 - p) ⊙ (dh A), in place, and dA = dhᵀ x̃ [r, K]"""
    lora_up(dx, dh, A, mask=mask)
    return lora_outer(dh, x, mask=mask)


def lora_backward_y(
    dy: Tensor, h: Tensor, Bt: Tensor, scale: float = 1.0, gain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dh = scale · (g ⊙ dy) B [M, r] and dBᵀ = scale · hᵀ (g ⊙ dy) [r, N]"""
    return lora_down(dy, Bt, scale, gain=gain), lora_outer(h, dy, scale, gain=gain)


def _dropped(x: Tensor, mask: Masking | None) -> Tensor:
    if mask is None:
        return x
    if isinstance(mask, Mask) and (x.is_cuda or INTERPRETED):
        from kernels.lora_drop import lora_drop  # here, as this file is imported where there is no Triton too

        return lora_drop(x, mask)
    return mask(x).to(x.dtype)
