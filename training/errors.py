"""What a run that cannot go on raises."""


class TrainingError(RuntimeError):
    """A run that cannot go on: one line that says at which step, and why; `about` is that for programs."""

    def __init__(self, message: str, **about: object):
        super().__init__(message)
        self.about = about
