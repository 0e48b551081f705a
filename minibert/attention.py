"""Self-attention over packed sequences, with its gradients by hand.

Letters: M tokens, S sequences, T the longest of them, H hidden size, N heads, D = H / N head size.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minibert.layers import Dropout, Linear, apply_all
from minibert.sequences import Sequences


class Attention(torch.autograd.Function):
    """O = P̃ V, with P̃ = P ⊙ mask and P = softmax(Q Kᵀ), in each head (Vaswani et al. 2017, eq. 1).

        dV = P̃ᵀ dO
        dP = (dO Vᵀ) ⊙ mask
        dS = P ⊙ (dP - Σ_T dP ⊙ P)
        dQ = dS K,  dK = dSᵀ Q

    Q comes divided by √D. For the way back P is kept, and dropout's mask; the padded copies of Q, K, V and
    P̃, which autograd would keep too, are made again, since copying is cheap and memory is not.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, num_heads: int, dropout: Dropout
    ) -> Tensor:
        """three times [M, H] -> [M, H]"""
        context = torch.zeros_like(q)  # [M, H]; the filler sees nothing
        probs, ctx.masks = [], []
        for block in sequences.blocks:
            Q, K, V = (split_heads(block.pad(x), num_heads) for x in (q, k, v))  # [S, N, T, D]
            scores = Q @ K.mT  # [S, N, T, T]
            if block.beyond is not None:
                scores.masked_fill_(block.beyond, -math.inf)
            P = scores.softmax(dim=-1)  # [S, N, T, T]
            mask = dropout.draw(P)
            block.unpad(join_heads(mask(P) @ V), out=context)
            probs.append(P)
            ctx.masks.append(mask)
        ctx.sequences, ctx.num_heads = sequences, num_heads
        ctx.save_for_backward(q, k, v, *probs)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, d_context: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probs = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(q) for _ in range(3))  # [M, H]
        for block, P, mask in zip(ctx.sequences.blocks, probs, ctx.masks, strict=True):
            padded = (block.pad(x) for x in (q, k, v, d_context))  # [S, T, H]
            Q, K, V, dO = (split_heads(x, ctx.num_heads) for x in padded)  # [S, N, T, D]
            block.unpad(join_heads(mask(P).mT @ dO), out=dv)
            dP = mask(dO @ V.mT)  # [S, N, T, T]
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)  # [S, N, T, T], summed in fp32
            block.unpad(join_heads(dS @ K), out=dq)
            block.unpad(join_heads(dS.mT @ Q), out=dk)
        return dq, dk, dv, None, None, None


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [S, N, T, D]


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [S, T, H]


class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √D) V in each of N heads; the one place where tokens see each other."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size)
        self.value = Linear(hidden_size, hidden_size)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """x [M, H] -> [M, H]"""
        q, k, v = apply_all((self.query, self.key, self.value), x)  # [M, H] each
        q = q / math.sqrt(x.shape[1] // self.num_heads)
        return Attention.apply(q, k, v, sequences, self.num_heads, self.dropout)
