"""The benchmark of the methods says what it measured, and refuses what it cannot measure."""

import csv

import pytest
from small_runs import call, flags

from benchmarks.methods import COLUMNS, VARIANTS, main, ratios, step_times
from tasks.model import TaskModel
from training.cli import parse
from training.loop import Trainer

step = Trainer.step


def test_a_ratio_is_the_median_of_the_ratios_step_by_step():
    times = {"full": [1.0, 2.0, 4.0, 8.0, 16.0], "LoRA": [0.5, 1.4, 3.0, 5.0, 16.0]}
    (line,) = ratios(times, {"full": 200.0, "LoRA": 150.0})
    told = dict(zip(COLUMNS, line, strict=True))
    assert (told["method"], told["against"], told["time"], told["memory"]) == (
        "LoRA",
        "full",
        "0.700",
        "0.750",
    )
    assert float(told["quartile 1"]) < 0.7 < float(told["quartile 3"])


def test_every_variant_is_a_setting_that_trains():
    for variant in VARIANTS.values():
        assert parse(variant)[0].method == variant[1]


def test_it_measures_what_it_is_asked_to_and_writes_it(tiny, small_data, tmp_path):
    small = flags(tiny, small_data, task="sst")
    times = step_times(small, ["LoRA", "full"], steps=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"LoRA": 3, "full": 3}
    assert min(map(min, times.values())) > 0
    out = tmp_path / "methods.csv"
    ended = call(main, *small, "--variants", "LoRA", "full", "--steps", 2, "--memory-steps", 2, "--out", out)
    assert ended.code == 0, ended.err
    with open(out, newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["method"], line["against"]) == ("LoRA", "full")
    assert all(float(line[name]) > 0 for name in COLUMNS[2:])
    assert all(cell in ended.out for cell in line.values())


def test_the_frozen_encoder_has_read_the_data_before_its_steps_are_timed(tiny, small_data, monkeypatch):
    read = []
    encode = TaskModel.encode
    monkeypatch.setattr(TaskModel, "encode", lambda *a: read.append(1) or encode(*a))
    monkeypatch.setattr(Trainer, "step", lambda self: read.clear() or step(self))
    step_times(flags(tiny, small_data, task="sst"), ["frozen"], steps=3)
    assert not read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "1"], "--steps: expected at least 2, got 1"),
        (["--variants", "DoRA?"], "--variants"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "1e-3", "--nope"], "--nope"),
        (["--out", "no/such/folder/a.csv"], "--out: no/such/folder/a.csv cannot be written"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line


def test_a_run_that_fails_says_why(tiny, tmp_path):
    ended = call(main, *flags(tiny, tmp_path), "--variants", "LoRA", "--memory-steps", 2)
    assert ended.code == 2
    assert "LoRA: error:" in ended.line
