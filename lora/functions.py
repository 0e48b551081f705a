"""An adapted linear layer in its two exact forms, each with its gradients written out.

With V = W + s·B A and g = m/‖V‖ (DoRA; 1 for LoRA and rsLoRA), both compute y = g ⊙ (x Vᵀ) + b. One
multiplies by a single dense weight, the other can drop out the input of A alone. g is a constant of the
step: no gradient flows through ‖V‖ (Liu et al. 2024, section 4.3).

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`; b and m
may be None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import dora_norm, lora_merge

# Where |g| is smaller, y - b holds too few digits of g ⊙ (x Vᵀ) to divide by g.
SMALL_GAIN = 1 / 64


class Merged(torch.autograd.Function):
    """y = x W'ᵀ + b, with W' = g ⊙ V formed anew from the parameters: one GEMM forward, one for dx.

        dx = dy W'
        dA = s · (dy (g ⊙ B))ᵀ x
        dB = s · g ⊙ (dyᵀ (x Aᵀ))
        dm = Σ_M dy ⊙ (x Vᵀ) / ‖V‖,  with x Vᵀ = (y - b) / g

    The gradient of W', [N, K], is never formed. V is summed in the dtype of the parameters, fp32 or better,
    and rounded once, to the dtype of x.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        lora_A: Tensor,  # [r, K]
        lora_B: Tensor,  # [N, r]
        magnitude: Tensor | None,  # [N]
        scaling: float,
    ) -> Tensor:
        merged, norm = lora_merge(weight, lora_A, lora_B, scaling, magnitude, x.dtype)  # [N, K], [N]
        y = F.linear(x, merged, None if bias is None else bias.to(x.dtype))  # [M, N]
        ctx.scaling = scaling
        needs_y = None if magnitude is None else y
        ctx.save_for_backward(x, weight, merged, bias, lora_A, lora_B, magnitude, norm, needs_y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, merged, bias, lora_A, lora_B, magnitude, norm, y = ctx.saved_tensors
        dx = dy @ merged if ctx.needs_input_grad[0] else None  # [M, K]
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        gain = None if magnitude is None else magnitude / norm  # [N]
        gained_B = B if gain is None else (gain[:, None] * lora_B).to(x.dtype)  # [N, r]
        x, dy = rows(x), rows(dy)
        dA = ctx.scaling * ((dy @ gained_B).mT @ x).to(lora_A.dtype)  # [r, K]
        dB = ctx.scaling * (dy.mT @ (x @ A.mT)).to(lora_B.dtype)  # [N, r]
        if gain is None:
            return dx, None, None, dA, dB, None, None
        z = rows(y) if bias is None else rows(y) - bias.to(x.dtype)  # [M, N], g ⊙ (x Vᵀ)
        dm = (dy * z).sum(0, dtype=norm.dtype) / (gain * norm)  # [N]
        for n in (gain.abs() < SMALL_GAIN).nonzero().flatten():  # hardly ever any
            V = torch.addmm(weight[n, None].to(norm.dtype), lora_B[n, None], lora_A, alpha=ctx.scaling)
            dm[n] = (dy[:, n] * (x @ V[0].to(x.dtype))).sum(dtype=norm.dtype) / norm[n]
        return dx, None, None, dA, gain[:, None] * dB, dm, None


class Split(torch.autograd.Function):
    """y = g ⊙ z + b, z = x Wᵀ + s · x̃ Aᵀ Bᵀ, where x̃ is x after dropout: the base term sees all of x.

    dz = g ⊙ dy          dx = dz W
    dA = s · (dz B)ᵀ x̃   dx̃ = s · dz B A
    dB = s · dzᵀ (x̃ Aᵀ)  dm = Σ_M dy ⊙ z / ‖V‖
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [M, K]
        dropped: Tensor,  # [M, K], x̃
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        lora_A: Tensor,  # [r, K]
        lora_B: Tensor,  # [N, r]
        magnitude: Tensor | None,  # [N]
        scaling: float,
    ) -> Tensor:
        W, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        h = dropped @ lora_A.to(x.dtype).mT  # [M, r]
        update = scaling * h @ lora_B.to(x.dtype).mT  # [M, N]
        ctx.scaling = scaling
        if magnitude is None:
            ctx.save_for_backward(dropped, W, lora_A, lora_B, h, None, None, None)
            return F.linear(x, W, b) + update
        z = F.linear(x, W) + update  # [M, N]
        norm = dora_norm(weight, lora_A, lora_B, scaling)  # [N]
        gain = (magnitude / norm).to(x.dtype)  # [N]
        ctx.save_for_backward(dropped, W, lora_A, lora_B, h, z, norm, gain)
        return gain * z if b is None else torch.addcmul(b, gain, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, W, lora_A, lora_B, h, z, norm, gain = ctx.saved_tensors
        dz = dy if gain is None else gain * dy  # [M, N]
        dx = dz @ W if ctx.needs_input_grad[0] else None  # [M, K]
        dh = ctx.scaling * dz @ lora_B.to(dz.dtype)  # [M, r]
        d_dropped = dh @ lora_A.to(dz.dtype) if ctx.needs_input_grad[1] else None  # [M, K]
        dA = (rows(dh).mT @ rows(dropped)).to(lora_A.dtype)  # [r, K]
        dB = ctx.scaling * (rows(dz).mT @ rows(h)).to(lora_B.dtype)  # [N, r]
        dm = None if gain is None else rows(dy * z).sum(0, dtype=norm.dtype) / norm  # [N]
        return dx, d_dropped, None, None, dA, dB, dm, None


def rows(x: Tensor) -> Tensor:
    """Any leading shape as one: [..., K] -> [M, K]"""
    return x.reshape(-1, x.shape[-1])
