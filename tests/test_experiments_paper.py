"""The study's tables: their cells are settings that run, and their verdicts are arithmetic."""

import math

import pytest
from small_runs import call

from experiments.paper import (
    cells_of,
    columns,
    config_of,
    lines,
    main,
    overall,
    rows_of,
)
from experiments.tables import TABLES, clock
from experiments.verdicts import Scored, gap, standard_error, verdict
from training.cli import parse
from training.config import METHODS

ROWS = [(number, row) for number, table in TABLES.items() for row in table.rows]


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("recipe", ["study", "ours"])
def test_every_row_is_a_run_that_train_py_accepts(scale, recipe):
    for table in TABLES.values():
        cells = [cell for row in cells_of(rows_of(table), scale, recipe, [0, 1]) for cell in row]
        assert len({cell.name for cell in cells}) == len({cell.config for cell in cells}) == len(cells)
        for cell in cells:
            arguments = [str(word) for word in cell.command("folder")[1:]]
            assert parse(arguments)[0] == cell.config


@pytest.mark.parametrize(("scale", "runs"), [("small", 52), ("full", 54)])
@pytest.mark.parametrize("recipe", ["study", "ours"])
def test_tables_share_the_runs_that_are_the_same_and_no_others(scale, runs, recipe):
    cells = [cell for table in TABLES.values() for row in cells_of(rows_of(table), scale, recipe, [0])
             for cell in row]  # fmt: skip
    assert len(cells) == 62 + 3  # a table's rows, and those of others that table 4 is compared with
    assert len({cell.name for cell in cells}) == len({cell.config for cell in cells}) == runs


def test_the_scales_differ_in_model_and_length_and_the_recipes_in_what_the_table_leaves_open():
    lora, siamese, full = (
        next(row for row in TABLES["1"].rows if row.label == label)
        for label in (("SST", "-", "lora"), ("STS", "siamese", "rslora"), ("Quora", "concat", "full"))
    )
    study = config_of(lora, "full", "study")
    assert (study.model, study.max_steps, study.alpha, study.lora_dropout) == (
        "bert-base-uncased", None, 16.0, 0.1,
    )  # fmt: skip
    assert config_of(siamese, "full", "study").features == "uv"
    assert config_of(siamese, "full", "study").scaling == 16 / math.sqrt(8)
    assert config_of(siamese, "small", "ours").features != "uv"
    assert config_of(lora, "small", "ours").lora_dropout == 0
    assert config_of(full, "full", "study").lr == METHODS["full"].lr
    best = TABLES["8"].rows[2]
    assert config_of(best, "full", "study").epochs == 11
    small = config_of(best, "small", "study")
    assert (small.epochs, small.max_steps, small.model) == (None, 378, "all-MiniLM-L6-v2")
    several = TABLES["4"].rows[3]
    assert config_of(several, "small", "study").max_steps == 3 * 534


def test_a_table_says_each_row_once_and_no_score_is_out_of_range():
    for number, row in ROWS:
        assert set(row.dev) == set(row.settings["task"].split("+")), (number, row.label)
        assert all(0 < score < 1 for score in (*row.dev.values(), *row.train.values()))
    assert {number: len(table.rows) for number, table in TABLES.items()} == {
        "1": 18, "2": 4, "3": 6, "4": 4, "5": 4, "6": 12, "7": 8, "8": 6,
    }  # fmt: skip
    assert (clock("17:32"), clock("3:03:00")) == (1052, 10980)


def test_a_standard_error_is_that_of_a_share_or_of_a_correlation():
    assert standard_error("sst", 0.5, 100) == pytest.approx(0.05)
    assert standard_error("sts", 0.8, 101) == pytest.approx(0.036)


def test_a_verdict_goes_by_the_errors_of_all_scores_in_it():
    # √2 · √(.25/1101) · 1.96 = .0418
    errors = [standard_error("sst", 0.5, 1101)] * 2
    assert verdict(0.041, errors) == verdict(-0.041, errors) == "reproduced"
    assert (verdict(0.043, errors), verdict(-0.043, errors)) == ("beaten", "behind")
    assert verdict(0.043, errors * 2) == "reproduced"


def test_a_gap_is_to_the_row_that_the_table_names():
    low, high = 0.01, 0.02
    full, lora = Scored(0.52, 0.48, (low, low)), Scored(0.45, 0.49, (low, low))
    assert gap(lora, full) == ("-0.0700", "+0.0100", "beaten")  # .08 against 1.96 · .02
    assert gap(Scored(0.45, 0.43, (high, low)), full) == ("-0.0700", "-0.0500", "reproduced")
    assert gap(Scored(0.55, 0.43, (low, low)), full) == ("+0.0300", "-0.0500", "behind")
    assert gap(full, full) == gap(lora, None) == ("", "", "")


def test_every_table_names_rows_that_are_there_to_compare_with():
    for table in TABLES.values():
        assert {task for row in table.rows for task in row.dev} == set(table.references())
    assert [row.label for row in rows_of(TABLES["4"])[4:]] == [
        ("SST", "-", "full"), ("Quora", "siamese"), ("STS", "siamese"),
    ]  # fmt: skip
    assert rows_of(TABLES["1"]) == list(TABLES["1"].rows)


def result(dev, train, **more):
    rows = {task: {"dev": 863} for task in ("sst", "qqp", "sts")}
    told = {"dev": dev, "train": train, "train_seconds": 90.0, "memory_above_start_mib": 512.0, "loss": 0.5}
    return told | {"rows": rows} | more


def test_a_row_of_several_tasks_has_a_line_for_each_and_one_without_runs_has_none():
    table = TABLES["4"]
    first = result({"qqp": 0.8, "sts": 0.6}, {"qqp": 0.9, "sts": 0.7})
    second = result({"qqp": 0.9, "sts": 0.8}, {"qqp": 0.9, "sts": 0.7}, loss=1.5)
    results = [[first, second], [], [], [], [], [], [result(0.7, 0.9)]]
    quora, sts = (dict(zip(columns(table), line, strict=True)) for line in lines(table, results))
    assert (quora["of"], quora["our dev"], quora["study's dev"]) == ("Quora", "0.8500 ± 0.0707", "0.7841")
    assert (quora["study's gap"], quora["our gap"]) == ("", "")  # Quora alone has not run
    assert (sts["study's gap"], sts["our gap"], sts["gap's verdict"]) == ("+0.0547", "+0.0000", "reproduced")
    assert (sts["of"], sts["verdict"], sts["our loss"], sts["our GiB"]) == ("STS", "beaten", "1.000", "0.50")


def test_the_overall_score_is_the_studys_mean_and_needs_all_three():
    table = TABLES["8"].best()
    runs = [[result(0.5, 0.9)], [result(0.8, 0.9)], [result(0.9, 0.9)]]
    assert [row.settings["task"] for row in table.rows] == ["sst", "sts", "qqp"]
    assert overall(table, runs).startswith(f"Overall {(0.5 + 0.9 + 0.9) / 3:.3f} on dev")
    assert overall(table, [*runs[:2], []]) == ""


def test_a_table_runs_says_its_cuts_and_goes_on_where_it_was(tiny, small_data, tmp_path):
    arguments = [
        "--table",
        "3",
        "--data",
        small_data,
        "--model",
        tiny,
        "--max-steps",
        2,
        "--out",
        tmp_path / "t",
    ]
    # The tiny model is too small for rank 32: a row that fails is named, and the others are there.
    ended = call(main, *arguments)
    assert ended.code in (0, 1), ended.err
    written = (tmp_path / "t" / "table-3.md").read_text()
    assert written in ended.out
    assert "2 of SST" in written
    done = sorted(path.parent.name for path in (tmp_path / "t").glob("*/result.json"))
    assert f"{len(done)} of them finished" in call(main, *arguments).out
    assert len(done) + ended.err.count("error: ") == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "9"], "--table"),
        ([], "--table"),
        (["--table", "1", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--table", "1", "--seeds", "0", "0"], "--seeds: expected each once, got 0 0"),
        (["--table", "1", "--seeds", "-1"], "--seed"),
        # Once, before any cell is tried.
        (
            ["--table", "1", "--data", "no/folder"],
            "--data: expected demo, cs224n or a folder",
        ),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line
    assert list(tmp_path.iterdir()) == []
