"""What a score on n dev examples can say: its error, paired tests, and the smallest difference it shows.

Its interval is `tasks.bootstrap`'s.

Letters: n examples, S seeds of a setting, whose score is the mean over them. Arrays and floats in and out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t

from tasks.bootstrap import LEVEL, RESAMPLES, resample

POWER = 0.8


def influence(metric: str, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """ψ [n], what each example adds to a score: score - truth ≈ mean(ψ), so Var(score) ≈ Var(ψ)/n.

    The infinitesimal jackknife (Efron 1982, chapter 6). Accuracy: ψ = [prediction = label] - accuracy.
    Pearson, with z the standardised values: ψ = z_x z_y - r (z_x² + z_y²)/2 (Devlin, Gnanadesikan and
    Kettenring 1975); of a constant, which has no correlation, 0.
    """
    if metric == "accuracy":
        correct = (predictions == labels).astype(np.float64)
        return correct - correct.mean()
    x, y = (values.astype(np.float64) - values.mean() for values in (predictions, labels))
    spreads = x.std(), y.std()
    if 0.0 in spreads:
        return np.zeros(len(x))
    x, y = x / spreads[0], y / spreads[1]
    return x * y - (x * y).mean() * (x**2 + y**2) / 2


def standard_error(psi: np.ndarray) -> float:
    """√(Var(ψ)/n), of a score over dev examples; ψ [n]"""
    return float(psi.std(ddof=1)) / math.sqrt(len(psi))


def bootstrap_test(difference: Callable[[np.ndarray], np.ndarray], n: int) -> float:
    """p of a difference of two scores on the same resampled examples (Efron and Tibshirani 1993, chapter 13).

    Twice the smaller share of resamples on either side of 0, those at 0 on both: the level at which the
    percentile interval just holds 0. Never below 2/(resamples + 1).
    """
    resamples = resample(difference, n, "percentile").bootstrap_distribution
    sides = (resamples <= 0).sum(), (resamples >= 0).sum()
    return min(1.0, 2 * (int(min(sides)) + 1) / (RESAMPLES + 1))


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """p of McNemar's exact test: of the examples that one alone gets right, each should get half.

    McNemar 1947, with the binomial distribution in place of χ².
    """
    a_alone, b_alone = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    return float(binomtest(a_alone, a_alone + b_alone).pvalue) if a_alone + b_alone else 1.0


def williams(r12: float, r13: float, r23: float, n: int) -> tuple[float, float]:
    """t and p of r12 = r13, two correlations with the same labels 1 (Williams 1959; Steiger 1980, T2).

    t = (r12 - r13) √[(n - 1)(1 + r23) / (2 |R| (n - 1)/(n - 3) + r̄² (1 - r23)³)], n - 3 degrees of freedom,
    with r̄ = (r12 + r13)/2 and |R| = 1 - r12² - r13² - r23² + 2 r12 r13 r23. It takes all three
    for jointly normal; where errors have heavy tails, as those of similarities do, its p is too small.
    """
    if r12 == r13:
        return 0.0, 1.0
    determinant = max(0.0, 1 - r12**2 - r13**2 - r23**2 + 2 * r12 * r13 * r23)
    below = 2 * determinant * (n - 1) / (n - 3) + (r12 + r13) ** 2 / 4 * (1 - r23) ** 3
    statistic = (r12 - r13) * math.sqrt((n - 1) * (1 + r23) / below)
    return statistic, float(2 * t.sf(abs(statistic), n - 3))


@dataclass(frozen=True)
class Seeds:
    """How much seeds differ, pooled over settings: of the scores, and of ψ from example to example."""

    variance: float
    interaction: float
    df: int


def pool_seeds(scores: Sequence[np.ndarray], influences: Sequence[np.ndarray]) -> Seeds | None:
    """scores [S] and ψ [S, n] of each setting; None where none has two seeds.

    Pooled, since a spread over three seeds is itself known to a factor of two or three.
    """
    repeated = [i for i, one in enumerate(scores) if len(one) > 1]
    df = sum(len(scores[i]) - 1 for i in repeated)
    if not df:
        return None
    variance = sum(((scores[i] - scores[i].mean()) ** 2).sum() for i in repeated) / df
    within = sum(((influences[i] - influences[i].mean(axis=0)) ** 2).sum(axis=0).mean() for i in repeated)
    return Seeds(float(variance), float(within / df), df)


@dataclass(frozen=True)
class Difference:
    """A difference of two scores, its standard error and that error's degrees of freedom.

    `error_examples` is that of these very models: by the choice of the dev examples alone.
    """

    value: float
    error: float
    df: float
    error_examples: float

    @property
    def p(self) -> float:
        """Of no difference, by Student's t."""
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * t.sf(abs(self.value) / self.error, self.df))


def detectable(error: float, df: float) -> float:
    """The smallest true difference that a test at 5 % finds with 80 % power, from its standard error.

    (t_{1 - α/2} + t_{power}) · error, with df degrees of freedom (Bloom 1995); Card et al. 2020 ask for it
    of comparisons in NLP.
    """
    return float((t.ppf(1 - LEVEL / 2, df) + t.ppf(POWER, df)) * error)


def paired_difference(
    value: float, psi_a: np.ndarray, psi_b: np.ndarray, seeds: Seeds | None = None
) -> Difference:
    """The difference of two settings' scores on the same examples, from ψ [S_a, n] and [S_b, n].

    Examples and seeds are both samples (Clark 1973; this is the denominator of his quasi-F ratio):

        Var = V_examples + V_seeds - V_both,    V_examples = Var_i(ψ̄_a - ψ̄_b)/n,
        V_seeds = σ²(1/S_a + 1/S_b),            V_both = σ²_interaction (1/S_a + 1/S_b)/n,

    and at least the larger of the first two, each of which has V_both in it. Degrees of freedom by
    Satterthwaite 1946. Without `seeds` it is about these very models, not about how they are trained.
    """
    n = psi_a.shape[1]
    examples = standard_error(psi_a.mean(axis=0) - psi_b.mean(axis=0)) ** 2
    if seeds is None:
        return Difference(value, examples**0.5, n - 1, examples**0.5)
    shares = 1 / len(psi_a) + 1 / len(psi_b)
    by_seed, both = seeds.variance * shares, seeds.interaction * shares / n
    variance = max(examples, by_seed, examples + by_seed - both)
    below = examples**2 / (n - 1) + by_seed**2 / seeds.df
    df = variance**2 / below if below else n - 1
    return Difference(value, math.sqrt(variance), df, math.sqrt(examples))


def holm(p_values: Sequence[float]) -> list[float]:
    """p of m tests, adjusted: one of them wrongly below α in at most a share α of such families (Holm 1979).

    p̃_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), the p sorted upwards.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()
