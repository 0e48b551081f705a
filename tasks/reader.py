"""Data files -> examples: tab-separated, CSV quoting, columns matched by name."""

import csv
import io
import math
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from minibert.errors import InputError
from minibert.files import read_text
from tasks.base import Example, Skipped, Task

MOST_SKIPPED = 0.01  # of a file's rows; above that the file is not what it is taken for
LARGEST_FIELD = 2**17  # characters; a longer one is no sentence


def read_examples(
    path: Path, task: Task, labelled: bool, strict: bool = False
) -> tuple[list[Example], list[Skipped]]:
    """The examples of a file, and the rows skipped because they lack a sentence or a label.

    Extra and nameless columns are ignored; a class label may read `1.0`. Without `labelled` the label
    column may be missing or empty.

    Raises:
        InputError: with file:line, for a file that cannot be read, a missing column, a label that is no
            number or out of range, a duplicate id, no rows, more than 1 % skipped, or with `strict` any.
    """
    examples: list[Example] = []
    skipped: list[Skipped] = []
    lines_of_ids: dict[str, int] = {}
    for line, row in _rows(path, ["id", *task.text_columns], task.label_column, labelled):
        where = f"{path}:{line}"
        texts = tuple(row.get(column, "").strip() for column in task.text_columns)
        given = row.get(task.label_column, "").strip()
        lacking = [column for column, text in zip(task.text_columns, texts, strict=True) if not text]
        if labelled and not given:
            lacking.append(task.label_column)
        if lacking:
            skipped.append(Skipped(where, f"no {' and no '.join(lacking)}"))
            continue
        identity = row.get("id", "").strip()
        if not identity:
            raise InputError(f"{where}: expected an id, got none")
        if identity in lines_of_ids:
            raise InputError(f"{where}: id {identity!r} is taken by line {lines_of_ids[identity]}")
        lines_of_ids[identity] = line
        examples.append(Example(identity, texts, _label(given, task, where) if given else None))
    if not examples and not skipped:
        raise InputError(f"{path}: expected rows under the header, got none")
    if skipped and (strict or len(skipped) > MOST_SKIPPED * (len(examples) + len(skipped))):
        rule = "none may be with --strict" if strict else f"more than {MOST_SKIPPED:.0%}"
        total = len(examples) + len(skipped)
        raise InputError(f"{skipped[0].where}: {skipped[0].reason} ({len(skipped)} of {total} rows: {rule})")
    return examples, skipped


def _rows(
    path: Path, needed: Sequence[str], label_column: str, labelled: bool
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) for each record; a record's line is where it starts, quoted line breaks included."""
    # strict: a quote that is never closed, or not doubled, is an error and not a very long field.
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(io.StringIO(read_text(path, stream=True), newline=""), delimiter="\t", strict=True)
    line = 1
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(columns, needed, label_column, labelled, path)
        line = reader.line_num + 1
        for fields in reader:
            if any(fields[len(columns) :]):
                raise InputError(f"{path}:{line}: expected {len(columns)} fields, got {len(fields)}")
            if fields:
                yield line, dict(zip(columns, fields, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: {error} (a quote that is not closed, or not doubled?)") from None


def _check_columns(
    columns: Sequence[str], needed: Sequence[str], label_column: str, labelled: bool, path: Path
) -> None:
    required = [*needed, label_column] if labelled else needed
    if any(name not in columns for name in required):
        got = ", ".join(reprlib.repr(name) for name in columns if name) or "an empty line"
        hint = " (are the fields separated by tabs?)" if len(columns) == 1 and columns[0] else ""
        raise InputError(f"{path}:1: expected tab-separated columns {', '.join(required)}; got {got}{hint}")
    twice = [name for name in (*needed, label_column) if columns.count(name) > 1]
    if twice:
        raise InputError(f"{path}:1: column {twice[0]!r} stands there twice")


def _label(text: str, task: Task, where: str) -> float:
    low, high = task.label_range
    kind = "a class" if task.is_classification else "a number"
    wanted = f"{kind} from {low} to {high}"
    try:
        label = float(text.replace("_", "?"))  # Python would read 0_5 as 5
    except ValueError:
        label = math.nan
    if not low <= label <= high or (task.is_classification and not label.is_integer()):
        raise InputError(f"{where}: {task.label_column} {reprlib.repr(text)} is not {wanted}")
    return label
