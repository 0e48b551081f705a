"""Losses, by hand: logits [B, C] and labels [B] -> a scalar, the mean over the batch."""

from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], in nats."""
    log_probs = logits - logits.logsumexp(dim=1, keepdim=True)  # [B, C]
    return -log_probs.gather(1, labels[:, None]).mean()


def mean_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """(score - label)², in squared units of the label; C = 1."""
    return (logits.squeeze(1) - labels).square().mean()


LOSSES = {"cross-entropy": cross_entropy, "mse": mean_squared_error}
