"""A run looked at from all sides: predictions whose evaluation is known, and small real runs."""

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scored_runs import one_hot, write_labels, write_scored
from small_runs import ROWS, call, column, flags, strict_json, write_data
from tolerances import TOLERANCE

import train
from experiments.evaluate import main
from experiments.evaluation import by_length, evaluate, worst
from experiments.pair_order import order, predict_both
from experiments.scored import read_scored
from experiments.submission import overall, submission
from minibert.errors import InputError
from tasks import TASKS
from training.evaluate import Prediction
from training.run_folder import load_run

FP32 = TOLERANCE[torch.float32, "encoder"]
RUNS = {
    "sst": {"task": "sst", "method": "lora"},
    "qqp": {"task": "qqp", "method": "full", "pair": "siamese", "features": "uv-diff"},
    "sts": {"task": "sts", "method": "rslora"},
    "all": {"task": "sst+qqp+sts", "method": "lora"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("evaluated"), ROWS | {"dev": 20})


@pytest.fixture(scope="module")
def finished(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a finished run; not to be changed."""
    known: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("finished") / name
            ended = call(train.main, *flags(tiny, data, out=known[name], **RUNS[name] | {"epochs": 1}))
            assert ended.code == 0, ended.err
        return known[name]

    return run


@pytest.fixture
def own(finished, tmp_path: Path):
    """A copy of such a folder."""
    return lambda name: Path(shutil.copytree(finished(name), tmp_path / name))


@pytest.mark.parametrize("name", ["sst", "qqp", "sts"])
def test_a_run_is_evaluated_and_its_files_are_written(own, data, name):
    folder = own(name)
    ended = call(main, folder)
    assert (ended.code, ended.err) == (0, "")
    told = strict_json((folder / "evaluation.json").read_text())
    reported = strict_json((folder / "result.json").read_text())
    metric = TASKS[name].metrics[0]
    assert told["scores"][metric] == pytest.approx(reported["dev"], abs=1e-6)
    assert f"{metric} {reported['dev']:.4f}" in ended.out
    assert told["interval"][0] <= reported["dev"] <= told["interval"][1]
    assert sum(one["count"] for one in told["lengths"]) == told["examples"] == 20
    assert (told["order"] is None) == (name == "sst")
    assert (told["ordinal"] is None) == (name != "sst")
    assert (told["threshold"] is None) == (name != "qqp")
    assert (told["calibration"] is None) == (name == "sts")
    assert ("spearman" in told["scores"]) == (name == "sts")
    names = {path.name for path in (folder / "evaluation").iterdir()}
    expected = {"lengths.csv", "worst.csv"}
    expected |= {f"{'para' if name == 'qqp' else name}-{split}-output.csv" for split in ("dev", "test")}
    assert names == expected | (
        set() if name == "sts" else {"classes.csv", "confusion.csv", "calibration.csv"}
    )


def test_one_task_of_several_is_named(own):
    folder = own("all")
    assert "--task: expected one of the run's tasks" in call(main, folder).line
    ended = call(main, folder, "--task", "sts", "--no-model")
    assert ended.code == 0
    assert strict_json((folder / "evaluation-sts.json").read_text())["lengths"] is None
    assert (folder / "evaluation-sts" / "sts-test-output.csv").is_file()


def test_everything_goes_where_out_says(own, tmp_path):
    folder = own("sts")
    before = sorted(folder.rglob("*"))
    assert call(main, folder, "--no-model", "--out", tmp_path / "new" / "one.json").code == 0
    assert sorted(folder.rglob("*")) == before
    assert (tmp_path / "new" / "one" / "worst.csv").is_file()


def test_the_model_is_asked_both_ways(finished):
    run = read_scored(finished("sts"))
    there, back = predict_both(*load_run(run.path), run.task, run.examples)
    swapped = [replace(one, texts=one.texts[::-1]) for one in run.examples]
    again, _ = predict_both(*load_run(run.path), run.task, swapped)
    assert there.predictions == pytest.approx(run.prediction.predictions, abs=FP32)
    assert back.predictions == pytest.approx(again.predictions, abs=FP32)
    assert np.abs(there.predictions - back.predictions).max() > 10 * FP32


def test_a_head_that_weighs_both_sides_alike_has_no_order(finished):
    run = read_scored(finished("qqp"))
    config, model, tokenizer = load_run(run.path)
    weight = model.heads["qqp"].output.weight  # [2, 3H]: u, v, |u - v|
    width = weight.shape[1] // 3
    with torch.no_grad():
        weight[:, width : 2 * width] = weight[:, :width]
    found = order(run.task, *predict_both(config, model, tokenizer, run.task, run.examples), run.labels)
    assert found.mean_absolute_difference == pytest.approx(0, abs=FP32)
    assert found.changed == 0


def test_order_is_measured_as_differences_changes_and_the_score_of_the_mean():
    ids, labels = tuple("abcd"), np.array([0, 0, 1, 1])
    sides = []
    for p in ([0.2, 0.6, 0.9, 0.4], [0.4, 0.1, 0.7, 0.8]):
        shares = np.stack([1 - np.array(p), p], axis=1)
        sides.append(Prediction(ids, shares.argmax(axis=1), shares))
    found = order(TASKS["qqp"], *sides, labels)
    assert found.mean_absolute_difference == pytest.approx((0.2 + 0.5 + 0.2 + 0.4) / 4)
    assert (found.changed, found.score, found.score_swapped, found.score_both) == (0.5, 0.5, 1.0, 1.0)
    assert found.error_of_gain == pytest.approx(np.std([0, 1, 0, 1], ddof=1) / 2)


def scored(tmp_path: Path, task: str, predictions: np.ndarray, labels: list[float]):
    data = write_labels(tmp_path / "data", task, labels)
    return read_scored(write_scored(tmp_path / task, data, task, predictions))


def test_the_worst_errors_are_the_surest_wrong_ones(tmp_path):
    shares = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6], [0.7, 0.3]])
    run = scored(tmp_path, "qqp", shares, [0, 0, 0, 1])
    assert [one.id for one in worst(run)] == ["e0", "e3", "e2"]
    assert worst(run, 1)[0].error == pytest.approx(-math.log(0.1))
    assert worst(run)[0].texts == ("text 0", "text 0")


def test_the_worst_scores_are_the_farthest(tmp_path):
    run = scored(tmp_path, "sts", np.array([1, 2, 3, 4.5]), [1, 4, 2, 4])
    assert [(one.id, one.error) for one in worst(run)] == [("e1", 2), ("e2", 1), ("e3", 0.5)]


def test_length_bins_hold_as_many_examples_each_where_lengths_allow(tmp_path):
    labels = [0, 1] * 20
    run = scored(tmp_path, "qqp", one_hot([0, 1] * 10 + [1, 0] * 10, 2), labels)
    bins = by_length(run, np.arange(40))
    assert [(one.low, one.high, one.count) for one in bins] == [
        (0, 9, 10),
        (10, 19, 10),
        (20, 29, 10),
        (30, 39, 10),
    ]
    assert [one.score for one in bins] == [1, 1, 0, 0]
    assert [(one.count, one.score) for one in by_length(run, np.full(40, 7))] == [(40, 0.5)]
    single = by_length(run, np.array([3] * 39 + [9]))
    assert [(one.count, one.error is None) for one in single] == [(39, False), (1, True)]


def test_a_perfect_run_can_be_evaluated(tmp_path):
    run = scored(tmp_path, "qqp", one_hot([0, 1, 0, 1], 2), [0, 1, 0, 1])
    result = evaluate(run, with_model=False)
    assert (result.worst, result.interval, result.threshold.in_sample) == ([], (1.0, 1.0), 1.0)
    strict = result.to_dict()
    assert (strict["macro_f1"], strict["classes"][1]["precision"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("task", "value", "text"),
    [
        ("sst", 3.0, "id \t Predicted_Sentiment \nx , 3 \n"),
        ("qqp", 1.0, "id \t Predicted_Is_Paraphrase \nx , 1.0 \n"),
        ("sts", 2.36288953, "id \t Predicted_Similiary \nx , 2.36288953 \n"),
    ],
)
def test_submissions_are_written_as_the_course_does(task, value, text):
    assert submission(task, {"x": value}) == text


def test_a_submission_has_the_runs_predictions_in_their_order(own):
    folder = own("sts")
    assert call(main, folder, "--no-model").code == 0
    _, *lines = (folder / "evaluation" / "sts-test-output.csv").read_text().splitlines()
    source = folder / "predictions-test.csv"
    pairs = zip(column(source, "id"), column(source, "prediction"), strict=True)
    assert lines == [f"{name} , {value} " for name, value in pairs]


def test_the_overall_score_is_the_studys_mean(tmp_path):
    chance = np.random.default_rng(0)
    sst = write_labels(tmp_path / "data", "sst", [0, 1, 2, 3])
    write_labels(sst, "qqp", [0, 1] * 50)
    similarity = np.linspace(0, 5, 200)
    write_labels(sst, "sts", similarity)
    noisy = similarity + chance.normal(size=200)
    folders = [
        write_scored(tmp_path / "a", sst, "sst", one_hot([0, 1, 2, 0], 5)),
        write_scored(tmp_path / "b", sst, "qqp", one_hot([0, 1] * 40 + [1, 0] * 10, 2)),
        write_scored(tmp_path / "c", sst, "sts", noisy),
    ]
    r = np.corrcoef(noisy, similarity)[0, 1]
    found = overall([read_scored(folder) for folder in folders])
    assert found.overall == pytest.approx((0.75 + 0.8 + (1 + r) / 2) / 3)
    # Of four examples, one wrong: variance 1/4; of a hundred, twenty wrong: 16/99.
    assert found.error == pytest.approx(
        math.sqrt(0.25 / 4 + 0.16 / 99 + (1 - r * r) ** 2 / 200 / 4) / 3, rel=0.02
    )
    ended = call(main, "--overall", *folders, "--out", tmp_path / "overall.json")
    assert (ended.code, f"overall {found.overall:.4f}" in ended.out) == (0, True)
    assert strict_json((tmp_path / "overall.json").read_text())["sts"] == pytest.approx(r)
    assert "expected runs of sst, qqp, sts, got sts, qqp, sst" in call(main, "--overall", *folders[::-1]).line
    with pytest.raises(InputError):
        overall([read_scored(folders[0])])


def test_one_run_of_all_tasks_can_stand_in_each_place(finished):
    folder = finished("all")
    ended = call(main, "--overall", folder, folder, folder)
    dev = strict_json((folder / "result.json").read_text())["dev"]
    expected = (dev["sst"] + dev["qqp"] + (1 + dev["sts"]) / 2) / 3
    assert (ended.code, f"overall {expected:.4f}" in ended.out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected one RUN, or --overall with three"),
        (("a", "--overall", "a", "b", "c"), "expected one RUN"),
        (("--overall", "a", "b", "c", "--task", "sst"), "--overall: takes the task"),
        (("a", "--out", "x.csv"), "--out: expected the name of a .json file, got x.csv"),
        (("nowhere",), "nowhere: expected a finished run"),
        (("--overall", "a", "b", "c"), "a/config.json: cannot be read"),
    ],
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.line


def test_too_few_examples_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least 4 labelled examples, got 3"):
        scored(tmp_path, "qqp", one_hot([0, 1, 0], 2), [0, 1, 0])


def test_nothing_is_written_where_the_model_is_gone(own):
    folder = own("sts")
    shutil.rmtree(folder / "adapter")
    assert call(main, folder).code == 2
    assert not (folder / "evaluation.json").exists()
    assert not (folder / "evaluation").exists()
    assert call(main, folder, "--no-model").code == 0


def test_the_tables_say_what_the_json_says(own):
    folder = own("qqp")
    assert call(main, folder, "--no-model").code == 0
    told = strict_json((folder / "evaluation.json").read_text())
    with open(folder / "evaluation" / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == told["confusion"]
    assert column(folder / "evaluation" / "classes.csv", "tp") == [str(c["tp"]) for c in told["classes"]]
