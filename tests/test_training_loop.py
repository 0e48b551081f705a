"""What a training step moves, what it leaves alone, and what ends a run."""

import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import BATCH, call, checkpoints, flags, left_behind, lines_of, settings, strict_json
from torch import Tensor, nn

import train
from lora.methods import METHODS
from tasks.losses import LOSSES
from training.errors import TrainingError
from training.loop import read
from training.run import Run
from training.signals import StopAtOnce, stop_signals

SHAPES = {
    "sts": {},
    "sts siamese": {"pair": "siamese", "features": "uv-diff-prod"},
    "sts siamese uv": {"pair": "siamese", "features": "uv"},
    "sst": {"task": "sst"},
    "qqp": {"task": "qqp", "hidden_layers": 1},
    "all three": {"task": "sst+qqp+sts", "pair": "siamese", "pooling": "mean"},
}


def weights(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.trainer.model.named_parameters()}


def should_move(name: str, method: str) -> bool:
    if name.startswith("heads."):
        return True
    if method == "full":
        return not name.startswith("bert.pooler.")  # which these runs do not use
    part = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    adapters = {"lora": ("lora_A", "lora_B"), "rslora": ("lora_A", "lora_B"), "frozen": ()}
    return part in adapters.get(method, ("lora_A", "lora_B", "lora_magnitude_vector"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_should_move_moves_and_the_rest_stays_bitwise(
    method: str, shape: str, tiny: Path, small_data: Path
) -> None:
    run = Run(settings(tiny, small_data, method=method, **SHAPES[shape]))
    before = weights(run)
    run.trainer.model.train()
    for _ in range(2 * len(run.config.tasks)):
        run.trainer.step()
    after = weights(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # Softmax ignores a key's bias: its gradient is rounding noise, or nothing.
    undecided = {name for name in before if name.endswith("key.bias")} if method == "full" else set()
    assert moved - undecided == {n for n in before if should_move(n, method)} - undecided
    assert all(tensor.isfinite().all() for tensor in after.values())
    if method in ("lora", "rslora", "dora"):
        assert sum("lora_B" in name for name in moved) == 12  # six linears in each of two layers


def test_only_the_targets_are_adapted(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, targets=("value", "output")))
    adapted = {name.split(".lora_")[0] for name in weights(run) if ".lora_" in name}
    layers = [f"bert.encoder.layer.{i}." for i in (0, 1)]
    assert adapted == {
        f"{layer}{end}" for layer in layers for end in ("attention.self.value", "output.dense")
    }


def test_a_pooler_that_is_used_trains_with_the_encoder(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, method="full", pooling="pooler"))
    before = weights(run)["bert.pooler.dense.weight"]
    run.trainer.step()
    assert not torch.equal(weights(run)["bert.pooler.dense.weight"], before)


def test_the_frozen_encoder_is_a_constant_function(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, method="frozen", dropout=0.0))
    _, batch = run.trainer.plan.batch(0)
    run.trainer.model.train()
    training = run.trainer.model("sts", batch)
    run.trainer.dropout_key.step = 1
    assert torch.equal(training, run.trainer.model("sts", batch))
    assert torch.equal(training, run.trainer.model.eval()("sts", batch))


def test_each_dropout_reaches_its_place(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, dropout=0.1, encoder_dropout=0.2, lora_dropout=0.4, hidden_layers=1))
    places: dict[float, set[str]] = {}
    for name, module in run.trainer.model.named_modules():
        if isinstance(module, nn.Dropout):
            places.setdefault(module.p, set()).add(name.removesuffix(".dropout").split(".")[-1])
    assert places == {
        0.1: {"sts", "0"},
        0.2: {"embeddings", "self", "output"},
        0.4: {"query", "key", "value", "dense"},
    }


@pytest.mark.parametrize("method", ["dora", "full"])
def test_scoring_does_not_change_what_is_learnt(method: str, tiny: Path, small_data: Path) -> None:
    scored, unscored = (Run(settings(tiny, small_data, method=method, task="sts+sst")) for _ in range(2))
    for run in (scored, unscored):
        run.trainer.model.train()
        for step in range(8):
            run.trainer.step()
            if run is scored and step in (1, 5):
                run.trainer.end_epoch({"dev": run.data["dev"]})
    after = weights(unscored)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(scored).items())


def not_a_number_from(step: int, what: str):
    """The loss of sts, but for the steps from that one on."""
    calls = []

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        calls.append(step)
        value = (logits.squeeze(1) - wanted).square().mean()
        if len(calls) < step:
            return value
        return value * math.inf if what == "loss" else value + (logits * 0).sum().sqrt()

    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_examples(
    what: str, tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", resume=True)
    with monkeypatch.context() as patch:
        patch.setitem(LOSSES, "mse", not_a_number_from(5, what))
        ended = call(train.main, *arguments)
    assert ended.code == 1
    told = ended.line.split("examples ")
    assert told[0] == f"error: step 5: the {what} of sts is not finite ("
    ids = told[1].split(")")[0].split(", ")
    assert len(set(ids)) == BATCH
    assert all(name.startswith("train") for name in ids)
    assert len(lines_of(tmp_path / "run" / "steps.jsonl")) == 4
    assert checkpoints(tmp_path / "run")[-1].name.startswith("step-4-")
    failure = strict_json((tmp_path / "run" / "checkpoint" / "failure.json").read_text())
    assert (failure["step"], failure["task"], failure["what"], failure["examples"]) == (5, "sts", what, ids)
    assert call(train.main, *arguments).code == 0  # from the step before, as if nothing had been
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "whole")).code == 0
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


WAYS = {
    "lora": {},
    "lora dropout": {"lora_dropout": 0.1, "hidden_layers": 1},
    "full": {"method": "full", "pooling": "cls"},
    "frozen": {"method": "frozen", "encoder_dropout": None},
    "recomputed": {"recompute": True},
    "pearson": {"loss": "pearson"},
    "cosent": {"loss": "cosent"},
    "simcse": {"loss": "simcse", "pair": "siamese", "features": "cosine"},
    "simcse-unsup": {"loss": "simcse-unsup", "pair": "siamese", "features": "cosine"},
    "three tasks": {"task": "sst+qqp+sts", "adapters": "per-task", "pair": "siamese"},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_loss_or_gradient_depends_on_what_the_host_would_wait_for(
    way: str, tiny: Path, small_data: Path
) -> None:
    """A tensor on the meta device has no values, so an operation that needs one on the host raises."""
    changes = {"encoder_dropout": 0.1, "pooling": "mean"} | WAYS[way]
    trainer = Run(settings(tiny, small_data, **changes)).trainer
    for _ in trainer.encode_training_data():
        pass
    trainer.model.to("meta").train()
    trainer.device = torch.device("meta")
    losses = trainer.losses(trainer.plan.batches_of(0))
    sum(losses.values()).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients
    assert all(tensor.is_meta for tensor in (*losses.values(), *gradients))


def test_a_step_reads_from_the_device_once(
    tiny: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"task": "sst+qqp+sts", "adapters": "per-task"}
    trainer = Run(settings(tiny, small_data, **changes)).trainer
    trainer.step()
    reads = []
    monkeypatch.setattr("training.loop.read", lambda scalars: reads.append(scalars) or read(scalars))
    for waits in ("item", "tolist", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, waits, no_other_read(getattr(Tensor, waits)))
    trainer.step()
    assert [len(scalars) for scalars in reads] == [6]  # the losses and the norms of three tasks


def no_other_read(method: Callable) -> Callable:
    """A tensor's method, which only `read` may call."""

    def checked(tensor: Tensor, *arguments: object) -> object:
        assert sys._getframe(1).f_code.co_name == "read"
        return method(tensor, *arguments)

    return checked


def test_a_gpu_s_masks_are_seeded_for_every_piece_of_every_step(
    tiny: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Run(settings(tiny, small_data, seed=7, micro_batch_size=BATCH // 2)).trainer
    seeded = []
    monkeypatch.setattr("training.loop.seed_generator", lambda device, *numbers: seeded.append(numbers))
    for _ in range(2):
        trainer.step()
    assert seeded == [(7, 0, step, piece) for step in range(2) for piece in range(2)]  # seed, rank, ...


@pytest.mark.parametrize("task", ["sts", "sst"])
def test_predictions_that_are_not_finite_are_no_score(task: str, tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, task=task))
    run.trainer.step()
    run.trainer.model.heads[task].output.weight.data[0, 0] = math.nan
    with pytest.raises(TrainingError, match=f"step 1: a prediction of {task} is not finite"):
        run.trainer.end_epoch({"dev": run.data["dev"]})


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_a_second_acts_as_usual(how: signal.Signals) -> None:
    def handlers() -> list:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with stop_signals() as stopped:
        assert stopped() == 0
        assert handlers() != before
        signal.raise_signal(how)
        assert stopped() == how
        assert handlers() == before
    with stop_signals():
        pass
    assert handlers() == before


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_hanging_up_is_never_the_second_signal(first: signal.Signals) -> None:
    """A lost connection says so several times, and systemd says it beside SIGTERM, in either order."""
    with StopAtOnce() as at_once:
        with stop_signals() as stopped:
            for number in (first, signal.SIGHUP):
                signal.raise_signal(number)
            if first == signal.SIGHUP:
                signal.raise_signal(signal.SIGTERM)
                first = signal.SIGTERM
            assert stopped() == first
        signal.raise_signal(signal.SIGHUP)  # while the state is saved
    assert at_once.signum == 0
