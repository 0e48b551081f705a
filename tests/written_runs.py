"""Folders of runs that no training made: the files a report reads, with numbers a test chooses."""

import json
from collections.abc import Sequence
from pathlib import Path

from training.config import Config, check, to_dict

RESULT = {
    "metric": "accuracy",
    "dev": 0.5,
    "best_epoch": 2,
    "train": 0.6,
    "train_seconds": 10.0,
    "tokens_per_second": 900.0,
    "peak_memory_mib": 700.0,
    "memory_above_start_mib": 300.0,
    "trainable_parameters": 1000,
    "total_parameters": 50_000,
}


def write_run(
    folder: Path,
    predictions: Sequence[tuple[str, object]] = (),
    finished: bool = True,
    epochs: int = 2,
    result: dict | None = None,
    **settings,
) -> Path:
    """A run of SST by LoRA, but for `settings`; `result` changes what came out."""
    folder.mkdir(parents=True)
    config = check(Config(**{"task": "sst", "method": "lora", "epochs": 2} | settings))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    lines = [
        {"epoch": epoch, "loss": 1 / epoch, "dev": 0.4 + 0.05 * epoch, "train": 0.5}
        for epoch in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "result.json").write_text(json.dumps(RESULT | (result or {})))
        rows = "".join(f"{name},{given}\n" for name, given in predictions)
        (folder / "predictions-dev.csv").write_text("id,prediction\n" + rows)
    return folder
