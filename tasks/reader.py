"""Data files -> examples: columns matched by name, quotes as in CSV or plain characters.

The study's files are tab-separated. Those of an own task may be separated by commas or semicolons too, or be
JSON Lines, whatever they are called.
"""

import csv
import hashlib
import io
import json
import math
import reprlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from minibert.errors import InputError
from minibert.files import read_text
from tasks.base import Example, Skipped, Task

BINARY = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".zip")  # tables that are no text
MOST_SKIPPED = 0.01  # of a file's rows; above that the file is not what it is taken for
LARGEST_FIELD = 2**17  # characters; a longer one is no sentence
QUOTES = {"csv": csv.QUOTE_MINIMAL, "plain": csv.QUOTE_NONE}
LAYOUTS = {"\t": "tab-separated", ",": "comma-separated", ";": "semicolon-separated", "": "JSON Lines"}
BOOLEANS = ("false", "true")
SHOWN = 20  # classes named in a message
BINS = 10  # of scores, for a split that has as many of each in both parts
REMEDY = "a quote that is not closed, or not doubled? If quotes are plain characters here, add --quotes plain"


def read_split(
    folder: Path, task: Task, split: str, strict: bool = False, quotes: str = "csv"
) -> tuple[list[Example], list[Skipped]]:
    """`read_examples` of a task's train, dev or test; where dev is a share of train's file, of that part."""
    examples, skipped = read_examples(folder / task.files[split], task, split != "test", strict, quotes)
    if not task.dev_share or split == "test":
        return examples, skipped
    held_out = _held_out(examples, task)
    kept = [one for one, out in zip(examples, held_out, strict=True) if out == (split == "dev")]
    if not kept:
        wanted = f"a row of dev, got none: {task.dev_share:g} of each label's rows, {len(examples)} in all"
        raise InputError(f"{folder / task.files[split]}: expected {wanted}; use a larger share, or a file")
    return kept, skipped if split == "train" else []


def _held_out(examples: Sequence[Example], task: Task) -> list[bool]:
    """Which rows are dev: as large a part of each label, chosen by the texts alone, whatever the rows' order.

    Rows with the same texts and label are on one side.
    """
    low, high = task.label_range
    keys, strata = [], defaultdict(list)
    for one in examples:
        digest = hashlib.sha256("\0".join(one.texts).encode()).digest()
        place = one.label if task.is_classification else BINS * (one.label - low) // (high - low)
        keys.append((place, digest))
        strata[place].append(digest)
    cuts = {}
    for place, digests in strata.items():
        digests.sort()
        cuts[place] = digests[min(round(task.dev_share * len(digests)), len(digests) - 1)]
    return [digest < cuts[place] for place, digest in keys]


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
    for line, row in read_rows(path, task, labelled, quotes):
        where = f"{path}:{line}"
        texts = tuple(row.get(column, "").strip() for column in task.text_columns)
        given = row.get(task.label_column, "").strip()
        lacking = [column for column, text in zip(task.text_columns, texts, strict=True) if not text]
        if labelled and not given:
            lacking.append(task.label_column)
        if lacking:
            skipped.append(Skipped(where, f"no {' and no '.join(lacking)}"))
            continue
        identity = row.get(task.id_column, "").strip()
        if not identity and task.own and task.id_column not in row:
            identity = str(len(examples) + len(skipped) + 1)
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


def layout_of(text: str, columns: Collection[str]) -> str:
    """What separates the columns of an own task's file, a key of LAYOUTS: what finds most of `columns`."""
    if text.lstrip()[:1] == "{":
        return ""
    header = text[: text.find("\n")] if "\n" in text else text

    def found(separator: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        return len(set(names) & set(columns)), len(names)

    return max(filter(None, LAYOUTS), key=found)


def read_rows(path: Path, task: Task, labelled: bool, quotes: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) for each record of a file. Raises InputError as `read_examples` does."""
    ids = [] if task.own else [task.id_column]
    required = [*ids, *task.text_columns, *[task.label_column] * labelled]
    if path.suffix.lower() in BINARY:
        wanted = "expected comma- or tab-separated text, or JSON Lines"
        raise InputError(f"{path}: {wanted}, got a {path.suffix} file; convert it first")
    text = read_text(path, stream=True)
    layout = layout_of(text, required) if task.own else "\t"
    if not layout:
        return _objects(text, path, required, task)
    return _records(text, path, required, (task, layout, quotes))


def _records(
    text: str, path: Path, required: Sequence[str], how: tuple[Task, str, str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """A record's line is where it starts, quoted line breaks included; `how`: task, separator and quotes."""
    task, separator, quotes = how
    lines = list(io.StringIO(text, newline=""))
    csv.field_size_limit(2**31 - 1)  # what is longer than LARGEST_FIELD is refused below
    # strict: a quote that is never closed, or not doubled, is an error and not a very long field.
    reader = csv.reader(iter(lines), delimiter=separator, strict=True, quoting=QUOTES[quotes])
    columns: list[str] = []
    line = 1
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(columns, required, task, path)
        line = reader.line_num + 1
        for fields in reader:
            if reader.line_num > line or len(fields) != len(columns) or len(lines[line - 1]) > LARGEST_FIELD:
                where = f"{path}:{line}"
                if separator == "\t":  # a sentence has commas, and so may look like a row
                    rows = _complete(fields, columns, required)
                    _check_swallowed(lines[line - 1 : reader.line_num], columns, required, rows, where)
                _check_fields(fields, columns, where)
            if fields:
                yield line, dict(zip(columns, fields, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        where = f"{path}:{line}"
        if separator == "\t":
            _check_swallowed(lines[line - 1 : reader.line_num], columns, required, 1, where)
        raise InputError(f"{where}: {error} ({REMEDY})") from None


def _objects(
    text: str, path: Path, required: Sequence[str], task: Task
) -> Iterator[tuple[int, dict[str, str]]]:
    wanted = {*required, *task.text_columns, task.label_column, task.id_column}
    first = True
    for line, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        where = f"{path}:{line}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected a JSON object on each line, got no JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object on each line, got {reprlib.repr(row)}")
        if first:
            _check_columns(list(row), required, task, path)
        first = False
        yield line, {name: _as_text(row[name], name, where) for name in wanted & row.keys()}


def _as_text(value: object, name: str, where: str) -> str:
    """A value of JSON as a CSV file would have it."""
    if isinstance(value, list | dict):
        raise InputError(
            f"{where}: expected one text, number or boolean as {name}, got {reprlib.repr(value)}"
        )
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    if len(text) > LARGEST_FIELD:
        most = f"at most {LARGEST_FIELD:,} characters"
        raise InputError(f"{where}: expected a sentence of {most}, got a field of {len(text):,}")
    return text


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


def _check_columns(columns: Sequence[str], required: Sequence[str], task: Task, path: Path) -> None:
    if any(name not in columns for name in required):
        got = ", ".join(reprlib.repr(name) for name in columns if name) or "an empty line"
        one = len(columns) == 1 and columns[0] and not task.own
        hint = " (are the fields separated by tabs?)" if one else ""
        kind = "" if task.own else "tab-separated "
        raise InputError(f"{path}:1: expected {kind}columns {', '.join(required)}; got {got}{hint}")
    twice = [name for name in (*required, task.label_column) if columns.count(name) > 1]
    if twice:
        raise InputError(f"{path}:1: column {twice[0]!r} stands there twice")


def number_of(text: str) -> float | None:
    """The finite number that a label is, if it is one."""
    try:
        number = float(text.replace("_", "?"))  # Python would read 0_5 as 5
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def class_of(text: str) -> str:
    """A label as the name of a class: 1.0 and 1 are one class, and so are True and true."""
    number = number_of(text)
    if number is not None:
        return str(int(number)) if number.is_integer() else text
    return text.lower() if text.lower() in BOOLEANS else text


def _label(text: str, task: Task, where: str, labelled: bool) -> float | None:
    number = number_of(text)
    if task.classes:
        label = task.place_of.get(class_of(text))
        more = f" and {len(task.classes) - SHOWN} more" if len(task.classes) > SHOWN else ""
        wanted = f"one of the task's classes: {', '.join(task.classes[:SHOWN])}{more}"
    else:
        low, high = task.label_range
        whole = not task.is_classification or number is None or number.is_integer()
        label = number if number is not None and low <= number <= high and whole else None
        wanted = f"{'a class' if task.is_classification else 'a number'} from {low} to {high}"
        wanted += " (--range LOW HIGH sets it)" if task.own else ""
    if label is None and number == -1 and not labelled:  # as published test sets have it
        return None
    if label is None:
        raise InputError(f"{where}: {task.label_column} {reprlib.repr(text)} is not {wanted}")
    return label
