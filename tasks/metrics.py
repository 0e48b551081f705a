"""Scores of predictions [n] against labels [n]; higher is better."""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation, in fp64; of a constant, which has none, 0."""
    x = predictions.astype(np.float64) - predictions.mean(dtype=np.float64)
    y = labels.astype(np.float64) - labels.mean(dtype=np.float64)
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata  # takes half a second to import, and only scoring needs it

    return pearson(rankdata(predictions), rankdata(labels))


METRICS = {"accuracy": accuracy, "pearson": pearson, "spearman": spearman}
