"""One finished run looked at from all sides, as plain values; `experiments.evaluate` is the command."""

from dataclasses import asdict, dataclass

import numpy as np

from experiments.calibration import SMALLEST, Calibration, Threshold, calibration, threshold
from experiments.classification import ClassScores, Ordinal, class_scores, confusion_matrix, ordinal
from experiments.pair_order import Order, order, predict_both
from experiments.scored import Scored
from experiments.statistics import influence, standard_error
from tasks.bootstrap import interval, score_of
from tasks.data import Dataset
from tasks.metrics import METRICS
from training.run_folder import load_run

LENGTH_BINS = 4
WORST = 20


@dataclass(frozen=True)
class LengthBin:
    """The dev examples of `low` to `high` tokens, [CLS] and [SEP] among them."""

    low: int
    high: int
    count: int
    score: float
    error: float | None  # standard error; of one example there is none


@dataclass(frozen=True)
class Mistake:
    """An example and how wrong it is: -log p[label] of classes in nats, |score - label| of scores."""

    id: str
    texts: tuple[str, ...]
    label: float
    prediction: float
    error: float


@dataclass(frozen=True)
class Evaluation:
    """What does not apply to the task, or needs a model that was not to be loaded, is None."""

    task: str
    method: str
    seed: int
    examples: int
    scores: dict[str, float]
    interval: tuple[float, float]  # of the first score, 95 % over dev examples
    mean_absolute_error: float | None
    class_names: tuple[str, ...]
    confusion: list[list[int]] | None
    classes: list[ClassScores] | None
    ordinal: Ordinal | None
    calibration: Calibration | None
    threshold: Threshold | None
    order: Order | None
    lengths: list[LengthBin] | None
    worst: list[Mistake]

    def to_dict(self) -> dict:
        """With what follows from the counts of each class."""
        derived = [{"precision": c.precision, "recall": c.recall, "f1": c.f1} for c in self.classes or ()]
        told = asdict(self)
        if self.classes:
            told["classes"] = [one | more for one, more in zip(told["classes"], derived, strict=True)]
            told["macro_f1"] = sum(c.f1 for c in self.classes) / len(self.classes)
        return told

    def named(self, label: float, digits: str) -> str:
        """A class's name, or a score."""
        return self.class_names[int(label)] if self.class_names else format(label, digits)


def evaluate(run: Scored, with_model: bool = True) -> Evaluation:
    """All that can be said of a run's dev predictions; `with_model` it also predicts pairs both ways.

    Raises:
        InputError: if the model is needed and cannot be loaded.
    """
    task, labels, prediction = run.task, run.labels, run.prediction
    given, probabilities = prediction.predictions, prediction.probabilities
    metric = score_of(run.metric, given[None], labels)
    matrix = confusion_matrix(given, labels, task.num_outputs) if task.is_classification else None
    swapped, lengths = _with_model(run) if with_model else (None, None)
    return Evaluation(
        task=task.name,
        method=run.record.config.method,
        seed=run.record.config.seed,
        examples=len(labels),
        scores={name: METRICS[name](given, labels) for name in task.metrics},
        interval=interval(metric, len(labels)),
        mean_absolute_error=None if task.is_classification else float(np.abs(given - labels).mean()),
        class_names=task.class_names,
        confusion=None if matrix is None else matrix.tolist(),
        classes=None if matrix is None else class_scores(matrix),
        ordinal=ordinal(given, labels) if task.ordered else None,
        calibration=None if probabilities is None else calibration(probabilities, labels),
        threshold=threshold(probabilities[:, 1], labels) if task.num_outputs == 2 else None,
        order=swapped,
        lengths=None if lengths is None else by_length(run, lengths),
        worst=worst(run),
    )


def _with_model(run: Scored) -> tuple[Order | None, np.ndarray]:
    """Pairs in both orders, and the tokens of each example [n]."""
    config, model, tokenizer = load_run(run.path, run.task.name)
    data = Dataset(run.task, run.examples, tokenizer, config.siamese(run.task))
    lengths = data.lengths(np.arange(len(data)))
    if not run.task.is_pair:
        return None, lengths
    both = predict_both(config, model, tokenizer, run.task, run.examples)
    return order(run.task, *both, run.labels), lengths


def by_length(run: Scored, lengths: np.ndarray, count: int = LENGTH_BINS) -> list[LengthBin]:
    """The score in each of `count` bins with as many examples, as far as equal lengths allow."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    place = np.searchsorted(edges, lengths, side="left")  # [n]; an edge belongs to the bin below
    bins = []
    for b in np.unique(place):
        here = np.flatnonzero(place == b)
        given, labels = run.prediction.predictions[here], run.labels[here]
        span = int(lengths[here].min()), int(lengths[here].max())
        error = standard_error(influence(run.metric, given, labels)) if len(here) > 1 else None
        bins.append(LengthBin(*span, len(here), METRICS[run.metric](given, labels), error))
    return bins


def worst(run: Scored, count: int = WORST) -> list[Mistake]:
    """The largest errors, largest first; of classes only examples whose class is wrong."""
    given, labels, probabilities = run.prediction.predictions, run.labels, run.prediction.probabilities
    if probabilities is None:
        errors = np.abs(given - labels)
    else:
        of_label = probabilities[np.arange(len(labels)), labels]
        errors = np.where(given == labels, 0.0, -np.log(np.maximum(of_label, SMALLEST)))
    mistakes = []
    for i in np.argsort(-errors, kind="stable")[: min(count, np.count_nonzero(errors))]:
        one = run.examples[i]
        mistakes.append(Mistake(one.id, one.texts, labels[i].item(), given[i].item(), float(errors[i])))
    return mistakes
