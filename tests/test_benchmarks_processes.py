"""One process beside several: what they did is what the table says."""

import csv

import pytest
from small_runs import call

from benchmarks.processes import main, rows, variants


def test_ratios_are_to_one_process_of_one_thread_in_the_same_round():
    rounds = [
        {name: {"tokens_per_second": rate} for name, rate in zip(variants(2), rates, strict=True)}
        for rates in ((100.0, 150.0, 180.0, 190.0), (50.0, 90.0, 80.0, 100.0))
    ]
    assert rows(rounds, 2) == [
        ("1", "1", "1", "75 [50, 100]", "1.000 [1.000, 1.000]"),
        ("1", "1", "2", "120 [90, 150]", "1.650 [1.500, 1.800]"),
        ("1", "2", "1", "130 [80, 180]", "1.700 [1.600, 1.800]"),
        ("2", "1", "1", "145 [100, 190]", "1.950 [1.900, 2.000]"),
    ]


def test_it_runs_each_and_writes_what_it_shows(tiny, small_data, tmp_path):
    out = tmp_path / "processes.csv"
    asked = ["--data", small_data, "--model", tiny, "--processes", 2, "--steps", 2, "--rounds", 1]
    asked += ["--max-length", 32]
    ended = call(main, *asked, "--out", out)
    assert ended.code == 0, ended.err
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    sizes = ("runs", "processes of each", "threads of each")
    assert [tuple(one[name] for name in sizes) for one in lines] == [
        ("1", "1", "1"),
        ("1", "1", "2"),
        ("1", "2", "1"),
        ("2", "1", "1"),
    ]
    assert all(one["tokens/s"] in ended.out for one in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "1"], "--processes: expected at least 2, got 1"),
        (["--processes", "4", "--batch-size", "3"], "--batch-size: expected at least 4, got 3"),
        (["--data", "no/where"], "--data"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line
