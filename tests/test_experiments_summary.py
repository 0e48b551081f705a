"""The table of runs says what the runs say."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from small_runs import call

from experiments.summary import COLUMNS, main, markdown, read_records, rows
from lora.methods import METHODS
from minibert.errors import InputError
from training.config import Config, check, to_dict

RESULT = {
    "metric": "pearson",
    "dev": 0.5,
    "best_epoch": 2,
    "train": 0.6,
    "train_seconds": 10.0,
    "tokens_per_second": 900.0,
    "peak_memory_mib": 700.0,
    "memory_above_start_mib": 300.0,
    "trainable_parameters": 1,
    "total_parameters": 50,
}


def write_run(folder: Path, changes: dict | None = None, **settings) -> Path:
    folder.mkdir()
    result, config = RESULT | (changes or {}), check(Config(**{"method": "lora"} | settings))
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    return folder


def test_a_row_has_the_mean_and_spread_over_its_seeds(tmp_path):
    scores = [0.81, 0.84, 0.86]
    folders = [write_run(tmp_path / str(i), {"dev": dev}, seed=i) for i, dev in enumerate(scores)]
    folders.append(write_run(tmp_path / "other", {"dev": 0.9}, method="full"))
    lora, full = (dict(zip(COLUMNS, row, strict=True)) for row in rows(read_records(folders)))
    assert (lora["method"], lora["trained"], lora["seeds"]) == ("lora", "2.0%", "3")
    assert lora["dev"] == f"{mean(scores):.4f} ± {stdev(scores):.4f}"
    assert (full["seeds"], full["dev"]) == ("1", "0.9000")


def test_a_setting_that_differs_makes_a_row_of_its_own_and_is_named(tmp_path):
    told = [{}, {"lr": 0.01}, {"rank": 4, "alpha": 8.0}]
    folders = [write_run(tmp_path / str(i), **settings) for i, settings in enumerate(told)]
    lr = f"lr {METHODS['lora'].lr:g}"
    column = [row[COLUMNS.index("settings")] for row in rows(read_records(folders))]
    assert [one.split(", ") for one in column] == [
        ["rank 8", "alpha 16", lr],
        ["rank 8", "alpha 16", "lr 0.01"],
        ["rank 4", "alpha 8", lr],
    ]


def test_runs_of_other_models_and_data_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / "mini"), write_run(tmp_path / "base", model="bert-base-uncased")]
    column = [row[COLUMNS.index("settings")] for row in rows(read_records(folders))]
    assert column == ["model all-MiniLM-L6-v2", "model bert-base-uncased"]


def test_a_column_that_says_nothing_is_left_out(tmp_path):
    head, _, line = markdown(rows(read_records([write_run(tmp_path / "run")]))).splitlines()
    assert "settings" not in head
    assert head.count("|") == line.count("|") == len(COLUMNS)


def test_a_line_per_run_is_written_as_csv(tmp_path):
    folders = [write_run(tmp_path / str(i), {"dev": i / 10}, seed=i, data=str(tmp_path)) for i in range(2)]
    ended = call(main, *folders, "--csv", tmp_path / "runs.csv")
    assert (ended.code, ended.out.count("\n")) == (0, 3)
    with open(tmp_path / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(one["seed"], one["dev"], one["method"]) for one in lines] == [
        ("0", "0.0", "lora"),
        ("1", "0.1", "lora"),
    ]
    assert {(one["data"], one["targets"], one["rank_pattern"]) for one in lines} == {
        (tmp_path.name, "all", "")
    }


def test_a_seed_that_stands_there_twice_is_refused(tmp_path):
    folders = [write_run(tmp_path / name, seed=1) for name in "ab"]
    with pytest.raises(InputError, match=r"same seed, 1: .*/a and .*/b; leave one out"):
        rows(read_records(folders))


@pytest.mark.parametrize("changes", [{"dev": {"sts": 0.5}}, {"dev": None}, {"dev": True}])
def test_what_is_no_result_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match=r"run/result.json: expected a number as dev, got "):
        read_records([write_run(tmp_path / "run", changes)])


SEVERAL = {
    "dev": {"sst": 0.4, "sts": 0.8},
    "train": {"sst": 0.5, "sts": 0.9},
    "metric": {"sst": "accuracy", "sts": "pearson"},
}


def test_a_run_of_several_tasks_has_a_row_and_a_line_for_each(tmp_path):
    folders = [
        write_run(tmp_path / f"both{seed}", SEVERAL | {"dev": {"sst": 0.4 + seed, "sts": 0.8}},
                  task="sst+sts", seed=seed)
        for seed in range(2)
    ]  # fmt: skip
    alone = write_run(tmp_path / "alone", task="sst")
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows(read_records([*folders, alone]))]
    assert [(row["task"], row["seeds"], row["dev"][:6], row["train"][:6]) for row in table] == [
        ("sst with sts", "2", f"{mean([0.4, 1.4]):.4f}", "0.5000"),
        ("sts with sst", "2", "0.8000", "0.9000"),
        ("sst", "1", "0.5000", "0.6000"),
    ]
    assert call(main, *folders, "--csv", tmp_path / "runs.csv").code == 0
    with open(tmp_path / "runs.csv", newline="") as file:
        lines = [
            (one["task"], one["scored_task"], one["metric"], one["train"]) for one in csv.DictReader(file)
        ]
    assert lines == 2 * [("sst+sts", "sst", "accuracy", "0.5"), ("sst+sts", "sts", "pearson", "0.9")]


@pytest.mark.parametrize("changes", [{"dev": {"sst": 0.4}}, {"dev": 0.4}, {"train": None}])
def test_a_run_of_several_tasks_that_lacks_a_score_is_refused(tmp_path, changes):
    folder = write_run(tmp_path / "run", SEVERAL | changes, task="sst+sts")
    (name,) = changes
    with pytest.raises(InputError, match=rf"result.json: expected a number as {name} of s[st]"):
        read_records([folder])


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="finished run"):
        read_records([tmp_path])


def test_a_grids_folder_among_the_runs_is_said_to_be_one(tmp_path):
    grid, run = tmp_path / "head", write_run(tmp_path / "run")
    grid.mkdir()
    write_run(grid / "rank4", rank=4)
    ended = call(main, run, grid)
    assert (ended.code, ended.line) == (0, f"not used: {grid}: a folder of runs, which {grid}/* names")
    ended = call(main, grid)
    assert ended.code == 2
    assert f"{grid}: expected a finished run; a folder of runs, which {grid}/* names" in ended.line


def test_no_runs_at_all_is_bad_usage():
    assert call(main).code == 2
