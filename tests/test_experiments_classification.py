"""Errors of classes, counted again by loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.classification import class_scores, confusion_matrix, ordinal

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@given(PAIRS)
def test_every_count_is_what_a_loop_counts(pairs):
    predictions, labels = map(np.array, zip(*pairs, strict=True))
    confusion = confusion_matrix(predictions, labels, 4)
    for label in range(4):
        for predicted in range(4):
            assert confusion[label, predicted] == sum(pair == (predicted, label) for pair in pairs)
    for c, one in enumerate(class_scores(confusion)):
        assert one.tp == sum(p == y == c for p, y in pairs)
        assert one.fp == sum(p == c != y for p, y in pairs)
        assert one.fn == sum(p != c == y for p, y in pairs)
        assert one.tn == sum(p != c != y for p, y in pairs)
        if one.precision and one.recall:
            assert one.f1 == pytest.approx(2 / (1 / one.precision + 1 / one.recall))
        else:
            assert one.f1 == 0


def test_precision_and_recall_are_shares_of_what_was_said_and_of_what_there_is():
    one = class_scores(np.array([[5, 3], [2, 8]]))[1]
    assert (one.tp, one.fp, one.fn, one.tn) == (8, 3, 2, 5)
    assert (one.precision, one.recall, one.f1) == (8 / 11, 8 / 10, pytest.approx(16 / 21))


def test_a_class_that_is_neither_there_nor_predicted_has_scores_of_0():
    one = class_scores(confusion_matrix(np.array([0, 1]), np.array([1, 1]), 3))[2]
    assert (one.precision, one.recall, one.f1, one.tn) == (0, 0, 0, 2)


def test_distances_between_classes_are_counted():
    result = ordinal(np.array([0, 1, 2, 4]), np.array([0, 2, 0, 0]))
    assert (result.mean_absolute_error, result.off_by_one, result.off_by_more) == (7 / 4, 0.25, 0.5)
