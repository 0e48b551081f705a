"""A task from a user's own files: what is inferred, what the split is, and what is refused in a line."""

import json
from collections import Counter
from pathlib import Path

import pytest
from own_files import SHAPES, Shape
from small_runs import call

import train
from minibert.errors import InputError
from tasks.own import from_json, read_toml, to_json, to_toml
from tasks.reader import read_split
from training.cli import parse


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_file_says_what_its_task_is(shape: Shape, tmp_path: Path) -> None:
    path = shape.write(tmp_path)
    config, given = parse(["--train", str(path), *shape.flags])
    (task,) = config.tasks
    assert task.classes == shape.classes
    assert task.num_outputs == (len(shape.classes) or 1)
    assert shape.range is None or task.label_range == shape.range
    assert task.id_column == ("id" if shape.ids else "")
    assert config.data == str(tmp_path)
    assert all(any(name in line for line in given.inferred) for name in (path.name, *shape.classes))
    assert sum(" -> " in line for line in given.inferred) == 4  # the columns, and three rows


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_share_of_each_label_is_dev_and_the_rest_is_train_whatever_the_order(
    shape: Shape, tmp_path: Path
) -> None:
    path = shape.write(tmp_path)
    config, _ = parse(["--train", str(path), *shape.flags, "--dev", "0.2"])
    (task,) = config.tasks
    parts = {split: read_split(tmp_path, task, split, quotes=config.quotes)[0] for split in ("train", "dev")}
    texts = {split: {one.texts for one in rows} for split, rows in parts.items()}
    assert not texts["train"] & texts["dev"]
    counts = {split: Counter(one.label for one in rows) for split, rows in parts.items()}
    for label, many in counts["train"].items():
        assert counts["dev"][label] == pytest.approx(0.2 * (many + counts["dev"][label]), abs=1)
    if path.suffix == ".jsonl":
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
        assert {one.texts for one in read_split(tmp_path, task, "dev")[0]} == texts["dev"]


def test_a_dry_run_stops_at_what_was_inferred(tmp_path: Path) -> None:
    shape = SHAPES["tickets"]
    words = ["--train", shape.write(tmp_path), *shape.flags, "--model", "nowhere", "--dry-run"]
    ended = call(train.main, *words)
    assert (ended.code, ended.err) == (0, "")
    assert "own task   tickets: body -> queue, of 60 rows" in ended.out
    assert "tickets.jsonl.gz is JSON Lines" in ended.out
    assert "4 classes: a broken screen, billing, shipping, Übergabe" in ended.out
    assert "tickets: 52 train, 8 dev" in ended.out


def test_a_range_makes_scores_of_what_would_be_classes(tmp_path: Path) -> None:
    shape = SHAPES["twenty"]
    config, _ = parse(["--train", str(shape.write(tmp_path)), *shape.flags, "--range", "0", "20"])
    assert (config.tasks[0].num_outputs, config.tasks[0].label_range) == (1, (0, 20))


def test_a_file_of_a_task_is_the_task_and_joins_others(tmp_path: Path) -> None:
    shape = SHAPES["three"]
    by_flags, _ = parse(["--train", str(shape.write(tmp_path)), *shape.flags])
    table = {"text": ["premise", "hypothesis"], "label": "gold", "files": {"train": "nli.csv"}, "name": "nli"}
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(table))
    by_file, _ = parse(["--task", str(file)])
    assert by_file == by_flags
    several, _ = parse(["--task", f"sst+{file}"])
    assert [task.name for task in several.tasks] == ["sst", "nli"]
    assert (several.data, several.tasks[1].files["train"]) == ("demo", str(tmp_path / "nli.csv"))
    assert read_toml(file) == table | {"files": {"train": str(tmp_path / "nli.csv")}}
    (kept,) = several.own
    assert to_json(json.loads(kept)) == kept
    assert from_json(kept) == several.tasks[1]


LINES = {
    "csv": "text,label\n" + "".join(f"fine {i},{'ab'[i % 2]}\n" for i in range(20)),
    "jsonl": "".join(json.dumps({"text": f"fine {i}", "label": i % 2}) + "\n" for i in range(20)),
}
REFUSED = {
    "1: expected columns body, label; got 'text', 'label'": (LINES["csv"], ["--text-columns", "body"]),
    "--text-columns: expected of data's columns: text, label": (LINES["csv"], ["--text-columns"]),
    "--label-column: expected of data's columns: text, label": (LINES["jsonl"], ["--label-column"]),
    "1: column 'label' stands there twice": ("text,label,label\na,1,2\n", []),
    "22: expected label to be all numbers or all words, got '7' here and 'a' in line 2": (
        LINES["csv"] + "fine,7\n",
        [],
    ),
    "expected at least two labels, label is always 'a'": ("text,label\none,a\ntwo,a\n", []),
    "expected classes in label, got 12 different texts in 12 rows": (
        "text,label\n" + "".join(f"fine,w{i}x\n" for i in range(12)),
        [],
    ),
    "21: expected one text, number or boolean as label, got ['a', 'b']": (
        LINES["jsonl"] + json.dumps({"text": "x", "label": ["a", "b"]}),
        [],
    ),
    "21: expected a JSON object on each line, got no JSON": (LINES["jsonl"] + '{"text": "x"', []),
    "2: label 'a' is not one of the task's classes: 0, 1": (LINES["jsonl"], ["--dev", "dev.csv"]),
    "2: label '0' is not a number from 1 to 5 (--range LOW HIGH sets it)": (
        "text,label\nbad,0\ngood,5\n",
        ["--range", "1", "5"],
    ),
    "--train: expected range to be two numbers, the lower one first, got [5, 1]": (
        LINES["csv"],
        ["--range", "5", "1"],
    ),
    "--dev: expected a file, or a share between 0 and 1, got 1.5": (LINES["csv"], ["--dev", "1.5"]),
    "expected a row of dev, got none: 0.1 of each label's rows, 2 in all": ("text,label\na b,x\nc d,y\n", []),
    "got a .parquet file; convert it first": (LINES["csv"], ["--test", "more.parquet"]),
    "21: expected 2 fields, got 3": (LINES["csv"].replace("fine 19,b", "fine, 19,b"), []),
    "expected different columns as text and label": (LINES["csv"], ["--text-columns", "label"]),
    "nowhere.csv: cannot be read": (LINES["csv"], ["--test", "nowhere.csv"]),
    "no text (3 of 23 rows: more than 1%)": (LINES["csv"] + ",a\n" * 3, []),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_be_a_task_is_refused_in_a_line(
    message: str, case: tuple[str, list[str]], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, changes = case
    monkeypatch.chdir(tmp_path)
    Path("data").write_text(content)
    Path("dev.csv").write_text(LINES["csv"])
    words = {"--text-columns": ["text"], "--label-column": ["label"]}
    words |= {changes[0]: changes[1:]} if changes else {}
    told = [word for name, values in words.items() if values for word in (name, *values)]
    ended = call(train.main, "--train", "data", *told, "--model", tiny, "--out", "out")
    assert ended.code == 2
    assert message in ended.line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('lable = "x"\n', "expected the keys name, about, text, label, classes, range, ordered, id, files"),
        ('text = ["a"]\nlabel = "b"\n', "expected files to be"),
        ('text = ["a"]\nlabel = "b"\nclasses = ["x"]\nfiles = {train = "c"}', "expected classes to be"),
        ("= 3", "expected TOML, got something else"),
    ],
)
def test_a_file_that_is_no_task_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse(["--task", str(file)])
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_file_that_is_called_as_a_built_in_task_is_another_task(tmp_path: Path) -> None:
    for file in (tmp_path / "sst.csv", tmp_path / "sst" / "train.csv"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(LINES["csv"])
        config, _ = parse(["--train", str(file), "--text-columns", "text", "--label-column", "label"])
        assert config.task == "own-sst"


@pytest.mark.parametrize("words", [["--dry-run"], ["--dev", "0.2"], ["--text-columns", "a"]])
def test_flags_of_own_data_need_own_data(words: list[str], refusal) -> None:
    assert words[0] in refusal(parse, words)
