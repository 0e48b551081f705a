"""A search: what it chooses from, and how much of it. Imports neither torch nor Optuna.

What is compared fairly is searched apart, with as many trials each: every combination of task, input, method,
model and data is a space of its own. The other axes are what its trials choose from.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod, sqrt

from experiments.cells import (
    SETTINGS,
    Axis,
    Cell,
    Range,
    as_setting,
    cell_name,
    make_blocks,
    make_cell,
    ranged,
)
from minibert.errors import InputError
from training.cli import kind_of
from training.config import Config

KIND = ("task", "pair", "method", "model", "data")
INTEGERS = {one.name for one in fields(Config) if kind_of(one) is int}
NUMBERS = INTEGERS | {one.name for one in fields(Config) if kind_of(one) is float}
CHOICES = {"sampler": ("grid", "random", "tpe"), "pruner": ("median", "hyperband", "none")}


@dataclass(frozen=True)
class Plan:
    """A file's [search]: how trials are chosen, how many of each kind, which are stopped early, and more.

    `storage` is an Optuna URL; None stands for a journal in the grid's folder.
    """

    sampler: str = "tpe"
    trials: int | None = None
    pruner: str = "median"
    seed: int = 0
    storage: str | None = None


@dataclass(frozen=True)
class Space:
    """What the trials of one kind choose from, by setting, and what they have in common."""

    name: str
    common: Mapping[str, object]
    axes: Mapping[str, Axis]
    block: Mapping[str, Axis]

    def cell(self, number: int, chosen: Mapping[str, object]) -> Cell:
        """The run of a trial; names within a value are joined by +, as a study holds them."""
        told = self.common | {name: as_setting(name, value) for name, value in chosen.items()}
        given = {name: told[name] for name in SETTINGS if name in told}
        return make_cell(f"{self.name}-{number:03d}", given, self.block)

    def choices(self, name: str) -> list:
        """An axis's values, as a study holds them."""
        return ["+".join(one) if isinstance(one, tuple) else one for one in self.axes[name].values]

    def combinations(self) -> list[dict[str, object]]:
        return [dict(zip(self.axes, one, strict=True)) for one in product(*map(self.choices, self.axes))]

    def middle(self) -> Cell:
        """A trial of the first values of lists and the middles of ranges."""
        middle = self.cell(0, {name: self._some(name)[0] for name in self.axes})
        return replace(middle, name=self.name)  # not the first trial, which may be done

    def check(self) -> None:
        """Raises:
        InputError: if a value, the ends of ranges among them, is refused beside the middle of the others.
        """
        middle = {name: self._some(name)[0] for name in self.axes}
        for name in self.axes:
            for value in self._some(name):
                self.cell(0, middle | {name: value})

    def _some(self, name: str) -> list:
        axis = self.axes[name]
        if not ranged(axis):
            return self.choices(name)
        low, high = axis.values.low, axis.values.high
        middle = sqrt(low * high) if axis.values.log else (low + high) / 2
        return [round(middle) if name in INTEGERS else middle, low, high]


def read_plan(table: Mapping, where: str, given: Namespace) -> Plan:
    """The file's [search], with the flags in place of its own.

    Raises:
        InputError: for an unknown key, or a value that is none of its choices.
    """
    raw = table.get("search", {})
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: search: expected a table, as in [search], got {raw!r}")
    known = {one.name: one.type for one in fields(Plan)}
    flags = {
        "sampler": given.search,
        "trials": given.trials,
        "pruner": given.pruner,
        "storage": given.storage,
    }
    told = dict(raw) | {name: value for name, value in flags.items() if value is not None}
    for name, value in told.items():
        if name not in known:
            raise InputError(f"{where}: search: unknown key {name!r}; expected {', '.join(known)}")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise InputError(f"{where}: search.{name}: expected another type, got {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{where}: search.{name}: expected {', '.join(CHOICES[name])}; got {value!r}")
        if (least := {"trials": 1, "seed": 0}.get(name)) is not None and not least <= value < 2**31:
            raise InputError(f"{where}: search.{name}: expected at least {least}, got {value}")
    return Plan(**told)


def make_spaces(table: Mapping, where: str, plan: Plan) -> tuple[list[Space], Plan]:
    """The spaces of a search, each value checked, and the plan with its number of trials.

    Raises:
        InputError: for what makes no sense, or would give kinds a different number of trials.
    """
    spaces = [space for block in make_blocks(table, where) for space in spaces_of(block, where)]
    for space in spaces:
        if [one.name for one in spaces].count(space.name) > 1:
            raise InputError(f"{where}: {space.name} is searched by two tables; each kind has one budget")
        space.check()
    if plan.sampler != "grid":
        if plan.trials is None:
            raise InputError(f"{where}: search.trials: expected a number of trials, got none")
        return spaces, plan
    for space in spaces:
        for axis in space.axes.values():
            if ranged(axis):
                raise InputError(f"{axis.place}: a range has no grid; use random or tpe, or a list")
    sizes = {space.name: prod(len(axis.values) for axis in space.axes.values()) for space in spaces}
    least = min(sizes.values())
    trials = plan.trials or least
    if trials > least or (plan.trials is None and max(sizes.values()) > least):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"{where}: search.trials: expected at most {least}, for as many of each, with grids of {told}"
        )
    return spaces, replace(plan, trials=trials)


def spaces_of(block: Mapping[str, Axis], where: str) -> list[Space]:
    kinds = [name for name in KIND if name in block]
    axes = {name: axis for name, axis in block.items() if name not in KIND and not axis.settled}
    for name, axis in block.items():
        if ranged(axis) and name not in NUMBERS:
            raise InputError(f"{axis.place}: {name} is no number, so it has no range")
        if ranged(axis) and name in INTEGERS:
            whole(axis.values, axis.place)
    if "seed" in axes:
        raise InputError(f"{axes['seed'].place}: a search has one seed, or it would choose the luckiest")
    if not axes:
        raise InputError(f"{where}: a search needs axes beside {', '.join(KIND)}")
    settled = {name: axis.values[0] for name, axis in block.items() if axis.settled}
    spaces = []
    for values in product(*(block[name].values for name in kinds)):
        kind = dict(zip(kinds, values, strict=True))
        shown = ["task", "method", *(name for name in kinds if not block[name].settled)]
        name = cell_name({"task": Config.task, "method": Config.method} | kind, dict.fromkeys(shown))
        spaces.append(Space(name, settled | kind, axes, block))
    return spaces


def whole(values: Range, place: str) -> None:
    if not (isinstance(values.low, int) and isinstance(values.high, int)):
        raise InputError(f"{place}: expected whole numbers, got {values.low} to {values.high}")
