"""Which epoch was best, of all tasks together and of each, and how long one has waited for a better one."""

from collections.abc import Mapping, Sequence

from training.config import Config


def best_per_task(config: Config, history: Sequence[Mapping]) -> dict[str, dict]:
    """Each task's own best epoch and its dev score there, of equals the first.

    A run keeps the weights of the best mean's epoch; these scores may be of another epoch each.
    """
    best = {}
    for name, scores in dev_scores(config, history).items():
        at = scores.index(max(scores))
        best[name] = {"epoch": history[at]["epoch"], "dev": scores[at]}
    return best


def dev_scores(config: Config, history: Sequence[Mapping]) -> dict[str, list[float]]:
    """Each task's dev score after each epoch."""
    return {
        task.name: [line["metrics"]["dev"][task.name][task.metrics[0]] for line in history]
        for task in config.tasks
    }


def longest_wait(scores: Sequence[float]) -> int:
    """The most epochs in a row, from the first to the last, that brought no new best."""
    longest = waited = 0
    for i, one in enumerate(scores):
        waited = 0 if i == 0 or one > max(scores[:i]) else waited + 1
        longest = max(longest, waited)
    return longest


def mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def single(scores: Mapping[str, float]) -> float | dict[str, float]:
    """Of one task its number, of several an object keyed by task."""
    return next(iter(scores.values())) if len(scores) == 1 else dict(scores)
