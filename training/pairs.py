"""How a Siamese pair's sides may be compared, and which losses train which task. Imports no torch."""

from collections.abc import Sequence

from tasks.base import Task

FEATURES = ("uv", "uv-diff", "uv-diff-prod", "cosine")
SCORE_LOSSES = ("mse", "pearson", "cosent")
COMPARING = ("pearson", "cosent", "simcse", "simcse-unsup")  # a batch's examples with one another
SIDE_LOSSES = ("cosine", "contrastive", "simcse", "simcse-unsup")  # of the two sides' vectors
LOSSES = ("cross-entropy", *SCORE_LOSSES, *SIDE_LOSSES)


def default_features(pair: str, tasks: Sequence[Task], loss: str | None, hidden_layers: int) -> str:
    """Cosine if all pairs have scores or the loss needs it; runs that compare nothing say uv-diff-prod."""
    learned = hidden_layers or any(task.is_pair and task.is_classification for task in tasks)
    return "cosine" if pair == "siamese" and (loss in SIDE_LOSSES or not learned) else "uv-diff-prod"


def losses_of(task: Task, features: str | None) -> tuple[str, ...]:
    """The losses that can train a task; `features` is None unless its pairs are Siamese."""
    own = ("cross-entropy",) if task.is_classification else SCORE_LOSSES
    if features != "cosine":
        return own
    return own + tuple(name for name in SIDE_LOSSES if name != "contrastive" or task.is_classification)


def check_loss(loss: str | None, compared: Sequence[tuple[Task, str | None]]) -> None:
    """`compared`: each task of the run, and the features of its Siamese pairs; None is each task's own loss.

    Raises:
        ValueError: if one of the tasks cannot be trained by that loss.
    """
    if loss in SIDE_LOSSES and not any(features == "cosine" for _, features in compared):
        raise ValueError(f"{loss} compares two vectors; add --pair siamese --features cosine")
    fitting = {task.name: losses_of(task, features) for task, features in compared}
    if loss is not None and any(loss not in losses for losses in fitting.values()):
        wanted = ", ".join(f"{' or '.join(losses)} for {name}" for name, losses in fitting.items())
        raise ValueError(f"expected {wanted}; got {loss}")
