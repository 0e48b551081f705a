"""The command line of train.py: a flag for every field of `Config`, and flags.py's. Imports no torch."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from types import UnionType
from typing import NoReturn, get_args

from minibert.errors import InputError
from minibert.files import check_output, read_json
from tasks.own import describe, from_json, placed, read_toml, to_json
from training.config import PRECISIONS, Config, check, flag, from_dict
from training.flags import add_flags, check_flags, own_table

TASK_DEFAULT = Config.task
# What a run's folder, its adapter's or a model's holds that other commands read.
READ = ("config.json", "result.json", "*.jsonl", "*.safetensors", "tokenizer.json", "adapter*/*", "model/*")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line like all others. Paths are text in UTF-8, and not empty."""

    def __init__(self, *args: object, **settings: object):
        super().__init__(*args, **settings)
        self.color = False  # Python 3.14's codes would be shown, as all of a text's are
        for kind in (None, str, Path):
            self.register("type", kind, path_in_utf8 if kind is Path else in_utf8)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def in_utf8(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python keeps odd bytes
        raise argparse.ArgumentTypeError(f"expected UTF-8, got {text!r}")
    return text


def path_in_utf8(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(in_utf8(text))


def check_beside(output: Path | None, flag: str, run: Path, *read: Path) -> None:
    """`check_output`, for a command that reads a run's or a model's folder, and maybe other files."""
    check_output(output, flag, [*read, *(file for name in READ for file in run.glob(name))])


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
    add_flags(parser)
    return parser


def add_computing(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--precision` of the commands that use a finished run."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one]")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="fp32 gives the same digits on every CPU [the faster one here]",
    )


def kind_of(one: Field) -> type:
    """The type of a field's value, where it has one."""
    if not isinstance(one.type, UnionType):
        return one.type
    return next(kind for kind in get_args(one.type) if kind is not type(None))


def _shown(default: object) -> str:
    return " ".join(default) or "none" if isinstance(default, tuple) else str(default)


def parse(arguments: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The config, and what is no part of it: out, resume, track, profile, inferred, ...

    Raises:
        InputError: for a flag or a value that makes no sense.
    """
    parser = build_parser()
    given = parser.parse_args(arguments)
    written = None
    if given.config:
        written = read_config(given.config)
        parser.set_defaults(**chosen(written))
        given = parser.parse_args(arguments)
    settings = {one.name: getattr(given, one.name) for one in fields(Config)}
    settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    check_flags(given)
    config = check(Config(**settings | own_settings(given)))
    if given.dry_run and not given.inferred:
        raise InputError("--dry-run: says how your own files are read; expected --train or --task FILE.toml")
    given.overridden = differing(written, config) if written else []
    return config, given


def own_settings(given: argparse.Namespace) -> dict[str, object]:
    """The settings that --train, or a --task with files among its names, comes to; `given.inferred` says how.

    Raises:
        InputError: for a task, or files of it, that make no sense.
    """
    names, given.inferred = given.task.split("+"), []
    if table := own_table(given):
        if given.task not in (TASK_DEFAULT, table["name"]):
            raise InputError(
                f"--task {given.task}: --train describes a task; join several as --task FILE.toml"
            )
        tables = {table["name"]: table}
        names = [table["name"]]
    else:
        tables = {name: read_toml(path_in_utf8(name)) for name in names if name.endswith(".toml")}
    if not tables:
        return {}
    described = {name: describe(table, given.quotes) for name, table in tables.items()}
    given.inferred = [line for one in described.values() for line in one.told]
    names = [described[name].table["name"] if name in tables else name for name in names]
    own = [one.table for one in described.values()]
    settings = {"task": "+".join(names)}
    if len(own) == len(names):
        settings["data"], own = placed(own)
    others = [text for text in given.own if from_json(text).name not in {one["name"] for one in own}]
    return settings | {"own": (*others, *map(to_json, own))}


def read_config(path: Path) -> Config:
    """Raises:
    InputError: if the file is no run's config.json.
    """
    return from_dict(read_json(path, stream=True), str(path))


def differing(one: Config, other: Config) -> list[str]:
    """The settings in which the second differs from the first: `rank 16 (8)`"""
    names = [field.name for field in fields(Config) if getattr(one, field.name) != getattr(other, field.name)]
    return [f"{name} {_shown(getattr(other, name))} ({_shown(getattr(one, name))})" for name in names]


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
