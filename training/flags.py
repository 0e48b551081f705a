"""The flags of train.py that change nothing of what a run computes. Imports no torch."""

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from minibert.errors import InputError
from tasks.own import DEV_SHARE, absolute, check_table, columns_of, name_of
from training.tracking import TRACKERS


@dataclass(frozen=True)
class Keeping:
    """A checkpoint is written at each epoch's end, and `steps` steps or `minutes` minutes after the last.

    The last `kept` stay.
    """

    steps: int | None = None
    minutes: float = 10.0
    kept: int = 2


def add_flags(parser: argparse.ArgumentParser) -> None:
    default = Keeping()
    parser.add_argument("--out", type=Path, help="the run's folder [runs/TASK-METHOD-TIME]")
    add_own_flags(parser)
    about = "the settings of RUN/config.json; flags given beside it override them"
    parser.add_argument("--config", type=Path, metavar="FILE", help=about)
    parser.add_argument(
        "--resume", action="store_true", help="continue the run that lies in --out, or start it there"
    )
    about = "the same, though settings, data, model or versions are others; result.json says so"
    parser.add_argument("--resume-anyway", action="store_true", help=about)
    about = "also save the run's state after so many steps [at each epoch's end]: docs/resume.md"
    parser.add_argument("--checkpoint-steps", type=int, metavar="STEPS", help=about)
    about = f"and after so many minutes ({default.minutes:g})"
    parser.add_argument(
        "--checkpoint-minutes", type=float, default=default.minutes, metavar="MINUTES", help=about
    )
    about = f"so many of them are kept ({default.kept})"
    parser.add_argument("--checkpoints", type=int, default=default.kept, metavar="N", help=about)
    watch = {"nargs": "+", "choices": TRACKERS, "metavar": "TRACKER", "default": ()}
    parser.add_argument("--track", **watch, help=f"also log the run to {' or '.join(TRACKERS)}, or both")
    about = "say where the time of so many steps went, in the run's profile.txt and trace.json"
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help=about)
    parser.add_argument(
        "--overfit-batch",
        action="store_true",
        help="train on one batch until its loss is near 0: the first thing to try if something is wrong",
    )


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("your own data", "csv, tsv or jsonl, also as .gz: docs/your-data.md")
    own.add_argument("--train", type=Path, metavar="FILE", help="the rows to train on")
    own.add_argument("--dev", metavar="FILE|SHARE", help=f"others, or a share of them ({DEV_SHARE})")
    own.add_argument("--test", type=Path, metavar="FILE", help="rows to predict; labels are optional [none]")
    own.add_argument("--text-columns", nargs="+", metavar="COLUMN", help="one text, or the two of a pair")
    own.add_argument("--label-column", metavar="COLUMN", help="words, numbers, true and false")
    own.add_argument(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="labels are scores of this range [inferred]",
    )
    own.add_argument("--dry-run", action="store_true", help="say how the files are read, and stop")


def own_table(given: argparse.Namespace) -> dict | None:
    """The task that --train and the flags beside it describe, its files by their whole path.

    Raises:
        InputError: for one flag without the others.
    """
    beside = ("dev", "test", "text_columns", "label_column", "range")
    if given.train is None:
        if lone := [name for name in beside if getattr(given, name) is not None]:
            raise InputError(f"--{lone[0].replace('_', '-')}: expected together with --train FILE, got none")
        return None
    for name in ("text_columns", "label_column"):
        if not getattr(given, name):
            columns = ", ".join(columns_of(given.train))
            raise InputError(f"--{name.replace('_', '-')}: expected of {given.train}'s columns: {columns}")
    if len(given.text_columns) > 2:
        raise InputError(f"--text-columns: expected one or two, got {len(given.text_columns)}")
    table = {"name": name_of(given.train), "text": given.text_columns, "label": given.label_column}
    if given.range:
        table["range"] = [int(one) if one.is_integer() else one for one in given.range]
    files = {"train": str(given.train), "dev": given.dev, "test": given.test and str(given.test)}
    with contextlib.suppress(ValueError):  # a file's name
        files["dev"] = float(given.dev) if given.dev else None
    if isinstance(files["dev"], float) and not 0 < files["dev"] < 1:
        raise InputError(f"--dev: expected a file, or a share between 0 and 1, got {given.dev}")
    files = absolute({split: place for split, place in files.items() if place is not None}, Path())
    return check_table(table | {"files": files}, "--train")


def check_flags(given: argparse.Namespace) -> None:
    """Raises InputError, naming the flag, for a value out of range or two flags in conflict."""
    for name in ("resume", "resume_anyway"):
        if getattr(given, name) and given.out is None:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: expected --out, the folder of the run to continue")
    given.resume = given.resume or given.resume_anyway
    if given.overfit_batch and given.out is not None:
        raise InputError("--overfit-batch: writes nothing, so it goes without --out")
    if given.overfit_batch and given.track:
        raise InputError("--overfit-batch: shows its loss itself, so it goes without --track")
    if given.overfit_batch and given.profile:
        raise InputError("--overfit-batch: has no folder for a profile, so it goes without --profile")
    if given.profile < 0:
        raise InputError(f"--profile: expected a number of steps, got {given.profile}")
    for name, value in (("steps", given.checkpoint_steps), ("", given.checkpoints)):
        if value is not None and value < 1:
            flag = f"--checkpoint-{name}" if name else "--checkpoints"
            raise InputError(f"{flag}: expected a whole number of at least 1, got {value}")
    if math.isnan(given.checkpoint_minutes) or given.checkpoint_minutes <= 0:
        raise InputError(f"--checkpoint-minutes: expected a number above 0, got {given.checkpoint_minutes}")


def keeping(given: argparse.Namespace) -> Keeping:
    return Keeping(given.checkpoint_steps, given.checkpoint_minutes, given.checkpoints)
