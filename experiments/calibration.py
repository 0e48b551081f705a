"""Do probabilities mean what they say, and what does a temperature or a threshold chosen on dev gain?

What is fitted on the examples it is measured on flatters itself. So both are also cross-fitted: fitted on
one random half, measured on the other, and the other way round. Letters: n examples, C classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

BINS = 15
SMALLEST = 5e-7  # the files' probabilities have six digits, and a 0 among them is not one
RANGE = (0.05, 20.0)  # of temperatures
DRAWS = 200


@dataclass(frozen=True)
class Bin:
    """The examples whose confidence is in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, correct: np.ndarray, count: int = BINS) -> list[Bin]:
    """The bins of equal width that hold an example; confidence is the predicted class's probability."""
    edges = np.linspace(0, 1, count + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, count - 1)  # [n]
    bins = []
    for b in np.unique(place):
        here = place == b
        means = float(confidence[here].mean()), float(correct[here].mean())
        bins.append(Bin(float(edges[b]), float(edges[b + 1]), int(here.sum()), *means))
    return bins


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """ECE = Σ_b |B_b|/n · |accuracy(B_b) - confidence(B_b)| over 15 bins (Guo et al. 2017, eq. 3)."""
    bins = reliability(confidence, correct)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / len(confidence)


def error_of_calibrated(confidence: np.ndarray) -> float:
    """The ECE that n examples would show, on average, were every confidence exactly right: it is not 0."""
    chance = np.random.default_rng(0)
    draws = (chance.random(len(confidence)) < confidence for _ in range(DRAWS))
    return float(np.mean([expected_calibration_error(confidence, correct) for correct in draws]))


def log_likelihood_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """NLL = -mean log p[label], in nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], SMALLEST)).mean())


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / T) = p^(1/T) / Σ p^(1/T)  [n, C] (Guo et al. 2017, eq. 9)"""
    scaled = np.log(np.maximum(probabilities, SMALLEST)) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The T of least NLL; the loss is convex in 1/T, so there is one."""

    def loss(log_temperature: float) -> float:
        return log_likelihood_loss(at_temperature(probabilities, np.exp(log_temperature)), labels)

    found = minimize_scalar(loss, bounds=tuple(np.log(RANGE)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def halves(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fit, measure), twice: two random halves of n examples, the same each time."""
    order = np.random.default_rng(0).permutation(n)
    first, second = order[: n // 2], order[n // 2 :]
    return [(first, second), (second, first)]


@dataclass(frozen=True)
class Calibration:
    """ECE and NLL as they are, with the temperature fitted on all of dev, and cross-fitted."""

    ece: float
    ece_of_calibrated: float
    nll: float
    temperature: float
    ece_in_sample: float
    nll_in_sample: float
    ece_cross_fitted: float
    nll_cross_fitted: float
    temperatures_of_halves: tuple[float, ...]
    bins: tuple[Bin, ...]


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """probabilities [n, C], labels [n]"""
    correct = probabilities.argmax(axis=1) == labels

    def measure(given: np.ndarray) -> tuple[float, float]:
        return expected_calibration_error(given.max(axis=1), correct), log_likelihood_loss(given, labels)

    temperature = fit_temperature(probabilities, labels)
    crossed, of_halves = np.empty_like(probabilities), []
    for fit, rest in halves(len(labels)):
        of_halves.append(fit_temperature(probabilities[fit], labels[fit]))
        crossed[rest] = at_temperature(probabilities[rest], of_halves[-1])
    ece, nll = measure(probabilities)
    confidence = probabilities.max(axis=1)
    return Calibration(
        ece,
        error_of_calibrated(confidence),
        nll,
        temperature,
        *measure(at_temperature(probabilities, temperature)),
        *measure(crossed),
        tuple(of_halves),
        tuple(reliability(confidence, correct)),
    )


@dataclass(frozen=True)
class Threshold:
    """A threshold on p1 in place of .5, and the accuracies with it."""

    threshold: float
    at_half: float
    in_sample: float
    cross_fitted: float
    thresholds_of_halves: tuple[float, ...]


def choose_threshold(p: np.ndarray, labels: np.ndarray) -> float:
    """The t of most examples with [p > t] = label; of several the one nearest .5.

    Candidates lie midway between neighbouring p, and outside all of them.
    """
    values, place = np.unique(p, return_inverse=True)
    ones = np.bincount(place, weights=labels, minlength=len(values))  # [k]
    counts = np.bincount(place, minlength=len(values))
    below = np.concatenate([[0], np.cumsum(counts - ones)])  # zeros that candidate k, of k + 1, gets right
    above = ones.sum() - np.concatenate([[0], np.cumsum(ones)])
    candidates = np.concatenate([[np.nextafter(0, -1)], (values[1:] + values[:-1]) / 2, [1.0]])  # [k + 1]
    right = below + above
    best = candidates[right == right.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def threshold(p: np.ndarray, labels: np.ndarray) -> Threshold:
    """p [n] of class 1, labels [n] of 0 and 1"""
    chosen = choose_threshold(p, labels)
    right, of_halves = np.empty(len(p), bool), []
    for fit, rest in halves(len(p)):
        of_halves.append(choose_threshold(p[fit], labels[fit]))
        right[rest] = (p[rest] > of_halves[-1]) == labels[rest]
    at_half, in_sample = (float(((p > t) == labels).mean()) for t in (0.5, chosen))
    return Threshold(chosen, at_half, in_sample, float(right.mean()), tuple(of_halves))
