"""Data files -> examples: tab-separated, columns matched by name, quotes as in CSV or plain characters."""

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
QUOTES = {"csv": csv.QUOTE_MINIMAL, "plain": csv.QUOTE_NONE}
REMEDY = "a quote that is not closed, or not doubled? If quotes are plain characters here, add --quotes plain"


def read_examples(
    path: Path, task: Task, labelled: bool, strict: bool = False, quotes: str = "csv"
) -> tuple[list[Example], list[Skipped]]:
    """The examples of a file, and the rows skipped because they lack a sentence or a label.

    Extra and nameless columns are ignored; a class label may read `1.0`. Without `labelled` the label
    column may be missing or empty, and -1 is no label. `quotes`: as in CSV, or `plain` characters.

    Raises:
        InputError: with file:line, for a file that cannot be read, a missing column, a label that is no
            number or out of range, a duplicate id, a quote that swallows rows, no rows, more than 1 %
            skipped, or with `strict` any.
    """
    examples: list[Example] = []
    skipped: list[Skipped] = []
    lines_of_ids: dict[str, int] = {}
    for line, row in _rows(path, ["id", *task.text_columns], task.label_column, labelled, quotes):
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
        examples.append(Example(identity, texts, _label(given, task, where, labelled) if given else None))
    if not examples and not skipped:
        raise InputError(f"{path}: expected rows under the header, got none")
    if skipped and (strict or len(skipped) > MOST_SKIPPED * (len(examples) + len(skipped))):
        rule = "none may be with --strict" if strict else f"more than {MOST_SKIPPED:.0%}"
        total = len(examples) + len(skipped)
        raise InputError(f"{skipped[0].where}: {skipped[0].reason} ({len(skipped)} of {total} rows: {rule})")
    return examples, skipped


def _rows(
    path: Path, needed: Sequence[str], label_column: str, labelled: bool, quotes: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) for each record; a record's line is where it starts, quoted line breaks included."""
    lines = list(io.StringIO(read_text(path, stream=True), newline=""))
    csv.field_size_limit(2**31 - 1)  # what is longer than LARGEST_FIELD is refused below
    # strict: a quote that is never closed, or not doubled, is an error and not a very long field.
    reader = csv.reader(iter(lines), delimiter="\t", strict=True, quoting=QUOTES[quotes])
    required = [*needed, label_column] if labelled else needed
    columns: list[str] = []
    line = 1
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(columns, required, label_column, path)
        line = reader.line_num + 1
        for fields in reader:
            if reader.line_num > line or len(fields) != len(columns) or len(lines[line - 1]) > LARGEST_FIELD:
                where = f"{path}:{line}"
                rows = _complete(fields, columns, required)
                _check_swallowed(lines[line - 1 : reader.line_num], columns, required, rows, where)
                _check_fields(fields, columns, where)
            if fields:
                yield line, dict(zip(columns, fields, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        where = f"{path}:{line}"
        _check_swallowed(lines[line - 1 : reader.line_num], columns, required, 1, where)
        raise InputError(f"{where}: {error} ({REMEDY})") from None


def _check_fields(fields: Sequence[str], columns: Sequence[str], where: str) -> None:
    if any(fields[len(columns) :]):
        raise InputError(f"{where}: expected {len(columns)} fields, got {len(fields)}")
    if (longest := max(map(len, fields), default=0)) > LARGEST_FIELD:
        most = f"at most {LARGEST_FIELD:,} characters"
        raise InputError(f"{where}: expected a sentence of {most}, got a field of {longest:,}")


def _complete(fields: Sequence[str], columns: Sequence[str], required: Sequence[str]) -> bool:
    row = dict(zip(columns, fields, strict=False))
    return all(row.get(name, "").strip(' "') for name in required)


def _check_swallowed(
    lines: Sequence[str], columns: Sequence[str], required: Sequence[str], rows: int, where: str
) -> None:
    """Raises InputError if a record's lines hold more whole rows, with quotes as characters, than `rows`."""
    fields = [line.rstrip("\r\n").split("\t") for line in lines]
    whole = [
        len(one) >= len(columns) and not any(one[len(columns) :]) and _complete(one, columns, required)
        for one in fields
    ]
    if sum(whole) > rows:
        more = f"{sum(whole[1:]):,} of the rows below it" if any(whole[1:]) else "a tab between two fields"
        raise InputError(f"{where}: expected one row, got a quoted field that swallows {more} ({REMEDY})")


def _check_columns(columns: Sequence[str], required: Sequence[str], label_column: str, path: Path) -> None:
    if any(name not in columns for name in required):
        got = ", ".join(reprlib.repr(name) for name in columns if name) or "an empty line"
        hint = " (are the fields separated by tabs?)" if len(columns) == 1 and columns[0] else ""
        raise InputError(f"{path}:1: expected tab-separated columns {', '.join(required)}; got {got}{hint}")
    twice = [name for name in (*required, label_column) if columns.count(name) > 1]
    if twice:
        raise InputError(f"{path}:1: column {twice[0]!r} stands there twice")


def _label(text: str, task: Task, where: str, labelled: bool) -> float | None:
    low, high = task.label_range
    kind = "a class" if task.is_classification else "a number"
    wanted = f"{kind} from {low} to {high}"
    try:
        label = float(text.replace("_", "?"))  # Python would read 0_5 as 5
    except ValueError:
        label = math.nan
    if label == -1 < low and not labelled:  # as published test sets have it
        return None
    if not low <= label <= high or (task.is_classification and not label.is_integer()):
        raise InputError(f"{where}: {task.label_column} {reprlib.repr(text)} is not {wanted}")
    return label
