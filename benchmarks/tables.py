"""What a benchmark shows: a table on the terminal, the same as CSV, and a number with its range."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from minibert.files import write_text

MACHINE = ("cpu", "cores", "threads", "torch")  # of what benchmarks.machine says; the log has the rest


def table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_csv(lines: Sequence[Sequence[str]], path: Path) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(text.getvalue(), path)


def show(
    columns: Sequence[str], lines: Sequence[Sequence[str]], machine: Mapping[str, object], out: Path | None
) -> None:
    """Print the table; with `out` write it there too, and in each line of it on which machine it was made."""
    print(table([columns, *lines]))
    if out:
        facts = tuple(str(machine[name]) for name in MACHINE)
        write_csv([(*columns, *MACHINE), *((*line, *facts) for line in lines)], out)


def with_range(values: Sequence[float], digits: int = 3) -> str:
    """The median, and between brackets the smallest and the largest: `0.750 [0.700, 0.810]`"""
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
