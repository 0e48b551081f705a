"""A share of a batch, a process's or a piece of it, and the whole batch's values from all shares."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed
from torch import Tensor


@cache
def dealt(count: int) -> np.ndarray:
    """The places of examples sorted by length, so that those of any run are about as long as any other's.

    Like cards to two players, there and back again (0 3 4 7 ..., 1 2 5 6 ...), and each hand in the same way.
    """
    return _dealt(np.arange(count))


def _dealt(places: np.ndarray) -> np.ndarray:
    if len(places) <= 2:
        return places
    first = np.isin(np.arange(len(places)) % 4, (0, 3))
    return np.concatenate([_dealt(places[first]), _dealt(places[~first])])


@dataclass(frozen=True)
class Share:
    """Of a batch of B examples, `dealt`, the run that one of several processes has: as many as others.

    Where there are fewer examples than processes, one that has none of its own works on the first, for
    nothing: all processes do the same steps.

    A share may be `apart`: its loss is the mean over its own examples, and counts by their part of the batch.
    So are the pieces in which a share goes through the model, and all shares where the loss compares no
    examples: none has to wait for what others make of theirs.
    """

    rank: int
    processes: int
    count: int  # B
    apart: bool = False

    def pieces(self, number: int) -> list["Share"]:
        """As many shares apart: those of one process, where each has so many."""
        among = self.processes * number
        return [Share(self.rank * number + i, among, self.count, apart=True) for i in range(number)]

    def run_of(self, rank: int) -> slice:
        """Which examples of the batch are a process's."""
        each, more = divmod(self.count, self.processes)  # the first ones have one more
        return slice(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))

    @property
    def weight(self) -> float:
        """Of its loss in the batch's."""
        own = self.run_of(self.rank)
        return (own.stop - own.start) / self.count if self.apart else 1.0

    @property
    def most(self) -> int:
        """The most examples that a process has."""
        return -(-self.count // self.processes)

    @property
    def places(self) -> list[int]:
        """Which examples of the batch are worked on."""
        return list(range(self.count))[self.run_of(self.rank)] or [0]

    def gather(self, x: Tensor) -> Tensor:
        """x [b, ...] of this process's examples -> [B, ...] of all; the gradient is that of its own alone.

        So each process computes the loss of the whole batch, whatever it is, and passes back what its own
        examples have to do with it; the sum over processes is the whole gradient.
        """
        if self.apart:
            return x
        padded = torch.cat([x.detach(), x.new_zeros(self.most - len(x), *x.shape[1:])])  # [most, ...]
        parts = [torch.empty_like(padded) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, padded)
        runs = [self.run_of(rank) for rank in range(self.processes)]
        parts = [part[: run.stop - run.start] for part, run in zip(parts, runs, strict=True)]
        if not len(parts[self.rank]):
            return torch.cat(parts) + 0 * x.sum()
        parts[self.rank] = x
        return torch.cat(parts)  # [B, ...]
