"""Runs that are stopped or killed after a step, in this process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from training import run as run_module
from training.run_folder import append_line


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing of it is caught, and nothing is saved."""


@contextmanager
def stopping(step: int, how: signal.Signals | None = None) -> Iterator[None]:
    """Once the line of that step is written, the run gets the signal; or is killed, without one."""

    def write(line: dict, path: Path) -> None:
        append_line(line, path)
        if line["step"] == step:
            if how is None:
                raise Killed
            signal.raise_signal(how)

    with patch.object(run_module, "append_line", write):
        yield
