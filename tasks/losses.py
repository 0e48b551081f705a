"""Losses, by hand: logits [B, C] and labels [B] -> a scalar, the mean over the batch."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], in nats."""
    log_probs = logits - logits.logsumexp(dim=1, keepdim=True)  # [B, C]
    return -log_probs.gather(1, labels[:, None]).mean()


def mean_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """(score - label)², in squared units of the label; C = 1."""
    return (logits.squeeze(1) - labels).square().mean()


def pearson(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - r of the batch's scores and labels: what STS is scored by, blind to scale and offset; C = 1.

    r = Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² Σ (y - ȳ)²); where either is constant, 0.
    """
    x, y = (values - values.mean() for values in (logits.squeeze(1), labels))
    return 1 - (x * y).sum() / ((x.square().sum() * y.square().sum()).clamp(min=1e-12)).sqrt()


COSENT_SCALE = 20.0 / 5.0  # λ of scores that span 5; CoSENT's own is 20, of cosines


def cosent(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + Σ exp(λ (sⱼ - sᵢ))) over the batch's pairs with yᵢ > yⱼ (Su 2022, CoSENT); C = 1.

    It asks for the labels' order alone. λ = 20 for cosines, so 4 for scores from 0 to 5.
    """
    s = COSENT_SCALE * logits.squeeze(1)
    wrong = s[None, :] - s[:, None]  # [B, B], sⱼ - sᵢ
    ordered = labels[:, None] > labels[None, :]
    terms = wrong[ordered]
    return torch.cat([terms, terms.new_zeros(1)]).logsumexp(dim=0)


LOSSES = {"cross-entropy": cross_entropy, "mse": mean_squared_error, "pearson": pearson, "cosent": cosent}
