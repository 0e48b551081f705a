"""Packed sequences: how the row of a batch's real tokens divides.

Letters: M tokens, S sequences.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.blocks import Block, Grid, block_sizes


@dataclass(frozen=True)
class Sequences:
    """How the row of M packed tokens divides into S sequences; none is empty.

    Attention sees them in blocks of nearly one length: see minibert/blocks.py.

    The row may end in `filler` tokens that belong to no sequence, and that no sequence sees: a matrix
    library keeps half a megabyte of code for every M it meets, so it pays to meet few.

    The row may also be one process's share of a batch: `whole` are then the lengths of all the batch's
    sequences, and `places`, in ascending order, says which of them these are. Blocks are the batch's.
    """

    lengths: tuple[int, ...]
    filler: int = 0
    device: torch.device = torch.device("cpu")
    whole: tuple[int, ...] = ()
    places: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Sequences":
        return replace(self, device=device)

    @property
    def of_batch(self) -> tuple[int, ...]:
        """The lengths of all the batch's sequences, in whatever process they are."""
        return self.whole or self.lengths

    @cached_property
    def _sizes(self) -> list[tuple[int, list[int]]]:
        return block_sizes(self.of_batch, on_cpu=self.device.type == "cpu")

    @property
    def blocks_of_batch(self) -> int:
        """How many blocks the whole batch has."""
        return len(self._sizes)

    @cached_property
    def blocks(self) -> list[Block]:
        """Those of them with sequences of this share."""
        mine = {place: i for i, place in enumerate(self.places or range(len(self.lengths)))}
        first_rows, blocks = [0, *accumulate(self.lengths)], []
        for number, (T, sequences) in enumerate(self._sizes):
            places = [place for place, sequence in enumerate(sequences) if sequence in mine]
            own = [mine[sequences[place]] for place in places]
            if own:
                lengths, rows = [self.lengths[i] for i in own], [first_rows[i] for i in own]
                blocks.append(Block(T, lengths, rows, self.device, places, number))
        return blocks

    def grid(self, num_heads: int) -> Grid:
        """The blocks, for attention with so many heads."""
        if num_heads not in self._grids:
            self._grids[num_heads] = Grid(self.blocks, num_heads, self.device)
        return self._grids[num_heads]

    @cached_property
    def _grids(self) -> dict[int, Grid]:
        return {}

    def padded(self, x: Tensor) -> Tensor:
        """x [M, H] -> [S, T, H], T the longest; zeros where a sequence has ended"""
        longest = max(self.lengths)
        t = torch.arange(longest, device=self.device)
        slots = (t < self.counts[:, None]).flatten().nonzero().squeeze(1)
        grid = x.new_zeros(len(self.lengths) * longest, x.shape[1])
        return grid.index_copy(0, slots, x[: len(slots)]).unflatten(0, (-1, longest))

    @cached_property
    def counts(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)  # [S]

    @cached_property
    def first(self) -> Tensor:
        """The row of each sequence's first token, [CLS]."""
        return self.counts.cumsum(0) - self.counts  # [S]

    @cached_property
    def position_ids(self) -> Tensor:
        rows = torch.arange(sum(self.lengths), device=self.device)
        return F.pad(rows - self.first.repeat_interleave(self.counts), (0, self.filler))  # [M]
