"""From the hidden states of a sequence's tokens to one vector: [M, H] -> [S, H].

What follows the encoder (sums over tokens, head, loss) is small, and done in fp32 or better.

Letters: M tokens, S sequences, H hidden size.
"""

import torch
from torch import Tensor

from minibert.layers import at_least_fp32
from minibert.model import Bert, Sequences


def cls(bert: Bert, hidden: Tensor, sequences: Sequences) -> Tensor:
    """The last hidden state of [CLS]."""
    return at_least_fp32(hidden[sequences.first])  # [S, H]


def pooler(bert: Bert, hidden: Tensor, sequences: Sequences) -> Tensor:
    """tanh(W h_[CLS] + b): BERT's own pooler, trained by its next-sentence task."""
    return torch.tanh(bert.pooler["dense"](cls(bert, hidden, sequences)))  # [S, H]


def mean(bert: Bert, hidden: Tensor, sequences: Sequences) -> Tensor:
    """The mean over all of a sequence's tokens, [CLS] and [SEP] too (Reimers & Gurevych 2019, section 3)."""
    sums = sequences.padded(at_least_fp32(hidden)).sum(dim=1)  # [S, H]
    return sums / sequences.counts[:, None]


POOLINGS = {"cls": cls, "pooler": pooler, "mean": mean}
