"""Training batches of one or several tasks, mixed: whose turn a step is, and which batch it has.

Whose turn it is is a function of the step alone, the batch one of (seed, task, the turns the task has had): a
run is resumed by its seed and its step, and several processes agree without a word.
"""

import math
from collections.abc import Container, Mapping

import numpy as np

from tasks.data import Batch, Dataset, epoch_order, like_length
from tasks.share import Share, dealt


def turns_per_epoch(batches: Mapping[str, int], temperature: float) -> dict[str, int]:
    """k_t = max(1, round(b_max (b_t / b_max)^(1/T))): shares ∝ b_t^(1/T) (Raffel et al. 2020, section 3.5.2).

    b_t is a task's number of batches, its data in units of a step. So in an epoch the largest task goes
    through its data once; the others do too at T = 1, and have as many turns as the largest at T = ∞.
    """
    largest = max(batches.values())
    return {
        name: max(1, round(largest * (count / largest) ** (1 / temperature)))
        for name, count in batches.items()
    }


class Turns:
    """An epoch's steps dealt out to tasks that have k_t turns each, as evenly as can be; each epoch the same.

    Turn j of a task stands at (j + 1/2) / k_t of the epoch; of equal places the first task's comes first. So
    where all k_t are equal the tasks go round, and of up to three tasks none is ever a whole turn from its
    share of the steps so far.
    """

    def __init__(self, per_epoch: Mapping[str, int]):
        self.names, self.per_epoch = list(per_epoch), dict(per_epoch)
        self.steps_per_epoch = sum(per_epoch.values())
        task = np.repeat(np.arange(len(per_epoch)), list(per_epoch.values()))
        place = np.concatenate([(2 * np.arange(k) + 1) / (2 * k) for k in per_epoch.values()])
        self._order = task[np.lexsort((task, place))]  # [steps_per_epoch]
        # The turns each task has had once a step of the epoch is done.
        self._done = {name: np.cumsum(self._order == i) for i, name in enumerate(per_epoch)}

    def task(self, step: int) -> str:
        """Whose turn step 0, 1, 2, ... is."""
        return self.names[self._order[step % self.steps_per_epoch]]

    def tasks(self, step: int) -> list[str]:
        return [self.task(step)]

    def had(self, name: str, steps: int) -> int:
        """How many of the first `steps` steps are a task's."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.per_epoch[name] + (int(self._done[name][rest - 1]) if rest else 0)


class TurnsTogether:
    """The same turns, taken side by side: an epoch has as many steps as the largest task has turns, k_max.

    A step takes the turns whose places lie in its share of the epoch, [i / k_max, (i + 1) / k_max): of the
    largest task one, of any other none or one.
    """

    def __init__(self, per_epoch: Mapping[str, int]):
        self.names, self.per_epoch = list(per_epoch), dict(per_epoch)
        self.steps_per_epoch = max(per_epoch.values())

    def tasks(self, step: int) -> list[str]:
        """Who has a turn in step 0, 1, 2, ..."""
        return [name for name in self.names if self.had(name, step + 1) > self.had(name, step)]

    def had(self, name: str, steps: int) -> int:
        """How many turns a task has in the first `steps` steps."""
        epochs, i = divmod(steps, self.steps_per_epoch)
        twice_places, width = 2 * i * self.per_epoch[name], 2 * self.steps_per_epoch
        # Turns j with (j + 1/2) / k < i / k_max: ⌈i k / k_max - 1/2⌉ of them.
        return epochs * self.per_epoch[name] - (width // 2 - twice_places) // width


class Mixture:
    """Training batches of tasks in turn; a task whose data runs out starts over, in another order.

    With a temperature of infinity the tasks go round, as many turns for each. `together` has a step take a
    batch of each task whose turn has come, `alike` has a batch hold examples of nearly one length. Of several
    `processes` each has the same turns and a share of each batch, and takes no more than `most` examples at
    once. Shares are `apart` if no loss compares examples.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        batch_size: int,
        seed: int,
        temperature: float = math.inf,
        together: bool = False,
        alike: bool = False,
        rank: int = 0,
        processes: int = 1,
        most: int | None = None,
        apart: bool = False,
    ):
        self.datasets, self.batch_size, self.seed, self.alike = dict(datasets), batch_size, seed, alike
        self.rank, self.processes, self.most, self.apart = rank, processes, most, apart
        self.batches = {name: -(-len(data) // batch_size) for name, data in self.datasets.items()}
        per_epoch = turns_per_epoch(self.batches, temperature)
        self.turns = TurnsTogether(per_epoch) if together else Turns(per_epoch)
        self.names, self.steps_per_epoch = self.turns.names, self.turns.steps_per_epoch
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> tuple[str, Batch]:
        """The task and the batch of step 0, 1, 2, ..., where a step is one task's."""
        ((name, batch),) = self.batches_of(step).items()
        return name, batch

    def batches_of(self, step: int, without: Container[str] = ()) -> dict[str, Batch]:
        """The batch of each task that has a turn in step 0, 1, 2, ..., but those `without`, in one piece."""
        (batches,) = self._pieces(self._turns(step, without), most=None)
        return batches

    def pieces_of(self, step: int, without: Container[str] = ()) -> list[dict[str, Batch]]:
        """The same in pieces that go through the model one after the other."""
        return self.pieces(self._turns(step, without))

    def pieces(self, chosen: Mapping[str, np.ndarray]) -> list[dict[str, Batch]]:
        """A step's batches of these examples, longest first, in pieces."""
        return self._pieces(chosen, self.most)

    def _turns(self, step: int, without: Container[str] = ()) -> dict[str, np.ndarray]:
        return {name: self._chosen(name, step) for name in self.turns.tasks(step) if name not in without}

    def _pieces(self, chosen: Mapping[str, np.ndarray], most: int | None) -> list[dict[str, Batch]]:
        chosen = {name: one[dealt(len(one))] for name, one in chosen.items()}
        shares = {
            name: Share(self.rank, self.processes, len(one), self.apart) for name, one in chosen.items()
        }
        each = self.batch_size if most is None else max(1, most // len(chosen))
        number = max(-(-share.most // each) for share in shares.values())  # the same in all processes
        pieces = {name: share.pieces(number) if number > 1 else [share] for name, share in shares.items()}
        if number * self.processes == 1:
            pieces = dict.fromkeys(chosen, [None])  # the whole batch
        return [
            {name: self.datasets[name].collate(one, pieces[name][i]) for name, one in chosen.items()}
            for i in range(number)
        ]

    def _chosen(self, name: str, step: int) -> np.ndarray:
        epoch, index = divmod(self.turns.had(name, step), self.batches[name])  # of its own data
        if self._orders.get(name, (None,))[0] != epoch:
            self._orders[name] = (epoch, self._order(name, epoch))
        chosen = self._orders[name][1][index * self.batch_size : (index + 1) * self.batch_size]
        # Order within a batch changes nothing but what each of several processes has.
        return self.datasets[name].longest_first(chosen)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """Of a task's examples in an epoch of its own data: a batch after the other."""
        data = self.datasets[name]
        order = epoch_order(len(data), self.seed, name, epoch)
        if self.alike:
            order = like_length(order, data.lengths(np.arange(len(data))), self.batch_size)
        return order

    def used(self, name: str, steps: int) -> np.ndarray:
        """The examples of a task, in the data's order, that the first `steps` steps train on."""
        return np.sort(self._order(name, epoch=0)[: self.turns.had(name, steps) * self.batch_size])
