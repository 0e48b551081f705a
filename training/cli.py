"""The command line of train.py: a flag for every field of `Config`. Imports no torch."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from types import UnionType
from typing import NoReturn, get_args

from minibert.errors import InputError
from training.config import Config, check, flag
from training.tracking import TRACKERS


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def build_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Fine-tune a BERT-size encoder on sentence tasks. [..]: the default, where it depends.",
        allow_abbrev=False,
    )
    for one in fields(Config):
        kind = kind_of(one)
        text = one.metadata["help"].replace("%", "%%")
        shown = "" if one.default is None or kind is bool else f" ({_shown(one.default)})"
        if kind is bool:
            parser.add_argument(flag(one.name), action="store_true", help=text)
        elif one.metadata["names"]:
            parser.add_argument(
                flag(one.name),
                nargs="+",
                default=one.default,
                metavar=one.metadata["names"],
                help=text + shown,
            )
        else:
            choices = one.metadata["choices"]
            metavar = "{" + ",".join(choices) + "}" if choices else one.name.split("_")[-1].upper()
            parser.add_argument(
                flag(one.name), type=kind, default=one.default, metavar=metavar, help=text + shown
            )
    parser.add_argument("--out", type=Path, help="the run's folder [runs/TASK-METHOD-TIME]")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run that lies in --out, or start it there"
    )
    watch = {"nargs": "+", "choices": TRACKERS, "metavar": "TRACKER", "default": ()}
    parser.add_argument("--track", **watch, help=f"also log the run to {' or '.join(TRACKERS)}, or both")
    about = "say where the time of so many steps went, in the run's profile.txt and trace.json"
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help=about)
    parser.add_argument(
        "--overfit-batch",
        action="store_true",
        help="train on one batch until its loss is near 0: the first thing to try if something is wrong",
    )
    return parser


def kind_of(one: Field) -> type:
    """The type of a field's value, where it has one."""
    if not isinstance(one.type, UnionType):
        return one.type
    return next(kind for kind in get_args(one.type) if kind is not type(None))


def _shown(default: object) -> str:
    return " ".join(default) or "none" if isinstance(default, tuple) else str(default)


def parse(arguments: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The config, and what is no part of it: out, resume, track, profile, overfit_batch.

    Raises:
        InputError: for a flag or a value that makes no sense.
    """
    given = build_parser().parse_args(arguments)
    settings = {one.name: getattr(given, one.name) for one in fields(Config)}
    settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    config = check(Config(**settings))
    if given.resume and given.out is None:
        raise InputError("--resume: expected --out, the folder of the run to continue")
    if given.overfit_batch and given.out is not None:
        raise InputError("--overfit-batch: writes nothing, so it goes without --out")
    if given.overfit_batch and given.track:
        raise InputError("--overfit-batch: shows its loss itself, so it goes without --track")
    if given.overfit_batch and given.profile:
        raise InputError("--overfit-batch: has no folder for a profile, so it goes without --profile")
    if given.profile < 0:
        raise InputError(f"--profile: expected a number of steps, got {given.profile}")
    return config, given


def chosen(config: Config) -> dict[str, object]:
    """The settings of a checked config that are not what the others make them by default, by name.

    So of a LoRA run with rank 16 and alpha 32 the rank alone; for its alpha is twice the rank unless told.
    """
    settings = {}
    for one in fields(Config):
        if getattr(config, one.name) == one.default:
            continue
        try:
            by_default = check(replace(config, **{one.name: one.default})) == config
        except InputError:  # without it, the others are in conflict
            by_default = False
        if not by_default:
            settings[one.name] = getattr(config, one.name)
    return settings


def command_of(config: Config, out: Path | None = None, resume: bool = False) -> list[str]:
    """The command that makes a run of a checked config, as arguments: `parse` of them gives the config."""
    words = ["python", "train.py"]
    for name, value in chosen(config).items():
        if isinstance(value, bool):
            words.append(flag(name))
        elif isinstance(value, tuple):
            words += [flag(name), *value]
        elif str(value).startswith("-"):  # which on its own would look like a flag
            words.append(f"{flag(name)}={value}")
        else:
            words += [flag(name), str(value)]
    words += ["--out", str(out)] if out else []
    return words + (["--resume"] if resume else [])
