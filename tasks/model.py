"""One encoder, a pooling, and a head for each task; and what a step minimises."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from minibert.model import Bert
from minibert.pooling import POOLINGS
from tasks.base import Task
from tasks.data import Batch, join, move
from tasks.losses import LOSSES, SIDE_LOSSES, simcse, simcse_unsupervised


class TaskModel(nn.Module):
    """batch -> hidden [M, H] -> pooled [S, H] -> logits [B, C]

    A batch that carries its pooled vectors needs no encoder.

    Attributes:
        rows: where the encoder has an adapter for each task, what it is told before each pass: how many
            tokens of the row under way are whose; else None.
    """

    def __init__(
        self,
        bert: Bert,
        pooling: str,
        heads: Mapping[str, nn.Module],
        rows: dict[str, int] | None = None,
    ):
        super().__init__()
        self.bert = bert
        self.pool = POOLINGS[pooling]
        self.heads = nn.ModuleDict(heads)
        self.rows = rows

    def encode(self, batch: Batch) -> Tensor:
        if batch.pooled is not None:
            return batch.pooled
        hidden = self.bert(batch.input_ids, batch.token_type_ids, batch.sequences)  # [M, H]
        return self.pool(self.bert, hidden, batch.sequences)  # [S, H]

    def forward(self, task: str, batch: Batch) -> Tensor:
        if self.rows is not None and batch.pooled is None:
            self.send({task: batch})
        pooled = self.encode(batch) if batch.pooled is None else batch.pooled  # [S, H]
        return self.heads[task](pooled)  # [B, C]

    def encode_together(self, batches: Mapping[str, Batch], device: torch.device) -> dict[str, Batch]:
        """Batches of several tasks with their pooled vectors, of one pass, each task by its own adapters.

        They are still on the host: only labels and texts' numbers, and the row that they make together, go to
        the device.
        """
        self.send(batches)
        pooled = self.encode(join(list(batches.values())).to(device))  # [S, H]
        parts = pooled.split([len(batch.sequences.lengths) for batch in batches.values()])
        here = {
            (task, name): getattr(batch, name)
            for task, batch in batches.items()
            for name in ("labels", "texts")
            if getattr(batch, name) is not None
        }
        moved = move(here, device)
        return {
            task: replace(batch, pooled=part, labels=moved[task, "labels"], texts=moved.get((task, "texts")))
            for (task, batch), part in zip(batches.items(), parts, strict=True)
        }

    def send(self, batches: Mapping[str, Batch]) -> None:
        """Say whose tokens come."""
        self.rows.clear()
        self.rows.update({task: sum(batch.sequences.lengths) for task, batch in batches.items()})


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
