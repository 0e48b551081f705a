"""Run a grid of experiments: `python -m experiments.grid FILE.toml --out FOLDER`, or by flags with values.

Every setting of train.py can have several values; each combination is a run, FOLDER/<what differs>. The same
command again goes on: finished runs are left alone, failed ones are tried again. docs/grids.md says more.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

from experiments.cells import Cell, as_setting, make_cells, read_table
from minibert.errors import InputError
from training.cli import Parser, kind_of
from training.config import Config, flag
from training.exit import run_command

say = partial(print, flush=True)


def build_parser() -> Parser:
    parser = Parser(prog="python -m experiments.grid", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.toml", help="the grid; flags override it")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--dry-run", action="store_true", help="list the cells, and check their data")
    search = parser.add_argument_group("search, by Optuna", "instead of every combination")
    search.add_argument("--search", choices=("grid", "random", "tpe"), help="how trials are chosen")
    search.add_argument("--trials", type=int, help="trials of each method, task, input, model and data")
    search.add_argument(
        "--pruner", choices=("median", "hyperband", "none"), help="which to stop early (median)"
    )
    search.add_argument("--storage", help="an Optuna storage URL [a journal in the folder]")
    settings = parser.add_argument_group(
        "settings",
        "one value, or several for an axis; names of one value joined by +; LOW:HIGH[:log] to search",
    )
    for one in fields(Config):
        kind = as_value(one.name, kind_of(one))
        text = one.metadata["help"].replace("%", "%%")
        settings.add_argument(flag(one.name), nargs="+", type=kind, metavar=one.name.upper(), help=text)
    return parser


def as_value(name: str, kind: type) -> Callable[[str], object]:
    """Text -> a value of a setting, or a range."""

    def convert(text: str) -> object:
        if kind is bool:
            return {"true": True, "false": False}[text]
        if kind in (int, float):
            if found := re.fullmatch(r"([^:]+):([^:]+)(:log)?", text):
                return {"low": kind(found[1]), "high": kind(found[2]), "log": bool(found[3])}
            return kind(text)
        return as_setting(name, text)

    def checked(text: str) -> object:
        try:
            return convert(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None

    return checked


def overridden(table: Mapping, given: argparse.Namespace) -> dict:
    """The table with the flags' settings in place of its own, wherever those stand."""
    told = {one.name: getattr(given, one.name) for one in fields(Config) if getattr(given, one.name)}

    def rest(part: object) -> object:
        return {k: v for k, v in part.items() if k not in told} if isinstance(part, Mapping) else part

    result, axes = rest(table), rest(table.get("axes", {}))
    if isinstance(table.get("grid"), list):
        result["grid"] = [rest(one) for one in table["grid"]]
    for name, values in told.items():
        if len(values) > 1:
            axes[name] = list(values)
        elif isinstance(values[0], Mapping):
            axes[name] = values[0]
        else:
            result[name] = list(values[0]) if isinstance(values[0], tuple) else values[0]
    return result | {"axes": axes}


def main() -> int:
    given = build_parser().parse_args()
    if given.jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {given.jobs}")
    where = str(given.file or "flags")
    table = overridden(read_table(given.file) if given.file else {}, given)
    if given.search or "search" in table:
        from experiments.search import run_search

        return run_search(table, where, given, say)
    if given.trials or given.storage or given.pruner:
        raise InputError("--trials, --pruner, --storage: expected --search, or [search] in the file")
    cells = make_cells(table, where)
    if given.dry_run:
        from experiments.runs import listing

        say(listing(cells, given.out))
        return 0
    return run_grid(cells, given.out, given.jobs)


def run_grid(cells: list[Cell], out: Path, jobs: int) -> int:
    from experiments.runs import report, run_cells

    stopped, failed = run_cells(cells, out, jobs, say)
    if stopped:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + stopped
    say(report(cells, out))
    for name, error in failed.items():
        print(f"error: {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
