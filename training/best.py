"""Which epoch was best, of all tasks together and of each, and how long one has waited for a better one."""

from collections.abc import Mapping, Sequence

from training.config import Config


def best_per_task(config: Config, history: Sequence[Mapping]) -> dict[str, dict]:
    """Each task's own best epoch and its dev score there, of equals the first.

    These may be of other epochs than the weights that the run keeps.
    """
    best = {}
    for name, scores in dev_scores(config, history).items():
        at = scores.index(max(scores))
        best[name] = {"epoch": history[at]["epoch"], "dev": scores[at]}
    return best


def epochs_kept(config: Config, history: Sequence[Mapping]) -> dict[str, int]:
    """The epoch whose weights each task keeps, of equals the first.

    That is the epoch of the best mean over the tasks; where all that trains is some task's own and `best` is
    per-task, it is the best of each.
    """
    if config.adapters == "per-task" and config.best == "per-task":
        return {task: own["epoch"] for task, own in best_per_task(config, history).items()}
    by_task = dev_scores(config, history)
    means = [mean(dict(zip(by_task, scores, strict=True))) for scores in zip(*by_task.values(), strict=True)]
    return dict.fromkeys(by_task, history[means.index(max(means))]["epoch"])


def dev_scores(config: Config, history: Sequence[Mapping]) -> dict[str, list[float]]:
    """Each task's dev score after each epoch."""
    return {
        task.name: [line["metrics"]["dev"][task.name][task.metrics[0]] for line in history]
        for task in config.tasks
    }


def of_kept(config: Config, history: Sequence[Mapping]) -> dict:
    """What result.json says of the weights that are kept: best_epoch, dev, train, metrics, constant."""
    kept = epochs_kept(config, history)
    lines = {task: next(line for line in history if line["epoch"] == epoch) for task, epoch in kept.items()}
    metrics = {
        split: {task: line["metrics"][split][task] for task, line in lines.items()}
        for split in ("dev", "train")
    }
    scores = {
        split: single({task.name: one[task.name][task.metrics[0]] for task in config.tasks})
        for split, one in metrics.items()
    }
    said = {task: line.get("constant", {}) for task, line in lines.items()}  # older checkpoints lack it
    constant = {task: one[task] for task, one in said.items() if task in one}
    epochs = set(kept.values())
    best = kept if len(epochs) > 1 else epochs.pop()
    return {"best_epoch": best, **scores, "metrics": metrics, "constant": constant}


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
