"""Losses against torch.nn.functional's, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import tolerance

from tasks import TASKS
from tasks.losses import (
    COSENT_SCALE,
    LOSSES,
    SIDE_LOSSES,
    contrastive,
    cosent,
    cosine_error,
    cross_entropy,
    filled,
    mean_squared_error,
    pearson,
    simcse,
    simcse_unsupervised,
)
from training import config

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


# Of the two sides of pairs


def sides(batch: int, hidden: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """u, v [B, H], from nearly equal to nearly opposite."""
    rng = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, hidden, dtype=torch.float64, generator=rng)
    noise = torch.randn(batch, hidden, dtype=torch.float64, generator=rng)
    mix = 2 * torch.rand(batch, 1, dtype=torch.float64, generator=rng) - 1
    return 3 * u, mix * u + 0.3 * noise


def value_and_gradients(loss, u: torch.Tensor, v: torch.Tensor, *labels) -> tuple[torch.Tensor, ...]:
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    value = loss(u, v, *labels)
    assert value.shape == ()
    return value.detach(), *torch.autograd.grad(value, (u, v))


SIZES = {"batch": st.integers(1, 12), "hidden": st.sampled_from([2, 7, 16]), "seed": st.integers(0, 2**31)}


@given(**SIZES)
def test_the_cosine_loss_is_the_squared_error_of_torchs_cosine(batch, hidden, seed):
    u, v = sides(batch, hidden, seed)
    labels = torch.linspace(0, 1, batch, dtype=torch.float64)
    ours = value_and_gradients(cosine_error, u, v, labels)
    theirs = value_and_gradients(lambda u, v, y: F.mse_loss(F.cosine_similarity(u, v), y), u, v, labels)
    torch.testing.assert_close(ours, theirs, **FP64)


@given(**SIZES)
def test_contrastive_is_the_published_loss_pair_by_pair(batch, hidden, seed):
    u, v = sides(batch, hidden, seed)
    labels = (torch.arange(batch) % 2).double()

    def pair_by_pair(u, v, labels):
        total = 0 * (u.sum() + v.sum())
        for a, b, same in zip(u, v, labels.tolist(), strict=True):
            distance = 1 - (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt())
            if same:
                total = total + distance**2 / 2
            elif distance < 0.5:
                total = total + (0.5 - distance) ** 2 / 2
        return total / len(u)

    ours = value_and_gradients(contrastive, u, v, labels)
    torch.testing.assert_close(ours, value_and_gradients(pair_by_pair, u, v, labels), **FP64)


@given(**SIZES)
def test_simcse_is_torchs_cross_entropy_over_the_right_sides_of_the_batch(batch, hidden, seed):
    u, v = sides(batch, hidden, seed)
    labels = torch.linspace(0, 1, batch, dtype=torch.float64)
    labels[0] = 0.8  # one at least says the same

    def theirs(u, v, labels):
        similarities = F.cosine_similarity(u[:, None], v[None], dim=2) / 0.05  # [B, B]
        same = [i for i, label in enumerate(labels.tolist()) if label >= 0.8]
        return F.cross_entropy(similarities[same], torch.tensor(same))

    ours = value_and_gradients(simcse, u, v, labels)
    torch.testing.assert_close(ours, value_and_gradients(theirs, u, v, labels), **FP64)


@given(**SIZES)
def test_unsupervised_simcse_is_torchs_cross_entropy_over_the_second_views(batch, hidden, seed):
    u, v = sides(batch, hidden, seed)

    def theirs(u, v):
        similarities = F.cosine_similarity(u[:, None], v[None], dim=2) / 0.05
        return F.cross_entropy(similarities, torch.arange(batch))

    ours = value_and_gradients(simcse_unsupervised, u, v)
    torch.testing.assert_close(ours, value_and_gradients(theirs, u, v), **FP64)


@pytest.mark.parametrize(("left", "right", "negatives"), [
    ("ab", "ab", [[1], [0]]),
    ("aa", "bb", [[], []]),
    ("ab", "ca", [[], [0]]),  # v₁ is u₀ once more
    ("aba", "cdc", [[1], [0, 2], [1]]),
    ("aba", "cde", [[1, 2], [0, 2], [0, 1]]),  # what a is paired with elsewhere is another text
])  # fmt: skip
def test_an_equal_text_is_no_negative(left: str, right: str, negatives: list[list[int]]):
    u, v = sides(len(left), 7, 0)
    u, v = (torch.stack([side[text.index(one)] for one in text]) for side, text in ((u, left), (v, right)))
    texts = torch.tensor([ord(one) for one in left + right])
    every = F.cosine_similarity(u[:, None], v[None], dim=2) / 0.05
    want = [every[i, [i, *others]].logsumexp(0) - every[i, i] for i, others in enumerate(negatives)]
    torch.testing.assert_close(simcse(u, v, torch.ones(len(left)), texts), sum(want) / len(want), **FP64)


def test_an_equal_sentence_is_no_negative_without_supervision():
    views = [side[[0, 0]] for side in sides(2, 7, 0)]
    assert simcse_unsupervised(*views, torch.tensor([5, 5])) == 0
    assert simcse_unsupervised(*views) > 0.69


def test_a_batch_in_which_no_pair_says_the_same_moves_nothing_in_simcse():
    u, v = sides(5, 7, 0)
    value, *gradients = value_and_gradients(simcse, u, v, torch.full((5,), 0.79))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss", SIDE_LOSSES.values(), ids=SIDE_LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_no_length_of_a_vector_makes_a_loss_of_two_sides_or_its_gradient_infinite(loss, scale):
    u, v = (scale * side.float() for side in sides(4, 7, 0))
    for tensor in value_and_gradients(loss, u, v, torch.tensor([0.0, 1.0, 0.0, 1.0])):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(("distance", "moves"), [(0.49, True), (0.51, False)])
def test_a_pair_that_differs_is_pushed_apart_up_to_the_margin(distance: float, moves: bool):
    cosine = 1 - distance
    u = torch.tensor([[1.0, 0.0]])
    v = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]])
    value, gradient, _ = value_and_gradients(contrastive, u, v, torch.zeros(1))
    assert (value > 0) == moves
    assert bool(gradient.any()) == moves


@pytest.mark.parametrize("loss", [cosent, simcse])
def test_where_nothing_is_selected_a_loss_and_its_gradient_are_the_same(loss, monkeypatch):
    """On a GPU all values stay, and those that do not count weigh nothing."""
    shapes = [(9, 1)] if loss is cosent else [(9, 4), (9, 4)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    labels = torch.tensor([0.0, 1.0, 0.9, 0.2, 1.0, 0.5, 0.5, 0.0, 0.8], dtype=torch.float64)
    selected = loss(*inputs, labels)
    gradients = torch.autograd.grad(selected, inputs)
    monkeypatch.setattr("tasks.losses.where", filled)
    weighed = loss(*inputs, labels)
    torch.testing.assert_close(weighed, selected, **FP64)
    torch.testing.assert_close(torch.autograd.grad(weighed, inputs), gradients, **FP64)


def test_on_another_device_no_loss_reads_a_value():
    """A tensor on the meta device has none: whatever depends on one raises."""
    there = {"device": "meta", "requires_grad": True}
    for loss in (*LOSSES.values(), *SIDE_LOSSES.values()):
        sides = loss in SIDE_LOSSES.values()
        inputs = [torch.empty(9, 4, **there) for _ in range(2)] if sides else [torch.empty(9, 1, **there)]
        dtype = torch.int64 if loss is cross_entropy else torch.float32
        texts = [torch.empty(18, device="meta")] if loss is simcse else []
        loss(*inputs, torch.empty(9, device="meta", dtype=dtype), *texts).backward()


def test_the_command_line_knows_every_loss_and_no_other():
    names = {*LOSSES, *SIDE_LOSSES, "simcse-unsup"}
    assert set(config.LOSSES) == names
    assert set(config.SIDE_LOSSES) == names - set(LOSSES)


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
