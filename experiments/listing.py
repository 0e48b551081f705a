"""Runs' folders as a report reads them: finished ones with their curves, all others with what they lack."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from experiments.left_out import LeftOut, sort_out
from experiments.summary import Record, by_task, distinct, is_number, of_task, read_record
from minibert.errors import InputError
from minibert.files import read_text
from tasks.base import Example, Task
from training.config import Config

CURVES = ("epoch", "loss", "dev", "train")


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """A finished run as one of its tasks saw it, with a line per epoch.

    A line has epoch, dev, train, and loss, of which there is one for all tasks.
    """

    history: list[dict]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Every folder, as a run - one of several tasks once for each - or as left out.

    Raises:
        InputError: if there is no such folder.
    """
    found, left_out = sort_out(folders, _read)
    runs, repeated = distinct(list(chain(*found)))
    return runs, left_out + repeated


def _read(folder: Path) -> list[Run]:
    metrics = folder / "metrics.jsonl"
    return [
        Run(**vars(record), history=read_history(metrics, record.only))
        for record in by_task(read_record(folder), folder)
    ]


def read_history(path: Path, task: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl, with the scores of one task where a run has several.

    Raises:
        InputError: with file:line, unless each has the numbers of `CURVES`.
    """
    history = []
    for number, text in enumerate(read_text(path).splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if task and isinstance(line, dict):
            line = of_task(line, task)
        if not isinstance(line, dict) or not all(is_number(line.get(name)) for name in CURVES):
            raise InputError(f"{path}:{number}: expected the numbers {', '.join(CURVES)}, got {text[:60]!r}")
        history.append(line)
    return history


def labelled(config: Config, task: Task, split: str) -> list[Example]:
    """Of a run's `train` or `dev`, the rows that it had.

    Raises:
        InputError: if the data folder is no longer there, or cannot be read.
    """
    from tasks.course import cached_folder
    from tasks.reader import read_split
    from training.build import data_folder

    folder = cached_folder() if config.data == "cs224n" else Path(config.data)
    if config.data != "demo" and not os.path.isfile(folder / task.files[split]):
        raise InputError(f"{folder}: there is no {task.files[split]} any more")
    folder = data_folder(config) if config.data == "demo" else folder
    return read_split(folder, task, split, quotes=config.quotes)[0]
