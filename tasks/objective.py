"""What a step minimises."""

from torch import Tensor

from tasks.base import Task
from tasks.data import Batch
from tasks.losses import LOSSES, SIDE_LOSSES, simcse_unsupervised
from tasks.model import TaskModel


def objective(model: TaskModel, task: Task, loss: str, batch: Batch) -> Tensor:
    """The loss of that name: of the head's logits, or of the two sides' vectors.

    One of the two sides trains the encoder alone. The head, an affine of their cosine, then learns by the
    task's own loss to read the cosine off, and passes nothing on: so predictions are scores or classes as
    ever, and what is returned is the sides' loss in value, both losses in gradient.
    """
    if loss in LOSSES:
        return LOSSES[loss](model(task.name, batch), batch.labels)
    pooled = model.encode(batch)  # [2B, H]
    if loss == "simcse-unsup":
        trained = simcse_unsupervised(pooled, model.encode(batch))  # each pass draws dropout anew
    else:
        low, high = task.label_range
        trained = SIDE_LOSSES[loss](*pooled.chunk(2), (batch.labels - low) / (high - low))
    read = LOSSES[task.loss](model.heads[task.name](pooled.detach()), batch.labels)
    return trained + (read - read.detach())
