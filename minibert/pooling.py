"""From the hidden states of a sequence's tokens to one vector: [M, H] -> [S, H].

Letters: M tokens, S sequences, H hidden size.
"""

import torch
from torch import Tensor

from minibert.model import Bert, Sequences


def _at_least_fp32(x: Tensor) -> Tensor:
    """What follows the encoder (sums over tokens, head, loss) is small, and worth doing exactly."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cls(bert: Bert, hidden: Tensor, sequences: Sequences) -> Tensor:
    """The last hidden state of [CLS]."""
    return _at_least_fp32(hidden[sequences.first])  # [S, H]


def pooler(bert: Bert, hidden: Tensor, sequences: Sequences) -> Tensor:
    """tanh(W h_[CLS] + b): BERT's own pooler, trained by its next-sentence task."""
    return torch.tanh(bert.pooler["dense"](cls(bert, hidden, sequences)))  # [S, H]


def mean(bert: Bert, hidden: Tensor, sequences: Sequences) -> Tensor:
    """The mean over all of a sequence's tokens, [CLS] and [SEP] too (Reimers & Gurevych 2019, section 3)."""
    sums = sequences.padded(_at_least_fp32(hidden)).sum(dim=1)  # [S, H]
    return sums / sequences.counts[:, None]


POOLINGS = {"cls": cls, "pooler": pooler, "mean": mean}
