"""From pooled sentence vectors to a task's outputs.

Letters: S sequences, B examples, H hidden size, F features, C outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.base import Task


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """u·v / (‖u‖ ‖v‖) of each row, [B]; 0 where a vector is 0."""
    return (F.normalize(u, eps=1e-8) * F.normalize(v, eps=1e-8)).sum(dim=1)


def _uv(u: Tensor, v: Tensor) -> list[Tensor]:
    """The study's features. A linear head on them is w₁·u + w₂·v: a sum that cannot compare."""
    return [u, v]


def _uv_difference(u: Tensor, v: Tensor) -> list[Tensor]:
    """Reimers & Gurevych 2019, figure 1."""
    return [u, v, (u - v).abs()]


def _uv_difference_product(u: Tensor, v: Tensor) -> list[Tensor]:
    """Conneau et al. 2017, section 3: the product lets a linear head weigh agreement."""
    return [u, v, (u - v).abs(), u * v]


def _cosine(u: Tensor, v: Tensor) -> list[Tensor]:
    """cos(u, v) alone, [B, 1] (Reimers & Gurevych 2019, section 3): the comparison is not learned."""
    return [cosine(u, v).unsqueeze(1)]


# How two sides of a Siamese pair are compared: H -> F, and the parts of the features.
FEATURES = {
    "uv": (lambda h: 2 * h, _uv),
    "uv-diff": (lambda h: 3 * h, _uv_difference),
    "uv-diff-prod": (lambda h: 4 * h, _uv_difference_product),
    "cosine": (lambda h: 1, _cosine),
}


class Head(nn.Module):
    """The study's task adaptor: hidden layers of dropout -> linear -> ReLU, then dropout -> linear.

    With `features` the sequences are pairs, left sides then right sides, compared as FEATURES says. Of a
    cosine nothing is dropped: it is the only number there is.
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
        width = FEATURES[features][0](hidden_size) if features else hidden_size
        dropout = 0.0 if features == "cosine" else dropout
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

    @torch.no_grad()
    def start_at_cosine(self, task: Task) -> None:
        """Begin with the cosine as the answer: low + (high - low) · cos for a score in [low, high].

        Of two classes the second is the likelier above a cosine of .75, its log-odds 10 · (cos - .75).
        """
        low, high = task.label_range
        slope, at_zero = ([-5.0, 5.0], [3.75, -3.75]) if task.is_classification else ([high - low], [low])
        self.output.weight.copy_(torch.tensor(slope)[:, None])
        self.output.bias.copy_(torch.tensor(at_zero))
