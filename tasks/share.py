"""A share of a batch, a process's or a piece of it, and the whole batch's values from all shares."""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Of a batch of B examples, longest first, what is dealt to one of several processes.

    They are dealt like cards, and every second round begins at the other end: so all have as many as others,
    and as long ones. Where there are fewer examples than processes, one that has none of its own works on the
    first, for nothing: all processes do the same steps.

    A share may be `apart`: its loss is the mean over its own examples, and counts by their part of the batch.
    So are the pieces in which a share goes through the model, and all shares where the loss compares no
    examples: none has to wait for what others make of theirs.
    """

    rank: int
    processes: int
    count: int  # B
    apart: bool = False

    def pieces(self, number: int) -> list["Share"]:
        """As many shares apart: those of one process, where each has so many; as long ones in each."""
        among = self.processes * number
        return [Share(self.rank + self.processes * i, among, self.count, apart=True) for i in range(number)]

    @property
    def weight(self) -> float:
        """Of its loss in the batch's."""
        return len(self.dealt(self.rank)) / self.count if self.apart else 1.0

    def dealt(self, rank: int) -> list[int]:
        """Which examples of the batch are a process's."""
        ends = (rank, self.processes - 1 - rank)
        places = [self.processes * i + ends[i % 2] for i in range(self.rounds)]
        return [place for place in places if place < self.count]

    @property
    def rounds(self) -> int:
        """The most examples that a process has."""
        return -(-self.count // self.processes)

    @property
    def places(self) -> list[int]:
        """Which examples of the batch are worked on."""
        return self.dealt(self.rank) or [0]

    def gather(self, x: Tensor) -> Tensor:
        """x [b, ...] of this process's examples -> [B, ...] of all; the gradient is that of its own alone.

        So each process computes the loss of the whole batch, whatever it is, and passes back what its own
        examples have to do with it; the sum over processes is the whole gradient.
        """
        if self.apart:
            return x
        padded = torch.cat([x.detach(), x.new_zeros(self.rounds - len(x), *x.shape[1:])])  # [rounds, ...]
        parts = [torch.empty_like(padded) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, padded)
        whole = x.new_empty(self.count, *x.shape[1:])  # [B, ...]
        for rank, part in enumerate(parts):
            places = self.dealt(rank)
            whole[places] = part[: len(places)]
        if mine := self.dealt(self.rank):
            whole[mine] = x
            return whole
        return whole + 0 * x.sum()
