"""When a run's checkpoints are written, which are kept, and which one a resumed run goes on from.

A checkpoint is called step-STEP-SHA256.safetensors by the hash of its own content: one rename makes both
known, and whatever is torn, cut or flipped afterwards no longer has its name.
"""

import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minibert.errors import InputError
from minibert.files import flush
from minibert.verify import sha256
from training.checkpoint import FILE
from training.flags import Keeping

NAME = re.compile(r"step-(\d+)-([0-9a-f]{64})\.safetensors")


class Pace:
    """Says when the next checkpoint is due; `step` is where the run starts, `clock` counts seconds."""

    def __init__(self, keeping: Keeping, step: int, clock: Callable[[], float] = time.monotonic):
        self.keeping, self.clock = keeping, clock
        self.wrote(step)

    def wrote(self, step: int) -> None:
        self.step, self.time = step, self.clock()

    def due(self, step: int) -> bool:
        if self.keeping.steps and step - self.step >= self.keeping.steps:
            return True
        return self.clock() - self.time >= 60 * self.keeping.minutes


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    known = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(known, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def keep(folder: Path, step: int, kept: int) -> Path:
    """Give the checkpoint just written its name, and remove all but the last `kept`, one for a step."""
    path = folder / f"step-{step}-{sha256(folder / FILE)}.safetensors"
    (folder / FILE).replace(path)
    flush(folder)
    older = [one for one in checkpoints(folder) if one != path]
    for one in [one for one in older if _step(one) == step]:
        older.remove(one)
        one.unlink()
    for one in older[kept - 1 :]:
        one.unlink()
    return path


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose content has the hash in its name; None if there is none at all.

    Newer ones, which are damaged, are named on stderr and removed.

    Raises:
        InputError: if all are damaged.
    """
    damaged = []
    for path in checkpoints(folder):
        if sha256(path) != NAME.fullmatch(path.name)[2]:
            damaged.append(path)
            continue
        for one in damaged:
            said = "damaged, its content has another hash; going on from the checkpoint of step"
            print(f"{one}: {said} {_step(path)}", file=sys.stderr)
            one.unlink()
        return path
    if damaged:
        raise InputError(
            f"{damaged[0]}: expected the content its name says, got a damaged checkpoint, "
            f"and no earlier one is whole; without {folder} the run starts anew"
        )
    # Older versions knew one name alone; and a process may die between writing and naming its first.
    return folder / FILE if (folder / FILE).exists() else None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a run's folder if need be, and hold it; a killed process lets go of it.

    Raises:
        InputError: if it cannot be written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written ({error.strerror})") from None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--out: another process is training in {folder}") from None
        yield
    finally:
        os.close(handle)


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])
