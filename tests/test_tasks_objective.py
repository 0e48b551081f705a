"""What a step minimises: a loss of logits, or one of two sides beside a head that reads their cosine."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import settings
from tolerances import tolerance
from torch import Tensor

from tasks import TASKS
from tasks.data import Batch
from tasks.model import objective
from training.config import LOSSES, SIDE_LOSSES, losses_of
from training.run import Run

FP32 = tolerance(torch.float32)
TASK_OF = {"contrastive": "qqp", "cross-entropy": "qqp"}


def started(tiny: Path, small_data: Path, loss: str, **changes) -> tuple[Run, Batch]:
    """A Siamese run by that loss, and its first batch."""
    task = TASK_OF.get(loss, "sts")
    run = Run(settings(tiny, small_data, task=task, pair="siamese", pooling="mean", loss=loss, **changes))
    return run, run.trainer.plan.batch(0)[1]


def gradients(run: Run, loss: Tensor) -> dict[str, Tensor]:
    """Of all that trains, zeros where there is none."""
    trains = {name: p for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(loss, list(trains.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(trains, got, strict=True))


def by_hand(loss: str, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """By torch's own functions; labels in [0, 1]."""
    cosine = F.cosine_similarity(u, v)
    if loss == "cosine":
        return F.mse_loss(cosine, labels)
    if loss == "contrastive":
        apart = (0.5 - (1 - cosine)).clamp(min=0)
        return torch.where(labels == 1, (1 - cosine) ** 2, apart**2).mean() / 2
    every = F.cosine_similarity(u[:, None], v[None], dim=2) / 0.05
    same = (labels >= 0.8).nonzero().flatten() if loss == "simcse" else torch.arange(len(u))
    return F.cross_entropy(every[same], same)


@pytest.mark.parametrize("loss", sorted(set(SIDE_LOSSES) - {"simcse-unsup"}))
def test_a_loss_of_two_sides_trains_the_encoder_and_the_tasks_own_the_head(
    loss: str, tiny: Path, small_data: Path
) -> None:
    run, batch = started(tiny, small_data, loss, dropout=0.0, encoder_dropout=0.0)
    model, task = run.trainer.model, run.config.tasks[0]
    u, v = model.encode(batch).chunk(2)
    labels = batch.labels / (5 if task.name == "sts" else 1)
    sides = by_hand(loss, u, v, labels)
    logits = model(task.name, batch)
    read = (
        F.cross_entropy(logits, batch.labels)
        if task.name == "qqp"
        else F.mse_loss(logits[:, 0], batch.labels)
    )
    alone, head = gradients(run, sides), gradients(run, read)
    got = objective(model, task, loss, batch)
    torch.testing.assert_close(got, sides, **FP32)
    for name, gradient in gradients(run, got).items():
        torch.testing.assert_close(gradient, (head if name.startswith("heads.") else alone)[name], **FP32)
    assert any(gradient.any() for name, gradient in alone.items() if not name.startswith("heads."))


def test_a_loss_of_logits_trains_all_together(tiny: Path, small_data: Path) -> None:
    run, batch = started(tiny, small_data, "mse", encoder_dropout=0.0)
    model = run.trainer.model
    cosine = F.cosine_similarity(*model.encode(batch).chunk(2))
    expected = F.mse_loss(5 * cosine, batch.labels)  # as the head starts
    alone, got = gradients(run, expected), objective(model, run.config.tasks[0], "mse", batch)
    torch.testing.assert_close(got, expected, **FP32)
    for name, gradient in gradients(run, got).items():
        if not name.startswith("heads."):
            torch.testing.assert_close(gradient, alone[name], **FP32)


def encoded(run: Run, loss: str, batch: Batch) -> list[Tensor]:
    """What each pass through the encoder gave in one step's loss."""
    passes, model = [], run.trainer.model
    hook = model.bert.register_forward_hook(lambda module, given, out: passes.append(out.detach()))
    objective(model, run.config.tasks[0], loss, batch)
    hook.remove()
    return passes


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"simcse-unsup"}))
def test_both_sides_go_through_the_encoder_in_one_pass(loss: str, tiny: Path, small_data: Path) -> None:
    run, batch = started(tiny, small_data, loss)
    (hidden,) = encoded(run, loss, batch)
    assert len(batch.sequences.lengths) == 2 * len(batch.labels)
    assert len(hidden) == sum(batch.sequences.lengths) + batch.sequences.filler


@pytest.mark.parametrize(("loss", "negatives"), [("simcse", 0), ("simcse-unsup", 2)])
def test_a_pair_that_is_there_twice_is_not_its_own_negative(
    loss: str, negatives: int, tiny: Path, small_data: Path
) -> None:
    """Without dropout the loss is log(1 + Σ exp((cos - 1)/τ)); unsupervised, the other side is a negative."""
    run, _ = started(tiny, small_data, loss)
    data, model, (task,) = run.data["train"]["sts"], run.trainer.model.eval(), run.config.tasks
    best = int(data.labels.argmax())
    alone, twice = (objective(model, task, loss, data.collate(np.full(n, best))) for n in (1, 2))
    torch.testing.assert_close(twice.expm1(), negatives * alone.expm1(), **FP32)


@pytest.mark.parametrize("training", [True, False])
def test_the_two_views_of_unsupervised_simcse_differ_by_dropout_alone(
    training: bool, tiny: Path, small_data: Path
) -> None:
    run, batch = started(tiny, small_data, "simcse-unsup")
    run.trainer.model.train(training)
    one, two = encoded(run, "simcse-unsup", batch)
    assert torch.equal(one, two) != training
    run.trainer.dropout_key.step = 0  # the same step anew: the same two views
    assert all(map(torch.equal, encoded(run, "simcse-unsup", batch), (one, two)))


def test_unsupervised_simcse_reads_no_labels_to_train_the_encoder(tiny: Path, small_data: Path) -> None:
    run, batch = started(tiny, small_data, "simcse-unsup")
    seen = []
    for _ in range(2):
        run.trainer.dropout_key.step = 0
        seen.append(gradients(run, objective(run.trainer.model, run.config.tasks[0], "simcse-unsup", batch)))
        batch.labels.neg_().add_(5)
    for name, gradient in seen[0].items():
        assert torch.equal(gradient, seen[1][name]) != name.startswith("heads."), name


@pytest.mark.parametrize("name", ["sst", "qqp", "sts"])
def test_a_task_can_be_trained_by_its_own_loss_whatever_compares_its_pairs(name: str) -> None:
    for features in (None, "uv", "cosine"):
        assert TASKS[name].loss in losses_of(TASKS[name], features)
