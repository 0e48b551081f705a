"""Using a finished run: from its folder and a text, or a file of them, to predictions."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minibert.errors import InputError
from minibert.files import write_text
from tasks.base import Example, Task
from tasks.data import Dataset
from tasks.reader import read_examples
from training.build import compute_in
from training.config import Config
from training.evaluate import Prediction, predict
from training.run_folder import RunFolder, check_unchanged, load_run, predictions_csv, read_run_config


class Computing(NamedTuple):
    """How a finished run computes; `auto` is what is fastest here."""

    precision: str = "auto"
    device: str = "auto"


AUTO = Computing()


def score_file(
    path: Path,
    task_name: str | None,
    source: Path,
    target: Path,
    batch_size: int,
    quotes: str | None = None,
    computing: Computing = AUTO,
) -> int:
    """Write a prediction for every row of a file in the task's format; how many there are.

    `quotes` are read as in the run's own data, unless it says otherwise.

    Raises:
        InputError: if the run or the file cannot be used, or the target cannot be written.
    """
    config = read_run_config(RunFolder(path))
    task = choose_task(config, task_name)
    examples, skipped = read_examples(source, task, labelled=False, quotes=quotes or config.quotes)
    for row in skipped:
        print(f"skipped {row.where}: {row.reason}", file=sys.stderr)
    text = predictions_csv(task, predictions(path, task, examples, batch_size, computing))
    try:
        write_text(text, target)
    except OSError as error:
        raise InputError(f"--output: {target} cannot be written ({error.strerror})") from None
    return len(examples)


def score_text(path: Path, task_name: str | None, texts: list[str], computing: Computing = AUTO) -> str:
    """The prediction for one example, as a line: a score, or a class with every class's probability.

    Raises:
        InputError: if the run cannot be used, the number of texts is not the task's, or they are not UTF-8.
    """
    task = choose_task(read_run_config(RunFolder(path)), task_name)
    result = predictions(path, task, [text_example(task, texts)], 1, computing)
    if result.probabilities is None:
        return f"{result.predictions[0]:.4f}"
    shares = zip(task.probability_columns, result.probabilities[0], strict=True)
    told = " ".join(f"{column}={share:.4f}" for column, share in shares)
    return f"{task.class_names[result.predictions[0]]} {told}"


def text_example(task: Task, texts: Sequence[str]) -> Example:
    """What a user typed, as an example without a label.

    Raises:
        InputError: if the number of texts is not the task's, one is empty, or they are not UTF-8.
    """
    given = tuple(text.strip() for text in texts)
    if any("\ud800" <= letter <= "\udfff" for text in given for letter in text):  # how Python keeps odd bytes
        raise InputError("--text: expected UTF-8, got other bytes")
    if len(given) != len(task.text_columns) or not all(given):
        wanted = " and ".join(task.text_columns)
        got = len(given) if all(given) else "an empty one"
        raise InputError(f"--text: expected {len(task.text_columns)} for {task.name} ({wanted}), got {got}")
    return Example("text", given, None)


def choose_task(config: Config, name: str | None) -> Task:
    by_name = {task.name: task for task in config.tasks}
    if name is None and len(by_name) == 1:
        return config.tasks[0]
    if name not in by_name:
        got = "none" if name is None else repr(name)
        raise InputError(f"--task: expected one of the run's tasks, {', '.join(by_name)}; got {got}")
    return by_name[name]


def predictions(
    path: Path, task: Task, examples: list[Example], batch_size: int, computing: Computing
) -> Prediction:
    config, model, tokenizer = load_run(path, task.name)
    check_unchanged(path, read_run_config(RunFolder(path)))
    where = compute_in(model, *computing)
    data = Dataset(task, examples, tokenizer, config.siamese(task))
    return predict(model, data, where, batch_size)
