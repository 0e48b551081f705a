"""Gain or loss of training tasks together: `python -m experiments.multitask RUN... --single RUN...`.

A row for each task and each setting of the runs of several tasks: their dev score, that of runs of the task
alone (both mean and spread over seeds), and the difference of the means. A run of several tasks keeps the
epoch of the best mean over its tasks, a run of one task that task's best: the last column compares what the
former reached at each task's own best epoch.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence, Set
from itertools import chain
from pathlib import Path
from statistics import mean

from experiments.left_out import LeftOut, say, usable
from experiments.summary import (
    Record,
    by_setting,
    distinct,
    markdown,
    named,
    read_record,
    settings_that_differ,
    spread,
)
from minibert.errors import InputError
from training.cli import Parser
from training.exit import run_command

COLUMNS = ("task", "metric", "settings", "seeds", "together", "seeds alone", "alone", "difference",
           "at own best")  # fmt: skip
# A difference in one of these would be taken for one of training together or alone.
SAME = ("method", "model", "data")


def read_several(folders: Sequence[Path]) -> tuple[list[Record], list[LeftOut]]:
    """The runs of several tasks, and what else there is.

    Raises:
        InputError: if none can be used.
    """

    def read(folder: Path) -> Record:
        record = read_record(folder)
        if len(record.config.tasks) == 1:
            raise InputError(f"{folder}: expected a run of several tasks, got one of {record.config.task}")
        _check_scores(folder, record)
        return record

    found, left_out = usable(folders, read)
    records, repeated = distinct(found)
    return records, left_out + repeated


def read_single(folders: Sequence[Path], among: Set[str]) -> tuple[dict[str, list[Record]], list[LeftOut]]:
    """The runs of each of the tasks `among` alone, of one setting each, and what else there is.

    Raises:
        InputError: if none can be used, or the runs of a task differ in more than their seed.
    """

    def read(folder: Path) -> Record:
        record = read_record(folder)
        if record.config.task not in among:
            wanted = f"expected a run of {' or '.join(sorted(among))} alone"
            raise InputError(f"--single: {folder}: {wanted}, got {record.config.task}")
        _check_scores(folder, record)
        return record

    found, left_out = usable(folders, read)
    records, repeated = distinct(found)
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.config.task].append(record)
    for task, group in by_task.items():
        if differing := settings_that_differ(group):
            told = " and ".join(dict.fromkeys(named(record, differing) or "none" for record in group))
            raise InputError(f"--single: expected runs of {task} of one setting, got {told}")
    return by_task, left_out + repeated


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
        InputError: if a task has no run alone, or a comparison would be unfair.
    """
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
    several, left_out = read_several(given.several)
    single, others = read_single(given.single, {task.name for one in several for task in one.config.tasks})
    print(markdown(rows(several, single), COLUMNS))
    if names := also_different(several, single):
        print(f"\nTogether and alone differ in {', '.join(name.replace('_', '-') for name in names)} too.")
    used = {record.folder for record in chain(several, *single.values())}
    say([one for one in left_out + others if one.folder not in used])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
