"""Data files: what is read, what is skipped, what is refused, and where the message points."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.errors import InputError
from tasks import QQP, SST, STS, TASKS
from tasks.base import Example, Task
from tasks.reader import LARGEST_FIELD, REMEDY, read_examples

SST_HEADER = "id\tsentence\tsentiment\n"
STS_HEADER = "id\tsentence1\tsentence2\tsimilarity\n"
QQP_HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"


@pytest.fixture
def write(tmp_path: Path):
    """Writes a data file, byte for byte; its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "data.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused_with(path: Path, task: Task = SST, labelled: bool = True, strict: bool = False) -> str:
    """The one line that a file is refused with, without the path; what follows a `:` is a line number."""
    with pytest.raises(InputError) as caught:
        read_examples(path, task, labelled, strict)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert len(message.splitlines()) == 1
    assert len(message) < 300 + len(str(path))
    return message.removeprefix(f"{path}:")


def rows(count: int, first: int = 0) -> str:
    return "".join(f"{i}\tfine\t1\n" for i in range(first, first + count))


# What is read


def test_a_row_becomes_an_example(write):
    path = write(STS_HEADER + "a\tOne.\tTwo.\t3.5\nb\tThree.\tFour.\t0\n")
    assert read_examples(path, STS, labelled=True) == (
        [Example("a", ("One.", "Two."), 3.5), Example("b", ("Three.", "Four."), 0.0)],
        [],
    )


def test_columns_are_found_by_name_in_any_order_among_extra_and_nameless_ones(write):
    path = write('4\t\t" sentiment "\tnote\tsentence\tid\n9\t7\t2\tx\tGood.\ta\n9\t8\t3\t\tBetter.\tb\n')
    examples, _ = read_examples(path, SST, labelled=True)
    assert examples == [Example("a", ("Good.",), 2.0), Example("b", ("Better.",), 3.0)]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("plain", "plain"),
        ("  padded  ", "padded"),
        ('"with a\ttab"', "with a\ttab"),
        ('"say ""hi"" twice"', 'say "hi" twice'),
        ('""""', '"'),
        ('a 5" disk', 'a 5" disk'),
        ('5"', '5"'),
        ("don't", "don't"),
        ('"two\nlines"', "two\nlines"),
        ('"two\r\nlines"', "two\r\nlines"),
        ("naïve café 日本 🙂", "naïve café 日本 🙂"),
        ("commas, and; semicolons", "commas, and; semicolons"),
    ],
)
def test_fields_are_read_as_csv_quotes_them(write, field: str, text: str):
    examples, _ = read_examples(write(f"{SST_HEADER}a\t{field}\t1\n"), SST, labelled=True)
    assert examples == [Example("a", (text,), 1.0)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_a_byte_order_mark_and_any_line_ends_are_no_part_of_the_data(
    write, mark: str, line_end: str, last: bool
):
    content = (SST_HEADER + rows(2) + rows(1, first=2)).replace("\n", line_end)
    path = write(mark + (content if last else content.removesuffix(line_end)))
    examples, skipped = read_examples(path, SST, labelled=True)
    assert examples == [Example(str(i), ("fine",), 1.0) for i in range(3)]
    assert skipped == []


@pytest.mark.parametrize(
    ("task", "header", "texts", "label", "value"),
    [
        (SST, SST_HEADER, "x", "4.0", 4),
        (SST, SST_HEADER, "x", " 3 ", 3),
        (QQP, QQP_HEADER, "x\ty", "1.0", 1),
        (QQP, QQP_HEADER, "x\ty", "0.0", 0),
        (STS, STS_HEADER, "x\ty", "4.75", 4.75),
        (STS, STS_HEADER, "x\ty", "5e-1", 0.5),
    ],
)
def test_a_label_may_be_written_as_any_number(write, task, header, texts, label, value):
    examples, _ = read_examples(write(f"{header}a\t{texts}\t{label}\n"), task, labelled=True)
    assert examples[0].label == value


def test_without_labelled_the_label_column_may_be_missing_or_empty_and_labels_are_kept(write):
    examples, _ = read_examples(write("id\tsentence\na\tx\n"), SST, labelled=False)
    assert examples == [Example("a", ("x",), None)]
    examples, _ = read_examples(write(SST_HEADER + "a\tx\t\nb\ty\t2\nc\tz\n"), SST, labelled=False)
    assert [example.label for example in examples] == [None, 2.0, None]


def test_minus_one_in_an_unlabelled_file_is_no_label_where_the_range_has_none(write):
    path = write(SST_HEADER + "a\tx\t-1\nb\ty\t-1.0\nc\tz\t2\n")
    examples, _ = read_examples(path, SST, labelled=False)
    assert [example.label for example in examples] == [None, None, 2.0]
    examples, _ = read_examples(path, replace(SST, label_range=(-2, 2)), labelled=False)
    assert [example.label for example in examples] == [-1.0, -1.0, 2.0]


def test_blank_lines_are_passed_over_and_still_counted(write):
    path = write(SST_HEADER + "\n" + rows(1) + "\n\n" + rows(1) + "\n")
    assert refused_with(path) == "6: id '0' is taken by line 3"


def test_a_record_stands_where_it_starts_whatever_line_breaks_its_quotes_hold(write):
    path = write('id\tsentence\t"senti\nment"\tsentiment\na\t"1\n\r\n2\r3"\t\t1\nb\t"4\n5"\t\t2\na\tx\t\t1\n')
    assert refused_with(path) == "9: id 'a' is taken by line 3"


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(max_examples=200)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), ends=st.sampled_from(["\n", "\r\n"]))
def test_whatever_is_quoted_by_the_rules_of_csv_reads_back_as_it_was(tmp_path_factory, texts, ends):
    texts = [(f"a{left}z", f"a{right}z") for left, right in texts]  # so that no edge is white space
    content, lines = STS_HEADER.replace("\n", ends), []
    for i, pair in enumerate(texts):
        lines.append(1 + len(re.findall("\r\n|\r|\n", content)))
        quoted = ('"' + text.replace('"', '""') + '"' for text in pair)
        content += "\t".join([str(i), *quoted, "2"]) + ends
    path = tmp_path_factory.getbasetemp() / "round-trip.csv"
    path.write_bytes(content.encode())
    assert [e.texts for e in read_examples(path, STS, labelled=True)[0]] == texts
    last = 1 + len(re.findall("\r\n|\r|\n", content))
    path.write_bytes((content + "0\tx\ty\t1").encode())
    assert refused_with(path, STS) == f"{last}: id '0' is taken by line {lines[0]}"


# What is skipped


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x\t\tb\t1", "no sentence1"),
        ("x\ta\t  \t1", "no sentence2"),
        ("x\t\t\t1", "no sentence1 and no sentence2"),
        ("x\ta\tb\t", "no is_duplicate"),
        ("x\ta\tb", "no is_duplicate"),
        ("x", "no sentence1 and no sentence2 and no is_duplicate"),
        ("\t\t\t", "no sentence1 and no sentence2 and no is_duplicate"),
        ('x\t"only\n\nthis"', "no sentence2 and no is_duplicate"),
    ],
)
def test_a_row_that_lacks_a_sentence_or_a_label_is_skipped_and_named(write, row: str, reason: str):
    good = [f"{i}\ta\tb\t0\n" for i in range(150)]
    path = write(QQP_HEADER + "".join(good[:40]) + row + "\n" + "".join(good[40:]))
    examples, skipped = read_examples(path, QQP, labelled=True)
    assert [example.id for example in examples] == [str(i) for i in range(150)]
    assert [(one.where, one.reason) for one in skipped] == [(f"{path}:42", reason)]
    assert refused_with(path, QQP, strict=True) == f"42: {reason} (1 of 151 rows: none may be with --strict)"


def test_up_to_one_percent_of_the_rows_may_be_skipped_and_no_more(write):
    bad = "x\t\t1\n"
    assert len(read_examples(write(SST_HEADER + rows(99) + bad), SST, labelled=True)[1]) == 1
    assert len(read_examples(write(SST_HEADER + bad + rows(198) + bad), SST, labelled=True)[1]) == 2
    assert refused_with(write(SST_HEADER + rows(98) + bad)) == "100: no sentence (1 of 99 rows: more than 1%)"
    assert refused_with(write(SST_HEADER + bad)) == "2: no sentence (1 of 1 rows: more than 1%)"


def test_strict_minds_nothing_but_skipped_rows(write):
    assert len(read_examples(write(SST_HEADER + rows(3)), SST, labelled=True, strict=True)[0]) == 3


# What is refused


@pytest.mark.parametrize("label", ["5", "-1", "1.5", "nan", "inf", "-inf", "0x1", "x", "1,0", "1_0", "0_1"])
def test_a_label_that_is_no_class_is_refused(write, label: str):
    path = write(SST_HEADER + rows(1) + f"a\tx\t{label}\n")
    for labelled in (True, False) if label != "-1" else (True,):
        assert refused_with(path, labelled=labelled) == f"3: sentiment '{label}' is not a class from 0 to 4"


@pytest.mark.parametrize("label", ["5.01", "-0.2", "NaN", "infinity", "0x1p1", "four", "2,5", "0_5", "1e999"])
def test_a_label_that_is_no_score_is_refused(write, label: str):
    path = write(STS_HEADER + f"a\tx\ty\t{label}\n")
    assert refused_with(path, STS) == f"2: similarity '{label}' is not a number from 0 to 5"


def test_an_endless_label_is_refused_in_one_short_line(write):
    assert "2: sentiment 'aaaa" in refused_with(write(SST_HEADER + f"a\tx\t{'a' * 10_000}\n"))
    assert "2: sentiment 'a\\nb' is" in refused_with(write(SST_HEADER + 'a\tx\t"a\nb"\n'))


def test_a_repeated_id_is_refused(write):
    assert refused_with(write(SST_HEADER + rows(3) + "1\tx\t1\n")) == "5: id '1' is taken by line 3"


def test_a_row_without_an_id_is_refused(write):
    assert refused_with(write(SST_HEADER + " \tx\t1\n")) == "2: expected an id, got none"


def test_a_missing_column_is_refused(write):
    message = "1: expected tab-separated columns id, sentence, sentiment; got 'id', 'sentence', 'label'"
    assert refused_with(write("id\tsentence\tlabel\na\tx\t1\n")) == message
    message = "1: expected tab-separated columns id, sentence1, sentence2; got 'id', 'sentence1'"
    assert refused_with(write("id\tsentence1\t\na\tx\t1\n"), STS, labelled=False) == message


def test_a_column_that_stands_there_twice_is_refused_unless_it_is_not_needed(write):
    twice = "id\tsentence\tsentence\tsentiment\na\tx\ty\t1\n"
    assert refused_with(write(twice)) == "1: column 'sentence' stands there twice"
    twice = "id\tsentence\tsentiment\tsentiment\na\tx\t1\t2\n"
    assert refused_with(write(twice), labelled=False) == "1: column 'sentiment' stands there twice"
    path = write("id\tnote\tnote\tsentence\tsentiment\na\t\t\tx\t1\n")
    assert len(read_examples(path, SST, labelled=True)[0]) == 1


@pytest.mark.parametrize("separator", [",", ";", "|", " "])
def test_another_separator_is_refused_with_a_hint(write, separator: str):
    message = refused_with(write((SST_HEADER + rows(2)).replace("\t", separator)))
    assert message.startswith("1: expected tab-separated columns id, sentence, sentiment; got 'id")
    assert message.endswith("(are the fields separated by tabs?)")


def test_a_tab_that_no_quote_protects_is_refused(write):
    path = write("id\tsentence\n0\tfine\na\tsplit\tin two\n")
    assert refused_with(path, labelled=False) == "3: expected 2 fields, got 3"
    assert len(read_examples(write("id\tsentence\na\tx\t\t\n"), SST, labelled=False)[0]) == 1


@pytest.mark.parametrize("content", ["", "\ufeff", "\n", "\r\n\r\n", "\t\t\n"])
def test_an_empty_file_is_refused(write, content: str):
    assert refused_with(write(content)) == (
        "1: expected tab-separated columns id, sentence, sentiment; got an empty line"
    )


def test_a_header_without_rows_is_refused(write):
    assert refused_with(write(SST_HEADER)) == " expected rows under the header, got none"
    assert refused_with(write(SST_HEADER.strip() + "\n\n")) == " expected rows under the header, got none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "1: expected UTF-8 text, got byte 0x89"),
        (SST_HEADER.encode("utf-16"), "1: expected UTF-8 text, got byte 0xff"),
        (SST_HEADER.encode("utf-16-le"), "1: expected text, got a NUL byte"),
        (SST_HEADER.encode() + b"a\tx\t1\nb\tcaf\xe9\t1\n", "3: expected UTF-8 text, got byte 0xe9"),
        (b"\xef\xbb\xbf" + SST_HEADER.encode() + b"b\tcaf\xe9\t1\n", "2: expected UTF-8 text, got byte 0xe9"),
        (SST_HEADER.encode() + b"a\tx\t1\nb\ty\xe2\x82", "3: expected UTF-8 text, got byte 0xe2"),
        (SST_HEADER.encode() + b"b\t\xed\xa0\x80\t1\n", "2: expected UTF-8 text, got byte 0xed"),
        (SST_HEADER.encode() + b"a\tx\t1\nb\ty\0\t1\n", "3: expected text, got a NUL byte"),
    ],
)
def test_a_file_that_is_no_text_is_refused(write, content: bytes, message: str):
    assert refused_with(write(content)) == message


@pytest.mark.parametrize("tail", [0, 3, 500, 20_000])
def test_a_quote_that_is_never_closed_is_refused_where_it_opens(write, tail: int):
    message = refused_with(write(SST_HEADER + rows(2) + 'a\t"Never closed.\t1\n' + rows(tail, first=2)))
    assert message.startswith("4: ")
    assert (f"swallows {tail:,} of the rows below it" in message) == (tail > 0)
    assert message.endswith(f"({REMEDY})")


@pytest.mark.parametrize("closing", ['"Quoted."', 'closed"', '"Quoted" inside'])
@pytest.mark.parametrize("label", ["\t1", ""])
def test_a_quote_that_a_later_row_closes_is_refused_and_read_where_quotes_are_plain(
    write, closing: str, label: str
):
    content = (
        SST_HEADER + rows(2) + 'a\t"Open.\t1\n' + rows(108, first=2) + f"b\t{closing}\t1\n" + rows(9, 200)
    )
    path = write(content if label else content.replace("\t1\n", "\n").replace("\tsentiment", ""))
    swallows = "expected one row, got a quoted field that swallows 109 of the rows below it"
    assert refused_with(path, labelled=bool(label)) == f"4: {swallows} ({REMEDY})"
    examples, skipped = read_examples(path, SST, bool(label), quotes="plain")
    assert (len(examples), skipped) == (121, [])
    assert [one.texts for one in examples if one.id in "ab"] == [('"Open.',), (closing,)]


def test_a_quote_that_swallows_only_a_tab_is_refused_too(write):
    good = "".join(f"{i}\tfine\tfair\t1\n" for i in range(150))
    message = refused_with(write(STS_HEADER + good + 'a\t"One\ttwo"\t3\n'), STS)
    assert message.startswith("152: expected one row, got a quoted field that swallows a tab")


@pytest.mark.parametrize(
    "columns", ["id sentence sentiment", "sentence id sentiment", "sentiment id sentence"]
)
@pytest.mark.parametrize("text", ["two\nlines", "a\tb\n\nc\td\te"])
def test_a_quoted_field_may_span_lines_that_are_no_rows(write, columns: str, text: str):
    row = {"id": "a", "sentence": f'"{text}"', "sentiment": "3"}
    lines = [columns.split(), [row[name] for name in columns.split()]]
    path = write("".join("\t".join(line) + "\n" for line in lines))
    assert read_examples(path, SST, labelled=True) == ([Example("a", (text,), 3.0)], [])


def test_a_quote_inside_a_quoted_field_must_be_doubled(write):
    assert refused_with(write(SST_HEADER + 'a\t"Hello" she said.\t1\n')).startswith("2: ")


def test_a_huge_field_is_refused(write):
    assert read_examples(write(f"{SST_HEADER}a\t{'x' * LARGEST_FIELD}\t1\n"), SST, labelled=True)[0]
    message = refused_with(write(SST_HEADER + rows(1) + f"a\t{'x' * (LARGEST_FIELD + 1)}\t1\n"))
    assert message == "3: expected a sentence of at most 131,072 characters, got a field of 131,073"
    quoted = '"' + "x\n" * LARGEST_FIELD + '"'
    assert "2: expected a sentence of at most" in refused_with(write(f"{SST_HEADER}a\t{quoted}\t1\n"))


def test_a_huge_header_is_refused_in_one_short_line(write):
    assert refused_with(write("x" * (LARGEST_FIELD - 1))).startswith("1: expected tab-separated columns")


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path):
    assert refused_with(tmp_path / "none.csv") == " cannot be read (No such file or directory)"
    assert refused_with(tmp_path) == " cannot be read (Is a directory)"
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    assert refused_with(tmp_path / "loop.csv").startswith(" cannot be read (")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(write):
    path = write(SST_HEADER + rows(1))
    path.chmod(0)
    assert refused_with(path) == " cannot be read (Permission denied)"


# Anything at all


LIKELY = st.text(st.sampled_from('\t\n\r"ab01.,_-+ \0\ufeff\u2028é'), max_size=60)


@settings(max_examples=300)
@given(
    task=st.sampled_from(list(TASKS.values())),
    header=st.booleans(),
    content=st.one_of(LIKELY, LIKELY.map(str.encode), st.binary(max_size=60), TEXT),
    labelled=st.booleans(),
    strict=st.booleans(),
)
def test_any_file_gives_examples_or_one_clear_line(tmp_path_factory, task, header, content, labelled, strict):
    content = content.encode() if isinstance(content, str) else content
    names = "\t".join(["id", *task.text_columns, task.label_column]) + "\n"
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(names.encode() * header + content)
    examples, skipped, message = [], [], ""
    try:
        examples, skipped = read_examples(path, task, labelled, strict)
    except InputError as error:
        message = str(error)
    if message:
        assert re.match(rf"{re.escape(str(path))}:(\d+:)? \S", message)
        assert len(message.splitlines()) == 1
    else:
        assert examples
        assert len({example.id for example in examples}) == len(examples)
        for example in examples:
            assert example.id
            assert len(example.texts) == len(task.text_columns)
            assert all(text and text == text.strip() for text in example.texts)
            assert example.label is not None or not labelled
        assert not (strict and skipped)


# The course's own files


# Quora's two sizes: a cut of the 2023 dev file, whose broken rows are known, and the 2024 split.
COURSE_ROWS = {
    "sst": {"train": [8544], "dev": [1101], "test": [2210]},
    "qqp": {"train": [14_000, 283_010], "dev": [3_000, 40_429], "test": [3_214, 80_859]},
    "sts": {"train": [6040], "dev": [863], "test": [1725]},
}
COURSE_BROKEN = {
    14_000: [("quora-train.csv:2577", "no is_duplicate")],
    3_000: [("quora-dev.csv:222", "no sentence2 and no is_duplicate")],
}


@pytest.fixture
def course() -> Path:
    if "CS224N_DATA" not in os.environ:
        pytest.skip("needs the course's files: CS224N_DATA names no folder")
    return Path(os.environ["CS224N_DATA"])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_of_the_course_files_exactly_the_known_broken_rows_are_skipped(course: Path, task: Task, split: str):
    file = task.files[split]
    examples, skipped = read_examples(course / file, task, labelled=split != "test")
    total = len(examples) + len(skipped)
    assert total in COURSE_ROWS[task.name][split]
    if total < 20_000:
        broken = [(Path(one.where).name, one.reason) for one in skipped]
        assert broken == COURSE_BROKEN.get(total, [])
        # No record of these files holds a line break, so that lines count rows.
        assert (course / file).read_bytes().count(b"\n") == 1 + total
    assert all((example.label is None) == (split == "test") for example in examples)
    if not skipped:
        assert read_examples(course / file, task, split != "test", strict=True) == (examples, [])
