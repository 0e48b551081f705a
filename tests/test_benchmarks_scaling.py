"""Exponents are those of the measurements, and every point is a step of the size it names."""

import csv
import json
import math

import numpy as np
import pytest
from small_runs import call
from tiny_bert import TINY

from benchmarks import scaling, step
from benchmarks.scaling import AXES, COLUMNS, Point, exponent, main, rows
from benchmarks.step import RandomIds, build_trainer
from training.config import Config, check


def test_the_exponent_of_a_power_is_found_exactly():
    x = [16, 32, 64, 128]
    k, half = exponent(x, [3 * value**1.5 for value in x])
    assert (k, half) == (pytest.approx(1.5), pytest.approx(0, abs=1e-6))


def test_the_interval_is_that_of_the_normal_equations():
    x, y = [1, 2, 4, 8, 16], [1.0, 2.3, 3.7, 8.9, 15.0]
    A = np.stack([np.ones(5), np.log(x)], axis=1)
    (_, slope), residual, *_ = np.linalg.lstsq(A, np.log(y), rcond=None)
    error = math.sqrt(residual[0] / 3 * np.linalg.inv(A.T @ A)[1, 1])
    k, half = exponent(x, y)
    assert k == pytest.approx(slope)
    assert half == pytest.approx(3.18244630528 * error)  # t's 97.5 % point with 3 degrees of freedom


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    x, covered = [4, 8, 16, 32, 64], 0
    for _ in range(1000):
        y = [0.1 * value**0.8 * math.exp(0.1 * random.standard_normal()) for value in x]
        k, half = exponent(x, y)
        covered += abs(k - 0.8) <= half
    assert 920 <= covered <= 980  # 950 ± 4 standard errors


def test_each_axis_moves_what_it_names_away_from_the_base():
    for axis, points in AXES.items():
        assert len(points) >= 3
        assert Point() in points.values()
        for value, point in points.items():
            tokens = point.length * point.batch
            assert value == (tokens if axis == "tokens" else getattr(point, axis))


def test_random_ids_are_words_between_cls_and_sep():
    for one in RandomIds(9, 30522)([("a", "b")] * 20):
        assert (one.input_ids[0], one.input_ids[-1], len(one.input_ids)) == (101, 102, 9)
        assert all(1000 <= token < 30522 for token in one.input_ids[1:-1])
        assert len(one.token_type_ids) == 9


def test_a_step_has_the_tokens_it_names(tiny, monkeypatch):
    monkeypatch.setattr(step, "FIRST_WORD", 5)
    monkeypatch.setattr(step, "CLS", 2)
    monkeypatch.setattr(step, "SEP", 3)
    config = check(Config(method="lora", max_length=12, batch_size=6, max_steps=3, pooling="mean", rank=4))
    trainer = build_trainer(config, tiny)
    lines = [trainer.step() for _ in range(3)]
    assert [line["tokens"] for line in lines] == [72] * 3
    assert max(trainer.plan.batch(0)[1].input_ids) < TINY.vocab_size


def fake(point: Point, *_: object) -> dict:
    """Seconds that go as tokens and as hidden to the power of 1.5; 10 MiB a layer, whatever else."""
    seconds = 1e-4 * point.length * point.batch * (point.hidden / 384) ** 1.5
    return {"seconds": seconds, "memory_above_start_mib": 10.0 * point.layers}


def test_the_table_has_each_axis_exponent(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "measure", fake)
    out, picture = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    ended = call(main, "--rounds", 1, "--out", out, "--plot", picture)
    assert ended.code == 0, ended.err
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    time, memory = ({line["axis"]: line[name] for line in lines} for name in COLUMNS[-2:])
    assert time == {"length": "1.00 ± 0.00", "batch": "1.00 ± 0.00", "tokens": "1.00 ± 0.00",
                    "rank": "0.00 ± 0.00", "hidden": "1.50 ± 0.00", "layers": "0.00 ± 0.00"}  # fmt: skip
    assert memory["layers"] == "1.00 ± 0.00"
    assert memory["batch"] == "0.00 ± 0.00"
    assert picture.read_bytes().startswith(b"\x89PNG")
    measured = out.with_suffix(".jsonl").read_text().splitlines()[1:]
    assert len(measured) == len({point for points in AXES.values() for point in points.values()})


def test_a_value_is_the_median_of_the_rounds():
    rounds = [
        {str(point): {"seconds": 0.1 * n, "memory_above_start_mib": 5.0} for point in AXES["rank"].values()}
        for n in (1, 9, 2)
    ]
    assert {line[2] for line in rows(rounds, ["rank"])} == {"0.2000"}


def test_a_process_measures_a_point(tiny, monkeypatch):
    for name, value in (("FIRST_WORD", 5), ("CLS", 2), ("SEP", 3)):
        monkeypatch.setattr(step, name, value)
    ended = call(lambda: step.main() or 0, "--model", tiny, "--length", 8, "--batch", 4, "--steps", 2)
    told = json.loads(ended.out)
    assert told["seconds"] > 0
    assert told["memory_above_start_mib"] >= 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--axes", "depth"], "--axes"),
        (["--method", "full", "--axes", "rank"], "--axes rank: --method full has no adapters"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--plot", "no/where/a.png"], "--plot: no/where/a.png cannot be written"),
        (["--threads", "0"], "--threads"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line
