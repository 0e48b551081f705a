"""What a run will take is counted from its model and its largest batch, and refused where it cannot fit."""

from pathlib import Path

import pytest
import torch
from small_runs import call, flags, settings

import train
from training import footprint as module
from training.build import shape_of_model
from training.footprint import Footprint, check_fits, footprint, token_bytes
from training.run import Run

CPU = torch.device("cpu")


@pytest.fixture
def needed(tiny: Path, small_data: Path):
    def estimate(**changes) -> Footprint:
        return Run(settings(tiny, small_data, **changes)).needed

    return estimate


def test_of_what_trains_gradient_moments_and_best_copy_are_counted(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, method="lora", epochs=3))
    trained = sum(p.numel() for p in run.trainer.model.parameters() if p.requires_grad)
    assert run.needed.training * 2**20 == 16 * trained
    assert Run(settings(tiny, small_data, method="lora", epochs=1)).needed.training * 2**20 == 12 * trained
    assert run.needed.total == pytest.approx(sum(vars(run.needed).values()))


def test_activations_are_those_of_the_layers_that_gradients_reach(tiny: Path, small_data: Path) -> None:
    def of(**changes) -> float:
        run = Run(settings(tiny, small_data, encoder_dropout=0.0, **changes))
        return token_bytes(run.config, run.trainer.model.bert, length=8, size=4)

    hidden, wide, attention = 32, 64, 4 * 8 * 5  # of tiny: N T (c + 1)
    layer = 4 * (5 * hidden + wide) + attention
    assert of(method="full", lr=1e-3) == 2 * (layer + 4 * (3 * hidden + wide))
    assert of(method="lora", targets=("query",)) == 2 * (layer + 4 * hidden)
    assert of(method="lora", targets=("query@1",)) == layer + 4 * hidden
    assert of(method="lora", targets=("query@0",)) == 2 * layer + 4 * hidden
    assert of(method="dora", targets=("query", "value"), lora_dropout=0.1) == 2 * (layer + 14 * hidden)
    assert of(method="lora", targets=("query",), recompute=True) == layer + 4 * hidden + 2 * 4 * hidden
    run = Run(settings(tiny, small_data, method="frozen"))
    assert token_bytes(run.config, run.trainer.model.bert, length=8, size=4) == 0


def test_pieces_and_layers_computed_twice_need_less(needed) -> None:
    whole = needed(method="full", lr=1e-3)
    assert needed(method="full", lr=1e-3, micro_batch_size=2).activations < 0.5 * whole.activations
    assert needed(method="full", lr=1e-3, recompute=True).activations < whole.activations
    assert needed(method="frozen").features > 0 == needed(method="lora").features


@pytest.mark.parametrize("changes", [
    {"task": "sst"},
    {"task": "sts", "pair": "siamese"},
    {"task": "sst+sts", "micro_batch_size": 3},
    {"task": "sst+qqp+sts", "adapters": "per-task"},
], ids=str)  # fmt: skip
def test_the_largest_pass_is_that_of_an_epochs_batches(changes: dict, tiny: Path, small_data: Path) -> None:
    plan = Run(settings(tiny, small_data, method="lora", **changes)).trainer.plan
    found = [
        (sum(sum(b.sequences.lengths) for b in piece.values()),
         sum(len(b.sequences.lengths) for b in piece.values()))
        for step in range(plan.steps_per_epoch)
        for piece in plan.pieces_of(step)
    ]  # fmt: skip
    assert plan.largest(10**6) == max(found)
    assert plan.largest(1) == max(found[: len(plan.pieces_of(0))])


@pytest.mark.parametrize("method", ["frozen", "full", "lora", "dora"])
def test_a_model_without_numbers_is_counted_as_the_real_one(
    method: str, tiny: Path, small_data: Path
) -> None:
    run = Run(settings(tiny, small_data, method=method, precision="fp32"))
    shape = shape_of_model(run.config, tiny)
    assert {p.device.type for p in shape.bert.parameters()} == {"meta"}
    counted = [footprint(run.config, one, 100, 10, 50) for one in (shape, run.trainer.model)]
    assert counted[0].activations == counted[1].activations
    # tiny's files have a pooler, which the mean does not use.
    assert counted[0].total == pytest.approx(counted[1].total, rel=0.01)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_mib", lambda: 50.0)
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run"))
    assert ended.code == 2
    assert "there are 50 MiB; try --micro-batch-size" in ended.line
    assert not (tmp_path / "run").exists()


def test_what_may_not_fit_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    needed = Footprint(weights=500, training=200, activations=190)
    for there, said in ((2000, ""), (None, ""), (900, "warning: the run takes about 1,000 MiB")):
        monkeypatch.setattr(module, "available_mib", lambda there=there: there)
        check_fits(needed, CPU)
        assert capsys.readouterr().err.startswith(said)


def test_the_header_and_the_result_tell_it(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run"))
    assert "memory     about " in ended.out
    assert '"memory_estimated_mib": ' in (tmp_path / "run" / "result.json").read_text()
