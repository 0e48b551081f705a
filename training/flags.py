"""The flags of train.py that change nothing of what a run computes. Imports no torch."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from minibert.errors import InputError
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
