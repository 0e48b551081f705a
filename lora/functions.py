"""An adapted linear layer in its two exact forms, each with its gradients written out.

With V = W + s·B A and g = m/‖V‖ (DoRA; 1 for LoRA and rsLoRA), both compute y = g ⊙ z + b with z = x Vᵀ. One
multiplies by a single dense weight, the other can drop out the input of A alone. g is a constant of the
step: no gradient flows through ‖V‖ (Liu et al. 2024, section 4.3).

DoRA keeps z for the gradient of m: y - b has too few of its digits where b is large, and none where m is 0.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`; b and m
may be None. The gradient of W, [N, K], is never formed: A's and B's are products of rank r.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import (
    dora_gain,
    lora_backward_x,
    lora_backward_y,
    lora_down,
    lora_merge,
    lora_outer,
    lora_outer_dot,
    lora_up,
)
from kernels.gradients import first_order
from kernels.philox import Masking


def without_autocast(compute: Callable) -> Callable:
    """Of a Function's forward or backward, which say themselves in which dtype they compute.

    A backward pass may run within autocast or, as PyTorch advises, outside of it.
    """

    @functools.wraps(compute)
    def call(ctx, first: Tensor, *others: object) -> object:
        device = first.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return compute(ctx, first, *others)
        with torch.autocast(device, enabled=False):
            return compute(ctx, first, *others)

    return call


class Merged(torch.autograd.Function):
    """y = g ⊙ z + b, z = x Vᵀ, with V formed anew from the parameters: one GEMM forward, one for dx.

        dx = dy (g ⊙ V)
        dA = s · ((g ⊙ dy) B)ᵀ x
        dB = s · (g ⊙ dy)ᵀ (x Aᵀ)
        dm = Σ_M dy ⊙ z / ‖V‖

    V is summed in the dtype of the parameters, fp32 or better, and rounded once, to the dtype of x.

    Of several layers that share x, the low-rank passes over x are made once for all: x Aᵀ with their A on
    top of each other, their dA with their dh side by side; dx is summed in place.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, scaling: float, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """x [M, K], and of each layer weight [N, K], bias [N], lora_A [r, K], lora_B [N, r], magnitude [N]"""
        outputs, saved = [], []
        for weight, bias, lora_A, lora_B, magnitude in in_groups(parameters, 5):
            kept = magnitude is not None and ctx.needs_input_grad[0]
            gV = torch.empty_like(weight, dtype=x.dtype) if kept else None  # g ⊙ V, from the same pass
            V, norm, gain = lora_merge(weight, lora_A, lora_B, scaling, magnitude, x.dtype, gV)  # [N, K]
            if magnitude is None:
                gV, z, y = V, None, F.linear(x, V, None if bias is None else bias.to(x.dtype))  # [M, N]
            else:
                z = F.linear(x, V)
                y = gained(z, gain, bias)
            saved += [gV, lora_A, lora_B, norm, gain, z]
            outputs.append(y)
        ctx.scaling = scaling
        ctx.save_for_backward(x, *saved)
        return tuple(outputs)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        x, s, layers, dx = x.contiguous(), ctx.scaling, in_groups(saved, 6), None
        ranks = [len(layer[1]) for layer in layers]
        hs = lora_down(x, above([layer[1] for layer in layers])).split(ranks, dim=1)  # [M, r] each
        dhs, gradients = [], []
        for dy, h, (gV, _, lora_B, norm, gain, z) in zip(dys, hs, layers, strict=True):
            dy, Bt = dy.contiguous(), lora_B.mT.contiguous()
            if ctx.needs_input_grad[0]:
                dx = dy @ gV if dx is None else dx.addmm_(dy, gV)  # [M, K]
            dh, dBt, dm = passes_over_dy(dy, h, z, Bt, s, gain, norm)
            dhs.append(dh)
            gradients.append((dBt.mT, dm))
        dAs = lora_outer(torch.cat(dhs, 1) if len(dhs) > 1 else dhs[0], x).split(ranks)  # [r, K] each
        of_layers = [
            one for dA, (dB, dm) in zip(dAs, gradients, strict=True) for one in (None, None, dA, dB, dm)
        ]
        return dx, None, *of_layers


def in_groups(values: Sequence, size: int) -> list[tuple]:
    return list(zip(*[iter(values)] * size, strict=True))


def above(factors: list[Tensor]) -> Tensor:
    """[r, K] of each layer -> [all r, K]"""
    return torch.cat(factors) if len(factors) > 1 else factors[0]


class Split(torch.autograd.Function):
    """The same with z = x Wᵀ + s · x̃ Aᵀ Bᵀ, where x̃ is x after dropout: the base term sees all of x.

        dx = (g ⊙ dy) W + keep / (1 - p) ⊙ dx̃,  dx̃ = dh A,  dh = s · (g ⊙ dy) B
        dA = dhᵀ x̃
        dB = s · (g ⊙ dy)ᵀ (x̃ Aᵀ)
        dm = Σ_M dy ⊙ z / ‖V‖

    Neither x̃ nor dx̃ is stored: each operation applies the mask, or draws it again.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx,
        x: Tensor,  # [M, K]
        mask: Masking | None,
        W: Tensor,  # [N, K], the weight in the dtype of x
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        lora_A: Tensor,  # [r, K]
        lora_B: Tensor,  # [N, r]
        magnitude: Tensor | None,  # [N]
        scaling: float,
    ) -> Tensor:
        x, Bt = x.contiguous(), lora_B.mT.contiguous()
        h = lora_down(x, lora_A, mask=mask)  # [M, r]
        ctx.scaling, ctx.mask = scaling, mask
        if magnitude is None:
            norm = gain = z = None
            b = None if bias is None else bias.to(x.dtype)
            y = lora_up(F.linear(x, W, b), h, Bt, scaling)  # [M, N]
        else:
            norm, gain = dora_gain(weight, lora_A, lora_B, scaling, magnitude)  # [N], [N]
            z = lora_up(F.linear(x, W), h, Bt, scaling)  # [M, N]
            y = gained(z, gain, bias)
        ctx.save_for_backward(x, W, lora_A, lora_B, h, norm, gain, z)
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, lora_A, lora_B, h, norm, gain, z = ctx.saved_tensors
        dy, Bt = dy.contiguous(), lora_B.mT.contiguous()
        dh, dBt, dm = passes_over_dy(dy, h, z, Bt, ctx.scaling, gain, norm)
        if ctx.needs_input_grad[0]:
            dx = dy @ gained_rows(W, gain)  # [M, K]
            dA = lora_backward_x(x, dx, dh, lora_A, ctx.mask)  # [r, K]; dx is completed
        else:
            dx, dA = None, lora_outer(dh, x, mask=ctx.mask)
        return dx, None, None, None, None, dA, dBt.mT, dm, None


def gained(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """g ⊙ z + b, [M, N], summed in fp32 or better and rounded once, to the dtype of z."""
    y = torch.empty_like(z)
    return torch.mul(z, gain, out=y) if bias is None else torch.addcmul(bias, z, gain, out=y)


def gained_rows(weight: Tensor, gain: Tensor | None) -> Tensor:
    """g ⊙ W, [N, K]"""
    return weight if gain is None else torch.mul(weight, gain[:, None], out=torch.empty_like(weight))


def passes_over_dy(
    dy: Tensor, h: Tensor, z: Tensor | None, Bt: Tensor, s: float, gain: Tensor | None, norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh = s · (g ⊙ dy) B [M, r], dBᵀ = s · hᵀ (g ⊙ dy) [r, N] and dm [N], alike in both forms."""
    if gain is None:
        return *lora_backward_y(dy, h, Bt, s), None
    return lora_down(dy, Bt, s, gain=gain), *lora_outer_dot(h, dy, z, s, gain, norm)
