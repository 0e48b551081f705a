"""A grid's cells, run to the end: `run_cells(make_cells(table), folder)`, then `records`."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import IO

from experiments.cells import Cell
from experiments.pool import GridFolder, run_all
from experiments.summary import Record, distinct, lines, markdown, read_records, rows
from minibert.errors import InputError
from minibert.hub import is_local, resolve
from training.build import complete, read_splits
from training.config import Config, to_dict


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int = 1, say: Callable[[str], None] = print
) -> tuple[int, dict[str, str]]:
    """Run the cells that are not finished, each in `out`/NAME; the signal that stopped it or 0, and failures.

    Several processes may do so at once on one folder: they share the cells, and each waits for all.

    Raises:
        InputError: if the folder cannot be written, or has a run of a cell's name with other settings.
    """
    folder = GridFolder(out)
    for cell in cells:
        check_same(cell, folder.run(cell.name))
    folder.make()
    work = GridWork(cells, folder, jobs, say)
    say(f"{len(cells)} cells in {out}, {len(work.finished)} of them finished")
    return run_all(work, folder, jobs), work.failed


OF_DATA = ("data", "task", "strict", "quotes", "own")  # the settings that say what is read


def check_data(cells: Sequence[Cell]) -> None:
    """Read the cells' data, and the config.json of each model that is here: mistakes show before any run.

    Raises:
        InputError: if a cell's data, or its model, cannot be used.
    """
    read, find = cache(read_splits), cache(resolve)
    for cell in cells:
        config = cell.config
        try:
            splits = read(replace(Config(), **{name: getattr(config, name) for name in OF_DATA}))
            if is_local(config.model):
                complete(config, find(config.model), splits)
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from None


def listing(cells: Sequence[Cell], out: Path) -> str:
    """A line a cell. Raises InputError as `check_data` does."""
    check_data(cells)
    folder = GridFolder(out)
    told = [cell.name + ("  finished" if folder.result(cell.name).exists() else "") for cell in cells]
    return "\n".join([*told, f"{len(cells)} cells"])


def records(cells: Sequence[Cell], out: Path) -> list[Record]:
    """The finished runs among the cells, in order, those of several tasks once for each."""
    folder = GridFolder(out)
    done = [cell for cell in cells if folder.result(cell.name).exists()]
    return read_records([folder.run(cell.name) for cell in done])


def report(cells: Sequence[Cell], out: Path) -> str:
    """The table of the finished runs, written to `out`/results.csv too, a line per run and task."""
    from minibert.files import write_text

    found = records(cells, out)
    write_text(lines(found), out / "results.csv")
    different, _ = distinct(found)  # a search may draw a setting twice
    return markdown(rows(different)) if found else "no finished run"


def check_same(cell: Cell, run: Path) -> None:
    """Raises:
    InputError: if the run that lies there was made with other settings.
    """
    path = run / "config.json"
    if not path.exists():
        return
    from minibert.files import read_json

    made, wanted = read_json(path), to_dict(cell.config)
    for one in fields(Config):
        value = wanted[one.name]
        if one.name in ("model", "data") and Path(str(value)).is_dir():
            value = str(Path(value).absolute())
        if value in (None, "auto") or one.name not in made:  # what the run decided, or did not know yet
            continue
        if made[one.name] != value:
            was, now = made[one.name], value
            raise InputError(
                f"{run}: was made with {one.name} {was!r}, the grid says {now!r}; use another --out"
            )


class GridWork:
    """A fixed list of cells, for a pool.

    Attributes:
        finished: names of the cells that are, whoever ran them; `failed` has others' errors.
    """

    def __init__(self, cells: Sequence[Cell], folder: GridFolder, jobs: int, say: Callable[[str], None]):
        self.folder, self.jobs, self.say = folder, jobs, say
        self.total = len(cells)
        self.finished = [cell.name for cell in cells if folder.result(cell.name).exists()]
        self.failed: dict[str, str] = {}
        self.waiting = [cell for cell in cells if cell.name not in self.finished]
        self.before = {cell.name: self._error_written(cell) for cell in self.waiting}

    def _error_written(self, cell: Cell) -> int:
        path = self.folder.about(cell.name, "error")
        return path.stat().st_mtime_ns if path.exists() else 0

    def take(self) -> tuple[Cell, IO] | None:
        for cell in list(self.waiting):
            lock = self.folder.lock(cell.name)
            if lock is None:  # another process has it: we come back to it
                continue
            self.waiting.remove(cell)
            # Another process may have ended it since; one that failed before we began is tried again.
            failed = self._error_written(cell) != self.before[cell.name] and self.folder.error(cell.name)
            if not failed and not self.folder.result(cell.name).exists():
                return cell, lock
            lock.close()
            self.ended(cell, failed or "")
        return None

    def expects_more(self) -> bool:
        return bool(self.waiting)

    def prunes(self, cell: Cell) -> bool:
        return False

    def ended(self, cell: Cell, error: str) -> None:
        if error:
            self.failed[cell.name] = error
        else:
            self.finished.append(cell.name)
        done = len(self.finished) + len(self.failed)
        outcome = f"failed: {error}" if error else outcome_of(self.folder, cell)
        self.say(f"[{done}/{self.total}] {cell.name}  {outcome}{self._time_left(done)}")

    def _time_left(self, done: int) -> str:
        known = [seconds for name in self.finished if not isnan(seconds := self.folder.seconds(name))]
        if done == self.total or not known:
            return ""
        return f", about {duration((self.total - done) * fmean(known) / self.jobs)} to go"


def outcome_of(folder: GridFolder, cell: Cell) -> str:
    from minibert.files import read_json
    from training.report import numbers

    dev = numbers(read_json(folder.result(cell.name))["dev"])
    return f"dev {dev}, {duration(folder.seconds(cell.name))}"


def duration(seconds: float) -> str:
    """As in 12 s, 4 min, 1.5 h."""
    if isnan(seconds):
        return "time unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
