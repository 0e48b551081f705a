"""Settings compared on the same dev examples: which differ from the best, and which may only seem to.

Computation alone; `experiments.compare` is the command.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from statistics import stdev

import numpy as np

from experiments.left_out import LeftOut, usable
from experiments.scored import Scored, read_scored
from experiments.statistics import (
    Difference,
    Seeds,
    bootstrap_test,
    detectable,
    holm,
    influence,
    mcnemar,
    paired_difference,
    pool_seeds,
    williams,
)
from experiments.summary import Record, by_setting, distinct, named, read_record, settings_that_differ
from minibert.errors import InputError
from tasks.bootstrap import LEVEL, interval, score_of
from tasks.metrics import pearson
from training.config import Config, check


@dataclass(frozen=True)
class Group:
    """The runs of one setting, a seed each."""

    setting: str
    seeds: tuple[int, ...]
    metric: str
    predictions: np.ndarray  # [S, n]
    labels: np.ndarray  # [n]

    @property
    def scores(self) -> np.ndarray:
        alone = [score_of(self.metric, one[None], self.labels) for one in self.predictions]
        return np.array([score(np.arange(len(self.labels))) for score in alone])  # [S]

    @property
    def influences(self) -> np.ndarray:
        return np.stack([influence(self.metric, one, self.labels) for one in self.predictions])  # [S, n]


@dataclass(frozen=True)
class Row:
    """One setting beside the best one; of the best itself there is nothing to test."""

    setting: str
    seeds: tuple[int, ...]
    mean: float
    sd: float | None  # over seeds
    low: float  # 95 % over dev examples, the seeds as they are
    high: float
    difference: float  # to the best mean, 0 or below
    error: float | None = None  # standard error of the difference
    p: float | None = None
    p_holm: float | None = None  # among all pairs of settings
    p_bootstrap: float | None = None  # over examples alone
    p_classic: float | None = None  # of two single runs: McNemar's exact test, or Williams'
    detectable: float | None = None
    ties: bool = True


@dataclass(frozen=True)
class Comparison:
    """A task's settings, best mean first."""

    task: str
    metric: str
    examples: int
    test: str
    rows: tuple[Row, ...]
    detectable: tuple[float, float] | None  # smallest and largest of the ties, or of all where none ties
    detectable_by_examples: tuple[float, float] | None  # the same between these very models


def read_parts(
    folders: Sequence[Path], data: str | None = None, task: str | None = None
) -> tuple[list[list[Scored]], list[LeftOut]]:
    """The runs whose scores compare - of one task, on the same dev examples - and what cannot be used.

    A run of several tasks is in the part of each, or of `task` alone.

    Raises:
        InputError: if there is no such folder, or none can be used.
    """

    def read(folder: Path) -> list[Scored]:
        names = [task] if task else [one.name for one in read_record(folder).config.tasks]
        return [read_scored(folder, name, data) for name in names]

    found, left_out = usable(folders, read)
    parts: dict[tuple, list[Scored]] = defaultdict(list)
    for run in chain(*found):
        ids = tuple(example.id for example in run.examples)
        parts[run.task.name, run.record.config.data, ids].append(run)
    different = []
    for part in parts.values():
        kept, repeated = distinct(part, lambda run: run.record)
        different.append(kept)
        left_out += [one for one in repeated if one not in left_out]
    return different, left_out


def read_groups(
    folders: Sequence[Path], data: str | None = None, task: str | None = None
) -> tuple[str, list[Group]]:
    """The task of the runs in folders, or `task` of those that have several, and the runs by setting.

    Raises:
        InputError: if one cannot be used, or their scores do not compare.
    """
    parts, left_out = read_parts(folders, data, task)
    if left_out:
        raise InputError(str(left_out[0]))
    if len(parts) > 1:
        told = " and ".join(f"{part[0].task.name} on {part[0].record.config.data}" for part in parts)
        raise InputError(f"expected runs of one task on the same data, got {told}")
    return by_settings(parts[0])


def by_settings(runs: Sequence[Scored]) -> tuple[str, list[Group]]:
    """The task of runs whose scores compare, and the runs by setting."""
    records = [run.record for run in runs]
    groups = [[run for run in runs if run.record in group] for group in by_setting(records)]
    return runs[0].task.name, [_group(group, setting_name(group[0].record, records)) for group in groups]


def setting_name(record: Record, records: Sequence[Record]) -> str:
    """The method, and what else tells a run from the others: `lora rank 4, alpha 8`

    That is what differs among runs of the method, and, beside other methods, what is not its default.
    """
    config = record.config
    default = vars(check(Config(task=config.task, method=config.method, own=config.own)))
    if len(config.tasks) > 1:
        default["task"] = None  # what tells it from runs of one of them alone
    own = settings_that_differ([other for other in records if other.config.method == config.method])
    across = set(settings_that_differ(records))
    trained = [other for other in records if other.config.method != "frozen"]
    if not trained or "encoder_dropout" not in settings_that_differ(trained):
        across.discard("encoder_dropout")  # the frozen encoder has none, and nobody asked for that
    unusual = [name for name in across if record.settings[name] != default[name]]
    told = [name for name in record.settings if name in (*own, *unusual) and name != "method"]
    return " ".join(filter(None, (config.method, named(record, told))))


def _group(runs: Sequence[Scored], setting: str) -> Group:
    seeds = tuple(run.record.config.seed for run in runs)
    predictions = np.stack([run.prediction.predictions for run in runs])
    return Group(setting, seeds, runs[0].metric, predictions, runs[0].labels)


def compare(task: str, groups: Sequence[Group]) -> Comparison:
    """Every setting against the best mean.

    Holm's correction counts all pairs of settings: the best is chosen by the same scores, so a setting is
    compared with whichever happened to come out on top, not with one named beforehand.
    """
    order = sorted(groups, key=lambda group: -group.scores.mean())
    psi = [group.influences for group in order]
    seeds = pool_seeds([group.scores for group in order], psi)
    pairs = list(combinations(range(len(order)), 2))  # those with the best, 0, come first
    differences = {
        (a, b): paired_difference(
            float(order[b].scores.mean() - order[a].scores.mean()), psi[a], psi[b], seeds
        )
        for a, b in pairs
    }
    p = {(a, b): _p(order[a], order[b], differences[a, b], seeds) for a, b in pairs}
    adjusted = dict(zip(pairs, holm(list(p.values())), strict=True))
    rows = [_row(order[0], order[0])]
    for b in range(1, len(order)):
        rows.append(_row(order[b], order[0], differences[0, b], p[0, b], adjusted[0, b]))
    tied = [b for b in range(1, len(order)) if rows[b].ties] or range(1, len(order))
    to_best = [differences[0, b] for b in tied]
    n = len(order[0].labels)
    return Comparison(
        task,
        order[0].metric,
        n,
        _test(order[0].metric, seeds),
        tuple(rows),
        _range([detectable(one.error, one.df) for one in to_best]),
        _range([detectable(one.error_examples, n - 1) for one in to_best]),
    )


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None


def _test(metric: str, seeds: Seeds | None) -> str:
    if seeds:
        return "t-test over seeds and examples"
    return "McNemar's exact test" if metric == "accuracy" else "t-test over examples"


def _classic(a: Group, b: Group) -> float | None:
    if len(a.seeds) + len(b.seeds) > 2:
        return None
    x, y = a.predictions[0], b.predictions[0]
    if a.metric == "accuracy":
        return mcnemar(x == a.labels, y == b.labels)
    return williams(pearson(x, a.labels), pearson(y, b.labels), pearson(x, y), len(x))[1]


def _p(a: Group, b: Group, difference: Difference, seeds: Seeds | None) -> float:
    """Williams' test is not trusted with scores: it takes them for normal, which makes it too sure."""
    return _classic(a, b) if seeds is None and a.metric == "accuracy" else difference.p


def _row(
    group: Group,
    best: Group,
    difference: Difference | None = None,
    p: float | None = None,
    p_holm: float | None = None,
) -> Row:
    n, scores = len(group.labels), group.scores
    score = score_of(group.metric, group.predictions, group.labels)
    low, high = interval(score, n)
    row = (group.setting, group.seeds, float(scores.mean()), stdev(scores) if len(scores) > 1 else None)
    if difference is None:
        return Row(*row, low, high, 0.0)
    best_score = score_of(best.metric, best.predictions, best.labels)
    return Row(
        *row,
        low,
        high,
        difference=difference.value,
        error=difference.error,
        p=p,
        p_holm=p_holm,
        p_bootstrap=bootstrap_test(lambda examples: score(examples) - best_score(examples), n),
        p_classic=_classic(group, best),
        detectable=detectable(difference.error, difference.df),
        ties=p_holm >= LEVEL,
    )
