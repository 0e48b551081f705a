"""The layers of mixed precision: each computes in the dtype of its input, not of its weights."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """x itself where it is in fp32 or fp64, else in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """y = x Wᵀ + b, computed in the dtype of x whatever dtype the weight is kept in.

    This is all of mixed precision: weights that train stay fp32 masters, activations decide.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def apply_all(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """y of each of several layers with one input x. A class whose layers can share work has a `together`."""
    together = getattr(layers[0], "together", None)
    if together is None or len({type(layer) for layer in layers}) > 1:
        return tuple(layer(x) for layer in layers)
    return together(layers, x)


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) · w + b; PyTorch takes the statistics in fp32 for any dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class Embedding(nn.Embedding):
    """A table of vectors, [number, H], drawn from N(0, 0.02²), as in BERT's published code."""

    def reset_parameters(self) -> None:
        # On the meta device there is nothing to draw, and PyTorch would load its compiler to find that out.
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)


class Dropout(nn.Dropout):
    """y = x ⊙ mask (Srivastava et al. 2014), whose mask can be drawn apart from its use.

    A layer with gradients of its own applies one draw forward and again backward.
    """

    def draw(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """One mask for tensors like x, as the function that applies it; its own gradient, since linear."""
        if not self.training or self.p == 0:
            return torch.positive  # +x, x itself
        return F.dropout(x.new_ones(x.shape), self.p).mul
