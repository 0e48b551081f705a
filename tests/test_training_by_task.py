"""Runs with an adapter for each task: each trains as it would alone, and can be used alone."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    BATCH,
    FILES,
    call,
    column,
    flags,
    left_behind,
    lines_of,
    rescored,
    settings,
    strict_json,
    write_data,
)

import predict
import train
from lora.merge import main as merge_main
from tasks.data import join
from training import run as run_module
from training.report import Bar
from training.run import Run

TOGETHER = {"task": "sst+qqp+sts", "adapters": "per-task", "method": "lora"}
STILL = {"dropout": 0, "encoder_dropout": 0}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which sst has three times as many training rows as the others."""
    folder = write_data(tmp_path_factory.mktemp("uneven"), {"train": 6 * BATCH, "dev": 10, "test": 5})
    for task in ("qqp", "sts"):
        file = folder / FILES[task].format("train")
        file.write_text("".join(file.read_text().splitlines(keepends=True)[: 1 + 2 * BATCH]))
    return folder


@pytest.mark.parametrize("pair", ["concat", "siamese"])
def test_one_pass_over_several_tasks_is_a_pass_over_each(pair: str, tiny: Path, small_data: Path) -> None:
    model = Run(settings(tiny, small_data, pair=pair, **TOGETHER | STILL)).trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # or all adapters would be nothing
                parameter += torch.randn_like(parameter)
    trainer = Run(settings(tiny, small_data, pair=pair, **TOGETHER | STILL)).trainer
    batches = trainer.plan.batches_of(0)
    assert list(batches) == ["sst", "qqp", "sts"]
    together = model.encode_together(batches, torch.device("cpu"))
    for task, batch in batches.items():
        torch.testing.assert_close(model(task, together[task]), model(task, batch), atol=1e-5, rtol=1e-5)
    joined = join(list(batches.values()))
    assert joined.ids == tuple(one for batch in batches.values() for one in batch.ids)
    assert sum(joined.sequences.lengths) + joined.sequences.filler == len(joined.input_ids)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_task_learns_beside_others_what_it_learns_alone(
    method: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    """As many batches each, so that their learning rates are the same; no dropout, whose masks differ."""
    changes = STILL | {"method": method, "epochs": 3, "lr": 1e-3}
    arguments = flags(tiny, small_data, out=tmp_path / "run", **TOGETHER | changes)
    assert call(train.main, *arguments).code == 0
    beside = lines_of(tmp_path / "run" / "steps.jsonl")
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["task"] for line in beside] == ["sst+qqp+sts"] * 9
    for task in ("sst", "qqp", "sts"):
        out = tmp_path / task
        assert call(train.main, *flags(tiny, small_data, out=out, **changes | {"task": task})).code == 0
        alone = [line["loss"] for line in lines_of(out / "steps.jsonl")]
        np.testing.assert_allclose([line["losses"][task] for line in beside], alone, rtol=1e-4)
        for ours, single in zip(metrics, lines_of(out / "metrics.jsonl"), strict=True):
            assert ours["dev"][task] == pytest.approx(single["dev"], abs=2e-3)
    for line in beside:
        assert line["loss"] == pytest.approx(np.mean(list(line["losses"].values())))
    whole = [np.mean([line["loss"] for line in beside[i : i + 3]]) for i in (0, 3, 6)]
    np.testing.assert_allclose([line["loss"] for line in metrics], whole)


def test_a_tasks_gradient_is_clipped_alone(tiny: Path, small_data: Path) -> None:
    """Or a task with large gradients would slow the others down."""
    changes = TOGETHER | STILL | {"task": "sst+sts", "max_grad_norm": 0.01, "loss_weight": ("sts=100",)}
    trainer = Run(settings(tiny, small_data, **changes)).trainer
    trained = {task: {id(p) for p in own} for task, own in trainer.trained_by.items()}
    assert not trained["sst"] & trained["sts"]
    assert len(trained["sst"] | trained["sts"]) == sum(p.requires_grad for p in trainer.model.parameters())
    trainer.step()
    state, norms = trainer.optimizer.state, {}
    for task, own in trainer.trained_by.items():  # AdamW's first moment is a tenth of the first gradient
        norms[task] = sum(float((10 * state[p]["exp_avg"]).square().sum()) for p in own) ** 0.5
    assert norms["sst"] == pytest.approx(0.01, rel=1e-3)
    assert norms["sts"] == pytest.approx(1.0, rel=1e-3)


def test_a_task_with_fewer_turns_takes_part_in_fewer_steps(tiny: Path, uneven: Path, tmp_path: Path) -> None:
    changes = TOGETHER | {"sampling": "proportional"}
    ended = call(train.main, *flags(tiny, uneven, out=tmp_path / "run", **changes))
    assert ended.code == 0, ended.err
    assert "mixture    proportional; in 6 steps an epoch sst 6, qqp 2, sts 2" in ended.out
    assert "rank 8 for each task" in ended.out
    lines = lines_of(tmp_path / "run" / "steps.jsonl")
    alone, all_three = "sst", "sst+qqp+sts"
    assert [line["task"] for line in lines] == [alone, all_three, alone, alone, all_three, alone] * 2
    result = strict_json((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 12


@pytest.mark.parametrize("best", ["mean", "per-task"])
def test_each_tasks_adapter_stands_alone_and_says_what_the_run_said(
    best: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    run, told = tmp_path / "run", tmp_path / "told.csv"
    changes = TOGETHER | {"pair": "siamese", "best": best, "epochs": 4, "lr": 0.03, "schedule": "constant"}
    assert call(train.main, *flags(tiny, small_data, out=run, **changes)).code == 0
    result = strict_json((run / "result.json").read_text())
    assert not (run / "adapter").exists()
    for task in ("sst", "qqp", "sts"):
        source = small_data / FILES[task].format("dev")
        assert best == "mean" or result["dev"][task] == result["best_per_task"][task]["dev"]
        for path in (run, run / f"adapter-{task}"):
            assert call(predict.main, path, "--task", task, "--input", source, "--output", told).code == 0
            assert rescored(told, small_data, task) == pytest.approx(result["dev"][task], abs=1e-4)
            said = [
                np.float64(column(file, "prediction")) for file in (told, run / f"predictions-dev-{task}.csv")
            ]
            np.testing.assert_allclose(*said, atol=1e-4)
    assert best == "mean" or len(set(result["best_epoch"].values())) > 1  # or the test would see nothing


def test_what_wants_one_model_is_told_where_they_are(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = flags(tiny, small_data, out=run, **TOGETHER | {"task": "sst+sts", "max_steps": 1})
    assert call(train.main, *arguments).code == 0
    ended = call(merge_main, run, tmp_path / "merged")
    assert ended.code == 2
    assert ended.line.endswith(
        f"has an adapter for each task; use {run / 'adapter-sst'} or {run / 'adapter-sts'}"
    )
    ended = call(merge_main, run / "adapter-sts", tmp_path / "merged")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("step", [2, 7, 12])
def test_a_stopped_run_ends_as_one_that_was_not(
    step: int, tiny: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppingBar(Bar):
        def step(self, line: dict, tokens_per_second: float) -> None:
            if line["step"] == step:
                signal.raise_signal(signal.SIGTERM)

    changes = TOGETHER | {"sampling": "sqrt", "best": "per-task", "epochs": 3, "method": "dora"}
    changes |= {"patience": 1, "patience_of": "per-task"}
    stopped = flags(tiny, uneven, out=tmp_path / "stopped", resume=True, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Bar", StoppingBar)
        assert call(train.main, *stopped).code == 143
    assert call(train.main, *stopped).code == 0
    assert call(train.main, *flags(tiny, uneven, out=tmp_path / "whole", **changes)).code == 0
    assert left_behind(tmp_path / "stopped") == left_behind(tmp_path / "whole")
