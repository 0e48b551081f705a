"""A share of a batch, a process's or a piece of it, and the whole batch's values from all shares."""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Of a batch of B examples every `processes`-th from `rank` on: as many and as long ones as others have.

    Where there are fewer examples than processes, one that has none of its own works on the first, for
    nothing: all processes do the same steps.

    A share that goes through the model in pieces is so many shares, each `apart`: its loss is the mean over
    its own examples, and counts by their part of the batch.
    """

    rank: int
    processes: int
    count: int  # B
    apart: bool = False

    def pieces(self, number: int) -> list["Share"]:
        """The same examples in so many shares, as many and as long ones in each."""
        among = self.processes * number
        return [Share(self.rank + self.processes * i, among, self.count, apart=True) for i in range(number)]

    @property
    def weight(self) -> float:
        """Of its loss in the batch's."""
        return len(range(self.rank, self.count, self.processes)) / self.count if self.apart else 1.0

    @property
    def places(self) -> list[int]:
        """Which examples of the batch are worked on."""
        return list(range(self.rank, self.count, self.processes)) or [0]

    def gather(self, x: Tensor) -> Tensor:
        """x [b, ...] of this process's examples -> [B, ...] of all; the gradient is that of its own alone.

        So each process computes the loss of the whole batch, whatever it is, and passes back what its own
        examples have to do with it; the sum over processes is the whole gradient.
        """
        if self.apart:
            return x
        most = -(-self.count // self.processes)
        padded = torch.cat([x.detach(), x.new_zeros(most - len(x), *x.shape[1:])])  # [most, ...]
        parts = [torch.empty_like(padded) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, padded)
        whole = x.new_empty(self.count, *x.shape[1:])  # [B, ...]
        for rank, part in enumerate(parts):
            whole[rank :: self.processes] = part[: len(range(rank, self.count, self.processes))]
        if self.rank < self.count:
            whole[self.rank :: self.processes] = x
            return whole
        return whole + 0 * x.sum()
