"""The labelled examples of a finished run's data, where they still are; nothing is downloaded for it."""

import os
from pathlib import Path

from minibert.errors import InputError
from tasks.base import Example, Task
from training.config import Config


def labelled(config: Config, task: Task, split: str) -> list[Example]:
    """Of a run's `train` or `dev`, the rows that it had.

    Raises:
        InputError: if the data folder is no longer there, or cannot be read.
    """
    from tasks.course import cached_folder
    from tasks.reader import read_split
    from training.build import data_folder

    folder = cached_folder() if config.data == "cs224n" else Path(config.data)
    if config.data != "demo" and not os.path.isfile(folder / task.files[split]):
        raise InputError(f"{folder}: there is no {task.files[split]} any more")
    folder = data_folder(config) if config.data == "demo" else folder
    return read_split(folder, task, split, quotes=config.quotes)[0]
