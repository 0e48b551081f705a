"""Losses, by hand: of logits [B, C], or of the two sides u, v [B, H] of pairs -> a scalar for the batch.

Letters: B examples, C outputs, H hidden size, S sequences.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.heads import cosine


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


def where(chosen: Tensor, values: Tensor, otherwise: float) -> Tensor:
    """The chosen values, flat; on a GPU `otherwise` stands for each of the others.

    How many are chosen only the GPU knows: to select them is to wait for it.
    """
    return values[chosen] if values.device.type == "cpu" else filled(chosen, values, otherwise)


def filled(chosen: Tensor, values: Tensor, otherwise: float) -> Tensor:
    return values.masked_fill(~chosen, otherwise).flatten()


COSENT_SCALE = 20.0 / 5.0  # λ of scores that span 5; CoSENT's own is 20, of cosines


def cosent(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + Σ exp(λ (sⱼ - sᵢ))) over the batch's pairs with yᵢ > yⱼ (Su 2022, CoSENT); C = 1.

    It asks for the labels' order alone. λ = 20 for cosines, so 4 for scores from 0 to 5.
    """
    s = COSENT_SCALE * logits.squeeze(1)
    wrong = s[None, :] - s[:, None]  # [B, B], sⱼ - sᵢ
    ordered = labels[:, None] > labels[None, :]
    terms = where(ordered, wrong, otherwise=-math.inf)
    return torch.cat([terms, terms.new_zeros(1)]).logsumexp(dim=0)


def cosine_error(u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """(cos(u, v) - label)², the mean (Reimers & Gurevych 2019, section 3, the regression objective)."""
    return (cosine(u, v) - labels).square().mean()


MARGIN = 0.5  # of a cosine distance, as in sentence-transformers


def contrastive(u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """½ y d² + ½ (1 - y) max(0, m - d)², the mean, with d = 1 - cos(u, v) and m = ½.

    Hadsell et al. 2006, eq. 4 (whose Y is 1 - y): pairs with y = 1 are pulled together, others apart until
    their distance is m.
    """
    distance = 1 - cosine(u, v)  # [B]
    together, apart = distance.square(), (MARGIN - distance).clamp(min=0).square()
    return (labels * together + (1 - labels) * apart).mean() / 2


TEMPERATURE = 0.05  # τ
POSITIVE = 0.8  # of labels in [0, 1]: duplicates, and scores of 4 or more of 5


def simcse(u: Tensor, v: Tensor, labels: Tensor, texts: Tensor | None = None) -> Tensor:
    """-log(exp(cos(uᵢ, vᵢ)/τ) / Σⱼ exp(cos(uᵢ, vⱼ)/τ)), the mean over pairs i that say the same; τ = 0.05.

    Gao et al. 2021, eq. 5 without its hard negatives: the right sides of all the batch's other pairs are the
    negatives, but those that are equal to uᵢ or vᵢ by `texts` [2B], numbers of the left sides' texts and then
    the right ones'. A pair says the same if its label is at least 0.8; a batch without one has a loss of 0.
    """
    similarities = F.normalize(u, eps=1e-8) @ F.normalize(v, eps=1e-8).T / TEMPERATURE  # [B, B]
    if texts is not None:
        left, right = texts.chunk(2)
        equal = (left[:, None] == right) | (right[:, None] == right)  # [B, B]
        similarities = similarities.masked_fill(equal.fill_diagonal_(False), -math.inf)
    losses = similarities.logsumexp(dim=1) - similarities.diagonal()  # [B]
    positive = labels >= POSITIVE
    return where(positive, losses, otherwise=0.0).sum() / positive.sum().clamp(min=1)


def simcse_unsupervised(u: Tensor, v: Tensor, texts: Tensor | None = None) -> Tensor:
    """The same of S sentences: u and v [S, H] are what two draws of dropout make of them (eq. 4)."""
    return simcse(u, v, u.new_ones(len(u)), None if texts is None else texts.repeat(2))


# Of logits [B, C] and labels [B].
LOSSES = {"cross-entropy": cross_entropy, "mse": mean_squared_error, "pearson": pearson, "cosent": cosent}
# Of u, v [B, H] and labels [B] in [0, 1].
SIDE_LOSSES = {"cosine": cosine_error, "contrastive": contrastive, "simcse": simcse}
