"""Grids -> cells: every combination of the axes' values, each checked before anything runs. Imports no torch.

A grid is a table, as TOML has it: settings that are the same everywhere, `axes` with a list of values each,
and, where different methods get different axes, one `grid` table for each, whose lists are axes too and whose
other values are settled for it. Names within one value are joined by +, as in `targets = "query+value"`.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from pathlib import Path

from minibert.errors import InputError
from minibert.files import read_text
from training.config import Config, flag, from_dict, to_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TUPLES = {one.name for one in fields(Config) if one.type == tuple[str, ...]}
SETTINGS = [one.name for one in fields(Config)]
MOST = 10_000  # cells; more than that is a slip


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, for a search to choose from; evenly among their logarithms if `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Axis:
    """The values that a setting takes in turn, and where they stand; one that is `settled` is in no name."""

    place: str
    values: tuple | Range
    settled: bool = False


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its folder's name, what it is told, and the settings that makes."""

    name: str
    given: Mapping[str, object]
    config: Config

    def command(self, out: Path) -> list[str]:
        """Its run, started or continued, as arguments of Python."""
        arguments = [str(Path(__file__).parents[1] / "train.py")]
        for name, value in self.given.items():
            if isinstance(value, bool):
                arguments += [flag(name)] * value
            elif value != ():
                arguments += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
        return [*arguments, "--out", str(out), "--resume"]


def read_table(path: Path) -> dict:
    """Raises:
    InputError: if the file cannot be read, or is no TOML.
    """
    text = read_text(path, stream=True)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected TOML, got something else ({error})") from None


def make_cells(table: Mapping, where: str = "grid") -> list[Cell]:
    """The cells of a grid, in order, the last axis fastest.

    Raises:
        InputError: naming `where` and the key, for a grid that makes no sense, a cell whose settings are out
            of range or in conflict, or one that stands there twice.
    """
    blocks = make_blocks(table, where)
    size = sum(prod(len(axis.values) for axis in block.values() if not ranged(axis)) for block in blocks)
    if size > MOST:
        raise InputError(f"{where}: expected at most {MOST:,} cells, got {size:,}")
    cells = [cell for block in blocks for cell in combinations(block, names_in(blocks))]
    by_config: dict[Config, str] = {}
    for cell in cells:
        if cell.config in by_config:
            other = by_config[cell.config]
            raise InputError(f"{where}: cells {other} and {cell.name} are the same, one is too many")
        by_config[cell.config] = cell.name
    if len({cell.name for cell in cells}) < len(cells):
        names = sorted(cell.name for cell in cells)
        twice = next(a for a, b in zip(names, names[1:], strict=False) if a == b)
        raise InputError(f"{where}: two cells would be called {twice}; give their folders different names")
    return cells


def ranged(axis: Axis) -> bool:
    return isinstance(axis.values, Range)


def make_blocks(table: Mapping, where: str) -> list[dict[str, Axis]]:
    """For each `grid` table, or the whole if there is none, its settings and their values.

    Raises:
        InputError: for an unknown key, an axis that is empty or no list, or a value that stands there twice.
    """
    axes, grids = table.get("axes", {}), table.get("grid", [{}])
    if not isinstance(axes, Mapping):
        raise InputError(f"{where}: axes: expected a table, as in [axes], got {axes!r}")
    if not isinstance(grids, Sequence) or not grids or not all(isinstance(one, Mapping) for one in grids):
        raise InputError(f"{where}: grid: expected tables, as in [[grid]], got {grids!r}")
    common = {
        name: read_axis(name, value, f"{where}: {name}", settled=True)
        for name, value in table.items()
        if name not in ("axes", "grid", "search")
    }
    common |= {name: read_axis(name, value, f"{where}: axes.{name}") for name, value in axes.items()}
    blocks = []
    for i, grid in enumerate(grids, start=1):
        own = {
            name: read_axis(name, value, f"{where}: grid[{i}].{name}", not isinstance(value, list | Mapping))
            for name, value in grid.items()
        }
        together = common | own
        blocks.append({name: together[name] for name in SETTINGS if name in together})
    return blocks


def read_axis(name: str, value: object, place: str, settled: bool = False) -> Axis:
    if name not in SETTINGS:
        raise InputError(f"{place}: unknown key {name!r}; expected a setting, as train.py --help lists them")
    if settled:
        return Axis(place, (as_setting(name, value),), settled=True)
    if isinstance(value, Mapping):
        return Axis(place, read_range(value, place))
    if not isinstance(value, list) or not value:
        got = "an empty one" if value == [] else repr(value)
        raise InputError(f"{place}: expected a list of values, got {got}")
    values = tuple(as_setting(name, one) for one in value)
    for i, one in enumerate(values):
        if one in values[:i]:
            raise InputError(f"{place}: {one!r} stands there twice")
    return Axis(place, values)


def read_range(raw: Mapping, place: str) -> Range:
    if {"low", "high"} <= raw.keys() <= {"low", "high", "log"}:
        low, high, log = raw["low"], raw["high"], raw.get("log", False)
        numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (low, high))
        if numbers and isinstance(log, bool) and low < high and (low > 0 or not log):
            return Range(low, high, log)
    wanted = "{low = 1e-5, high = 1e-3, log = true}, low below high, and above 0 if log"
    raise InputError(f"{place}: expected a range as {wanted}; got {dict(raw)!r}")


def as_setting(name: str, value: object) -> object:
    """Several names as the tuple that `Config` has."""
    if name not in TUPLES:
        return value
    names = value.split("+") if isinstance(value, str) and value else value or []
    return tuple(names) if isinstance(names, list) else value


def names_in(blocks: Sequence[Mapping[str, Axis]]) -> list[str]:
    """The settings that a cell's name has: all axes, and what is settled differently in different tables."""
    varied = []
    for name in SETTINGS:
        axes = [block[name] for block in blocks if name in block]
        values = [axis.values for axis in axes]
        same = len(axes) in (0, len(blocks)) and all(one == values[0] for one in values)
        if not same or not all(axis.settled for axis in axes):
            varied.append(name)
    return varied


def combinations(block: Mapping[str, Axis], named: Sequence[str]) -> Iterator[Cell]:
    """The cartesian product of a table's values."""
    for name, axis in block.items():
        if ranged(axis):
            raise InputError(f"{axis.place}: a range of {name} is for a search: [search], or --search")
    for values in product(*(axis.values for axis in block.values())):
        given = dict(zip(block, values, strict=True))
        yield make_cell(cell_name(given, named), given, block)


def make_cell(name: str, given: Mapping[str, object], block: Mapping[str, Axis]) -> Cell:
    """Raises:
    InputError: if `Config` refuses the settings, naming the cell and where the setting at fault stands.
    """
    raw = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    try:
        return Cell(name, given, from_dict(to_dict(Config()) | raw, f"cell {name}"))
    except InputError as error:
        found = re.search(r": (?:--|expected )([a-z_-]+)", str(error))
        key = found[1].replace("-", "_") if found else ""
        place = f"{block[key].place}: " if key in block else ""
        raise InputError(f"{place}{error}") from None


def cell_name(given: Mapping[str, object], named: Sequence[str]) -> str:
    """As in `sts-lora-lr0.001-seed0`: of names the value alone, of numbers the setting before it."""
    parts = [part(name, given[name]) for name in named if name in given]
    return "-".join(
        parts or [part(name, given.get(name, getattr(Config, name))) for name in ("task", "method")]
    )


def part(name: str, value: object) -> str:
    if isinstance(value, tuple):
        text = "+".join(map(str, value)) or "none"
    elif isinstance(value, str):
        text = Path(value).name if name in ("model", "data") else value
    else:
        text = f"{name.replace('_', '-')}{value}"
    return re.sub(r"[^\w.+=@,-]+", "_", text).lstrip(".") or "_"
