"""train.py on a disk that is full at step 7, or at the end: `step` or `end`, then its flags."""

import errno
import sys
from pathlib import Path

import train
from training import run
from training.exit import leave, run_command

write = run.append_line


def write_until_full(line: dict, path: Path) -> None:
    write(line, path)
    if line["step"] == 7:
        raise full()


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left")


def write_nothing(*_: object) -> None:
    raise full()


if __name__ == "__main__":
    if sys.argv.pop(1) == "step":
        run.append_line = write_until_full
    else:
        run.save_model = write_nothing
    leave(run_command(train.main))
