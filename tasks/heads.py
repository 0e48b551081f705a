"""From pooled sentence vectors to a task's outputs.

Letters: S sequences, B examples, H hidden size, F features, C outputs.
"""

import torch
from torch import Tensor, nn


def _uv(u: Tensor, v: Tensor) -> list[Tensor]:
    """The study's features. A linear head on them is w₁·u + w₂·v: a sum that cannot compare."""
    return [u, v]


def _uv_difference(u: Tensor, v: Tensor) -> list[Tensor]:
    """Reimers & Gurevych 2019, figure 1."""
    return [u, v, (u - v).abs()]


def _uv_difference_product(u: Tensor, v: Tensor) -> list[Tensor]:
    """Conneau et al. 2017, section 3: the product lets a linear head weigh agreement."""
    return [u, v, (u - v).abs(), u * v]


# How two sides of a Siamese pair are compared: number of H-sized parts, and the parts.
FEATURES = {"uv": (2, _uv), "uv-diff": (3, _uv_difference), "uv-diff-prod": (4, _uv_difference_product)}


class Head(nn.Module):
    """The study's task adaptor: hidden layers of dropout -> linear -> ReLU, then dropout -> linear.

    With `features` the sequences are pairs, left sides then right sides, compared as FEATURES says.
    """

    def __init__(
        self,
        hidden_size: int,
        num_outputs: int,
        hidden_layers: int = 0,
        dropout: float = 0.3,
        features: str | None = None,
    ):
        super().__init__()
        self.features = features
        width = hidden_size * (FEATURES[features][0] if features else 1)
        self.hidden = nn.ModuleList()
        for _ in range(hidden_layers):
            self.hidden.append(nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden_size), nn.ReLU()))
            width = hidden_size
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, num_outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [S, H] -> logits [B, C]"""
        x = pooled
        if self.features:
            u, v = pooled.chunk(2)  # each [B, H]
            x = torch.cat(FEATURES[self.features][1](u, v), dim=1)  # [B, F]
        for layer in self.hidden:
            x = layer(x)  # [B, H]
        return self.output(self.dropout(x))  # [B, C]
