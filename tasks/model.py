"""One encoder, a pooling, and a head for each task."""

from collections.abc import Mapping

from torch import Tensor, nn

from minibert.model import Bert
from minibert.pooling import POOLINGS
from tasks.data import Batch


class TaskModel(nn.Module):
    """batch -> hidden [M, H] -> pooled [S, H] -> logits [B, C]

    A batch that carries its pooled vectors needs no encoder.
    """

    def __init__(self, bert: Bert, pooling: str, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.bert = bert
        self.pool = POOLINGS[pooling]
        self.heads = nn.ModuleDict(heads)

    def encode(self, batch: Batch) -> Tensor:
        hidden = self.bert(batch.input_ids, batch.token_type_ids, batch.sequences)  # [M, H]
        return self.pool(self.bert, hidden, batch.sequences)  # [S, H]

    def forward(self, task: str, batch: Batch) -> Tensor:
        pooled = self.encode(batch) if batch.pooled is None else batch.pooled  # [S, H]
        return self.heads[task](pooled)  # [B, C]
