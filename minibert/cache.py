"""Where downloads live, and how they get there whole: filled aside, under a lock, then renamed into place."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minibert.errors import InputError

logger = logging.getLogger(__name__)

PATIENCE = 3  # seconds of silence before a process says that it waits for another


def cache_root() -> Path:
    """`$MINIBERT_CACHE`, or `~/.cache/minibert`."""
    return Path(os.environ.get("MINIBERT_CACHE") or "~/.cache/minibert").expanduser()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, to fill and then rename from; one process at a time has it.

    It lies on the same file system, so a rename is atomic, and it is gone afterwards, whatever happened. What
    a killed process left behind is removed by the next one: the lock dies with its holder.

    Raises:
        InputError: if the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    partial = folder.with_name(folder.name + ".partial")
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            logger.warning("waiting for another process that is downloading to %s", folder)
            lock.acquire()
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{folder.parent}: the cache cannot be written ({reason}); $MINIBERT_CACHE moves it"
        ) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
