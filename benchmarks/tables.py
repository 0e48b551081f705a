"""What a benchmark shows: a table on the terminal, the same as CSV, and a number with its range."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from minibert.errors import InputError


def table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_csv(lines: Sequence[Sequence[str]], path: Path) -> None:
    from minibert.files import write_text

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(text.getvalue(), path)


def check_out(path: Path | None, name: str = "--out") -> None:
    """Before anything is measured: raises InputError if a file cannot be written there."""
    if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise InputError(f"{name}: expected a file in a folder that can be written, got {path}")


def check_least(**numbers: tuple[int, int]) -> None:
    """Each as flag=(value, least). Raises InputError, naming the flag, for a value that is too small."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def with_range(values: Sequence[float], digits: int = 3) -> str:
    """The median, and between brackets the smallest and the largest: `0.750 [0.700, 0.810]`"""
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
