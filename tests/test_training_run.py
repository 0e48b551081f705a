"""A run as a whole: its seed, its best epoch, its tasks, its learning rate."""

import math
import os
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import BATCH, call, flags, left_behind, lines_of, rescored, settings, strict_json, write_data
from tiny_bert import TINY, build_tiny

import train
from experiments import summary
from minibert.hub import PINNED, Model
from minibert.intended import write_intended
from minibert.verify import sha256
from tasks import QQP, SST, STS
from tasks.base import Example
from training.build import Splits, complete, default_length
from training.evaluate import Prediction, constant
from training.run import Run, default_out


@pytest.mark.parametrize("method", ["rslora", "full"])
def test_equal_seeds_give_equal_runs_whatever_was_drawn_before(
    method: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    for name, seed, noise in (("one", 3, 0), ("two", 3, 1), ("other", 4, 0)):
        torch.manual_seed(noise)
        arguments = flags(tiny, small_data, out=tmp_path / name, method=method, seed=seed, lr=0.001)
        assert call(train.main, *arguments).code == 0
    one, two, other = (left_behind(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["head.safetensors"] != other["head.safetensors"]
    assert one["steps.jsonl"] != other["steps.jsonl"]
    assert one["predictions-dev.csv"] != other["predictions-dev.csv"]


def test_a_score_starts_at_the_mean_of_its_labels_and_classes_at_none(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, task="sst+sts"))
    heads, labels = run.trainer.model.heads, [one.label for one in run.splits["sts"].train]
    assert heads["sts"].output.bias.item() == pytest.approx(statistics.fmean(labels), abs=1e-6)
    assert heads["sst"].output.bias.abs().max() < 1 / math.sqrt(32)  # as nn.Linear draws it


def test_parameters_are_counted_as_by_hand(tiny: Path, small_data: Path) -> None:
    hidden, wide, rank = 32, 64, 8
    four, up, down = 4 * (hidden + hidden) * rank, (hidden + wide) * rank, (wide + hidden) * rank
    head = hidden + 1
    expected = {
        "frozen": head,
        "lora": head + 2 * (four + up + down),
        "dora": head + 2 * (four + up + down) + 2 * (5 * hidden + wide),
    }
    base = sum(p.numel() for p in Run(settings(tiny, small_data, method="frozen")).trainer.model.parameters())
    for method, trainable in expected.items():
        facts = Run(settings(tiny, small_data, method=method)).facts()
        total = base + trainable - head
        assert facts == {"trainable_parameters": trainable, "total_parameters": total}
    pooler = hidden * hidden + hidden  # which a run on [CLS] does not use
    facts = Run(settings(tiny, small_data, method="full")).facts()
    assert facts == {"trainable_parameters": base - pooler, "total_parameters": base}


@pytest.mark.parametrize(("method", "task"), [("rslora", "sts"), ("full", "sst")])
def test_the_best_epoch_is_kept(method: str, task: str, tiny: Path, small_data: Path, tmp_path: Path) -> None:
    changes = {"method": method, "task": task, "lr": 0.01, "epochs": 5, "schedule": "constant"}
    best = set()
    for seed in range(3):
        folder = tmp_path / str(seed)
        assert call(train.main, *flags(tiny, small_data, out=folder, seed=seed, **changes)).code == 0
        history = lines_of(folder / "metrics.jsonl")
        result = strict_json((folder / "result.json").read_text())
        assert [line["epoch"] for line in history] == [1, 2, 3, 4, 5]
        scores = [line["dev"] for line in history]
        assert result["dev"] == max(scores)
        assert result["best_epoch"] == 1 + scores.index(max(scores))  # of equals the first
        assert result["train"] == history[result["best_epoch"] - 1]["train"]
        # The weights that predict are that epoch's.
        score = rescored(folder / "predictions-dev.csv", small_data, task)
        assert score == pytest.approx(result["dev"], abs=1e-5)
        best.add(result["best_epoch"])
    assert min(best) < 5  # or the test would see nothing


def test_a_model_that_predicts_one_value_for_all_is_marked(tiny: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    file = data / "ids-sst-train.csv"
    file.write_text("".join(line.rpartition("\t")[0] + f"\t{'3' if i else 'sentiment'}\n"
                            for i, line in enumerate(file.read_text().splitlines())))  # fmt: skip
    ended = call(train.main, *flags(tiny, data, out=tmp_path / "run", task="sst+sts", epochs=4))
    assert "warning    sst: all train labels are 3\n" in ended.out
    result = strict_json((tmp_path / "run" / "result.json").read_text())
    assert result["constant"] == {"sst": 3.0}
    history = lines_of(tmp_path / "run" / "metrics.jsonl")
    for line, told in zip(history, re.findall("^epoch.*", ended.out, re.MULTILINE), strict=True):
        assert ("sst: predicts 3 for all of dev" in told) == ("sst" in line["constant"])
    assert re.search("^warning +sst: predicts 3 for all of dev$", ended.out, re.MULTILINE)
    assert "- sst: predicts 3 for all of dev." in (tmp_path / "run" / "README.md").read_text()
    assert "(1 of 1 predict one value for all)" in call(summary.main, tmp_path / "run").out


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        (SST, [2, 2, 2], 2.0),
        (SST, [2, 2, 3], None),
        (QQP, [0, 0, 1], None),
        (SST, [2], None),
        (STS, [2.5, 2.5004, 2.4997], 2.5),
        (STS, [2.5, 2.5004, 2.49], None),
    ],
)
def test_predictions_are_one_value_if_they_differ_by_a_thousandth_of_the_range(task, values, expected):
    assert constant(task, Prediction(("",) * len(values), np.array(values), None)) == expected


def test_several_tasks_are_keyed_by_task(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert call(train.main, *flags(tiny, small_data, out=folder, task="sst+sts")).code == 0
    result = strict_json((folder / "result.json").read_text())
    assert result["metric"] == {"sst": "accuracy", "sts": "pearson"}
    assert result["dev"] == {
        "sts": pytest.approx(rescored(folder / "predictions-dev-sts.csv", small_data, "sts"), abs=1e-5),
        "sst": pytest.approx(rescored(folder / "predictions-dev-sst.csv", small_data, "sst")),
    }
    assert result["train"].keys() == {"sst", "sts"}
    assert {path.name for path in folder.glob("predictions-*")} == {
        f"predictions-{split}-{task}.csv" for split in ("dev", "test") for task in ("sst", "sts")
    }
    steps = lines_of(folder / "steps.jsonl")
    assert [line["task"] for line in steps] == ["sst", "sts"] * 6
    for epoch, line in enumerate(lines_of(folder / "metrics.jsonl")):
        losses = [step["loss"] for step in steps[6 * epoch : 6 * (epoch + 1)]]
        assert line["loss"] == pytest.approx(statistics.fmean(losses))


def test_steps_are_logged_with_the_learning_rate_of_the_schedule(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 4, "warmup": 0.5, "lr": 0.02, "batch_size": 5}  # 24 rows: the fifth would be of 4
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run", **changes))
    assert ended.code == 0
    lines = lines_of(tmp_path / "run" / "steps.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.02, 0.02, 0.01])
    assert all(line["tokens"] > 5 * 5 and line["grad_norm"] > 0 for line in lines)
    (epoch,) = lines_of(tmp_path / "run" / "metrics.jsonl")  # it ended mid-epoch, and was scored all the same
    assert epoch["loss"] == pytest.approx(statistics.fmean(line["loss"] for line in lines))
    result = strict_json((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 4
    score = rescored(tmp_path / "run" / "predictions-dev.csv", small_data, "sts")
    assert score == pytest.approx(result["dev"], abs=1e-5)
    rate = sum(line["tokens"] for line in lines) / result["train_seconds"]
    assert result["tokens_per_second"] == pytest.approx(rate, rel=0.1)


def test_the_first_step_moves_by_the_learning_rate_it_tells(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, max_steps=4, warmup=0.5, lr=0.02))
    bias = run.trainer.model.heads["sts"].output.bias
    before = bias.item()
    assert run.trainer.step()["lr"] == pytest.approx(0.01)
    assert abs(bias.item() - before) == pytest.approx(0.01, rel=1e-3)  # AdamW's first step, without decay


@pytest.mark.parametrize(
    "changes", [{"task": "sts"}, {"task": "sst"}, {"task": "qqp", "pair": "siamese"}], ids=str
)
def test_one_batch_can_be_learnt_by_heart(
    changes: dict, tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call(train.main, *flags(tiny, small_data, max_steps=100, **changes), "--overfit-batch")
    assert (ended.code, ended.err) == (0, "")
    assert f"one batch of {BATCH}: loss " in ended.out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("lr", [1e-9, 0.003])
def test_a_batch_that_is_not_learnt_is_a_failure(lr: float, tiny: Path, small_data: Path) -> None:
    ended = call(train.main, *flags(tiny, small_data, lr=lr, max_steps=9), "--overfit-batch")
    assert ended.code == 1
    assert ended.line.startswith("error: expected a loss below 5% of its start, got ")
    share = float(ended.line.split()[-1].rstrip("%"))
    assert share == pytest.approx(100, abs=1) if lr == 1e-9 else 5 <= share < 99


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    config = settings(Path("m"), Path("d"), task="sts+sst")
    names = []
    for _ in range(3):
        names.append(default_out(config))
        names[-1].mkdir(parents=True)
    first = "runs/sts+sst-rslora-20260101-000000"
    assert list(map(str, names)) == [first, f"{first}-2", f"{first}-3"]


@pytest.mark.parametrize(("rows", "epochs"), [(100_000, 10), (100_001, 2)])
def test_a_large_data_set_is_passed_twice_and_a_small_one_ten_times(
    rows: int, epochs: int, tiny: Path, small_data: Path
) -> None:
    one = Example("1", ("a", "b"), 1.0)
    splits = {"sst": Splits([one], [one], None, []), "sts": Splits([one] * rows, [one], None, [])}
    assert complete(settings(tiny, small_data, task="sst+sts", epochs=None), tiny, splits).epochs == epochs
    assert complete(settings(tiny, small_data, task="sst+sts", epochs=3), tiny, splits).epochs == 3


def test_pooling_and_length_are_the_checkpoints_own_and_the_header_says_by_what(
    tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny(tmp_path / "model", with_pooler=False)

    def said() -> str:
        flags_ = flags(folder, small_data, out=tmp_path / "run", max_steps=1)
        at = flags_.index("--max-length")
        ended = call(train.main, *flags_[:at], *flags_[at + 2 :])
        shutil.rmtree(tmp_path / "run")
        return next(line for line in ended.out.splitlines() if line.startswith("model ")).split(", ", 1)[1]

    positions = "at most 128 tokens (as many as it has positions)"
    assert said() == f"cls pooling (no 1_Pooling/config.json says otherwise), {positions}"
    known = Model(
        "org/tiny", "main", {"model.safetensors": sha256(folder / "model.safetensors")}, pooling="mean"
    )
    monkeypatch.setitem(PINNED, "tiny", known)
    assert said() == f"mean pooling (tiny's own), {positions}"
    write_intended("cls", 64, 32, folder)
    files = "its 1_Pooling/config.json", "its sentence_bert_config.json"
    assert said() == "cls pooling ({}), at most 64 tokens ({})".format(*files)


def test_what_is_asked_for_is_not_looked_up(tmp_path: Path, small_data: Path) -> None:
    folder = build_tiny(tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    run = Run(settings(folder, small_data, pooling="pooler"))
    assert (run.config.pooling, run.config.max_length, run.decided) == ("pooler", 32, {})


def test_the_default_length_is_256_where_a_model_has_positions_for_it(tmp_path: Path, refusal) -> None:
    folder = build_tiny(tmp_path, shape=replace(TINY, max_position_embeddings=257))
    assert default_length(folder) == (256, "the default")
    build_tiny(tmp_path, shape=replace(TINY, max_position_embeddings=3))
    assert refusal(default_length, folder).endswith("max_position_embeddings to be at least 4, got 3")
