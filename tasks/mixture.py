"""Training batches of one or several tasks, mixed: whose turn a step is, and which batch it has.

Whose turn it is is a function of the step alone, the batch one of (seed, task, the turns the task has had): a
run is resumed by its seed and its step, and several processes agree without a word.
"""

import math
from collections.abc import Mapping

import numpy as np

from tasks.data import Batch, Dataset, epoch_order


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

    def had(self, name: str, steps: int) -> int:
        """How many of the first `steps` steps are a task's."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.per_epoch[name] + (int(self._done[name][rest - 1]) if rest else 0)


class Mixture:
    """Training batches of tasks in turn; a task whose data runs out starts over, in another order.

    With a temperature of infinity the tasks go round, as many turns for each.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], batch_size: int, seed: int, temperature: float = math.inf
    ):
        self.datasets, self.batch_size, self.seed = dict(datasets), batch_size, seed
        self.batches = {name: -(-len(data) // batch_size) for name, data in self.datasets.items()}
        self.turns = Turns(turns_per_epoch(self.batches, temperature))
        self.names, self.steps_per_epoch = self.turns.names, self.turns.steps_per_epoch
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> tuple[str, Batch]:
        """The task and the batch of step 0, 1, 2, ..."""
        name = self.turns.task(step)
        epoch, index = divmod(self.turns.had(name, step), self.batches[name])  # of its own data
        if self._orders.get(name, (None,))[0] != epoch:
            data = self.datasets[name]
            self._orders[name] = (epoch, epoch_order(len(data), self.seed, name, epoch))
        chosen = self._orders[name][1][index * self.batch_size : (index + 1) * self.batch_size]
        # Order within a batch changes nothing but this: neighbours of like length pad less in attention.
        data = self.datasets[name]
        return name, data.collate(data.longest_first(chosen))

    def used(self, name: str, steps: int) -> np.ndarray:
        """The examples of a task, in the data's order, that the first `steps` steps train on."""
        order = epoch_order(len(self.datasets[name]), self.seed, name, epoch=0)
        return np.sort(order[: self.turns.had(name, steps) * self.batch_size])
