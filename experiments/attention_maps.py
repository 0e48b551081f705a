"""What each token attends to: the weights of every layer and head, which the model itself does not keep.

Letters: M tokens of all sequences, T tokens of one, H hidden size, L layers, N heads, D = H / N head size.
"""

import math

import torch
from torch import Tensor

from minibert.attention import SelfAttention
from minibert.layers import apply_all
from minibert.model import Bert
from tasks.data import Batch


def attention_weights(attention: SelfAttention, x: Tensor) -> Tensor:
    """A = softmax(Q Kᵀ / √D) in each head (Vaswani et al. 2017, eq. 1): what a layer weighs its values by.

    x [T, H], what goes into the layer of one sequence -> [N, T, T]. A[n, i, j] is the share that token j's
    value has in what head n gives to token i, so each row sums to 1. The layer's output is A V, head by head.
    """
    q, k, _ = apply_all((attention.query, attention.key, attention.value), x)  # [T, H] each
    Q, K = (y.unflatten(1, (attention.num_heads, -1)).transpose(0, 1) for y in (q, k))  # [N, T, D]
    return (Q @ K.mT / math.sqrt(Q.shape[-1])).softmax(dim=-1)


@torch.no_grad()
def attention_maps(bert: Bert, batch: Batch) -> list[Tensor]:
    """The weights in each sequence of a batch, [L, N, T, T]; bert is in eval, so that nothing is dropped."""
    x = bert.embeddings(batch.input_ids, batch.token_type_ids, batch.sequences.position_ids)  # [M, H]
    x = x.to(bert.compute_dtype or x.dtype)
    maps: list[list[Tensor]] = [[] for _ in batch.sequences.lengths]
    for layer in bert.encoder["layer"]:
        rows = x.split([*batch.sequences.lengths, batch.sequences.filler])[:-1]  # [T, H] of each sequence
        for of_sequence, own in zip(maps, rows, strict=True):
            of_sequence.append(attention_weights(layer.attention["self"], own))
        x = layer(x, batch.sequences)
    return [torch.stack(of_sequence) for of_sequence in maps]
