"""What a step minimises."""

from torch import Tensor

from tasks.base import Task
from tasks.data import Batch
from tasks.losses import LOSSES, SIDE_LOSSES, simcse, simcse_unsupervised
from tasks.model import TaskModel


def objective(model: TaskModel, task: Task, loss: str, batch: Batch) -> Tensor:
    """The loss of that name: of the head's logits, or of the two sides' vectors.

    One of the two sides trains the encoder alone. The head, an affine of their cosine, then learns by the
    task's own loss to read the cosine off, and passes nothing on: so predictions are scores or classes as
    ever, and what is returned is the sides' loss in value, both losses in gradient.
    """
    if loss in LOSSES:
        return LOSSES[loss](batch.whole(model(task.name, batch)), batch.labels)
    own = model.encode(batch)  # [2b, H]
    pooled = batch.whole_sides(own)  # [2B, H]
    if loss == "simcse-unsup":
        # Each pass draws dropout anew.
        trained = simcse_unsupervised(pooled, batch.whole_sides(model.encode(batch)), batch.texts)
    else:
        low, high = task.label_range
        given = (*pooled.chunk(2), (batch.labels - low) / (high - low))
        trained = simcse(*given, batch.texts) if loss == "simcse" else SIDE_LOSSES[loss](*given)
    read = LOSSES[task.loss](batch.whole(model.heads[task.name](own.detach())), batch.labels)
    return trained + (read - read.detach())
