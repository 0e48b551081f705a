"""Runs -> a table: `python -m experiments.summary runs/*`. Mean and spread over seeds, a row per setting."""

import csv
import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from minibert.errors import InputError
from training.cli import Parser
from training.config import Config, from_dict, to_dict
from training.exit import run_command

COLUMNS = ("task", "pair", "method", "settings", "trained", "seeds", "dev", "train", "seconds", "peak MiB")
# What a line per run says of its result, beside its settings.
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


@dataclass(frozen=True)
class Record:
    """A finished run of one task: what it was told, and what came out."""

    config: Config
    result: dict

    @property
    def kind(self) -> tuple:
        return self.config.task, self.config.pair, self.config.method, self.config.model, self.config.data

    @property
    def settings(self) -> dict[str, object]:
        return {name: value for name, value in vars(self.config).items() if name != "seed"}


def read_record(folder: Path) -> Record:
    """The finished run in a folder.

    Raises:
        InputError: if there is none.
    """
    from minibert.files import read_json

    path, config = folder / "result.json", folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: expected a finished run, there is no {path.name} in it")
    return Record(from_dict(read_json(config), str(config)), read_json(path))


def read_records(folders: Sequence[Path]) -> list[Record]:
    """The runs in folders.

    Raises:
        InputError: if a folder holds no finished run of one task.
    """
    records = [read_record(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if any(key not in record.result for key in RESULT) or not isinstance(record.result["dev"], float):
            raise InputError(f"{folder / 'result.json'}: expected the result of a run of one task")
    return records


def by_setting(records: Sequence[Record]) -> list[list[Record]]:
    """The runs of each setting, in the order given; seeds are never picked, a repeated one is an error.

    Raises:
        InputError: if two runs of a setting have the same seed.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record.settings.items())].append(record)
    for group in groups.values():
        task, pair, method, *_ = group[0].kind
        seeds = sorted(record.config.seed for record in group)
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{task} {pair} {method}: two runs have the same seed, of {seeds}")
    return list(groups.values())


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row for each setting, in the order given.

    Raises:
        InputError: if two runs of a setting have the same seed.
    """
    table = []
    for group in by_setting(records):
        one = group[0]
        task, pair, method, *_ = one.kind
        differing = settings_that_differ([other for other in records if other.kind == one.kind])
        settings = named(one, differing)
        results = [record.result for record in group]
        share = trained_share(one.result)
        scores = [spread([result[split] for result in results]) for split in ("dev", "train")]
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
    told = [(name.replace("_", "-"), record.settings[name]) for name in settings]
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
    """A line per run, as CSV: every setting, and its result. Of folders the last name alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(one.name for one in fields(Config)), *RESULT])
    for record in records:
        settings = to_dict(record.config) | {"data": Path(record.config.data).name}
        told = [" ".join(value) if isinstance(value, list) else value for value in settings.values()]
        writer.writerow([*told, *(record.result[key] for key in RESULT)])
    return text.getvalue()


def main() -> int:
    parser = Parser(prog="python -m experiments.summary", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--csv", type=Path, help="also write a line per run there: its settings, its result")
    given = parser.parse_args()
    records = read_records(given.runs)
    print(markdown(rows(records)))
    if given.csv:
        from minibert.files import write_text

        write_text(lines(records), given.csv)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
