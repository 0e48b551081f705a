"""Finished runs made up of given predictions: what a run's folder holds, without a model."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from small_runs import FILES, LABELS

from tasks import TASKS
from training.config import Config, check, to_dict

RESULT = {
    "best_epoch": 1,
    "train": 0.5,
    "train_seconds": 1.0,
    "tokens_per_second": 900.0,
    "peak_memory_mib": 700.0,
    "memory_above_start_mib": 300.0,
    "trainable_parameters": 1,
    "total_parameters": 50,
}


def write_labels(folder: Path, task: str, labels: Sequence[float], texts: Sequence[str] = ()) -> Path:
    """A data folder's dev file; ids e0, e1, ..."""
    folder.mkdir(exist_ok=True)
    names = TASKS[task].text_columns
    with open(folder / FILES[task].format("dev"), "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", *names, LABELS[task][0]])
        for i, label in enumerate(labels):
            text = texts[i] if texts else f"text {i}"
            writer.writerow([f"e{i}", *(text for _ in names), float(label)])
    return folder


def write_scored(folder: Path, data: Path, task: str, predictions: np.ndarray, **settings) -> Path:
    """predictions: scores [n], or the probabilities of classes [n, C]; settings of the config, dev, ids."""
    predictions = np.asarray(predictions, float)
    dev, ids = settings.pop("dev", None), settings.pop("ids", None)
    with open(data / FILES[task].format("dev"), newline="") as file:
        labels = [float(row[LABELS[task][0]]) for row in csv.DictReader(file, delimiter="\t")]
    classes = predictions.argmax(axis=1) if predictions.ndim == 2 else predictions
    right = np.mean(classes == labels) if predictions.ndim == 2 else np.corrcoef(classes, labels)[0, 1]
    folder.mkdir()
    result = RESULT | {"metric": TASKS[task].metrics[0], "dev": float(right if dev is None else dev)}
    made = {"task": task, "method": "lora", "data": str(data), "pooling": "mean", "max_length": 256}
    config = check(Config(**made | settings))
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    with open(folder / "predictions-dev.csv", "w", newline="") as file:
        writer = csv.writer(file)
        shares = predictions if predictions.ndim == 2 else predictions[:, None][:, :0]
        writer.writerow(["id", "prediction", *(f"p{c}" for c in range(shares.shape[1]))])
        for i, value in enumerate(classes):
            writer.writerow([ids[i] if ids else f"e{i}", value, *shares[i]])
    return folder


def one_hot(classes: Sequence[int], count: int) -> np.ndarray:
    return np.eye(count)[list(classes)]
