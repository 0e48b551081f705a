"""What a run leaves in its folder, and that no file of it is half written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import BATCH, ROWS, call, column, flags, lines_of, rescored, settings, strict_json, write_data

import train
from lora.methods import METHODS
from training.run import Run

CONTRACT = {
    "task", "method", "pair", "model", "data", "seed", "metric", "dev", "best_epoch", "train", "epochs",
    "train_seconds", "tokens_per_second", "peak_memory_mib", "trainable_parameters", "total_parameters",
    "versions",
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_writes_what_the_contract_says(
    method: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "run"
    ended = call(train.main, *flags(tiny, small_data, out=folder, method=method))
    assert ended.code == 0
    assert ended.err == ""
    model = {
        "full": {
            "model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/modules.json",
            "model/tokenizer_config.json",
            "model/1_Pooling/config.json", "model/sentence_bert_config.json",
            "model/config_sentence_transformers.json",
        },
        "frozen": set(),
    }.get(
        method,
        {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/head.safetensors",
         "adapter/minibert.json"},
    )  # fmt: skip
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == model | {
        "README.md", "config.json", "metrics.jsonl", "steps.jsonl", "result.json", "head.safetensors",
        "predictions-dev.csv", "predictions-test.csv",
    }  # fmt: skip
    result = strict_json((folder / "result.json").read_text())
    assert result.keys() >= CONTRACT
    assert (result["task"], result["method"], result["metric"]) == ("sts", method, "pearson")
    assert result["epochs"] == 2
    assert result["train_seconds"] > 0
    assert result["tokens_per_second"] > 0
    assert 0 <= result["memory_above_start_mib"] < result["peak_memory_mib"]
    strict_json((folder / "config.json").read_text())
    for line in lines_of(folder / "metrics.jsonl"):
        assert line.keys() >= {"epoch", "loss", "dev", "train", "seconds"}


def test_predictions_are_in_the_files_order_with_probabilities(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert call(train.main, *flags(tiny, small_data, out=folder, task="sst", max_steps=2)).code == 0
    for split in ("dev", "test"):
        path = folder / f"predictions-{split}.csv"
        assert column(path, "id") == [f"{split}{i}" for i in range(ROWS[split])]
        shares = [list(map(float, column(path, f"p{c}"))) for c in range(5)]
        for prediction, row in zip(column(path, "prediction"), zip(*shares, strict=True), strict=True):
            assert sum(row) == pytest.approx(1, abs=5e-6)
            assert row[int(prediction)] == max(row)
    result = strict_json((folder / "result.json").read_text())
    assert rescored(folder / "predictions-dev.csv", small_data, "sst") == result["dev"]


def test_a_data_folder_need_not_have_a_test_file(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", {"train": 8, "dev": 4})
    assert call(train.main, *flags(tiny, data, out=tmp_path / "run", max_steps=1)).code == 0
    assert not (tmp_path / "run" / "predictions-test.csv").exists()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"task": "sst", "pooling": "pooler"}, "SEQ_CLS"),
        ({"task": "sst", "pooling": "cls"}, "FEATURE_EXTRACTION"),
        ({"task": "sst", "pooling": "mean"}, "FEATURE_EXTRACTION"),
        ({"task": "sst", "pooling": "pooler", "hidden_layers": 1}, "FEATURE_EXTRACTION"),
        ({"task": "sst+qqp", "pooling": "pooler"}, "FEATURE_EXTRACTION"),
        ({"task": "qqp", "pooling": "pooler", "pair": "siamese"}, "FEATURE_EXTRACTION"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_a_linear_head_on_the_pooler_is_in_the_adapter_too(
    changes: dict, kind: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "run", max_steps=1, **changes)).code == 0
    adapter, head = tmp_path / "run" / "adapter", load_file(tmp_path / "run" / "head.safetensors")
    assert strict_json((adapter / "adapter_config.json").read_text())["task_type"] == kind
    inside = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if "classifier" in n}
    if kind == "FEATURE_EXTRACTION":
        assert inside == {}
    else:
        for name in ("weight", "bias"):
            ours = inside.pop(f"base_model.model.classifier.{name}")
            assert torch.equal(ours, head[f"sst.output.{name}"])
        assert inside == {}


def test_a_full_runs_model_opens_in_transformers(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = flags(tiny, small_data, out=tmp_path / "run", task="sst", method="full", lr=0.001)
    assert call(train.main, *arguments).code == 0
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "run" / "model").eval()
    head = load_file(tmp_path / "run" / "head.safetensors")
    run = Run(settings(tiny, small_data, task="sst"))
    shares = []
    with torch.no_grad():
        for i in range(ROWS["dev"]):
            ids = run.data["dev"]["sst"].collate(np.array([i]))
            tokens = ids.input_ids[: ids.sequences.lengths[0]][None]
            vector = theirs(tokens).last_hidden_state[0, 0]
            logits = head["sst.output.weight"] @ vector + head["sst.output.bias"]
            shares.append(float(logits.softmax(0)[2]))
    written = list(map(float, column(tmp_path / "run" / "predictions-dev.csv", "p2")))
    assert shares == pytest.approx(written, abs=1e-5)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk that has room for so many bytes of a file and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "batch", "file"), [(30_000, BATCH, "checkpoint/state.safetensors"), (2000, 1, "steps.jsonl")]
)
def test_a_file_that_cannot_be_written_ends_the_run_in_a_line(
    size: int, batch: int, file: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", batch_size=batch, epochs=1, resume=True)
    with no_file_above(size):
        ended = call(train.main, *arguments)
    assert ended.code == 1
    assert ended.line.startswith(f"error: {tmp_path / 'run' / file}: ")
    assert "File too large" in ended.line
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left <= {"config.json", "steps.jsonl", "metrics.jsonl"}
    assert call(train.main, *arguments).code == 0
