"""What each operation of the low-rank path computes, in plain PyTorch: the definition and the oracle.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`.
"""

import torch
from torch import Tensor


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """ΔW = s · B A (Hu et al. 2021, eq. 3): lora_A [r, K], lora_B [N, r] -> [N, K]"""
    return scaling * (lora_B @ lora_A)


def lora_up_down(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s · x Aᵀ Bᵀ, never forming the dense ΔW: x [M, K] -> [M, N]"""
    h = x @ lora_A.mT  # [M, r]
    return scaling * h @ lora_B.mT  # [M, N]


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B A‖ per output row (Liu et al. 2024, eq. 5), summed directly: [N], in lora_B's dtype.

    Of a row of zeros it is the smallest number instead of 0, so that m/‖V‖ starts at 1 there too.
    The factored form ‖w‖² + 2s⟨wAᵀ, b⟩ + s²⟨b(AAᵀ), b⟩ costs the same and cancels badly.
    """
    norm = (weight.to(lora_B.dtype) + lora_delta(lora_A, lora_B, scaling)).norm(dim=1)  # [N]
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
