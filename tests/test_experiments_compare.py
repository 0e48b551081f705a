"""Settings compared: predictions whose answer is known, and runs that cannot be compared."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from scored_runs import one_hot, write_labels, write_scored
from small_runs import call

from experiments.compare import COLUMNS, main
from experiments.comparison import compare, read_groups
from experiments.statistics import williams

N = 60
LABELS = np.arange(N) % 2


def qqp(right: slice) -> np.ndarray:
    """Of N questions' pairs, those of `right` classified rightly."""
    classes = 1 - LABELS
    classes[right] = LABELS[right]
    return one_hot(classes, 2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_labels(tmp_path / "data", "qqp", LABELS)


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    return write_labels(tmp_path / "data", "sts", np.linspace(0, 5, N))


def test_two_single_runs_get_mcnemars_p(data, tmp_path):
    folders = [
        write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50))),
        write_scored(tmp_path / "b", data, "qqp", qqp(slice(20, 60)), rank=4),
    ]
    best, other = compare(*read_groups(folders)).rows
    assert (best.setting, best.mean, best.sd, best.p) == ("lora rank 8, alpha 16", 50 / N, None, None)
    assert (other.setting, other.difference) == ("lora rank 4, alpha 8", pytest.approx(-10 / N))
    assert other.p == other.p_holm == pytest.approx(scipy.stats.binomtest(10, 30).pvalue)
    assert best.low < 50 / N < best.high


def test_two_single_scores_get_a_t_test_and_williams_p_beside_it(sts, tmp_path):
    labels, chance = np.linspace(0, 5, N), np.random.default_rng(0)
    x, y = (labels + noise * chance.normal(size=N) for noise in (1, 2))
    folders = [
        write_scored(tmp_path / "a", sts, "sts", x),
        write_scored(tmp_path / "b", sts, "sts", y, method="full"),
    ]
    comparison = compare(*read_groups(folders))
    assert comparison.test == "t-test over examples"
    r = np.corrcoef([labels, x, y])
    assert comparison.rows[1].difference == pytest.approx(r[0, 2] - r[0, 1])
    assert comparison.rows[1].p == pytest.approx(comparison.rows[1].p_bootstrap, abs=0.03)
    assert comparison.rows[1].p_classic == pytest.approx(williams(r[0, 1], r[0, 2], r[1, 2], N)[1])


def test_seeds_count_beside_examples(data, tmp_path):
    """One alone is far ahead on the examples; of settings whose seeds differ as much it says little."""
    ends = {"lora": (30, 58), "full": (20, 34)}
    folders = [
        write_scored(tmp_path / f"{method}{seed}", data, "qqp", qqp(slice(0, end)), method=method, seed=seed)
        for method, pair in ends.items()
        for seed, end in enumerate(pair)
    ]
    comparison = compare(*read_groups(folders))
    best, other = comparison.rows
    assert comparison.test == "t-test over seeds and examples"
    assert (best.setting, best.seeds) == ("lora", (0, 1))
    assert best.sd == pytest.approx(28 / N / np.sqrt(2))
    assert other.p_bootstrap < 0.01 < 0.05 < other.p
    assert other.ties
    assert comparison.detectable_by_examples[0] < comparison.detectable[0]


def test_equal_predictions_tie_with_the_best(data, tmp_path):
    folders = [
        write_scored(tmp_path / method, data, "qqp", qqp(slice(0, 50)), method=method)
        for method in ("lora", "dora", "full")
    ]
    rows = compare(*read_groups(folders)).rows
    assert [(row.ties, row.p_holm, row.difference) for row in rows[1:]] == [(True, 1.0, 0.0)] * 2


def test_holm_counts_all_pairs_not_only_those_with_the_best(data, tmp_path):
    ends = {"full": 60, "lora": 53, "dora": 53}
    folders = [
        write_scored(tmp_path / method, data, "qqp", qqp(slice(0, end)), method=method)
        for method, end in ends.items()
    ]
    _, *others = compare(*read_groups(folders)).rows
    assert {row.p for row in others} == {scipy.stats.binomtest(0, 7).pvalue}
    assert [row.p_holm for row in others] == [pytest.approx(3 * 0.5**6)] * 2


def test_the_table_names_the_ties_and_the_smallest_difference(data, tmp_path):
    folders = [
        write_scored(tmp_path / name, data, "qqp", qqp(slice(0, end)), method=name)
        for name, end in (("lora", 58), ("full", 57), ("frozen", 30))
    ]
    ended = call(main, *folders, "--csv", tmp_path / "table.csv")
    assert (ended.code, ended.err) == (0, "")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.out.splitlines()[:5]]
    assert lines[0] == [
        "setting",
        "seeds",
        "mean ± sd",
        "95 % interval",
        "to the best",
        "p after Holm",
        "ties",
    ]
    assert lines[0] == list(COLUMNS)
    assert [(line[0], line[-1]) for line in lines[2:]] == [
        ("lora", "best"),
        ("full", "yes"),
        ("frozen", "no"),
    ]
    assert "80 % power" in ended.out
    with open(tmp_path / "table.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in written] == [58 / N, 57 / N, 30 / N]
    assert written[0]["p"] == ""
    assert (written[2]["ties"], written[2]["seeds"]) == ("False", "0")


def test_a_setting_is_named_by_what_is_not_its_methods_default(data, tmp_path):
    told = [{}, {"batch_size": 8}, {"method": "full", "batch_size": 8}]
    folders = [
        write_scored(tmp_path / str(i), data, "qqp", qqp(slice(0, 50)), **settings)
        for i, settings in enumerate(told)
    ]
    names = {group.setting for group in read_groups(folders)[1]}
    assert names == {"lora batch-size 32", "lora batch-size 8", "full batch-size 8"}


def test_that_the_frozen_encoder_has_no_dropout_names_no_setting(data, tmp_path):
    told = [{"encoder_dropout": 0.1}, {"method": "frozen", "encoder_dropout": 0.0}]
    folders = [
        write_scored(tmp_path / str(i), data, "qqp", qqp(slice(0, 50)), **settings)
        for i, settings in enumerate(told)
    ]
    assert {group.setting for group in read_groups(folders)[1]} == {"lora", "frozen"}


def test_one_setting_alone_has_a_score_and_an_interval(data, tmp_path):
    ended = call(main, write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50))))
    assert (ended.code, "p after Holm" in ended.out, "80 %" in ended.out) == (0, False, False)


def test_runs_of_several_tasks_are_compared_with_those_of_one_of_them_alone(data, tmp_path):
    write_labels(data, "sst", np.zeros(N))
    alone = write_scored(tmp_path / "alone", data, "qqp", qqp(slice(0, 50)))
    both = write_scored(tmp_path / "both", data, "qqp", qqp(slice(0, 55)))
    config, result = (json.loads((both / f"{name}.json").read_text()) for name in ("config", "result"))
    (both / "config.json").write_text(json.dumps(config | {"task": "sst+qqp", "sampling": "sqrt"}))
    (both / "result.json").write_text(json.dumps(result | {"dev": {"sst": 0.5, "qqp": result["dev"]}}))
    (both / "predictions-dev.csv").rename(both / "predictions-dev-qqp.csv")
    ended = call(main, alone, both, "--task", "qqp")
    assert (ended.code, ended.err) == (0, "")
    first, second = [line for line in ended.out.splitlines() if line.startswith("| lora")]
    assert first.startswith("| lora task sst+qqp, sampling sqrt | 1 | 0.9167 |")
    assert second.startswith("| lora task qqp | 1 | 0.8333 | ")
    ended = call(main, both, alone, "--task", "sts")
    assert ended.code == 2
    assert "--task: expected one of the run's tasks, sst, qqp; got 'sts'" in ended.err


def test_runs_on_different_data_are_compared_apart_unless_told_that_they_are_the_same(data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)))
    b = write_scored(tmp_path / "b", other, "qqp", qqp(slice(0, 50)), rank=4)
    ended = call(main, a, b)
    assert ended.code == 0
    assert [line for line in ended.out.splitlines() if "##" in line] == [
        f"## qqp on {folder}" for folder in (data, other)
    ]
    assert ended.line == "runs on different data are apart; if the files are the same: --data"
    ended = call(main, a, b, "--data", other)
    assert (ended.code, "##" in ended.out, ended.err) == (0, False, "")


class TestRefuses:
    def line(self, *arguments: object) -> str:
        ended = call(main, *arguments)
        assert (ended.code, ended.out) == (2, "")
        return ended.line

    def test_groups_of_runs_whose_scores_do_not_compare(self, data, tmp_path, refusal):
        write_labels(data, "sts", np.linspace(0, 5, N))
        a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)))
        b = write_scored(tmp_path / "b", data, "sts", np.arange(N))
        assert refusal(read_groups, [a, b]).endswith(f"same data, got qqp on {data} and sts on {data}")
        again = write_scored(tmp_path / "c", data, "qqp", qqp(slice(0, 50)))
        assert f"has the setting and seed of {a}" in refusal(read_groups, [a, again])

    def test_a_run_without_predictions(self, data, tmp_path):
        a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)))
        (a / "predictions-dev.csv").unlink()
        assert "predictions-dev.csv: cannot be read" in self.line(a)

    def test_ids_that_differ(self, data, tmp_path):
        names = [f"e{i}" for i in range(N - 2)] + ["x", "y"]
        a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)), ids=names)
        assert "no prediction for id 'e58' and 1 more" in self.line(a)
        write_labels(data, "qqp", LABELS[:-1])
        a = write_scored(tmp_path / "b", data, "qqp", qqp(slice(0, 50))[:-1])
        write_labels(data, "qqp", LABELS[:-2])
        assert "unknown id 'e58'" in self.line(a)

    def test_labels_that_are_not_what_they_were(self, data, tmp_path):
        a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)))
        write_labels(data, "qqp", 1 - LABELS)
        assert "the data is not what it was" in self.line(a)

    def test_data_that_is_gone(self, data, tmp_path):
        a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)))
        shutil.rmtree(data)
        assert "--data: expected demo, cs224n or a folder" in self.line(a)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("id,prediction\ne0,1\n", ":1: expected columns id, prediction, p0, p1"),
            ("id,prediction,p0,p1\ne0,1,0.1\n", ":2: expected 3 numbers"),
            ("id,prediction,p0,p1\ne0,1,nan,0.1\n", ":2: expected 3 numbers"),
            ("id,prediction,p0,p1\ne0,2,0.1,0.9\n", ":2: expected a class from 0 to 1, got '2'"),
            ("id,prediction,p0,p1\ne0,1,0,1\ne0,1,0,1\n", ":3: id 'e0' stands there twice"),
        ],
    )
    def test_what_is_no_file_of_predictions(self, data, tmp_path, text, said):
        a = write_scored(tmp_path / "a", data, "qqp", qqp(slice(0, 50)))
        (a / "predictions-dev.csv").write_text(text)
        assert said in self.line(a)

    def test_a_run_that_is_not_finished(self, tmp_path):
        assert "expected a finished run" in self.line(tmp_path)
