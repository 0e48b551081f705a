"""Runs' folders as a report reads them: finished ones with their curves, all others with what they lack."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.summary import RESULT, Record, read_records
from minibert.errors import InputError
from training.cli import command_of
from training.config import Config, from_dict

CURVES = ("epoch", "loss", "dev", "train")


@dataclass(frozen=True)
class Run(Record):
    """A finished run of one task, with its folder and a line per epoch: epoch, loss, dev, train."""

    folder: Path
    history: list[dict]


@dataclass(frozen=True)
class LeftOut:
    """What is in no table: a folder, why, and the command that goes on with it where there is one."""

    folder: Path
    reason: str
    command: tuple[str, ...] = ()


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Every folder, as a run or as left out.

    Raises:
        InputError: if there is no such folder.
    """
    runs, left_out = [], []
    for folder in folders:
        if not folder.exists():
            raise InputError(f"{folder}: expected the folder of a run, there is none")
        try:
            one = _read(folder)
        except InputError as error:
            one = LeftOut(folder, str(error))
        (runs if isinstance(one, Run) else left_out).append(one)
    return runs, left_out


def _read(folder: Path) -> Run | LeftOut:
    from minibert.files import read_json

    config_file, result_file = folder / "config.json", folder / "result.json"
    if not config_file.is_file():
        return LeftOut(folder, f"no run: there is no {config_file.name} in it")
    if not result_file.is_file():
        return _unfinished(folder, from_dict(read_json(config_file), str(config_file)))
    (record,) = read_records([folder])
    for name in RESULT:
        value = record.result[name]
        if not (isinstance(value, str) if name == "metric" else _is_number(value)):
            raise InputError(f"{result_file}: expected {name} to be another kind of value, got {value!r}")
    return Run(record.config, record.result, folder, read_history(folder / "metrics.jsonl"))


def _unfinished(folder: Path, config: Config) -> LeftOut:
    """A run that goes on, was stopped or has failed: which of them, nothing in its folder says."""
    metrics = folder / "metrics.jsonl"
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    total = "" if config.max_steps else f" of {config.epochs}"
    reason = f"not finished: running, stopped or failed after epoch {done}{total}"
    return LeftOut(folder, reason, tuple(command_of(config, folder, resume=True)))


def read_history(path: Path) -> list[dict]:
    """The lines of metrics.jsonl.

    Raises:
        InputError: with file:line, unless each has the numbers of `CURVES`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    history = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not all(_is_number(line.get(name)) for name in CURVES):
            raise InputError(f"{path}:{number}: expected the numbers {', '.join(CURVES)}, got {text[:60]!r}")
        history.append(line)
    return history


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
