"""Predictions of a model over a dataset, and their scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lora.methods import merge
from tasks.base import Task
from tasks.data import Dataset, Features
from tasks.metrics import METRICS
from tasks.model import TaskModel
from training.memory import keep_freed_memory
from training.processes import ALONE, Processes


@dataclass(frozen=True)
class Prediction:
    """What a model says of a dataset's n examples, in their order."""

    ids: tuple[str, ...]
    predictions: np.ndarray  # [n], classes (int64) or scores (float64)
    probabilities: np.ndarray | None  # [n, C] for classes

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.predictions if self.probabilities is None else self.probabilities).all())


SAME = 1e-3  # of the range of labels: predictions that differ by no more say the same of all examples

# Of a batch. On a CPU no more tokens than a training step has, so that predicting needs no more memory.
MOST_EXAMPLES = 512
MOST_TOKENS = {"cpu": 1024, "cuda": 16384}


@torch.no_grad()
def encode_once(
    model: TaskModel,
    data: Dataset,
    device: torch.device,
    among: np.ndarray | None = None,
    processes: Processes = ALONE,
    most_tokens: int | None = None,
) -> Iterator[int]:
    """Give data the features of all its examples or those `among`, made by an encoder that never changes.

    Yields the number of examples of each batch once it is done; if left before the end, data stays as it was.
    The batches are the same each time, so that a resumed run has the same vectors, bit for bit.
    """
    keep_freed_memory()
    among = np.arange(len(data)) if among is None else among
    features = Features(len(data), among, len(data.sides), model.bert.config.hidden_size)
    batches = data.in_order_of_length(MOST_EXAMPLES, most_tokens or MOST_TOKENS[device.type], among)
    for indices, batch in processes.mine(batches):
        features.put(indices, model.encode(batch.to(device)))
        yield len(indices)
    processes.sum(features.vectors)
    data.features = features


@torch.no_grad()
def predict(
    model: TaskModel,
    data: Dataset,
    device: torch.device,
    batch_size: int = MOST_EXAMPLES,
    processes: Processes = ALONE,
) -> Prediction:
    """Without dropout, and with adapters merged once for all batches; the model is left as it was.

    A batch has at most `batch_size` examples, and no more tokens than suit the device. Of several processes
    each takes its share of the batches, and all have all predictions.
    """
    keep_freed_memory()
    model = merge(model, model.bert.compute_dtype).eval()
    scores = torch.zeros(len(data), data.task.num_outputs, dtype=torch.float64)
    for indices, batch in processes.mine(data.in_order_of_length(batch_size, MOST_TOKENS[device.type])):
        scores[indices] = model(data.task.name, batch.to(device)).double().cpu()  # [B, C]
    logits = processes.sum(scores).numpy()
    ids = tuple(example.id for example in data.examples)
    if not data.task.is_classification:
        return Prediction(ids, logits[:, 0], None)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Prediction(ids, logits.argmax(axis=1), shifted / shifted.sum(axis=1, keepdims=True))


def constant(task: Task, prediction: Prediction) -> float | None:
    """The one value that is predicted for all of several examples, or None."""
    values, (low, high) = prediction.predictions, task.label_range
    if len(values) == 1 or np.ptp(values) > SAME * (high - low):
        return None
    return float(values[0])


def score(task: Task, prediction: Prediction, labels: np.ndarray) -> dict[str, float]:
    """Every metric of a task, by name."""
    return {name: METRICS[name](prediction.predictions, labels) for name in task.metrics}
