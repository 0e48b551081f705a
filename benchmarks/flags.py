"""The flags that benchmarks share, and their checks. Imports no torch."""

import argparse
import importlib.util
from pathlib import Path

from minibert.errors import InputError
from minibert.files import check_output, special
from training.machine import cores

DEVICES = ("cpu", "cuda")


def add_common(parser: argparse.ArgumentParser, rounds: int = 3) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help=f"each has a turn in each ({rounds})")
    parser.add_argument("--threads", type=int, default=cores(), help="of every process [all cores]")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of both sides (cpu)")
    parser.add_argument("--out", type=Path, help="write the table there, as CSV, and keep a log beside it")


def check_common(given: argparse.Namespace) -> None:
    check_least(rounds=(given.rounds, 1), threads=(given.threads, 1))
    for path in (given.out, log_beside(given.out)):
        check_output(path, "--out")
    if given.out and given.out == log_beside(given.out):
        raise InputError(f"--out: expected a name as FILE.csv, the log is {given.out}")


def check_data(path: Path | None) -> None:
    if path is not None and not path.is_dir():
        raise InputError(f"--data: expected a folder, got {str(path)!r}")


def check_installed(*peers: str) -> None:
    """Before anything is measured: raises InputError if a package that is compared with is not there."""
    missing = [name for name in peers if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the comparison needs {' and '.join(missing)}: pip install -e '.[bench]'")


def check_least(**numbers: tuple[int, int]) -> None:
    """Each as flag=(value, least). Raises InputError, naming the flag, for a value that is too small."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def log_beside(out: Path | None) -> Path | None:
    """Where the measurements of FILE.csv are kept: FILE.jsonl; beside a FIFO or a device nothing is."""
    return out.with_suffix(".jsonl") if out and not special(out) else None
