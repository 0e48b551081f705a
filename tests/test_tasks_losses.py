"""Losses against torch.nn.functional's, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import tolerance

from tasks import TASKS
from tasks.losses import COSENT_SCALE, LOSSES, cosent, cross_entropy, mean_squared_error, pearson

FP64 = tolerance(torch.float64)


def value_and_gradient(loss, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels)
    assert value.shape == ()
    return value.detach(), torch.autograd.grad(value, logits)[0]


@given(
    batch=st.integers(1, 40),
    classes=st.integers(2, 7),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    shift=st.sampled_from([0.0, -1e4, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_cross_entropy_is_torchs_in_value_and_gradient(batch, classes, scale, shift, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, dtype=torch.float64, generator=rng) + shift
    labels = torch.randint(classes, (batch,), generator=rng)
    ours = value_and_gradient(cross_entropy, logits, labels)
    torch.testing.assert_close(ours, value_and_gradient(F.cross_entropy, logits, labels), **FP64)


@given(batch=st.integers(1, 40), scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]), seed=st.integers(0, 2**31))
def test_mean_squared_error_is_torchs_in_value_and_gradient(batch, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, 1, dtype=torch.float64, generator=rng)
    labels = 5 * torch.rand(batch, dtype=torch.float64, generator=rng)
    ours = value_and_gradient(mean_squared_error, logits, labels)
    theirs = value_and_gradient(lambda x, y: F.mse_loss(x, y[:, None]), logits, labels)
    torch.testing.assert_close(ours, theirs, **FP64)


def scores_and_labels(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels have ties, as those of STS do."""
    rng = torch.Generator().manual_seed(seed)
    logits = 5 * torch.rand(batch, 1, dtype=torch.float64, generator=rng)
    return logits, torch.randint(0, 6, (batch,), generator=rng).double()


@given(batch=st.integers(3, 40), seed=st.integers(0, 2**31))
def test_pearson_is_one_less_the_correlation_in_value_and_gradient(batch, seed):
    logits, labels = scores_and_labels(batch, seed)
    labels[:2] = torch.tensor([0.0, 5.0])  # or there is no correlation
    ours = value_and_gradient(pearson, logits, labels)
    both = lambda x, y: 1 - torch.corrcoef(torch.stack([x.squeeze(1), y]))[0, 1]  # noqa: E731
    torch.testing.assert_close(ours, value_and_gradient(both, logits, labels), **FP64)
    assert float(pearson(3 * logits + 7, labels)) == pytest.approx(float(ours[0]))


@given(batch=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_cosent_is_the_published_sum_over_pairs_in_value_and_gradient(batch, seed):
    logits, labels = scores_and_labels(batch, seed)

    def pair_by_pair(logits, labels):
        total = torch.ones((), dtype=torch.float64)
        for i in range(batch):
            for j in range(batch):
                if labels[i] > labels[j]:
                    total = total + (COSENT_SCALE * (logits[j, 0] - logits[i, 0])).exp()
        return total.log() + 0 * logits.sum()

    ours = value_and_gradient(cosent, logits, labels)
    torch.testing.assert_close(ours, value_and_gradient(pair_by_pair, logits, labels), **FP64)


@pytest.mark.parametrize("loss", [pearson, cosent])
@pytest.mark.parametrize(
    ("scores", "labels"), [([2.0], [3.0]), ([1.0, 4.0], [2.0, 2.0]), ([3.0, 3.0], [1.0, 5.0])]
)
def test_what_cannot_be_ordered_or_correlated_gives_no_nan(loss, scores, labels):
    value, gradient = value_and_gradient(loss, torch.tensor(scores)[:, None], torch.tensor(labels))
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_cross_entropy_stays_finite_however_sure_the_model_is(sign: int):
    logits = torch.tensor([[sign * 1e30, -sign * 1e30]])
    value, gradient = value_and_gradient(cross_entropy, logits, torch.tensor([0]))
    assert value == (0 if sign == 1 else 2e30)
    assert gradient.tolist() == ([[0, 0]] if sign == 1 else [[-1, 1]])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_names_a_loss_that_fits_its_outputs_and_falls_as_they_get_better(task):
    low, high = task.label_range
    dtype = torch.int64 if task.is_classification else torch.float32
    labels = torch.tensor([low, high, low], dtype=dtype)
    right = F.one_hot(labels, task.num_outputs) if task.is_classification else labels[:, None]
    logits = torch.zeros(3, task.num_outputs) + (high + low) / 2
    worse, gradient = value_and_gradient(LOSSES[task.loss], logits, labels)
    better = LOSSES[task.loss](logits.lerp(right.float(), 0.5), labels)
    assert better < worse
    assert gradient.shape == logits.shape
    assert gradient.isfinite().all()
