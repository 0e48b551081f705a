"""Which classes a run takes for which, from its predictions and the labels of the data folder."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.listing import Run, labelled
from minibert.errors import InputError
from minibert.files import read_text
from tasks.base import Task
from training.config import Config


def dev_labels(config: Config, task: Task) -> dict[str, int]:
    """id -> class of the dev file. Raises InputError as `labelled` does."""
    return {example.id: int(example.label) for example in labelled(config, task, "dev")}


def confusion(runs: Sequence[Run], labels: Mapping[str, int], classes: Sequence[str]) -> list[list[float]]:
    """Of each label's examples the share that is given each class, mean over runs, [C, C]; rows are labels.

    A label that no example has is a row of zeros.

    Raises:
        InputError: if predictions are missing or damaged, or are not those of the labels' examples.
    """
    from training.run_folder import RunFolder

    counts = [[0] * len(classes) for _ in classes]
    for run in runs:
        path = RunFolder(run.folder).predictions("dev", run.task, only=run.only is None)
        for name, predicted in read_predictions(path, labels, classes):
            counts[labels[name]][predicted] += 1
    return [[count / max(sum(row), 1) for count in row] for row in counts]


def read_predictions(path: Path, labels: Mapping[str, int], classes: Sequence[str]) -> list[tuple[str, int]]:
    """(id, class) of each example of a run's predictions on dev. Raises InputError as `confusion` does."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise InputError(f"{path}: expected CSV, got something else ({error})") from None
    pairs, named = [], {name: c for c, name in enumerate(classes)}
    for number, row in enumerate(rows, 2):
        name, given = row.get("id"), row.get("prediction")
        if name not in labels:
            raise InputError(f"{path}:{number}: the data's dev file has no id {name!r}")
        if given not in named:
            raise InputError(
                f"{path}:{number}: expected a class from {classes[0]} to {classes[-1]}, got {given!r}"
            )
        pairs.append((name, named[given]))
    if len({name for name, _ in pairs}) != len(labels) or len(pairs) != len(labels):
        raise InputError(f"{path}: expected a prediction for each of {len(labels)} ids, got {len(pairs)}")
    return pairs
