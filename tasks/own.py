"""A task of the user's own: from flags or a TOML file to a `Task`, by what its files say. Imports no torch.

    name = "reviews"            # [the file's name]
    about = "..."               # a sentence for the model card
    text = ["review"]           # one column, or the two of a pair
    label = "stars"
    classes = ["1", "2", "3"]   # or range = [0, 5]; inferred from the files where neither is given
    files = {train = "reviews.csv", dev = 0.1, test = "more.csv"}   # dev: a file, or a share of train's rows

A table with classes or a range is complete: it is what a run keeps, in config.json and as NAME.toml.
"""

import csv
import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minibert.errors import InputError
from minibert.files import check_regular, read_text
from tasks import TASKS
from tasks.base import Task
from tasks.reader import BOOLEANS, LAYOUTS, class_of, layout_of, number_of, read_rows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEV_SHARE = 0.1  # of the rows, where no dev file is given
EXAMPLES = 3  # rows that are shown
SHORT = 60  # characters of a text in them
MOST_WORDS = 1000  # classes named by words
# Whole numbers are classes if there are at most 10 different ones, or at most 100 that leave no gap.
FEW_NUMBERS, MOST_NUMBERS = 10, 100
UNTOLD_NAMES = ("train", "training", "data")  # files that are called after their folder
KEYS = ("name", "about", "text", "label", "classes", "range", "ordered", "id", "files")
SPLITS = ("train", "dev", "test")


class Described(NamedTuple):
    """A complete table, and what of it was inferred, as lines for people."""

    table: dict
    told: list[str]


def read_toml(path: Path) -> dict:
    """A task's table, its files by their whole path. Raises InputError if it is none."""
    text = read_text(path, stream=True)
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected TOML, got something else ({error})") from None
    check_table({"files": {}} | raw, str(path))
    return raw | {"files": absolute(raw["files"], path.parent), "name": raw.get("name") or name_of(path)}


def to_toml(table: Mapping) -> str:
    """JSON's texts, numbers and lists are TOML's too."""
    lines = [f"{key} = {_toml(table[key])}" for key in KEYS if key in table and key != "files"]
    files = [f"{split} = {_toml(place)}" for split, place in table["files"].items()]
    return "\n".join([*lines, "", "[files]", *files]) + "\n"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def absolute(files: Mapping[str, object], folder: Path) -> dict[str, object]:
    return {
        split: str((folder / place).absolute()) if isinstance(place, str) else place
        for split, place in files.items()
    }


def located(table: Mapping, folder: Path) -> dict:
    return {**table, "files": absolute(table["files"], folder)}


def name_of(file: Path) -> str:
    """reviews.csv.gz -> reviews, SST-2/train.tsv -> SST-2, sst.csv -> own-sst, which is not the built-in sst.

    Only what a name may hold.
    """
    file = file.absolute()
    stem = file.name.split(".")[0]
    stem = file.parent.name if stem.lower() in UNTOLD_NAMES else stem
    name = re.sub(r"[^\w-]+", "_", stem).strip("_") or "own"
    return f"own-{name}" if name in TASKS else name


def check_table(raw: dict, where: str) -> dict:
    """The table itself. Raises InputError if a key is unknown, or a value has the wrong type."""
    texts = raw.get("text")
    sound = {
        "name": isinstance(raw.get("name", ""), str) and re.fullmatch(r"[\w-]*", raw.get("name", "")),
        "about": isinstance(raw.get("about", ""), str),
        "text": isinstance(texts, list) and len(texts) in (1, 2) and all(map(_is_text, texts)),
        "label": _is_text(raw.get("label")),
        "id": raw.get("id", "") == "" or _is_text(raw["id"]),
        "ordered": isinstance(raw.get("ordered", False), bool),
        "classes": "classes" not in raw or _are_classes(raw["classes"]),
        "range": "range" not in raw or _is_range(raw["range"]),
        "files": "files" not in raw or _are_files(raw["files"]),
    }
    wanted = {
        "name": "letters, digits, _ and -",
        "text": "a list of one column, or of two",
        "label": "a column",
        "ordered": "true or false",
        "classes": "a list of at least two different texts",
        "range": "two numbers, the lower one first",
        "files": "a table of files named train, dev and test, or for dev a share between 0 and 1",
    }
    if unknown := raw.keys() - set(KEYS):
        raise InputError(f"{where}: expected the keys {', '.join(KEYS)}; got {min(unknown)!r}")
    for key, fine in sound.items():
        if not fine:
            got = reprlib.repr(raw.get(key))
            raise InputError(f"{where}: expected {key} to be {wanted.get(key, 'a text')}, got {got}")
    if "classes" in raw and "range" in raw:
        raise InputError(f"{where}: expected classes or a range, got both")
    if len({*texts, raw["label"]}) <= len(texts):
        raise InputError(f"{where}: expected different columns as text and label, got {raw['label']!r} twice")
    return raw


def _are_files(files: object) -> bool:
    if not isinstance(files, dict) or not files.keys() <= set(SPLITS) or "train" not in files:
        return False
    dev = files.get("dev", DEV_SHARE)
    share = isinstance(dev, float) and 0 < dev < 1
    return all(_is_text(place) for split, place in files.items() if split != "dev") and (
        share or _is_text(dev)
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_classes(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value) > 1


def _is_range(value: object) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(one) in (int, float) for one in value)
    return numbers and -math.inf < value[0] < value[1] < math.inf


@cache
def from_json(text: str) -> Task:
    """A complete table, as a run keeps it. Raises InputError if it is none."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise InputError(f"expected a task's table as JSON, got {reprlib.repr(text)}")
    check_table(raw, f"task {raw.get('name')!r}")
    if not raw.get("name") or not {"classes", "range"} & raw.keys():
        raise InputError(f"task {raw.get('name')!r}: expected a name, and classes or a range")
    return from_table(raw)


def to_json(table: Mapping) -> str:
    return json.dumps(table, ensure_ascii=False)


def from_table(raw: Mapping) -> Task:
    """Of a table that is sound; one without classes or a range is a task of scores, for its columns."""
    classes, files = raw.get("classes", ()), dict(raw.get("files", {}))
    dev = files.get("dev", DEV_SHARE)
    share = dev if isinstance(dev, float) else 0.0
    return Task(
        name=raw.get("name", ""),
        files=files | {"dev": files["train"] if share else dev} if files else {},
        text_columns=tuple(raw["text"]),
        label_column=raw["label"],
        num_outputs=len(classes) or 1,
        label_range=(0, len(classes) - 1) if classes else tuple(raw.get("range", (0, 1))),
        loss="cross-entropy" if classes else "mse",
        metrics=("accuracy",) if classes else ("pearson", "spearman"),
        about=raw.get("about", ""),
        ordered=raw.get("ordered", False),
        classes=tuple(classes),
        own=True,
        id_column=raw.get("id", "id"),
        dev_share=share,
    )


def placed(tables: Sequence[dict]) -> tuple[str, list[dict]]:
    """The folder of the first task's train file, and the tables, in which its files have names alone."""
    folder = Path(tables[0]["files"]["train"]).parent

    def name(place: object) -> object:
        return Path(place).name if isinstance(place, str) and Path(place).parent == folder else place

    return str(folder), [
        table | {"files": {split: name(place) for split, place in table["files"].items()}} for table in tables
    ]


def columns_of(path: Path) -> list[str]:
    """The column names that a file's first line or first JSON object gives; empty if it is damaged."""
    text = read_text(path)
    first = next((line for line in text.split("\n") if line.strip()), "")
    separator = layout_of(text, ())
    try:
        return (
            list(json.loads(first)) if not separator else next(csv.reader([first], delimiter=separator), [])
        )
    except ValueError:
        return []


def describe(raw: Mapping, quotes: str) -> Described:
    """The table made complete by what its files hold.

    Raises:
        InputError: with file:line, for files that cannot be read, columns that are not there, and labels
            that are of one value alone, or numbers in one row and words in another.
    """
    files = {"train": raw["files"]["train"], "dev": DEV_SHARE} | dict(raw["files"])
    table = dict(raw) | {"files": files}
    task = from_table(table)
    for place in set(task.files.values()):
        check_regular(Path(place))  # it is read more than once
    train = _look(Path(task.files["train"]), task, quotes)
    told = []
    if not {"classes", "range"} & table.keys():
        labels = [train] if task.dev_share else [train, _look(Path(task.files["dev"]), task, quotes)]
        found, why = _infer(labels, task.label_column)
        table |= found
        told.append(why)
    if "id" not in table:
        table["id"] = "id" if train.unique_ids else ""
    dev = f"{task.dev_share:g} of its rows, as many of each label" if task.dev_share else task.files["dev"]
    head = f"{' and '.join(task.text_columns)} -> {task.label_column}, of {train.count:,} rows"
    spread = _spread(train.labels) if "classes" in table else ""
    return Described(
        {key: table[key] for key in KEYS if key in table},
        [
            f"own task   {table['name']}: {head}; {train.path} is {train.layout}",
            f"           dev: {dev}",
            *(f"           {line}" for line in [*told, spread] if line),
            *(f"           {' | '.join(map(_short, texts))} -> {label}" for texts, label in train.examples),
        ],
    )


class Look(NamedTuple):
    """What a file's rows say. `labels` counts each label; `lines` has the line where it stands first."""

    path: Path
    layout: str
    count: int
    labels: Counter[str]
    lines: dict[str, int]
    examples: list[tuple[list[str], str]]
    unique_ids: bool


def _look(path: Path, task: Task, quotes: str) -> Look:
    columns = [*task.text_columns, task.label_column]
    layout = LAYOUTS[layout_of(read_text(path), columns)]
    labels, lines, ids, examples = Counter(), {}, set(), []
    count = 0
    for line, row in read_rows(path, task, True, quotes):
        count += 1
        ids.add(row.get("id"))
        if label := row.get(task.label_column, "").strip():
            label = class_of(label)
            labels[label] += 1
            lines.setdefault(label, line)
            if len(examples) < EXAMPLES:
                examples.append(([row.get(name, "") for name in task.text_columns], label))
    if not labels:
        raise InputError(f"{path}: expected rows with a {task.label_column}, got none")
    return Look(path, layout, count, labels, lines, examples, None not in ids and len(ids) == count)


def _infer(looks: Sequence[Look], column: str) -> tuple[dict, str]:
    """Classes of train's labels, in order, or a range of all files' scores; and a line that says so."""
    train = looks[0]
    words = [label for label in train.labels if number_of(label) is None]
    if words and len(words) < len(train.labels):
        number = next(label for label in train.labels if label not in words)
        first, other = sorted((train.lines[label], label) for label in (words[0], number))
        raise InputError(
            f"{train.path}:{other[0]}: expected {column} to be all numbers or all words, got {other[1]!r} "
            f"here and {first[1]!r} in line {first[0]}"
        )
    if len(train.labels) == 1:
        raise InputError(
            f"{train.path}: expected at least two labels, {column} is always {min(train.labels)!r}"
        )
    if words:
        return _words(train, column)
    numbers = sorted(map(float, train.labels))
    distinct, span = len(numbers), numbers[-1] - numbers[0] + 1
    if all(map(float.is_integer, numbers)) and (
        distinct <= FEW_NUMBERS or distinct == span and distinct <= MOST_NUMBERS
    ):
        classes = [str(int(one)) for one in numbers]
        told = f"{distinct} classes, as {column} has whole numbers: {_listed(classes)}"
        ends = f"{classes[0]} {classes[-1]}"
        return {"classes": classes, "ordered": distinct > 2}, f"{told} (--range {ends} makes them scores)"
    given = [number_of(label) for look in looks for label in look.labels]
    numbers = [one for one in given if one is not None]
    low, high = math.floor(min(numbers)), math.ceil(max(numbers))
    told = f"scores from {low} to {high} (--range LOW HIGH sets the range)"
    return {"range": [low, high]}, told


def _words(train: Look, column: str) -> tuple[dict, str]:
    classes = [name for name in BOOLEANS if name in train.labels]
    classes = sorted(train.labels) if len(classes) < len(train.labels) else classes
    if len(classes) > MOST_WORDS or len(classes) == train.count > FEW_NUMBERS:
        raise InputError(
            f"{train.path}: expected classes in {column}, got {len(classes):,} different texts in "
            f"{train.count:,} rows; is it the label column?"
        )
    return {"classes": classes}, f"{len(classes)} classes: {_listed(classes)}"


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _spread(labels: Counter[str]) -> str:
    total = sum(labels.values())
    (most, many), (least, few) = labels.most_common(1)[0], min(labels.items(), key=lambda one: one[1])
    return f"most often {most} ({many / total:.0%}), least often {least} ({few:,} rows)"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHORT else f"{text[:SHORT]}...")
