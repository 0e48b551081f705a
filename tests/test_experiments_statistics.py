"""Intervals and tests against closed forms, SciPy's own and simulations in which the truth is known."""

import math
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from experiments.statistics import (
    bootstrap_test,
    detectable,
    holm,
    influence,
    mcnemar,
    paired_difference,
    pool_seeds,
    williams,
)
from tasks.bootstrap import interval, score_of
from tasks.metrics import METRICS


def correlated(n: int, covariance: list[list[float]], seed: int = 0) -> np.ndarray:
    """Normal variables, a row each."""
    chance = np.random.default_rng(seed)
    return chance.multivariate_normal(np.zeros(len(covariance)), covariance, size=n).T


def some(metric: str, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of two models, and labels."""
    if metric == "pearson":
        return tuple(correlated(n, [[1, 0.8, 0.7], [0.8, 1, 0.6], [0.7, 0.6, 1]]))
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, n)
    return *(np.where(chance.random(n) < 0.6, labels, chance.integers(0, 3, n)) for _ in "ab"), labels


@pytest.mark.parametrize("metric", ["accuracy", "pearson"])
def test_an_influence_is_what_leaving_the_example_out_takes_away(metric):
    x, _, y = some(metric)
    whole = METRICS[metric](x, y)
    without = [METRICS[metric](np.delete(x, i), np.delete(y, i)) for i in range(len(x))]
    jackknife = (len(x) - 1) * (whole - np.array(without))
    assert influence(metric, x, y) == pytest.approx(jackknife, rel=0.05, abs=0.05)
    assert influence(metric, x, y).std() == pytest.approx(jackknife.std(), rel=0.02)


def test_the_influences_give_the_textbook_errors_of_accuracy_and_of_a_normal_correlation():
    x, _, y = some("accuracy")
    share = (x == y).mean()
    assert influence("accuracy", x, y).var() == pytest.approx(share * (1 - share), rel=1e-12)
    x, y = correlated(200_000, [[1, 0.6], [0.6, 1]])
    assert influence("pearson", x, y).std() == pytest.approx(1 - 0.6**2, rel=0.02)


def test_a_constant_prediction_has_no_influence_on_a_correlation_that_is_none():
    assert not influence("pearson", np.ones(5), np.arange(5.0)).any()


@pytest.mark.parametrize("metric", ["accuracy", "pearson"])
def test_a_resampled_score_is_the_metric_of_the_resampled_pairs(metric):
    a, b, y = some(metric, 40)
    examples = np.random.default_rng(1).integers(0, 40, (7, 40))
    expected = [np.mean([METRICS[metric](one[i], y[i]) for one in (a, b)]) for i in examples]
    assert score_of(metric, np.stack([a, b]), y)(examples) == pytest.approx(expected, abs=1e-12)


def test_an_interval_is_scipys_own_over_pairs_that_stay_together():
    x, _, y = some("pearson")
    low, high = interval(score_of("pearson", x[None], y), len(x))
    other = scipy.stats.bootstrap(
        (x, y),
        lambda x, y: scipy.stats.pearsonr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        random_state=np.random.default_rng(5),
    ).confidence_interval
    fisher = scipy.stats.pearsonr(x, y).confidence_interval()
    assert (low, high) == pytest.approx(tuple(other), abs=0.01)
    assert (low, high) == pytest.approx(tuple(fisher), abs=0.015)


def test_an_interval_of_an_accuracy_has_the_binomials_width():
    x, _, y = some("accuracy", 1000)
    low, high = interval(score_of("accuracy", x[None], y), len(x))
    exact = scipy.stats.binomtest(int((x == y).sum()), len(x)).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx(tuple(exact), abs=0.005)


def test_where_every_example_is_right_the_interval_is_a_point():
    y = np.arange(6)
    assert interval(score_of("accuracy", y[None], y), 6) == (1.0, 1.0)


def test_the_bootstrap_test_agrees_with_a_paired_t_test():
    a, b, y = some("accuracy", 400)
    scores = [score_of("accuracy", one[None], y) for one in (a, b)]
    p = bootstrap_test(lambda examples: scores[0](examples) - scores[1](examples), 400)
    expected = scipy.stats.ttest_rel((a == y).astype(float), (b == y).astype(float)).pvalue
    assert p == pytest.approx(expected, abs=0.05)
    assert bootstrap_test(lambda examples: scores[0](examples) - scores[0](examples), 400) == 1.0


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_a_binomial_sum_over_the_examples_that_one_alone_gets_right(a_alone, b_alone):
    a = np.array([True] * a_alone + [False] * b_alone + [True, False])
    b = np.array([False] * a_alone + [True] * b_alone + [True, False])
    m = a_alone + b_alone
    tail = sum(math.comb(m, k) for k in range(min(a_alone, b_alone) + 1)) / 2**m
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_williams_gives_steigers_example():
    """Verbal ability with masculinity .5, with femininity .4, these two .1, n 103: t .89, p .37."""
    statistic, p = williams(0.5, 0.4, 0.1, 103)
    assert (round(statistic, 2), round(p, 2)) == (0.89, 0.37)
    assert williams(0.4, 0.5, 0.1, 103) == (-statistic, p)


def test_williams_finds_no_difference_in_one_model_and_a_certain_one_where_noise_is_none():
    assert williams(0.8, 0.8, 1.0, 50) == (0.0, 1.0)
    assert williams(0.9, 0.1, 0.5, 500)[1] < 1e-12


def test_williams_is_wrong_in_five_of_a_hundred_samples_without_a_difference():
    p = []
    for seed in range(1500):
        y, a, b = correlated(40, [[1, 0.7, 0.7], [0.7, 1, 0.6], [0.7, 0.6, 1]], seed)
        r = np.corrcoef([y, a, b])
        p.append(williams(r[0, 1], r[0, 2], r[1, 2], 40)[1])
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.017)  # three standard errors


def test_williams_agrees_with_the_paired_difference_of_influences():
    a, b, y = some("pearson", 3000)
    r = np.corrcoef([y, a, b])
    statistic, _ = williams(r[0, 1], r[0, 2], r[1, 2], 3000)
    psi = [influence("pearson", one, y)[None] for one in (a, b)]
    difference = paired_difference(r[0, 1] - r[0, 2], *psi)
    assert difference.value / difference.error == pytest.approx(statistic, rel=0.05)


def test_with_heavy_tails_williams_is_too_sure_and_the_influences_are_not():
    chance = np.random.default_rng(0)
    wrong, times, n = [0, 0], 400, 300
    for _ in range(times):
        y = chance.normal(size=n)
        a, b = (y + np.where(chance.random(n) < 0.1, 2, 0.3) * chance.normal(size=n) for _ in "ab")
        r = np.corrcoef([y, a, b])
        psi = [influence("pearson", one, y)[None] for one in (a, b)]
        wrong[0] += williams(r[0, 1], r[0, 2], r[1, 2], n)[1] < 0.05
        wrong[1] += paired_difference(r[0, 1] - r[0, 2], *psi).p < 0.05
    assert wrong[0] / times > 0.1
    assert wrong[1] / times < 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)


def test_without_seeds_the_paired_difference_is_the_paired_t_test():
    a, b, y = some("accuracy")
    psi = [influence("accuracy", one, y)[None] for one in (a, b)]
    difference = paired_difference(METRICS["accuracy"](a, y) - METRICS["accuracy"](b, y), *psi)
    expected = scipy.stats.ttest_rel((a == y).astype(float), (b == y).astype(float)).pvalue
    assert difference.p == pytest.approx(expected, rel=1e-9)


def test_equal_predictions_do_not_differ():
    psi = influence("accuracy", *some("accuracy")[1:])[None]
    assert paired_difference(0.0, psi, psi).p == 1.0


@pytest.mark.parametrize(
    ("by_seed", "by_item", "by_both"), [(0.1, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.2, 0.5, 0.5)]
)
def test_seeds_and_examples_together_are_wrong_in_at_most_five_of_a_hundred(by_seed, by_item, by_both):
    """Two settings, three seeds, 200 examples: equal in truth, their scores means of normal values."""
    chance = np.random.default_rng(0)
    wrong, times, seeds, n = 0, 600, 3, 200
    for _ in range(times):
        settings = [
            by_seed * chance.normal(size=(seeds, 1))
            + by_item * chance.normal(size=n)
            + by_both * chance.normal(size=(seeds, n))
            for _ in "ab"
        ]
        scores = [one.mean(axis=1) for one in settings]
        psi = [one - one.mean(axis=1, keepdims=True) for one in settings]
        value = scores[0].mean() - scores[1].mean()
        wrong += paired_difference(value, *psi, pool_seeds(scores, psi)).p < 0.05
    assert wrong / times < 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)


def test_examples_alone_would_call_seeds_a_difference():
    """What the seeds' part is for: the same simulation, without it, is wrong far too often."""
    chance = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        settings = [0.2 * chance.normal(size=(3, 1)) + chance.normal(size=(3, 200)) for _ in "ab"]
        value = settings[0].mean() - settings[1].mean()
        psi = [one - one.mean(axis=1, keepdims=True) for one in settings]
        wrong += paired_difference(value, *psi).p < 0.05
    assert wrong / 200 > 0.4


def test_of_equal_settings_the_luckiest_is_rarely_called_better():
    """Five settings, three seeds: Holm over all pairs holds its 5 %, raw p over examples alone do not."""
    chance = np.random.default_rng(0)
    wrong, naive, times = 0, 0, 200
    for _ in range(times):
        settings = [
            0.2 * chance.normal(size=(3, 1))
            + 0.5 * chance.normal(size=200)
            + 0.5 * chance.normal(size=(3, 200))
            for _ in range(5)
        ]
        settings.sort(key=lambda one: -one.mean())
        scores = [one.mean(axis=1) for one in settings]
        psi = [one - one.mean(axis=1, keepdims=True) for one in settings]
        seeds = pool_seeds(scores, psi)
        pairs = list(combinations(range(5), 2))  # the best one's come first
        values = [scores[b].mean() - scores[a].mean() for a, b in pairs]
        tested = [
            paired_difference(v, psi[a], psi[b], seeds).p for v, (a, b) in zip(values, pairs, strict=True)
        ]
        wrong += min(holm(tested)[:4]) < 0.05
        naive += min(paired_difference(values[b], psi[0], psi[b + 1]).p for b in range(4)) < 0.05
    assert wrong / times < 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)
    assert naive / times > 0.5


def test_the_seeds_spread_is_pooled_over_settings_that_have_one():
    scores = [np.array([1.0, 3.0]), np.array([5.0]), np.array([2.0, 2.0, 5.0])]
    seeds = pool_seeds(scores, [np.zeros((len(one), 4)) for one in scores])
    assert (seeds.variance, seeds.interaction, seeds.df) == (pytest.approx((2 + 6) / 3), 0.0, 3)
    assert pool_seeds(scores[1:2], [np.zeros((1, 4))]) is None


def test_holm_gives_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_every_bonferroni_of_a_family_with_it_rejects(p):
    """The closure principle: of all families of the tests that hold it, each one's m · min p is below."""
    families = [family for m in range(1, len(p) + 1) for family in combinations(range(len(p)), m)]
    for i, adjusted in enumerate(holm(p)):
        worst = max(len(f) * min(p[j] for j in f) for f in families if i in f)
        assert adjusted == pytest.approx(min(1.0, worst))


def test_what_is_detectable_is_detected_in_four_of_five_samples():
    chance = np.random.default_rng(0)
    n, times = 60, 4000
    shift = detectable(1 / math.sqrt(n), n - 1)
    p = scipy.stats.ttest_1samp(chance.normal(shift, 1, (times, n)), 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.02)
    assert detectable(1.0, 1e9) == pytest.approx(2.8016, abs=1e-3)  # 1.960 + 0.842
