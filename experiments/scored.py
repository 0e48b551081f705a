"""A finished run's dev predictions beside the labels they are scored against."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.summary import Record, read_record
from minibert.errors import InputError
from minibert.files import read_text
from tasks.base import Example, Task
from tasks.metrics import METRICS
from tasks.reader import read_split
from training.build import data_folder
from training.evaluate import Prediction
from training.run_folder import RunFolder
from training.scoring import choose_task

FEWEST = 4  # examples that a test of two correlations needs
SAME_SCORE = 1e-6  # the files hold nine digits of a score


@dataclass(frozen=True)
class Scored:
    """One task of a finished run: its n dev examples, what it says of them, and what is right."""

    path: Path
    record: Record
    task: Task
    examples: tuple[Example, ...]
    prediction: Prediction
    labels: np.ndarray  # [n], classes (int64) or scores (float64)

    @property
    def metric(self) -> str:
        return self.task.metrics[0]

    @property
    def score(self) -> float:
        return METRICS[self.metric](self.prediction.predictions, self.labels)


def read_scored(path: Path, task_name: str | None = None, data: str | None = None) -> Scored:
    """The dev predictions in a run's folder and the labels in the data it names, or in `data` instead.

    Raises:
        InputError: if the folder holds no finished run or no predictions, if their ids are not the data's,
            or if they do not have the score that the run reports: the data is not what it was.
    """
    record = read_record(path)
    if data is not None:
        record = replace(record, config=replace(record.config, data=data))
    config = record.config
    try:
        task = choose_task(config, task_name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    folder = data_folder(config)
    labelled = folder / task.files["dev"]
    examples, _ = read_split(folder, task, "dev", config.strict, config.quotes)
    if len(examples) < FEWEST:
        raise InputError(f"{labelled}: expected at least {FEWEST} labelled examples, got {len(examples)}")
    file = RunFolder(path).predictions("dev", task.name, only=len(config.tasks) == 1)
    prediction = read_predictions(file, task, [example.id for example in examples], labelled)
    dtype = np.int64 if task.is_classification else np.float64
    labels = np.array([example.label for example in examples], dtype)
    scored = Scored(path, record, task, tuple(examples), prediction, labels)
    reported = record.result.get("dev")
    reported = reported.get(task.name) if isinstance(reported, dict) else reported
    if not isinstance(reported, float) or abs(scored.score - reported) > SAME_SCORE:
        raise InputError(
            f"{file}: scores {scored.score:.6f} against {labelled}, but result.json says {reported}: "
            "the data is not what it was, or the predictions are not the run's"
        )
    return scored


def read_predictions(path: Path, task: Task, ids: Sequence[str], labelled: Path) -> Prediction:
    """A predictions file of a run, in the order of `ids`, those of the file `labelled`.

    Raises:
        InputError: with file:line, for what is no such file, or if its ids are others.
    """
    rows = read_rows(path, task)
    lacking, unknown = set(ids) - rows.keys(), rows.keys() - set(ids)
    for problem, names in (("no prediction for", lacking), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path}: {problem} id {min(names)!r}{more}; expected the ids of {labelled}")
    values = np.array([rows[name] for name in ids])  # [n, 1 + C]
    if task.is_classification:
        return Prediction(tuple(ids), values[:, 0].astype(np.int64), values[:, 1:])
    return Prediction(tuple(ids), values[:, 0], None)


def read_rows(path: Path, task: Task) -> dict[str, list[float]]:
    """id -> prediction and, for classes, all probabilities, as `predictions_csv` wrote them.

    Raises:
        InputError: with file:line, for anything else.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    places = {name: str(place) for place, name in enumerate(task.class_names)}
    columns = ["id", "prediction", *task.probability_columns]
    if next(reader, []) != columns:
        raise InputError(f"{path}:1: expected columns {', '.join(columns)}")
    rows: dict[str, list[float]] = {}
    for name, *fields in filter(None, reader):
        where = f"{path}:{reader.line_num}"
        if name in rows:
            raise InputError(f"{where}: id {name!r} stands there twice")
        try:
            given = [places.get(fields[0], fields[0]), *fields[1:]] if fields else []
            values = [float(field) for field in given]
        except ValueError:
            values = [math.nan]
        if len(values) != len(columns) - 1 or not all(map(math.isfinite, values)):
            raise InputError(f"{where}: expected {len(columns) - 1} numbers after the id, got {fields}")
        if places and (values[0] not in range(len(places)) or task.classes and fields[0] not in places):
            classes = f"{task.class_names[0]} to {task.class_names[-1]}"
            raise InputError(f"{where}: expected a class from {classes}, got {fields[0]!r}")
        rows[name] = values
    return rows
