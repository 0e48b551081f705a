"""A run of several tasks: their shares of the steps, settings of their own, their best epochs, patience."""

import signal
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_runs import (
    BATCH,
    FILES,
    call,
    flags,
    left_behind,
    lines_of,
    rescored,
    settings,
    strict_json,
    without_times,
    write_data,
)

import predict
import train
from lora.methods import METHODS
from training import run as run_module
from training.report import Bar, header
from training.run import Run

LARGE, SMALL = 9 * BATCH, BATCH  # rows of sst, and of sts


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which sst has nine times as many training rows as sts."""
    folder = write_data(tmp_path_factory.mktemp("uneven"), {"train": LARGE, "dev": 10})
    file = folder / "sts-train.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[: 1 + SMALL]))
    return folder


SHARES = {
    "round-robin": ({}, {"sst": 9, "sts": 9}),
    "proportional": ({}, {"sst": 9, "sts": 1}),
    "sqrt": ({}, {"sst": 9, "sts": 3}),
    "temperature": ({"temperature": 1.5}, {"sst": 9, "sts": 2}),  # 9 times 1/9^(2/3) is 2.08
}


@pytest.mark.parametrize("sampling", SHARES)
def test_an_epoch_has_the_shares_of_its_strategy(
    sampling: str, tiny: Path, uneven: Path, tmp_path: Path
) -> None:
    changes, turns = SHARES[sampling]
    arguments = flags(tiny, uneven, out=tmp_path / "run", task="sst+sts", sampling=sampling, **changes)
    ended = call(train.main, *arguments)
    assert ended.code == 0, ended.err
    steps = lines_of(tmp_path / "run" / "steps.jsonl")
    length = sum(turns.values())
    assert len(steps) == 2 * length
    for epoch in (steps[:length], steps[length:]):
        assert Counter(step["task"] for step in epoch) == turns
    for epoch, line in enumerate(lines_of(tmp_path / "run" / "metrics.jsonl")):
        losses = [step["loss"] for step in steps[epoch * length : (epoch + 1) * length]]
        assert line["loss"] == pytest.approx(statistics.fmean(losses))
    said = f"{sampling}; of {length} steps an epoch sst {turns['sst']}, sts {turns['sts']}"
    assert said in ended.out


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_on_tasks_of_unequal_shares(
    method: str, tiny: Path, uneven: Path, tmp_path: Path
) -> None:
    changes = {"method": method, "task": "sst+sts", "sampling": "sqrt", "task_lr": "sts=.02", "epochs": 1}
    assert call(train.main, *flags(tiny, uneven, out=tmp_path / "run", **changes)).code == 0
    result = strict_json((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 12
    assert result["dev"].keys() == {"sst", "sts"}


def test_a_frozen_run_may_end_before_a_task_had_a_turn(tiny: Path, uneven: Path, tmp_path: Path) -> None:
    changes = {"method": "frozen", "task": "sst+sts", "sampling": "proportional", "max_steps": 3}
    ended = call(train.main, *flags(tiny, uneven, out=tmp_path / "run", **changes))
    assert (ended.code, ended.err) == (0, "")
    assert {line["task"] for line in lines_of(tmp_path / "run" / "steps.jsonl")} == {"sst"}


ALL_OF_IT = {
    "task": "sst+sts", "sampling": "sqrt", "task_lr": "sts=.03", "loss_weight": "sst=.5",
    "task_dropout": "sst=.5", "patience": 1, "patience_of": "per-task", "epochs": 4,
}  # fmt: skip


@pytest.mark.parametrize("method", ["frozen", "lora"])
@pytest.mark.parametrize("step", [2, 7, 12, 17])  # within an epoch, and at its end
def test_a_stopped_run_of_such_tasks_ends_as_one_that_was_not(
    step: int, method: str, tiny: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppingBar(Bar):
        def step(self, line: dict, tokens_per_second: float) -> None:
            if line["step"] == step:
                signal.raise_signal(signal.SIGTERM)

    changes = ALL_OF_IT | {"method": method, "best": "mean" if method == "frozen" else "per-task"}
    stopped = flags(tiny, uneven, out=tmp_path / "stopped", resume=True, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Bar", StoppingBar)
        assert call(train.main, *stopped).code == 143
    assert call(train.main, *stopped).code == 0
    whole = flags(tiny, uneven, out=tmp_path / "whole", **changes)
    assert call(train.main, *whole).code == 0
    assert left_behind(tmp_path / "stopped") == left_behind(tmp_path / "whole")


def test_a_tasks_head_learns_at_its_own_rate_and_the_encoder_at_the_runs(
    tiny: Path, small_data: Path
) -> None:
    changes = {"task": "sst+sts", "lr": 0.02, "task_lr": ("sts=.05",), "warmup": 0.0, "weight_decay": 0.0}
    trainer = Run(settings(tiny, small_data, schedule="constant", **changes)).trainer
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    lines = [trainer.step(), trainer.step()]
    assert [line["lr"] for line in lines] == [0.02, 0.02]
    moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in trainer.model.named_parameters()}
    # AdamW's first step moves everything by its rate, whatever the gradient.
    assert moved["heads.sst.output.bias"] == pytest.approx(0.02, rel=1e-3)
    assert moved["heads.sts.output.bias"] == pytest.approx(0.05, rel=1e-3)
    assert 0 < max(far for name, far in moved.items() if "lora_B" in name) <= 0.0401


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 1e6])
def test_a_loss_weight_scales_what_adamw_is_given_clipped_or_not(
    max_grad_norm: float, tiny: Path, small_data: Path
) -> None:
    changes = {"task": "sst+sts", "max_grad_norm": max_grad_norm}
    moments, lines = [], []
    for weight in ("1", ".25"):
        trainer = Run(settings(tiny, small_data, loss_weight=(f"sst={weight}",), **changes)).trainer
        lines.append(trainer.step())
        state = trainer.optimizer.state
        named = trainer.model.named_parameters()
        moments.append({name: state[p]["exp_avg"].clone() for name, p in named if p in state})
    assert lines[0]["task"] == "sst"
    assert lines[0]["loss"] == lines[1]["loss"]  # what is told is the task's own, comparable between runs
    assert lines[1]["grad_norm"] == pytest.approx(0.25 * lines[0]["grad_norm"], rel=1e-4)
    assert any(moment.any() for moment in moments[0].values())
    for name, moment in moments[0].items():
        torch.testing.assert_close(moments[1][name], 0.25 * moment, rtol=1e-3, atol=1e-12)


def test_a_tasks_head_has_its_own_dropout(tiny: Path, small_data: Path) -> None:
    changes = {"task": "sst+sts", "dropout": 0.2, "task_dropout": ("sst=.6",), "hidden_layers": 1}
    heads = Run(settings(tiny, small_data, **changes)).trainer.model.heads
    found = {n: {m.p for m in head.modules() if isinstance(m, torch.nn.Dropout)} for n, head in heads.items()}
    assert found == {"sst": {0.6}, "sts": {0.2}}


def test_the_result_tells_each_tasks_own_best_epoch_beside_the_shared_one(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    own = set()
    for seed in range(3):
        folder = tmp_path / str(seed)
        changes = {"task": "sst+sts", "epochs": 4, "lr": 0.03, "schedule": "constant", "seed": seed}
        ended = call(train.main, *flags(tiny, small_data, out=folder, **changes))
        result = strict_json((folder / "result.json").read_text())
        history = lines_of(folder / "metrics.jsonl")
        means = [statistics.fmean(line["dev"].values()) for line in history]
        assert result["best_epoch"] == 1 + means.index(max(means))
        for task, best in result["best_per_task"].items():
            scores = [line["dev"][task] for line in history]
            assert best == {"epoch": 1 + scores.index(max(scores)), "dev": max(scores)}
            assert f"{task}'s own best" in ended.out
            own.add(best["epoch"] == result["best_epoch"])
    assert own == {True, False}  # or the test would see nothing


def test_each_tasks_best_adapter_scores_what_its_own_best_epoch_did_and_changes_nothing_else(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes = {"task": "sst+sts", "epochs": 4, "lr": 0.03, "schedule": "constant", "seed": 0}
    changes |= {"dropout": 0, "encoder_dropout": 0}  # so that which epoch is best hangs on no mask
    for best in ("mean", "per-task"):
        arguments = flags(tiny, small_data, out=tmp_path / best, best=best, **changes)
        assert call(train.main, *arguments).code == 0
    mean, own = (left_behind(tmp_path / best) for best in ("mean", "per-task"))
    for name in ("config.json", "README.md"):
        assert mean.pop(name) != own.pop(name)
    for files in (mean, own):  # which tells the settings and the files again
        files["result.json"] = {
            key: value for key, value in files["result.json"].items() if key not in ("config", "files")
        }
    assert {name: own[name] for name in mean} == mean
    assert {name.split("/")[0] for name in own.keys() - mean} == {"adapter-sst", "adapter-sts"}
    result = strict_json((tmp_path / "per-task" / "result.json").read_text())
    assert len({best["epoch"] for best in result["best_per_task"].values()}) == 2  # or one folder would do
    for task, best in result["best_per_task"].items():
        source, told = small_data / FILES[task].format("dev"), tmp_path / f"{task}.csv"
        adapter = tmp_path / "per-task" / f"adapter-{task}"
        assert call(predict.main, adapter, "--task", task, "--input", source, "--output", told).code == 0
        assert rescored(told, small_data, task) == pytest.approx(best["dev"], abs=1e-4)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_run_where_no_epoch_was_better_for_so_long(
    patience: int, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes = {"task": "sst+sts", "epochs": 6, "lr": 0.03, "schedule": "constant"}
    ended_early = 0
    for seed in range(3):
        whole, patient = tmp_path / f"whole{seed}", tmp_path / f"patient{seed}"
        assert call(train.main, *flags(tiny, small_data, out=whole, seed=seed, **changes)).code == 0
        arguments = flags(tiny, small_data, out=patient, seed=seed, patience=patience, **changes)
        assert call(train.main, *arguments).code == 0
        history = [without_times(line) for line in lines_of(whole / "metrics.jsonl")]
        means = [statistics.fmean(line["dev"].values()) for line in history]
        since = [i - means.index(max(means[: i + 1])) for i in range(len(means))]
        length = 1 + since.index(patience) if patience in since else len(means)
        assert [without_times(line) for line in lines_of(patient / "metrics.jsonl")] == history[:length]
        result = strict_json((patient / "result.json").read_text())
        assert (result["epochs"], result["best_epoch"]) == (length, 1 + means.index(max(means[:length])))
        again = call(train.main, *arguments, "--resume")
        assert "is finished" in again.out
        ended_early += length < len(means)
    assert ended_early


def test_a_task_rests_when_its_own_patience_ends_and_nothing_else_changes(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    """Frozen, so that the heads share nothing: each task trains as it would alone, as long as it does."""
    changes = {"method": "frozen", "task": "sst+sts", "epochs": 6, "lr": 0.3, "schedule": "constant"}
    rested = 0
    for seed in (0, 3, 6):
        whole, patient = tmp_path / f"whole{seed}", tmp_path / f"patient{seed}"
        assert call(train.main, *flags(tiny, small_data, out=whole, seed=seed, **changes)).code == 0
        arguments = flags(
            tiny, small_data, out=patient, seed=seed, patience=1, patience_of="per-task", **changes
        )
        assert call(train.main, *arguments).code == 0
        history = lines_of(whole / "metrics.jsonl")
        own = {task: [line["dev"][task] for line in history] for task in ("sst", "sts")}
        length = {}  # epochs until one brought no new best
        for task, scores in own.items():
            worse = [i + 1 for i in range(1, len(scores)) if scores[i] <= max(scores[:i])]
            length[task] = min([*worse, len(scores)])
        turns = steps_by_epoch(whole)
        expected = [
            [line for line in epoch if number <= length[line["task"]]]
            for number, epoch in enumerate(turns, start=1)
        ]
        told = [line for epoch in expected for line in epoch]
        assert lines_of(patient / "steps.jsonl") == told
        result = strict_json((patient / "result.json").read_text())
        assert (result["steps"], result["epochs"]) == (len(told), max(length.values()))
        for task, best in result["best_per_task"].items():
            assert best["dev"] == max(own[task][: length[task]])
        for line, steps in zip(lines_of(patient / "metrics.jsonl"), expected, strict=False):
            assert line["loss"] == pytest.approx(statistics.fmean(step["loss"] for step in steps))
        rested += length["sst"] != length["sts"]
    assert rested


def steps_by_epoch(run: Path) -> list[list[dict]]:
    ends = [0, *(line["step"] for line in lines_of(run / "metrics.jsonl"))]
    lines = lines_of(run / "steps.jsonl")
    return [lines[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def test_one_task_has_no_mixture_to_tell(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data))
    assert "mixture" not in header(run.config, run.splits, run.facts(), run.trainer, Path("here"))
