"""Gain or loss of training tasks together: `python -m experiments.multitask RUN... --single RUN...`.

A row for each task and each setting of the runs of several tasks: their dev score, that of runs of the task
alone (both mean and spread over seeds), and the difference of the means. A run of several tasks keeps the
epoch of the best mean over its tasks, a run of one task that task's best: the last column compares what the
former reached at each task's own best epoch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments.summary import Record, by_setting, markdown, named, read_record, settings_that_differ, spread
from minibert.errors import InputError
from training.cli import Parser
from training.exit import run_command

COLUMNS = ("task", "metric", "settings", "seeds", "together", "seeds alone", "alone", "difference",
           "at own best")  # fmt: skip
# A difference in one of these would be taken for one of training together or alone.
SAME = ("method", "model", "data")


def read_several(folders: Sequence[Path]) -> list[Record]:
    """Raises:
    InputError: if a folder holds no finished run, or one of a single task.
    """
    records = [read_record(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if len(record.config.tasks) == 1:
            raise InputError(f"{folder}: expected a run of several tasks, got one of {record.config.task}")
        _check_scores(folder, record)
    return records


def read_single(folders: Sequence[Path]) -> dict[str, list[Record]]:
    """The runs of each task alone, of one setting each.

    Raises:
        InputError: if a folder holds no finished run of one task, if the runs of a task differ in more than
            their seed, or if two have the same.
    """
    by_task: dict[str, list[Record]] = {}
    for folder in folders:
        record = read_record(folder)
        if len(record.config.tasks) > 1:
            raise InputError(f"--single: {folder}: expected a run of one task, got {record.config.task}")
        _check_scores(folder, record)
        by_task.setdefault(record.config.task, []).append(record)
    for task, records in by_task.items():
        if differing := settings_that_differ(records):
            told = " and ".join(dict.fromkeys(named(record, differing) or "none" for record in records))
            raise InputError(f"--single: expected runs of {task} of one setting, got {told}")
        by_setting(records)  # refuses a seed that stands there twice
    return by_task


def _check_scores(folder: Path, record: Record) -> None:
    tasks, result = [task.name for task in record.config.tasks], record.result
    try:
        if len(tasks) == 1:
            scores = [result["dev"]]
        else:
            scores = [result["dev"][task] for task in tasks]
            scores += [own_best(record, task) for task in tasks if "best_per_task" in result]
        sound = all(type(score) is float for score in scores) and "metric" in result
    except (TypeError, KeyError):
        sound = False
    if not sound:
        raise InputError(f"{folder / 'result.json'}: expected metric and dev scores of {', '.join(tasks)}")


def own_best(record: Record, task: str) -> float:
    """A task's dev score at its own best epoch. Raises KeyError for an older run, which does not tell it."""
    return record.result["best_per_task"][task]["dev"]


def check_fair(several: Record, single: Record) -> None:
    """Raises:
    InputError: if the two differ in what would be taken for a gain or a loss, naming all of it.
    """
    (task,) = single.config.tasks
    # Of a task of one sentence the pair says nothing.
    names = (*SAME, "pair") if task.is_pair else SAME
    differing = [name for name in names if several.settings[name] != single.settings[name]]
    if differing:
        told = "; ".join(f"{n} {several.settings[n]!r} and {single.settings[n]!r}" for n in differing)
        raise InputError(f"{task.name}: expected the same {', '.join(names)} together and alone, got {told}")


def rows(several: Sequence[Record], single: dict[str, list[Record]]) -> list[tuple[str, ...]]:
    """A row for each task of each setting, in the order given.

    Raises:
        InputError: if a task has no run alone, a run alone no use, or a comparison would be unfair.
    """
    known = {task.name for record in several for task in record.config.tasks}
    for task in single:
        if task not in known:
            raise InputError(f"--single: expected runs of {', '.join(sorted(known))}; got one of {task}")
    differing = settings_that_differ(several)
    table = []
    for group in by_setting(several):
        for task in (task.name for task in group[0].config.tasks):
            if task not in single:
                raise InputError(f"--single: expected a run of {task} alone, got none")
            check_fair(group[0], single[task][0])
            table.append(_row(task, group, single[task], named(group[0], differing)))
    return table


def _row(task: str, group: Sequence[Record], alone: Sequence[Record], settings: str) -> tuple[str, ...]:
    together = [record.result["dev"][task] for record in group]
    scores = [record.result["dev"] for record in alone]
    tells = all("best_per_task" in record.result for record in group)
    return (
        task,
        str(alone[0].result["metric"]),
        settings,
        str(len(group)),
        spread(together),
        str(len(alone)),
        spread(scores),
        f"{mean(together) - mean(scores):+.4f}",
        f"{mean(own_best(record, task) for record in group) - mean(scores):+.4f}" if tells else "",
    )


def also_different(several: Sequence[Record], single: dict[str, list[Record]]) -> list[str]:
    """The names of other settings in which a run of a task alone differs from one together."""
    leave_out = {*SAME, "task", "pair", "loss", "sampling", "temperature", "best"}
    alone = [records[0] for records in single.values()]
    return [
        name
        for name in several[0].settings
        if name not in leave_out
        and any(one.settings[name] != other.settings[name] for one in several for other in alone)
    ]


def main() -> int:
    parser = Parser(prog="python -m experiments.multitask", description=__doc__, allow_abbrev=False)
    parser.add_argument("several", type=Path, nargs="+", metavar="MULTI_RUN", help="a run of several tasks")
    parser.add_argument(
        "--single", type=Path, nargs="+", required=True, metavar="SINGLE_RUN", help="a run of one task alone"
    )
    given = parser.parse_args()
    several, single = read_several(given.several), read_single(given.single)
    print(markdown(rows(several, single), COLUMNS))
    if names := also_different(several, single):
        print(f"\nTogether and alone differ in {', '.join(name.replace('_', '-') for name in names)} too.")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
