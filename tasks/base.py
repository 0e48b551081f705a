"""What a task is, and the types its data takes on the way. Imports no torch: the command line reads TASKS."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A sentence task: where its data lies, how a row is read, what is predicted and how it is scored.

    Attributes:
        files: split -> file name; `test` may be absent from a data folder.
        text_columns: one sentence or a pair.
        num_outputs: C classes, labelled 0 to C - 1; 1 means a score in `label_range`.
        loss: a name in `tasks.losses.LOSSES`.
        metrics: names in `tasks.metrics.METRICS`; the first selects the best epoch.
    """

    name: str
    files: Mapping[str, str]
    text_columns: tuple[str, ...]
    label_column: str
    num_outputs: int
    label_range: tuple[float, float]
    loss: str
    metrics: tuple[str, ...]

    @property
    def is_pair(self) -> bool:
        return len(self.text_columns) == 2

    @property
    def is_classification(self) -> bool:
        return self.num_outputs > 1


@dataclass(frozen=True)
class Example:
    """One row of a data file."""

    id: str
    texts: tuple[str, ...]
    label: float | None


@dataclass(frozen=True)
class Skipped:
    """A row that was left out, and why."""

    where: str  # file:line
    reason: str
