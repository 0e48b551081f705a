"""Which of the folders given can be used: `runs/*` has unfinished runs, grids and stray files among them."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from minibert.errors import InputError
from training.cli import command_of
from training.config import from_dict

Found = TypeVar("Found")


@dataclass(frozen=True)
class LeftOut:
    """A folder that cannot be used, the reason, and the command that finishes it, if there is one."""

    folder: Path
    reason: str
    command: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = self.reason.startswith(str(self.folder))
        return self.reason if named else f"{self.folder}: {self.reason}"


def sort_out(folders: Sequence[Path], read: Callable[[Path], Found]) -> tuple[list[Found], list[LeftOut]]:
    """What `read` returns for each folder, and the folders that cannot be used.

    Raises:
        InputError: if there is no such folder.
    """
    used, left_out = [], []
    for folder in folders:
        if not os.path.lexists(folder):
            raise InputError(f"{folder}: expected the folder of a run, there is none")
        if unusable := no_run(folder):
            left_out.append(unusable)
            continue
        try:
            used.append(read(folder))
        except InputError as error:
            left_out.append(LeftOut(folder, str(error)))
    return used, left_out


def usable(folders: Sequence[Path], read: Callable[[Path], Found]) -> tuple[list[Found], list[LeftOut]]:
    """As `sort_out`, for a command that needs at least one run.

    Raises:
        InputError: if there is no such folder, or none can be used.
    """
    used, left_out = sort_out(folders, read)
    if not used:
        say(left_out[1:])
        read(folders[0])  # which says why not
    return used, left_out


def say(left_out: Sequence[LeftOut]) -> None:
    for one in left_out:
        print(f"not used: {one}", file=sys.stderr)


def no_run(folder: Path) -> LeftOut | None:
    """The reason why a folder is not a finished run; None for a finished run and for an adapter."""
    config_file = folder / "config.json"
    if not folder.is_dir():
        return LeftOut(folder, "no run: it is no folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        return LeftOut(folder, "no run: the folder cannot be read")
    if config_file.is_file():
        return None if (folder / "result.json").is_file() else _unfinished(folder, config_file)
    if (folder / "adapter_config.json").is_file():
        return None
    if any(folder.glob(f"*/{config_file.name}")):  # a grid's, among the runs
        return LeftOut(folder, f"a folder of runs, which {folder}/* names")
    return LeftOut(folder, f"no run: there is no {config_file.name} in it")


def _unfinished(folder: Path, config_file: Path) -> LeftOut:
    """A run without a result. It may be running, stopped or failed; its folder does not tell which."""
    from minibert.files import read_json

    try:
        config = from_dict(read_json(config_file), str(config_file))
    except InputError as error:
        return LeftOut(folder, str(error))
    metrics = folder / "metrics.jsonl"
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    total = "" if config.max_steps else f" of {config.epochs}"
    reason = f"not finished: running, stopped or failed after epoch {done}{total}"
    return LeftOut(folder, reason, tuple(command_of(config, folder, resume=True)))
