"""Packed sequences: how the row of a batch's real tokens divides, and how attention's blocks are padded.

Letters: M tokens, S sequences, T the longest of them, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8  # sequences, on a CPU


class Block:
    """Neighbouring sequences that are padded together for attention: S of them, to T tokens.

    T is the longest, rounded up to a multiple of 8: libraries keep a kernel for every shape they meet. In a
    share of a batch it is the longest of the `whole` block, which is the batch's `number`-th, and of which
    these are the sequences at `places`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        first_row: int,
        device: torch.device,
        whole: Sequence[int],
        places: Sequence[int],
        number: int,
    ):
        self.places, self.number = tuple(places), number
        self.shape = (len(lengths), -(-max(whole) // 8) * 8)
        self.rows = slice(first_row, first_row + sum(lengths))
        inside = torch.arange(self.shape[1]) < torch.tensor(lengths)[:, None]  # [S, T]
        self.slots = inside.flatten().nonzero().squeeze(1).to(device)  # rows' places in the padded grid
        ragged = min(lengths) < self.shape[1]
        self.beyond = ~inside[:, None, None, :].to(device) if ragged else None  # [S, 1, 1, T]

    def pad(self, x: Tensor) -> Tensor:
        """this block's rows of x [M, H] -> [S, T, H], zeros where a sequence has ended"""
        grid = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1])
        return grid.index_copy_(0, self.slots, x[self.rows]).unflatten(0, self.shape)  # [S, T, H]

    def unpad(self, x: Tensor, out: Tensor) -> None:
        """x [S, T, H] -> this block's rows of out [M, H]"""
        torch.index_select(x.flatten(0, 1), 0, self.slots, out=out[self.rows])


@dataclass(frozen=True)
class Sequences:
    """How the row of M packed tokens divides into S sequences; none is empty.

    Attention sees them in blocks of neighbours, each padded to its own longest: the nearer in length
    neighbours are, the less is wasted. On a GPU, where every launch costs, all are one block.

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
    def blocks(self) -> list[Block]:
        whole = self.of_batch
        size = BLOCK if self.device.type == "cpu" else len(whole)
        places = self.places or range(len(whole))
        starts, blocks, first = [0, *accumulate(self.lengths)], [], 0
        for number, start in enumerate(range(0, len(whole), size)):
            inside = [place - start for place in places[first:] if place < start + size]
            if inside:
                lengths, chunk = self.lengths[first : first + len(inside)], whole[start : start + size]
                blocks.append(Block(lengths, starts[first], self.device, chunk, inside, number))
                first += len(inside)
        return blocks

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
