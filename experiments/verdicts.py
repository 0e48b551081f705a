"""Whether a score of ours agrees with one of the study, and a difference of ours with one of its."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks import TASKS

CLOSE = 1.96  # standard errors


def standard_error(task: str, score: float, rows: int) -> float:
    """Of a score over `rows` dev examples."""
    if TASKS[task].is_classification:
        return math.sqrt(score * (1 - score) / rows)
    return (1 - score**2) / math.sqrt(rows - 1)


@dataclass(frozen=True)
class Scored:
    """A row's dev score of a task, the study's and ours, with their standard errors."""

    study: float
    ours: float
    errors: tuple[float, float]


def verdict(difference: float, errors: Sequence[float]) -> str:
    """On ours less the study's, which is made of scores with these standard errors."""
    if abs(difference) <= CLOSE * math.hypot(*errors):
        return "reproduced"
    return "beaten" if difference > 0 else "behind"


def gap(one: Scored, other: Scored | None) -> tuple[str, str, str]:
    """The study's, ours, and the verdict; nothing for a row beside itself, or beside one without runs."""
    if other is None or one == other:
        return "", "", ""
    study, ours = one.study - other.study, one.ours - other.ours
    return f"{study:+.4f}", f"{ours:+.4f}", verdict(ours - study, one.errors + other.errors)
