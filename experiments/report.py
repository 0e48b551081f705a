"""Runs -> a page: `python -m experiments.report runs/* --out report.html`, and report.md beside it."""

import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from experiments.blocks import Block, Cell, Commands, Heading, Paragraph, Table, markdown, page
from experiments.left_out import LeftOut
from experiments.listing import Run, read_runs
from experiments.plots import check_installed
from experiments.sections import Comparison
from minibert.errors import InputError
from minibert.files import check_output, write_text
from training.cli import Parser
from training.exit import run_command

TITLE = "Runs compared"


def report(runs: Sequence[Run], left_out: Sequence[LeftOut]) -> list[Block]:
    """A part for each task, model and data, whose scores compare; then what is in none of them.

    Raises:
        InputError: if two runs of a setting have the same seed.
    """
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.config.model, run.config.data].append(run)
    finished = len({run.folder for run in runs})
    count = f"{finished} finished run{'' if finished == 1 else 's'}"
    others = (
        f"; {len(left_out)} not finished or not readable, or repeating another, at the end"
        if left_out
        else ""
    )
    blocks: list[Block] = [Heading(TITLE, 1), Paragraph(f"{count}{others}.")]
    for group in groups.values():
        blocks += Comparison.of(group).blocks()
    return blocks + not_shown(left_out)


def not_shown(left_out: Sequence[LeftOut]) -> list[Block]:
    if not left_out:
        return []
    rows = [[Cell(one.folder.name), Cell(one.reason)] for one in left_out]
    commands = [shlex.join(one.command) for one in left_out if one.command]
    return [
        Heading("Not in the tables"),
        Paragraph("Nothing in a folder tells a run that goes on from one that was stopped or has failed."),
        Table(("run", "why"), rows),
        *([Commands("The commands that go on with those that have begun", commands)] if commands else []),
    ]


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path]:
    """The folders, and where the page goes. Raises InputError before anything is read."""
    parser = Parser(prog="python -m experiments.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        help="the page; Markdown goes beside it (report.html)",
    )
    given = parser.parse_args(arguments)
    if given.out.suffix != ".html":
        raise InputError(f"--out: expected a file that ends in .html, got {given.out}")
    for path in (given.out, given.out.with_suffix(".md")):
        check_output(path, "--out")
    check_installed()
    return given.runs, given.out


def main() -> int:
    folders, out = parse(sys.argv[1:])
    blocks = report(*read_runs(folders))
    write_text(page(TITLE, blocks), out)
    write_text(markdown(blocks), out.with_suffix(".md"))
    print(f"{out} and {out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
