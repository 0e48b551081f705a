"""Siamese runs: what they start as, and that every loss leaves a run whose predictions are right."""

import csv
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import FILES, call, column, flags, rescored, settings, strict_json

import predict
import train
from training.build import complete
from training.config import LOSSES, SIDE_LOSSES, Config, check, from_dict, to_dict
from training.embedding import Encoder

WITHIN = {"atol": 1e-4, "rtol": 1e-4}
SIAMESE = {"pair": "siamese", "pooling": "mean", "features": "cosine"}
CLASSES = ("cross-entropy", "contrastive", "simcse")  # the losses that are tried on duplicates


def task_of(loss: str) -> str:
    return "qqp" if loss in CLASSES else "sts"


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a finished run by that loss; not to be changed."""
    known: dict[str, Path] = {}

    def run(loss: str, **changes) -> Path:
        if (key := f"{loss} {changes}") not in known:
            known[key] = tmp_path_factory.mktemp("finished") / "run"
            some = {"task": task_of(loss), "loss": loss, "out": known[key], **SIAMESE, **changes}
            ended = call(train.main, *flags(tiny, small_data, **some))
            assert ended.code == 0, ended.err
        return known[key]

    return run


def cosines(run: Path, data: Path, task: str) -> np.ndarray:
    """Of the dev pairs, from the run's sentence vectors."""
    with open(data / FILES[task].format("dev"), newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    u, v = (Encoder.load(run).encode([row[f"sentence{i}"] for row in rows], normalize=True) for i in (1, 2))
    return (u * v).sum(axis=1)


def predictions(run: Path, name: str = "prediction") -> np.ndarray:
    return np.array(list(map(float, column(run / "predictions-dev.csv", name))))


@pytest.mark.parametrize("loss", ["mse", "pearson", "cosine", "simcse-unsup"])
def test_a_score_starts_as_the_cosine_stretched_over_the_labels(
    loss: str, finished, small_data: Path
) -> None:
    run = finished(loss, max_steps=1, lr=1e-9)
    np.testing.assert_allclose(predictions(run), 5 * cosines(run, small_data, "sts"), **WITHIN)


@pytest.mark.parametrize("loss", CLASSES)
def test_a_duplicate_starts_as_a_cosine_above_three_quarters(loss: str, finished, small_data: Path) -> None:
    run = finished(loss, max_steps=1, lr=1e-9)
    odds = np.exp(10 * (cosines(run, small_data, "qqp") - 0.75))
    np.testing.assert_allclose(predictions(run, "p1"), odds / (1 + odds), **WITHIN)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_by_any_loss_predicts_an_affine_of_the_cosine_of_its_vectors(
    loss: str, finished, small_data: Path
) -> None:
    run, task = finished(loss), task_of(loss)
    found = predictions(run, "p1" if task == "qqp" else "prediction")
    if task == "qqp":
        found = np.log(found / (1 - found))  # to the six digits of the file
    cosine = cosines(run, small_data, task)
    slope, offset = np.polyfit(cosine, found, 1)
    np.testing.assert_allclose(slope * cosine + offset, found, atol=1e-3)
    result = strict_json((run / "result.json").read_text())
    assert rescored(run / "predictions-dev.csv", small_data, task) == pytest.approx(result["dev"], abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_by_any_loss_is_used_like_others_from_its_adapter_alone(
    loss: str, finished, small_data: Path, tmp_path: Path
) -> None:
    run, task = finished(loss), task_of(loss)
    dev = small_data / FILES[task].format("dev")
    ended = call(predict.main, run / "adapter", "--input", dev, "--output", tmp_path / "p.csv")
    assert ended.code == 0, ended.err
    got = np.array(list(map(float, column(tmp_path / "p.csv", "prediction"))))
    np.testing.assert_allclose(got, predictions(run), **WITHIN)


@pytest.mark.parametrize("loss", SIDE_LOSSES)
def test_the_head_learns_to_read_the_cosine_while_the_encoder_learns_by_another_loss(
    loss: str, finished
) -> None:
    before, after = (finished(loss, **changes) for changes in ({"max_steps": 1, "lr": 1e-9}, {}))
    for name in (f"{task_of(loss)}.output.weight", f"{task_of(loss)}.output.bias"):
        start, end = (load_file(run / "head.safetensors")[name] for run in (before, after))
        assert np.abs(start - end).min() > 1e-3


# Defaults


@pytest.mark.parametrize(
    ("changes", "features"),
    [
        ({"task": "sts", "pair": "siamese"}, "cosine"),
        ({"task": "sst+sts", "pair": "siamese"}, "cosine"),
        ({"task": "sts", "pair": "siamese", "hidden_layers": 1}, "uv-diff-prod"),
        ({"task": "qqp", "pair": "siamese"}, "uv-diff-prod"),
        ({"task": "qqp+sts", "pair": "siamese"}, "uv-diff-prod"),
        ({"task": "qqp", "pair": "siamese", "loss": "simcse"}, "cosine"),
        ({"task": "qqp", "pair": "siamese", "features": "cosine"}, "cosine"),
        ({"task": "sts"}, "uv-diff-prod"),
    ],
    ids=str,
)
def test_scores_are_compared_by_their_cosine_and_classes_by_a_learned_head(
    changes: dict, features: str
) -> None:
    assert check(Config(**changes)).features == features


@pytest.mark.parametrize("pair", ["siamese", "concat"])
def test_a_run_from_before_the_cosine_is_read_as_the_run_it_was(pair: str) -> None:
    raw = to_dict(check(Config(pair=pair))) | {"features": "uv-diff-prod"}  # then the default
    assert from_dict(raw, "c.json").features == "uv-diff-prod"


def test_unsupervised_simcse_needs_dropout(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    changes = {"loss": "simcse-unsup", "out": tmp_path / "run", **SIAMESE}
    ended = call(train.main, *flags(tiny, small_data, encoder_dropout=0, **changes))
    assert ended.code == 2
    assert (
        "--loss simcse-unsup: its two views are by dropout; expected --encoder-dropout above 0" in ended.line
    )
    assert not (tmp_path / "run").exists()
    some = {"encoder_dropout": 0.0, "lora_dropout": 0.1, "loss": "simcse-unsup", **SIAMESE}
    assert complete(settings(tiny, small_data, **some), tiny).loss == "simcse-unsup"
