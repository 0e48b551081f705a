"""What a run that cannot go on raises."""

from tasks.data import Batch


class TrainingError(RuntimeError):
    """A run that cannot go on: one line that says at which step, and why; `about` is that for programs."""

    def __init__(self, message: str, **about: object):
        super().__init__(message)
        self.about = about


def not_finite(what: str, step: int, task: str, batch: Batch) -> TrainingError:
    """The loss or the gradient of a step's batch."""
    ids = ", ".join(batch.ids[:8]) + (", ..." if len(batch.ids) > 8 else "")
    line = f"step {step}: the {what} of {task} is not finite (examples {ids}); try a lower --lr"
    return TrainingError(line, step=step, task=task, what=what, examples=list(batch.ids))
