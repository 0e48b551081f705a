"""What a task is, and the types its data takes on the way. Imports no torch: the command line reads TASKS."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Task:
    """A sentence task: where its data lies, how a row is read, what is predicted and how it is scored.

    Attributes:
        files: split -> file, by its place in the data folder; `test` may be absent.
        text_columns: one sentence or a pair.
        num_outputs: C classes, labelled 0 to C - 1; 1 means a score in `label_range`.
        loss: a name in `tasks.losses.LOSSES`.
        metrics: names in `tasks.metrics.METRICS`; the first selects the best epoch.
        about: a sentence for people.
        course_limits: what is known to be wrong with the course's data of this task.
        ordered: whether the classes have an order, so that some mistakes are larger than others.
        classes: the names of the classes in the files, where they are not 0 to C - 1.
        own: a task of the user's: its files may have other formats, and no ids.
        id_column: in an own task's files it may be absent; rows are then numbered.
        dev_share: the share of the rows of `files["train"]` that is dev; 0 where dev has a file.
    """

    name: str
    files: Mapping[str, str]
    text_columns: tuple[str, ...]
    label_column: str
    num_outputs: int
    label_range: tuple[float, float]
    loss: str
    metrics: tuple[str, ...]
    about: str = ""
    course_limits: tuple[str, ...] = ()
    ordered: bool = False
    classes: tuple[str, ...] = ()
    own: bool = False
    id_column: str = "id"
    dev_share: float = 0.0

    @property
    def is_pair(self) -> bool:
        return len(self.text_columns) == 2

    @property
    def is_classification(self) -> bool:
        return self.num_outputs > 1

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes or tuple(map(str, range(self.num_outputs if self.is_classification else 0)))

    @cached_property
    def place_of(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.classes)}

    @property
    def probability_columns(self) -> list[str]:
        """Of a file of predictions."""
        return [f"p_{name}" if self.classes else f"p{name}" for name in self.class_names]


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
