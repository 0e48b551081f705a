"""Runs' folders as a report reads them: finished ones with their curves, all others with what they lack."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.summary import Record, by_task, is_number, of_task, read_record
from minibert.errors import InputError
from minibert.files import read_json, read_text
from training.cli import command_of
from training.config import Config, from_dict

CURVES = ("epoch", "loss", "dev", "train")


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """A finished run as one of its tasks saw it, with a line per epoch.

    A line has epoch, dev, train, and loss, of which there is one for all tasks.
    """

    history: list[dict]


@dataclass(frozen=True)
class LeftOut:
    """What is in no table: a folder, why, and the command that goes on with it where there is one."""

    folder: Path
    reason: str
    command: tuple[str, ...] = ()


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Every folder, as a run - one of several tasks once for each - or as left out.

    Raises:
        InputError: if there is no such folder.
    """
    runs, left_out = [], []
    for folder in folders:
        if not folder.exists():
            raise InputError(f"{folder}: expected the folder of a run, there is none")
        try:
            found = _read(folder)
        except InputError as error:
            found = LeftOut(folder, str(error))
        if isinstance(found, LeftOut):
            left_out.append(found)
        else:
            runs += found
    return runs, left_out


def _read(folder: Path) -> list[Run] | LeftOut:
    config_file, result_file = folder / "config.json", folder / "result.json"
    if not config_file.is_file():
        return LeftOut(folder, f"no run: there is no {config_file.name} in it")
    if not result_file.is_file():
        return _unfinished(folder, from_dict(read_json(config_file), str(config_file)))
    metrics = folder / "metrics.jsonl"
    return [
        Run(**vars(record), history=read_history(metrics, record.only))
        for record in by_task(read_record(folder), folder)
    ]


def _unfinished(folder: Path, config: Config) -> LeftOut:
    """A run that goes on, was stopped or has failed: which of them, nothing in its folder says."""
    metrics = folder / "metrics.jsonl"
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    total = "" if config.max_steps else f" of {config.epochs}"
    reason = f"not finished: running, stopped or failed after epoch {done}{total}"
    return LeftOut(folder, reason, tuple(command_of(config, folder, resume=True)))


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
