"""Which training examples a model's encoder finds most like an example.

Letters: n training examples, S/B sequences of an example, H hidden size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from experiments.listing import labelled
from minibert.errors import InputError
from tasks.base import Example, Task
from tasks.data import Batch, Dataset
from tasks.model import TaskModel
from training.config import Config
from training.evaluate import encode_once
from training.run_folder import RunFolder

MOST_EXAMPLES = 10_000  # are encoded; of more training examples so many are drawn


def training_examples(path: Path, config: Config, task: Task) -> list[Example]:
    """What a run was trained on; nothing is downloaded for it.

    Raises:
        InputError: if the path is an adapter folder, which does not know, or if the data cannot be read.
    """
    if RunFolder(path).is_adapter:
        raise InputError(f"{path}: an adapter folder does not say what it was trained on, its run does")
    return labelled(config, task, "train")


def drawn(examples: Sequence[Example], most: int = MOST_EXAMPLES) -> list[Example]:
    """All of them, or of many the same `most` each time."""
    if len(examples) <= most:
        return list(examples)
    return [examples[i] for i in np.random.default_rng(0).choice(len(examples), most, replace=False)]


@torch.no_grad()
def nearest(model: TaskModel, data: Dataset, one: Batch, count: int) -> list[tuple[Example, float]]:
    """The `count` examples of `data` whose cosine with a batch's one example is largest, and these cosines.

    Of pooled vectors, as the head gets them. A Siamese pair has two: then it is the mean of the left sides'
    cosine and the right sides'. `data` gets its features. The model is in eval and without adapters (merged).
    """
    for _ in encode_once(model, data, torch.device("cpu")):
        pass
    u = F.normalize(data.features.vectors, dim=2)  # [S/B, n, H]
    v = F.normalize(model.encode(one)).unsqueeze(1)  # [S/B, 1, H]
    cosines, places = (u * v).sum(dim=2).mean(dim=0).topk(min(count, len(data)))
    return [(data.examples[i], float(cosine)) for i, cosine in zip(places, cosines, strict=True)]
