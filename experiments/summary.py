"""Runs -> a table: `python -m experiments.summary runs/*`. Mean and spread over seeds, a row per setting.

A run of several tasks has a row for each: its scores are that task's, its costs are those of all together.
"""

import csv
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

from experiments.left_out import Found, LeftOut, no_run, say, usable
from minibert.errors import InputError
from minibert.files import check_output, read_json, write_text
from training.cli import Parser
from training.config import OF_SEVERAL, Config, from_dict, to_dict
from training.exit import run_command

COLUMNS = ("task", "pair", "method", "settings", "trained", "seeds", "dev", "train", "seconds", "peak MiB")
# What a line per run and task says of its result, beside its settings.
RESULT = [
    "metric",
    "dev",
    "best_epoch",
    "train",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_mib",
    "memory_above_start_mib",
    "trainable_parameters",
    "total_parameters",
]
PER_TASK = ("metric", "dev", "train")  # of these a run of several tasks has an object keyed by task


@dataclass(frozen=True)
class Record:
    """A finished run: what it was told, and what came out; of several tasks, for one of them or for all.

    Attributes:
        folder: the run's.
        only: the task that the result is about, of a run of several.
    """

    folder: Path
    config: Config
    result: dict
    only: str | None = None

    @property
    def task(self) -> str:
        return self.only or self.config.task

    @property
    def title(self) -> str:
        """The task, and those it was trained beside: `sst with qqp, sts`"""
        others = [task.name for task in self.config.tasks if task.name != self.task]
        return f"{self.only} with {', '.join(others)}" if self.only else self.task

    @property
    def kind(self) -> tuple:
        return self.title, self.config.pair, self.config.method, self.config.model, self.config.data

    @property
    def constant(self) -> float | None:
        """The one value that the model predicts for all of dev, if it has learnt no more."""
        told = self.result.get("constant")
        return told.get(self.task) if isinstance(told, Mapping) else None

    @property
    def settings(self) -> dict[str, object]:
        return {name: value for name, value in vars(self.config).items() if name != "seed"}


def read_record(folder: Path) -> Record:
    """The finished run in a folder.

    Raises:
        InputError: if there is none.
    """
    if unusable := no_run(folder):
        raise InputError(f"{folder}: expected a finished run; {unusable.reason}")
    path, config = folder / "result.json", folder / "config.json"
    return Record(folder, from_dict(read_json(config), str(config)), read_json(path))


def read_records(folders: Sequence[Path]) -> list[Record]:
    """The runs in folders, those of several tasks once for each.

    Raises:
        InputError: if a folder holds no finished run, or not the numbers of `RESULT`.
    """
    return [record for folder in folders for record in by_task(read_record(folder), folder)]


def by_task(record: Record, folder: Path) -> list[Record]:
    """The record of a run of one task; of a run of several one for each, with the scores of that task.

    Raises:
        InputError: naming the run's file, if its result lacks one of the numbers of `RESULT`.
    """
    names = [task.name for task in record.config.tasks]
    if len(names) > 1:
        records = [replace(record, only=name, result=of_task(record.result, name)) for name in names]
    else:
        records = [record]
    for one in records:
        for name in RESULT:
            value = one.result.get(name)
            if not (isinstance(value, str) if name == "metric" else is_number(value)):
                expected = "the name of a metric" if name == "metric" else "a number"
                of = f" of {one.only}" if one.only else ""
                path = folder / "result.json"
                raise InputError(f"{path}: expected {expected} as {name}{of}, got {value!r}")
    return records


def of_task(result: Mapping, task: str) -> dict:
    """What a result, or an epoch's line, says of a task: of the objects keyed by task, its part."""
    parts = {name: result.get(name) for name in PER_TASK}
    own = {name: part.get(task) if isinstance(part, Mapping) else None for name, part in parts.items()}
    if isinstance(epochs := result.get("best_epoch"), Mapping):  # with an adapter for each task
        own["best_epoch"] = epochs.get(task)
    return {**result, **own}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def by_setting(records: Sequence[Record]) -> list[list[Record]]:
    """The runs of each setting, in the order given; seeds are never picked, a repeated one is an error.

    Raises:
        InputError: if two runs of a setting have the same seed.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.task, tuple(record.settings.items())].append(record)
    for group in groups.values():
        task, pair, method, *_ = group[0].kind
        seen: dict[int, Path] = {}
        for record in group:
            seed = record.config.seed
            if seed in seen:
                same = f"two runs have the same seed, {seed}: {seen[seed]} and {record.folder}; leave one out"
                raise InputError(f"{task} {pair} {method}: {same}")
            seen[seed] = record.folder
    return list(groups.values())


def distinct(runs: Sequence[Found], record: Callable = lambda run: run) -> tuple[list[Found], list[LeftOut]]:
    """The first run of each setting and seed, and those that only repeat one; `record` is that of a run."""
    first: dict[tuple, Found] = {}
    repeated = {}
    for run in runs:
        one = record(run)
        before = record(first.setdefault((one.config, one.task), run))
        if before is not one:
            scores = [other.result.get("dev") for other in (before, one)]
            differ = "" if scores[0] == scores[1] else f", dev {scores[0]} there and {scores[1]} here"
            repeated[one.folder] = f"has the setting and seed of {before.folder}{differ}"
    return list(first.values()), [LeftOut(*one) for one in repeated.items()]


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row for each setting, in the order given; it names the model and the data if there are others.

    Raises:
        InputError: if two runs of a setting have the same seed.
    """
    table, apart = [], [name for name in settings_that_differ(records) if name in ("model", "data")]
    for group in by_setting(records):
        one = group[0]
        task, pair, method, *_ = one.kind
        differing = settings_that_differ([other for other in records if other.kind == one.kind])
        settings = named(one, [*apart, *differing])
        results = [record.result for record in group]
        share = trained_share(one.result)
        scores = [spread([result[split] for result in results]) for split in ("dev", "train")]
        if count := sum(record.constant is not None for record in group):
            scores[0] += f" ({count} of {len(group)} predict one value for all)"
        seconds = f"{mean(result['train_seconds'] for result in results):.0f}"
        peak = f"{max(result['peak_memory_mib'] for result in results):.0f}"
        table.append((task, pair, method, settings, share, str(len(group)), *scores, seconds, peak))
    return table


def settings_that_differ(records: Sequence[Record]) -> list[str]:
    """The names of the settings that are not the same in all of them."""
    first = records[0].settings
    return [name for name in first if any(record.settings[name] != first[name] for record in records)]


def named(record: Record, settings: Sequence[str]) -> str:
    """Some of a run's settings as text, but for those it does not have: `rank 8, lr 0.001`"""
    alone = len(record.config.tasks) == 1
    has = [name for name in settings if not (alone and name in OF_SEVERAL)]
    told = [(name.replace("_", "-"), record.settings[name]) for name in has]
    return ", ".join(f"{name} {shown(value)}" for name, value in told if value not in (None, ()))


def shown(value: object) -> str:
    return (
        " ".join(value)
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def trained_share(result: dict) -> str:
    return f"{result['trainable_parameters'] / result['total_parameters']:.1%}"


def markdown(table: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """The table, without a column that is empty in every row."""
    filled = [i for i in range(len(columns)) if any(row[i] for row in table)]
    lines = [[row[i] for i in filled] for row in (columns, ["---"] * len(columns), *table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lines(records: Sequence[Record]) -> str:
    """A line per run and task, as CSV: every setting, and its result. Of folders the last name alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(one.name for one in fields(Config)), "scored_task", *RESULT, "constant"])
    for record in records:
        settings = to_dict(record.config) | {
            "data": Path(record.config.data).name,
            "own": list(record.config.own),
        }
        told = [" ".join(value) if isinstance(value, list) else value for value in settings.values()]
        writer.writerow([*told, record.task, *(record.result[key] for key in RESULT), record.constant])
    return text.getvalue()


def main() -> int:
    parser = Parser(prog="python -m experiments.summary", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--csv", type=Path, help="also write a line per run and task: its settings, its result"
    )
    given = parser.parse_args()
    check_output(given.csv, "--csv")
    found, left_out = usable(given.runs, lambda folder: by_task(read_record(folder), folder))
    records, repeated = distinct(list(chain(*found)))
    print(markdown(rows(records)))
    say(left_out + repeated)
    if given.csv:
        write_text(lines(records), given.csv)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
