"""What each operation of the low-rank path computes, in plain PyTorch: the definition and the oracle.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`.
"""

import torch
from torch import Tensor


def lora_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """W' = g ⊙ V with V = W + s·B A and g = m/‖V‖ (1 without a magnitude), and ‖V‖.

    weight [N, K], lora_A [r, K], lora_B [N, r], magnitude [N] -> [N, K] in `dtype` (the weight's own if
    None), [N] in lora_B's dtype. V is summed in lora_B's dtype and rounded once.
    """
    V = torch.addmm(weight.to(lora_B.dtype), lora_B, lora_A, alpha=scaling)  # [N, K]
    dtype = weight.dtype if dtype is None else dtype
    if magnitude is None:
        return V.to(dtype), None
    norm = row_norm(V)  # [N]
    return V.mul_((magnitude / norm)[:, None]).to(dtype), norm


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B A‖ per output row (Liu et al. 2024, eq. 5), summed directly: [N], in lora_B's dtype.

    Of a row of zeros it is the smallest number instead of 0, so that m/‖V‖ starts at 1 there too.
    The factored form ‖w‖² + 2s⟨wAᵀ, b⟩ + s²⟨b(AAᵀ), b⟩ costs the same and cancels badly.
    """
    return row_norm(torch.addmm(weight.to(lora_B.dtype), lora_B, lora_A, alpha=scaling))


def row_norm(V: Tensor) -> Tensor:
    """‖V‖ per row, [N]; of a row of zeros the smallest number instead of 0."""
    norm = V.norm(dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
