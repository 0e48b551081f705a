"""The course's own measures: its files of predictions, and one score over its three tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.scored import Scored
from experiments.statistics import influence, standard_error
from minibert.errors import InputError

# Task -> the start of its files' names, its column as the course spells it, how a prediction is written.
COURSE = {
    "sst": ("sst", "Predicted_Sentiment", "{:.0f}"),
    "qqp": ("para", "Predicted_Is_Paraphrase", "{:.1f}"),
    "sts": ("sts", "Predicted_Similiary", "{:.9g}"),
}


def submission_name(task: str, split: str) -> str:
    return f"{COURSE[task][0]}-{split}-output.csv"


def submission(task: str, predictions: Mapping[str, float]) -> str:
    """id -> prediction, as CS 224N's starter code writes it: a header with a tab, lines with a comma."""
    _, column, number = COURSE[task]
    lines = [f"{name} , {number.format(value)} \n" for name, value in predictions.items()]
    return f"id \t {column} \n" + "".join(lines)


@dataclass(frozen=True)
class Overall:
    """(SST accuracy + Quora accuracy + (1 + STS Pearson)/2) / 3, and its standard error over dev examples."""

    sst: float
    qqp: float
    sts: float
    overall: float
    error: float


def overall(runs: Sequence[Scored]) -> Overall:
    """Of three runs, one of each task in this order.

    Raises:
        InputError: if they are of other tasks.
    """
    tasks = [run.task.name for run in runs]
    if tasks != list(COURSE):
        raise InputError(f"--overall: expected runs of {', '.join(COURSE)}, got {', '.join(tasks)}")
    sst, qqp, sts = (run.score for run in runs)
    errors = [standard_error(influence(run.metric, run.prediction.predictions, run.labels)) for run in runs]
    error = math.hypot(errors[0], errors[1], errors[2] / 2) / 3
    return Overall(sst, qqp, sts, (sst + qqp + (1 + sts) / 2) / 3, error)
