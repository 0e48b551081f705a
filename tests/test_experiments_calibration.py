"""Calibration, temperature and threshold, where the answer is known in closed form or by trying all."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.calibration import (
    at_temperature,
    calibration,
    choose_threshold,
    error_of_calibrated,
    expected_calibration_error,
    fit_temperature,
    halves,
    log_likelihood_loss,
    reliability,
    threshold,
)

PAIRS = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40)


def two(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], axis=1)


def sharpened(n: int, factor: float, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are `factor` times those that the labels are drawn from."""
    chance = np.random.default_rng(0)
    logits = chance.normal(size=(n, classes))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) < chance.random((n, 1))).sum(axis=1)
    sharp = np.exp(factor * logits)
    return sharp / sharp.sum(axis=1, keepdims=True), labels


def test_the_error_is_the_gap_where_all_examples_share_a_bin():
    confidence, correct = np.full(10, 0.9), np.arange(10) < 6
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.3)


@given(PAIRS)
def test_the_error_is_what_a_loop_over_bins_finds(pairs):
    confidence = np.array([share / 20 for share, _ in pairs])
    correct = np.array([right for _, right in pairs])
    total = 0.0
    for b in range(15):
        low, high = np.linspace(0, 1, 16)[b : b + 2]
        here = [(c, r) for c, r in zip(confidence, correct, strict=True) if low < c <= high or c == low == 0]
        if here:
            total += abs(sum(c for c, _ in here) - sum(r for _, r in here)) / len(pairs)
    assert expected_calibration_error(confidence, correct) == pytest.approx(total, abs=1e-12)
    assert sum(one.count for one in reliability(confidence, correct)) == len(pairs)


def test_a_certain_and_right_model_has_no_error_and_a_calibrated_one_some():
    assert expected_calibration_error(np.ones(9), np.ones(9)) == 0
    confidence = np.linspace(0.3, 0.99, 500)
    assert 0.02 < error_of_calibrated(confidence) < 0.08
    assert error_of_calibrated(np.tile(confidence, 40)) < 0.012


def test_the_loss_is_torchs():
    probabilities, labels = sharpened(50, 1)
    theirs = torch.nn.functional.nll_loss(torch.tensor(probabilities).log(), torch.tensor(labels))
    assert log_likelihood_loss(probabilities, labels) == pytest.approx(theirs.item(), rel=1e-12)
    assert math.isfinite(log_likelihood_loss(np.array([[0.0, 1.0]]), np.array([0])))


def test_a_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.1, 3.0]], dtype=torch.float64)
    scaled = at_temperature(logits.softmax(dim=1).numpy(), 2.5)
    assert scaled == pytest.approx((logits / 2.5).softmax(dim=1).numpy(), abs=1e-12)


def test_the_temperature_makes_a_constant_confidence_the_accuracy():
    """All say .9 and 7 of 10 are right: logit(.9)/T = logit(.7)."""
    labels = (np.arange(10) < 7).astype(int)
    expected = math.log(0.9 / 0.1) / math.log(0.7 / 0.3)
    assert fit_temperature(two(np.full(10, 0.9)), labels) == pytest.approx(expected, rel=1e-4)


def test_the_temperature_undoes_a_factor_of_the_logits():
    probabilities, labels = sharpened(20_000, 3.0)
    result = calibration(probabilities, labels)
    assert result.temperature == pytest.approx(3.0, rel=0.05)
    assert result.temperatures_of_halves == pytest.approx((3.0, 3.0), rel=0.07)
    assert result.ece > 0.2 > 0.02 > result.ece_cross_fitted
    assert result.nll_in_sample <= result.nll_cross_fitted < result.nll


def test_halves_share_nothing_and_leave_nothing_out():
    (fit, rest), (other_fit, other_rest) = halves(11)
    assert sorted([*fit, *rest]) == list(range(11))
    assert (list(fit), list(rest)) == (list(other_rest), list(other_fit))


@given(PAIRS)
def test_no_threshold_is_right_more_often_than_the_chosen_one(pairs):
    p = np.array([share / 20 for share, _ in pairs])
    labels = np.array([int(label) for _, label in pairs])
    chosen = choose_threshold(p, labels)
    tried = max(((p > t) == labels).mean() for t in np.arange(-0.025, 1.05, 0.05))
    assert ((p > chosen) == labels).mean() == tried


def test_the_threshold_lies_between_the_classes_it_separates():
    p, labels = np.array([0.1, 0.2, 0.3, 0.35, 0.4]), np.array([0, 0, 0, 1, 1])
    assert choose_threshold(p, labels) == pytest.approx(0.325)
    assert choose_threshold(np.array([0.2, 0.9]), np.array([0, 1])) == pytest.approx(0.55)


def test_a_threshold_found_in_noise_gains_on_its_own_examples_alone():
    chance = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        result = threshold(chance.random(40), chance.integers(0, 2, 40))
        gains.append((result.in_sample - result.at_half, result.cross_fitted - result.at_half))
    in_sample, crossed = np.mean(gains, axis=0)
    assert in_sample > 0.08
    assert abs(crossed) < 0.03


def test_a_threshold_helps_where_the_half_is_the_wrong_place():
    labels = np.arange(100) % 2
    result = threshold(0.1 + 0.2 * labels + np.linspace(0, 0.05, 100), labels)
    assert (result.at_half, result.in_sample, result.cross_fitted) == (0.5, 1.0, 1.0)
