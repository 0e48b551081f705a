"""Files of one's own in the shapes of public ones, with sentences made up for the tests."""

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tiny_bert import WORDS

TOPICS = ["billing", "a broken screen", "Übergabe", "shipping"]


class Shape(NamedTuple):
    """A file, what train.py is told of it, and what it must find there."""

    write: Callable[[Path], Path]
    flags: list[str]
    classes: tuple[str, ...]
    range: tuple[float, float] | None = None
    ids: bool = False


def _text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(2, 9)))


def _rows(count: int, *columns: Callable[[random.Random, int], object]) -> list[list]:
    chance = random.Random(0)
    return [[column(chance, i) for column in columns] for i in range(count)]


def text(chance: random.Random, i: int) -> str:
    return f"{_text(chance)} {i}"


def quoted(chance: random.Random, i: int) -> str:
    """Every third row begins with a quote that nothing closes, as raw TSVs have it."""
    return f"{'' if i % 3 else chr(34)}{_text(chance)} {i}"


def number(chance: random.Random, i: int) -> int:
    return i


def one_of(*values: object) -> Callable[[random.Random, int], object]:
    return lambda chance, i: values[i % len(values)]


def delimited(name: str, separator: str, header: str, rows: list[list], plain: bool = False):
    def write(folder: Path) -> Path:
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            if plain:
                file.writelines("\t".join(map(str, row)) + "\n" for row in [header.split("\t"), *rows])
            else:
                csv.writer(file, delimiter=separator).writerows([header.split(separator), *rows])
        return folder / name

    return write


def jsonl(name: str, columns: list[str], rows: list[list]):
    def write(folder: Path) -> Path:
        whole = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        (folder / name).write_bytes(gzip.compress(whole.encode()) if name.endswith(".gz") else whole.encode())
        return folder / name

    return write


def told(*text_columns: str, label: str, more: tuple[str, ...] = ()) -> list[str]:
    return ["--text-columns", *text_columns, "--label-column", label, *more]


PLAIN = ("--quotes", "plain")
MULTILINE = one_of("good film, a film", "bad\nnot, 1\nthe", 'a "good" one')
SHAPES = {
    "quora": Shape(
        delimited(
            "questions.csv",
            ",",
            "id,qid1,qid2,question1,question2,is_duplicate",
            _rows(60, number, number, number, text, MULTILINE, one_of(0, 0, 1)),
        ),
        told("question1", "question2", label="is_duplicate"),
        ("0", "1"),
        ids=True,
    ),
    "sst2": Shape(
        delimited("train.tsv", "\t", "sentence\tlabel", _rows(60, quoted, one_of(0, 1)), plain=True),
        told("sentence", label="label", more=PLAIN),
        ("0", "1"),
    ),
    "mrpc": Shape(
        delimited(
            "msr.txt",
            "\t",
            "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            _rows(60, one_of(1, 0, 1), number, number, quoted, quoted),
            plain=True,
        ),
        told("#1 String", "#2 String", label="Quality", more=PLAIN),
        ("0", "1"),
    ),
    "tickets": Shape(
        jsonl("tickets.jsonl.gz", ["body", "queue"], _rows(60, text, one_of(*TOPICS))),
        told("body", label="queue"),
        tuple(sorted(TOPICS)),
    ),
    "twenty": Shape(
        delimited("news.csv", ";", "label;text", _rows(200, one_of(*range(1, 21)), text)),
        told("text", label="label"),
        tuple(map(str, range(1, 21))),
    ),
    "booleans": Shape(
        jsonl("flags.json", ["a", "b", "same"], _rows(40, text, text, one_of(True, False))),
        told("a", "b", label="same"),
        ("false", "true"),
    ),
    "scores": Shape(
        jsonl(
            "pairs.jsonl", ["id", "a", "b", "score"], _rows(60, number, text, text, one_of(0.1, 0.25, 1.0))
        ),
        told("a", "b", label="score"),
        (),
        (0, 1),
        ids=True,
    ),
    "three": Shape(
        delimited(
            "nli.csv",
            ",",
            "premise,hypothesis,gold",
            _rows(60, text, text, one_of("neutral", "entails", "denies")),
        ),
        told("premise", "hypothesis", label="gold"),
        ("denies", "entails", "neutral"),
    ),
}
