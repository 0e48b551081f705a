"""Runs small enough for tests: a few rows of data for each task, and the commands called in this process."""

import contextlib
import csv
import io
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tiny_bert import WORDS

import train
from training.config import Config, check
from training.exit import run_command

ROWS = {"train": 24, "dev": 10, "test": 5}
BATCH = 8  # so an epoch has three steps
FILES = {"sst": "ids-sst-{}.csv", "qqp": "quora-{}.csv", "sts": "sts-{}.csv"}
LABELS = {"sst": ("sentiment", 5), "qqp": ("is_duplicate", 2), "sts": ("similarity", 6)}

# What differs between two equal runs: the time and the memory they took.
TIMES = {"seconds", "train_seconds", "tokens_per_second", "peak_memory_mib", "memory_above_start_mib"}


def write_data(folder: Path, rows: Mapping[str, int] = ROWS) -> Path:
    """Data files of all three tasks, laid out as the course's are: tabs, a nameless first column."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for task, name in FILES.items():
        texts = ["sentence"] if task == "sst" else ["sentence1", "sentence2"]
        label, classes = LABELS[task]
        for split, count in rows.items():
            columns = ["id", *texts] if split == "test" else ["id", *texts, label]
            lines = ["\t".join(["", *columns])]
            for i in range(count):
                words = [" ".join(chance.choices(WORDS, k=chance.randint(2, 9))) for _ in texts]
                given = [] if split == "test" else [str(float(chance.randrange(classes)))]
                lines.append("\t".join([str(i), f"{split}{i}", *words, *given]))
            file = name.format("test-student" if split == "test" else split)
            (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(model: Path, data: Path, /, **changes) -> Config:
    """A run of two epochs in fp32, but for `changes`."""
    small = {"max_length": 32, "batch_size": BATCH, "epochs": 2, "precision": "fp32", "lr": 0.01}
    return check(Config(model=str(model), data=str(data), **small | changes))


def flags(model: Path, data: Path, /, **changes) -> list[str]:
    """The same as arguments of train.py."""
    small = {"max_length": 32, "batch_size": BATCH, "epochs": 2, "precision": "fp32", "lr": 0.01}
    arguments = []
    for name, value in ({"model": model, "data": data} | small | changes).items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line it says on stderr."""
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.strip()


def call(main: Callable[[], int], *arguments: object) -> Ended:
    """A command, as its script calls it, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["command", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run_command(main)
    return Ended(code, out.getvalue(), err.getvalue())


def finished_runs(
    model: Path, data: Path, folder: Path, kinds: Mapping[str, Mapping], **common
) -> Callable[[str], Path]:
    """By kind the folder of a finished run, made when it is first asked for; not to be changed."""

    @cache
    def run(kind: str) -> Path:
        out = folder / kind
        ended = call(train.main, *flags(model, data, out=out, **common, **kinds[kind]))
        assert ended.code == 0, ended.err
        return out

    return run


def strict_json(text: str) -> dict:
    """Raises ValueError for NaN and infinities, which are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def lines_of(path: Path) -> list[dict]:
    return [strict_json(line) for line in path.read_text().splitlines()]


def without_times(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in TIMES}


def left_behind(folder: Path) -> dict[str, object]:
    """All of a run's files but what differs between equal runs: tensors and predictions as bytes."""
    files: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            files[name] = [without_times(line) for line in lines_of(path)]
        elif path.name == "result.json":
            files[name] = without_times(strict_json(path.read_text()))
        else:
            files[name] = path.read_bytes()
    return files


def checkpoints(folder: Path) -> list[Path]:
    """A run's, by step."""
    found = (folder / "checkpoint").glob("step-*.safetensors")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def column(path: Path, name: str) -> list[str]:
    with open(path, newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def rescored(predictions: Path, data: Path, task: str) -> float:
    """The score of a file of predictions for the dev file, computed from the two files alone."""
    with open(data / FILES[task].format("dev"), newline="") as file:
        labels = [float(row[LABELS[task][0]]) for row in csv.DictReader(file, delimiter="\t")]
    predicted = list(map(float, column(predictions, "prediction")))
    if task == "sts":
        return statistics.correlation(predicted, labels)
    return statistics.fmean(a == b for a, b in zip(predicted, labels, strict=True))
