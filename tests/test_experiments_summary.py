"""The table of runs says what the runs say."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

from experiments.summary import markdown, read_results, rows
from minibert.errors import InputError


def write_result(folder: Path, **changes) -> Path:
    result = {
        "task": "sts",
        "pair": "concat",
        "method": "lora",
        "model": "m",
        "data": "d",
        "metric": "pearson",
        "seed": 0,
        "dev": 0.5,
        "train": 0.6,
        "train_seconds": 10.0,
        "peak_memory_mib": 700.0,
        "trainable_parameters": 1,
        "total_parameters": 50,
    }
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result | changes), encoding="utf-8")
    return folder


def test_a_row_has_the_mean_and_spread_over_its_seeds(tmp_path):
    scores = [0.81, 0.84, 0.86]
    folders = [write_result(tmp_path / str(i), seed=i, dev=dev) for i, dev in enumerate(scores)]
    folders.append(write_result(tmp_path / "other", method="full", dev=0.9))
    lora, full = rows(read_results(folders))
    assert lora[:5] == ("sts", "concat", "lora", "2.0%", "3")
    assert lora[5] == f"{mean(scores):.4f} ± {stdev(scores):.4f}"
    assert full[4:6] == ("1", "0.9000")
    assert markdown([lora, full]).count("\n") == 3


def test_a_seed_that_stands_there_twice_is_refused(tmp_path):
    folders = [write_result(tmp_path / name, seed=1) for name in "ab"]
    with pytest.raises(InputError, match="same seed"):
        rows(read_results(folders))


@pytest.mark.parametrize("changes", [{"dev": {"sts": 0.5}}, {"dev": None}])
def test_what_is_no_result_of_one_task_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match="one task"):
        read_results([write_result(tmp_path / "run", **changes)])


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="finished run"):
        read_results([tmp_path])
