"""An evaluation as a page to read in a terminal. Imports no torch."""

from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.evaluation import Evaluation

SHOWN = 5  # of the worst errors; all are in the files


def findings(result: "Evaluation") -> str:
    parts = (_scores, _confusion, _ordinal, _calibration, _threshold, _order, _lengths, _worst)
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part(result))))


def _aligned(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _scores(result: "Evaluation") -> Iterator[str]:
    (name, score), *others = result.scores.items()
    low, high = result.interval
    yield f"{result.task}, {result.method}, seed {result.seed}: {result.examples} dev examples"
    yield f"{name} {score:.4f} (95 % {low:.4f} to {high:.4f})"
    yield from (f"{name} {score:.4f}" for name, score in others)
    if result.mean_absolute_error is not None:
        yield f"mean absolute error {result.mean_absolute_error:.4f}"


def _confusion(result: "Evaluation") -> Iterator[str]:
    if not result.confusion:
        return
    classes = result.class_names
    yield "label \\ predicted"
    yield from _aligned(
        [["", *classes], *([name, *row] for name, row in zip(classes, result.confusion, strict=True))]
    )
    rows = [(classes[c.label], c.precision, c.recall, c.f1, c.tp + c.fn) for c in result.classes]
    yield ""
    yield from _aligned([("class", "precision", "recall", "F1", "examples"), *rows])
    yield f"macro F1 {sum(c.f1 for c in result.classes) / len(result.classes):.4f}"
    if len(classes) == 2:
        one = result.classes[1]
        yield f"class {classes[1]}: TP {one.tp}, FP {one.fp}, FN {one.fn}, TN {one.tn}"


def _ordinal(result: "Evaluation") -> Iterator[str]:
    if one := result.ordinal:
        yield (
            f"classes off: {one.mean_absolute_error:.4f} on average; by one in {one.off_by_one:.1%} of all "
            f"examples, by more in {one.off_by_more:.1%}"
        )


def _calibration(result: "Evaluation") -> Iterator[str]:
    if one := result.calibration:
        fitted = f"temperature {one.temperature:.3f}, fitted on these examples"
        crossed = " and ".join(f"{t:.3f}" for t in one.temperatures_of_halves)
        yield f"calibration (so many examples show an ECE of {one.ece_of_calibrated:.4f} by chance alone)"
        yield from _aligned(
            [
                ("", "ECE", "NLL"),
                ("as it is", one.ece, one.nll),
                (fitted, one.ece_in_sample, one.nll_in_sample),
                (f"fitted on the other half ({crossed})", one.ece_cross_fitted, one.nll_cross_fitted),
            ]
        )


def _threshold(result: "Evaluation") -> Iterator[str]:
    if one := result.threshold:
        halves = " and ".join(f"{t:.3f}" for t in one.thresholds_of_halves)
        yield "accuracy by the threshold on p1"
        yield from _aligned(
            [
                ("0.500", one.at_half),
                (f"{one.threshold:.3f}, chosen on these examples", one.in_sample),
                (f"chosen on the other half ({halves})", one.cross_fitted),
            ]
        )


def _order(result: "Evaluation") -> Iterator[str]:
    if one := result.order:
        what = "score" if one.changed is None else "probability"
        changed = "" if one.changed is None else f", the class in {one.changed:.1%}"
        yield f"sides swapped: the {what} changes by {one.mean_absolute_difference:.4f}{changed} (in fp32)"
        gain = f"{one.score_both - one.score:+.4f}, standard error {one.error_of_gain:.4f}"
        scores = f"{one.score:.4f}, swapped {one.score_swapped:.4f}, of the mean {one.score_both:.4f}"
        yield f"{next(iter(result.scores))} {scores} ({gain})"


def _lengths(result: "Evaluation") -> Iterator[str]:
    if result.lengths:
        rows = [
            (f"{one.low} to {one.high}", one.count, one.score, "" if one.error is None else one.error)
            for one in result.lengths
        ]
        yield "by length"
        yield from _aligned([("tokens", "examples", next(iter(result.scores)), "standard error"), *rows])


def _worst(result: "Evaluation") -> Iterator[str]:
    if result.worst:
        unit = "|score - label|" if result.confusion is None else "-log p of the label, in nats"
        yield f"worst errors ({unit})"
    for one in result.worst[:SHOWN]:
        texts = " | ".join(shorten(text, 90, placeholder=" ...") for text in one.texts)
        label, predicted = result.named(one.label, "g"), result.named(one.prediction, ".3g")
        yield f"{one.error:6.2f}  label {label}, predicted {predicted}: {texts}"
