"""How attention pads packed sequences: on a CPU in blocks of nearly one length, on a GPU in one rectangle.

Letters: M tokens, S sequences, T tokens that each is padded to, H hidden size, N heads, D = H / N head size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16  # fp32 numbers in a CPU's widest register: softmax is slow over any other number of keys
LARGEST = 2**15  # S T² of a CPU's block of several sequences: so that its scores stay in the cache
SPARED = 2**13  # by how much S T² may grow where it spares a block: each costs a CPU twenty calls


def block_sizes(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """T and the sequences of each block, for a CPU.

    Those of one T go together, the next multiple of `LANES`, as many as `LARGEST` allows, and few with those
    of the next T above.
    """
    of_length: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        of_length.setdefault(next_multiple(length, LANES), []).append(sequence)
    taken, above = {}, 0
    for T in sorted(of_length, reverse=True):
        few = len(of_length[T]) * (above**2 - T**2) <= SPARED
        above = above if few and above else T
        taken.setdefault(above, []).extend(of_length[T])
    sizes = []
    for T, sequences in taken.items():
        most = max(1, LARGEST // T**2)
        sizes += [(T, sequences[start : start + most]) for start in range(0, len(sequences), most)]
    return sizes


def next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


class Block:
    """S sequences, padded to T tokens each."""

    def __init__(self, T: int, lengths: Sequence[int], first_rows: Sequence[int]):
        t, length = torch.arange(T), torch.tensor(lengths)[:, None]  # [T], [S, 1]
        self.inside = t < length  # [S, T]
        # Past a sequence's end stands its last token again: any finite number will do there.
        self.rows = torch.tensor(first_rows)[:, None] + torch.minimum(t, length - 1)  # [S, T]
        # Factors for queries, [S, 1, T, 1], and what is added to keys' scores, [S, 1, 1, T].
        self.asks = self.inside[:, None, :, None]
        seen = torch.zeros(self.inside.shape).masked_fill(~self.inside, -math.inf)
        self.beyond = None if self.inside.all() else seen[:, None, None]


class Grid:
    """All of a batch's blocks head by head, [S, N, T, D] each, and end to end as one column of cells [C, D].

    A tensor is padded and its heads are split in one copy, and in another its tokens stand in a row again.
    """

    def __init__(self, blocks: Sequence[Block], num_heads: int):
        self.shapes = [(len(block.rows), num_heads, block.rows.shape[1]) for block in blocks]
        heads = torch.arange(num_heads)[:, None]  # [N, 1]
        source = torch.cat([(block.rows[:, None] * num_heads + heads).flatten() for block in blocks])
        pairs = zip(blocks, self.shapes, strict=True)
        inside = torch.cat([block.inside[:, None].expand(shape).flatten() for block, shape in pairs])
        cells = inside.nonzero().squeeze(1)
        target = torch.empty_like(cells)
        target[source[cells]] = cells
        self.source, self.target = source, target  # [C] and [M N], each of the other

    def empty(self, x: Tensor) -> Tensor:
        """cells [C, D] to be filled, for x [M, H]"""
        return x.new_empty(len(self.source), x.shape[1] // self.shapes[0][1])

    def split(self, cells: Tensor) -> list[Tensor]:
        """cells [C, D] -> of each block [S, N, T, D], the same memory"""
        parts = cells.split([math.prod(shape) for shape in self.shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def spread(self, x: Tensor) -> list[Tensor]:
        """x [M, H] -> of each block [S, N, T, D]"""
        return self.split(x.reshape(-1, x.shape[1] // self.shapes[0][1]).index_select(0, self.source))

    def gather(self, cells: Tensor, x: Tensor) -> Tensor:
        """cells [C, D] -> [M, H] like x, zeros for the filler"""
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        torch.index_select(cells, 0, self.target, out=out.view(-1, cells.shape[1])[: len(self.target)])
        return out


class Rectangle(NamedTuple):
    """All S sequences of a batch, padded to T tokens each, for a GPU: there every launch costs.

    T is a multiple of 8, which the fused attention kernels want. Past a sequence's end stands its last token
    again. No key there is seen, and its cells get no gradient, so the filler's rows may read one of them.
    """

    source: Tensor  # [S T], the row that each cell is filled from
    target: Tensor  # [M], the cell of each row; of the filler's rows an empty one
    key_bias: Tensor | None  # [S, 1, 1, T], 0 or -inf, added to the scores of each key; None if all are seen

    @classmethod
    def of(cls, lengths: Sequence[int], filler: int) -> "Rectangle":
        T = next_multiple(max(lengths), 8)
        if filler and min(lengths) == T:
            T += 8  # so that there is an empty cell
        t, length = torch.arange(T), torch.tensor(lengths)[:, None]  # [T], [S, 1]
        inside = t < length  # [S, T]
        first_rows = length.cumsum(0) - length  # [S, 1]
        source = (first_rows + torch.minimum(t, length - 1)).flatten()  # [S T]
        cells, empty = inside.flatten().nonzero().squeeze(1), inside.flatten().logical_not().nonzero()
        target = torch.cat([cells, empty[:1, 0].expand(filler)])  # [M]
        seen = torch.zeros(inside.shape).masked_fill(~inside, -math.inf)  # [S, T]
        return cls(source, target, None if inside.all() else seen[:, None, None])
