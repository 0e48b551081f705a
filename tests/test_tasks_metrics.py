"""Metrics against SciPy's, and what they must not depend on."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerances import TOLERANCE

from tasks import TASKS
from tasks.metrics import METRICS, accuracy, pearson, spearman

FP64 = TOLERANCE[torch.float64, "layer"]
CORRELATIONS = [pearson, spearman]

# Thousandths, so that neither ties nor the spread of values are a matter of rounding.
VALUE = st.integers(-100_000, 100_000).map(lambda n: n / 1000) | st.integers(0, 5).map(float)


@st.composite
def paired(draw, min_size: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels, neither of them constant."""
    pairs = draw(st.lists(st.tuples(VALUE, VALUE), min_size=min_size, max_size=50))
    x, y = np.array(pairs).T
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    return x, y


def close(value: float) -> float:
    return pytest.approx(value, abs=FP64)


@given(paired())
def test_pearson_is_scipys(xy):
    assert pearson(*xy) == close(scipy.stats.pearsonr(*xy).statistic)


@given(paired())
def test_spearman_is_scipys_ties_included(xy):
    assert spearman(*xy) == close(scipy.stats.spearmanr(*xy).statistic)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=50))
def test_accuracy_is_the_share_of_equal_pairs(pairs):
    predictions, labels = np.array(pairs).T
    assert accuracy(predictions, labels) == close(sum(p == y for p, y in pairs) / len(pairs))
    assert accuracy(predictions, labels.astype(np.float32)) == accuracy(predictions, labels)


def test_accuracy_counts_what_it_should():
    assert accuracy(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 4])) == 0.75
    assert accuracy(np.array([4]), np.array([0])) == 0


@pytest.mark.parametrize("metric", CORRELATIONS)
@given(xy=paired())
def test_correlation_lies_between_minus_one_and_one_and_is_symmetric(metric, xy):
    x, y = xy
    assert -1 <= metric(x, y) <= 1
    assert metric(x, y) == close(metric(y, x))
    assert metric(x, x) == close(1)
    assert metric(x, -x) == close(-1)


@pytest.mark.parametrize("metric", [*CORRELATIONS, accuracy])
@given(xy=paired(), seed=st.integers(0, 99))
def test_the_order_of_the_examples_does_not_matter(metric, xy, seed):
    order = np.random.default_rng(seed).permutation(len(xy[0]))
    assert metric(xy[0][order], xy[1][order]) == close(metric(*xy))


@pytest.mark.parametrize("metric", CORRELATIONS)
@given(
    xy=paired(),
    slope=st.sampled_from([-8, -1, -0.25, 0.25, 2, 64]),
    shift=st.integers(-8, 8),
)
def test_a_linear_change_of_the_predictions_changes_no_more_than_the_sign(metric, xy, slope, shift):
    x, y = xy
    assert metric(slope * x + shift, y) == close(np.sign(slope) * metric(x, y))


@given(paired())
def test_spearman_sees_only_the_order_of_the_predictions(xy):
    x, y = xy
    assert spearman(x**3, y) == close(spearman(x, y))
    assert spearman(np.exp(x / 100), y) == close(spearman(x, y))


def test_pearson_sees_more_than_the_order():
    x = np.arange(5.0)
    assert pearson(x, np.exp(x)) < 0.95 < spearman(x, np.exp(x))


@pytest.mark.parametrize("metric", CORRELATIONS)
@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -2.7, 1e8 + 0.1, 1e-300])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_correlates_with_nothing(metric, constant: float, count: int, dtype):
    constant = np.full(count, constant, dtype)
    others = np.random.default_rng(0).random(count)
    assert metric(constant, others) == 0
    assert metric(others, constant) == 0
    assert metric(constant, constant) == 0


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_correlation_does_not_depend_on_units_however_large_or_small(scale: float):
    x, y = np.random.default_rng(1).random((2, 20))
    assert pearson(scale * x, y) == close(pearson(x, y))
    assert pearson(scale * x, scale * y) == close(pearson(x, y))


def test_correlation_of_float32_is_taken_in_float64():
    x = (1000 + np.random.default_rng(2).random(5000)).astype(np.float32)
    y = np.random.default_rng(3).random(5000).astype(np.float32)
    assert pearson(x, y) == close(scipy.stats.pearsonr(x.astype(np.float64), y.astype(np.float64)).statistic)


@pytest.mark.parametrize("metric", CORRELATIONS)
def test_a_prediction_that_is_no_number_is_not_hidden(metric):
    assert np.isnan(metric(np.array([1, np.nan, 3]), np.array([1.0, 2, 3])))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_names_metrics_that_a_perfect_prediction_maxes(task):
    low, high = task.label_range
    labels = np.linspace(low, high, 2 if task.num_outputs == 2 else 5)
    assert task.metrics
    for name in task.metrics:
        assert METRICS[name](labels, labels) == close(1)
        assert METRICS[name](labels[::-1], labels) < 1
        assert isinstance(METRICS[name](labels, labels), float)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_tasks_classes_are_its_label_range(task):
    assert TASKS[task.name] is task
    if task.is_classification:
        assert task.label_range == (0, task.num_outputs - 1)
    assert {"train", "dev"} <= set(task.files)
    assert len(task.text_columns) in (1, 2)
