"""Packed sequences: how the row of a batch's real tokens divides.

Letters: M tokens, S sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.blocks import Block, Grid, Rectangle, block_sizes

ON_DEVICE = ("position_ids", "counts", "first", "slots")  # beside the rectangle


@dataclass(frozen=True)
class Sequences:
    """How the row of M packed tokens divides into S sequences; none is empty.

    On a CPU attention sees them in blocks of nearly one length: see minibert/blocks.py.

    The row may end in `filler` tokens that belong to no sequence, and that no sequence sees: a matrix
    library keeps half a megabyte of code for every M it meets, so it pays to meet few.
    """

    lengths: tuple[int, ...]
    filler: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """What a GPU needs of this, built on the host: a GPU would have to be waited for."""
        own = {name: getattr(self, name) for name in ON_DEVICE}
        return own | {name: one for name, one in self.rectangle._asdict().items() if one is not None}

    def holding(self, tensors: Mapping[str, Tensor]) -> "Sequences":
        """The same with its `tensors` on another device."""
        moved = replace(self)
        # Cached properties look here first for what they are.
        vars(moved).update({name: tensors[name] for name in ON_DEVICE})
        vars(moved)["rectangle"] = Rectangle(*map(tensors.get, Rectangle._fields))
        return moved

    def to(self, device: torch.device) -> "Sequences":
        return self.holding({name: tensor.to(device) for name, tensor in self.tensors().items()})

    @cached_property
    def blocks(self) -> list[Block]:
        first_rows = [0, *accumulate(self.lengths)]
        return [
            Block(T, [self.lengths[i] for i in own], [first_rows[i] for i in own])
            for T, own in block_sizes(self.lengths)
        ]

    def grid(self, num_heads: int) -> Grid:
        """The blocks, for attention with so many heads."""
        if num_heads not in self._grids:
            self._grids[num_heads] = Grid(self.blocks, num_heads)
        return self._grids[num_heads]

    @cached_property
    def _grids(self) -> dict[int, Grid]:
        return {}

    @cached_property
    def rectangle(self) -> Rectangle:
        """All sequences as a GPU's attention takes them."""
        return Rectangle.of(self.lengths, self.filler)

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The rectangle's, in the dtype of the queries: cast once for all layers."""
        bias = self.rectangle.key_bias
        if bias is not None and dtype not in self._key_biases:
            self._key_biases[dtype] = bias.to(dtype)  # [S, 1, 1, T]
        return self._key_biases.get(dtype)

    @cached_property
    def _key_biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    def padded(self, x: Tensor) -> Tensor:
        """x [M, H] -> [S, T, H], T the longest; zeros where a sequence has ended"""
        grid = x.new_zeros(len(self.lengths) * max(self.lengths), x.shape[1])
        rows = x[: len(self.slots)]
        return grid.index_copy(0, self.slots, rows).unflatten(0, (-1, max(self.lengths)))

    @cached_property
    def slots(self) -> Tensor:
        """Where `padded` puts each token, as rows of [S T]."""
        inside = torch.arange(max(self.lengths)) < self.counts[:, None]  # [S, T]
        return inside.flatten().nonzero().squeeze(1)  # [M] without filler

    @cached_property
    def counts(self) -> Tensor:
        return torch.tensor(self.lengths)  # [S]

    @cached_property
    def first(self) -> Tensor:
        """The row of each sequence's first token, [CLS]."""
        return self.counts.cumsum(0) - self.counts  # [S]

    @cached_property
    def position_ids(self) -> Tensor:
        rows = torch.arange(sum(self.lengths))
        return F.pad(rows - self.first.repeat_interleave(self.counts), (0, self.filler))  # [M]
