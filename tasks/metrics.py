"""Scores of predictions [n] against labels [n]; higher is better."""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    values = values - values[0]  # so that a constant is exactly 0, which less its mean it may not be
    return values - values.mean()


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation, in fp64; of a constant, which has none, 0."""
    x, y = _centred(predictions), _centred(labels)
    norm = np.sqrt(x @ x) * np.sqrt(y @ y)
    return 0.0 if norm == 0 else float(np.clip(x @ y / norm, -1, 1))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata  # takes half a second to import, and only scoring needs it

    return pearson(rankdata(predictions), rankdata(labels))


METRICS = {"accuracy": accuracy, "pearson": pearson, "spearman": spearman}
