"""What kind of errors a classifier makes, from predictions [n] and labels [n]: counted by hand."""

from dataclasses import dataclass

import numpy as np


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] counts: a row per label, a column per prediction."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class ClassScores:
    """How well one class is found; TP, FP, FN and TN are those of this class against all others."""

    label: int
    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def precision(self) -> float:
        """TP / (TP + FP); 0 for a class that is never predicted."""
        return self.tp / (self.tp + self.fp) if self.tp else 0.0

    @property
    def recall(self) -> float:
        """TP / (TP + FN); 0 for a class without examples."""
        return self.tp / (self.tp + self.fn) if self.tp else 0.0

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN), the harmonic mean of the two."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if self.tp else 0.0


def class_scores(confusion: np.ndarray) -> list[ClassScores]:
    """confusion [C, C] -> a line per class"""
    total = int(confusion.sum())
    scores = []
    for c in range(len(confusion)):
        tp = int(confusion[c, c])
        fp, fn = int(confusion[:, c].sum()) - tp, int(confusion[c].sum()) - tp
        scores.append(ClassScores(c, tp, fp, fn, total - tp - fp - fn))
    return scores


@dataclass(frozen=True)
class Ordinal:
    """Errors of classes that have an order."""

    mean_absolute_error: float  # in classes
    off_by_one: float  # share of all examples
    off_by_more: float


def ordinal(predictions: np.ndarray, labels: np.ndarray) -> Ordinal:
    distance = np.abs(predictions - labels)
    return Ordinal(float(distance.mean()), float((distance == 1).mean()), float((distance > 1).mean()))
