"""The interval of a score on n examples, by drawing them again (Efron 1979). Imports SciPy: slow to load.

Letters: n examples, S models, whose score is the mean over them.
"""

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

LEVEL = 0.05
RESAMPLES = 1999
AT_ONCE = 2**22  # numbers of a resampling held in memory
MOST_JACKKNIFED = 3000  # examples; above that the n² of BCa's jackknife costs much and corrects nothing


def score_of(metric: str, predictions: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """predictions [S, n], labels [n] -> the mean score over the seeds as a function of examples [..., k]."""
    if metric == "accuracy":
        correct = (predictions == labels).mean(axis=0)  # [n]
        return lambda examples: correct[examples].mean(axis=-1)
    x = predictions - predictions.mean(axis=1, keepdims=True)  # Pearson's r is the same, and sums are exact
    y = labels - labels.mean()

    def mean_correlation(examples: np.ndarray) -> np.ndarray:
        return sum(_pearson(one[examples], y[examples]) for one in x) / len(x)

    return mean_correlation


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; of a constant 0."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return (x * y).sum(axis=-1) / np.where(norm == 0, 1, norm)


def interval(score: Callable[[np.ndarray], np.ndarray], n: int) -> tuple[float, float]:
    """The bootstrap confidence interval of a score over dev examples, the seeds as they are.

    BCa's (Efron 1987), or the percentile one where n makes that needless.
    """
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = resample(score, n, "BCa" if n <= MOST_JACKKNIFED else "percentile")
    ends = result.confidence_interval
    if not np.isfinite(ends).all():  # where every example is right, say, BCa is not defined
        ends = np.quantile(result.bootstrap_distribution, [LEVEL / 2, 1 - LEVEL / 2])
    return float(ends[0]), float(ends[1])


def resample(score: Callable[[np.ndarray], np.ndarray], n: int, method: str):
    """SciPy's bootstrap, of the examples' indices: what belongs to an example stays together."""
    return bootstrap(
        (np.arange(n),),
        lambda examples, axis: score(examples),
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // n),
        vectorized=True,
        axis=-1,
        confidence_level=1 - LEVEL,
        method=method,
        random_state=np.random.default_rng(0),
    )
