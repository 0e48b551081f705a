"""f(a, b) against f(b, a): a similarity has no order, a model that reads pairs may well have one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from experiments.statistics import influence, paired_difference
from minibert.tokenizer import Tokenizer
from tasks.base import Example, Task
from tasks.data import Dataset
from tasks.metrics import METRICS
from tasks.model import TaskModel
from training.config import Config
from training.evaluate import Prediction, predict


@dataclass(frozen=True)
class Order:
    """What changes when the sides of every pair are swapped; computed in fp32."""

    mean_absolute_difference: float  # of scores, or of the class probabilities
    changed: float | None  # share of examples that get another class
    score: float
    score_swapped: float
    score_both: float  # of the mean of both
    error_of_gain: float  # standard error of score_both - score


def order(task: Task, there: Prediction, back: Prediction, labels: np.ndarray) -> Order:
    """there and back are predictions for the same pairs, as they are and swapped.

    Probabilities differ by ½ Σ_c |p_c - p'_c|, which for two classes is |p1 - p1'|.
    """
    metric = task.metrics[0]
    if task.is_classification:
        difference = np.abs(there.probabilities - back.probabilities).sum(axis=1) / 2
        both = (there.probabilities + back.probabilities).argmax(axis=1)
        changed = float((there.predictions != back.predictions).mean())
    else:
        difference = np.abs(there.predictions - back.predictions)
        both, changed = (there.predictions + back.predictions) / 2, None
    each = (there.predictions, back.predictions, both)
    scores = [METRICS[metric](one, labels) for one in each]
    psi = [influence(metric, one, labels)[None] for one in (both, there.predictions)]
    error = paired_difference(scores[2] - scores[0], *psi).error
    return Order(float(difference.mean()), changed, *scores, error)


def predict_both(
    config: Config, model: TaskModel, tokenizer: Tokenizer, task: Task, examples: Sequence[Example]
) -> tuple[Prediction, Prediction]:
    swapped = [replace(example, texts=example.texts[::-1]) for example in examples]
    sides = [Dataset(task, one, tokenizer, config.siamese(task)) for one in (examples, swapped)]
    there, back = (predict(model, one, torch.device("cpu")) for one in sides)
    return there, back
