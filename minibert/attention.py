"""Self-attention over packed sequences: for a CPU with its gradients by hand, for a GPU by PyTorch's kernels.

Letters: M tokens, S sequences (of a block), T tokens that each is padded to, H hidden size, N heads,
D = H / N head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minibert.layers import Dropout, Linear, apply_all, at_least_fp32
from minibert.sequences import Sequences


class Attention(torch.autograd.Function):
    """O = P̃ V, with P̃ = P ⊙ mask and P = softmax(Q Kᵀ), in each head (Vaswani et al. 2017, eq. 1).

        dV = P̃ᵀ dO
        dP = (dO Vᵀ) ⊙ mask
        dS = P ⊙ (dP - Σ_T dP ⊙ P)
        dQ = dS K,  dK = dSᵀ Q

    Q comes divided by √D. For the way back P is kept, and dropout's mask; the padded copies of Q, K, V and
    P̃, which autograd would keep too, are made again, since copying is cheap and memory is not. Softmax is in
    fp32: in bf16 a CPU takes up to three times as long for it, and up to ten on the way back.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, num_heads: int, dropout: Dropout
    ) -> Tensor:
        """three times [M, H] -> [M, H]"""
        grid = sequences.grid(num_heads)
        cells, probs, ctx.masks = grid.empty(q), [], []
        parts = zip(*map(grid.spread, (q, k, v)), grid.split(cells), strict=True)  # [S, N, T, D] each
        for block, (Q, K, V, out) in zip(sequences.blocks, parts, strict=True):
            scores = at_least_fp32(Q @ K.mT)  # [S, N, T, T]
            if block.beyond is not None:
                scores += block.beyond
            P = scores.softmax(dim=-1).to(q.dtype)  # [S, N, T, T]
            mask = dropout.draw(P)
            torch.matmul(mask(P), V, out=out)
            probs.append(P)
            ctx.masks.append(mask)
        ctx.sequences, ctx.num_heads = sequences, num_heads
        ctx.save_for_backward(q, k, v, *probs)
        return grid.gather(cells, q)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_context: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probs = ctx.saved_tensors
        grid = ctx.sequences.grid(ctx.num_heads)
        d_cells = [grid.empty(q) for _ in range(3)]
        parts = zip(*map(grid.spread, (q, k, v, d_context)), *map(grid.split, d_cells), strict=True)
        for block, P, mask, (Q, K, V, dO, dQ, dK, dV) in zip(
            ctx.sequences.blocks, probs, ctx.masks, parts, strict=True
        ):
            dO *= block.asks.to(dO.dtype)  # queries past the end have none
            torch.matmul(mask(P).mT, dO, out=dV)
            dP = at_least_fp32(mask(dO @ V.mT))  # [S, N, T, T]
            dS = torch._softmax_backward_data(dP, P.to(dP.dtype), -1, dP.dtype).to(q.dtype)  # [S, N, T, T]
            torch.matmul(dS, K, out=dQ)
            torch.matmul(dS.mT, Q, out=dK)
        return *(grid.gather(cells, q) for cells in d_cells), None, None, None


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, num_heads: int, dropout: float
) -> Tensor:
    """O = dropout(softmax(Q Kᵀ / √D)) V by PyTorch's fused kernels, which keep neither P nor dropout's mask.

    q, k, v [M, H] -> [M, H]. The mask is drawn from the default generator of the device.
    """
    shape = (len(sequences.lengths), -1, num_heads, q.shape[1] // num_heads)  # S, T, N, D
    Q, K, V = (Pad.apply(x, sequences).view(shape).transpose(1, 2) for x in (q, k, v))  # [S, N, T, D]
    context = F.scaled_dot_product_attention(Q, K, V, sequences.key_bias(q.dtype), dropout)  # [S, N, T, D]
    return Unpad.apply(context.transpose(1, 2).reshape(-1, q.shape[1]), sequences)


class Pad(torch.autograd.Function):
    """x [M, H] -> cells [S T, H] of the rectangle, by one gather; its gradient is gathered back."""

    @staticmethod
    def forward(ctx, x: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return x.index_select(0, sequences.rectangle.source)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_cells: Tensor) -> tuple[Tensor, None]:
        # Cells past a sequence's end have no gradient, for no query or key there counts.
        return d_cells.index_select(0, ctx.sequences.rectangle.target), None


class Unpad(torch.autograd.Function):
    """cells [S T, H] -> [M, H], by one gather. The cells that no token has read get a gradient of zero."""

    @staticmethod
    def forward(ctx, cells: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences, ctx.shape = sequences, cells.shape
        return cells.index_select(0, sequences.rectangle.target)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        tokens = len(dx) - ctx.sequences.filler
        target = ctx.sequences.rectangle.target[:tokens]
        return dx.new_zeros(ctx.shape).index_copy_(0, target, dx[:tokens]), None


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
        if x.device.type != "cpu":
            dropout = self.dropout.p if self.dropout.training else 0.0
            return fused_attention(q, k, v, sequences, self.num_heads, dropout)
        q = q / math.sqrt(x.shape[1] // self.num_heads)
        return Attention.apply(q, k, v, sequences, self.num_heads, self.dropout)
