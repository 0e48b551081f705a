"""The built-in data: counts, balance, splits that share nothing, and no cheap way to solve it."""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import tasks
from tasks import QQP, STS, TASKS
from tasks.base import Example, Task
from tasks.reader import read_examples

DEMO = Path(tasks.__file__).parent / "demo"
SPLITS = ("train", "dev", "test")
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
each_split = pytest.mark.parametrize("split", SPLITS)


def examples(task: Task, split: str) -> list[Example]:
    return read_examples(DEMO / task.files[split], task, labelled=True, strict=True)[0]


def texts(task: Task, split: str) -> list[str]:
    return [text for example in examples(task, split) for text in example.texts]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.casefold()))


def incidence(sets: list[frozenset[str]], vocabulary: dict[str, int]) -> np.ndarray:
    matrix = np.zeros((len(sets), len(vocabulary)), np.float32)
    for row, one in enumerate(sets):
        matrix[row, [vocabulary[word] for word in one]] = 1
    return matrix  # [texts, words]


def jaccard(left: list[frozenset[str]], right: list[frozenset[str]]) -> np.ndarray:
    """|a ∩ b| / |a ∪ b| of every pair, [left, right]"""
    vocabulary = {word: i for i, word in enumerate(sorted(frozenset().union(*left, *right)))}
    a, b = incidence(left, vocabulary), incidence(right, vocabulary)
    common = a @ b.T
    return common / (a.sum(axis=1)[:, None] + b.sum(axis=1) - common)


@each_task
def test_every_split_is_there_and_no_other_file(task: Task):
    expected = {name for one in TASKS.values() for name in one.files.values()} | {"README.md"}
    assert {path.name for path in DEMO.iterdir()} == expected
    assert set(task.files) == set(SPLITS)


@each_task
def test_there_are_enough_rows_and_the_datasheet_counts_them_right(task: Task):
    counts = [len(examples(task, split)) for split in SPLITS]
    assert counts[0] >= 400
    assert min(counts[1:]) >= 100
    sheet = (DEMO / "README.md").read_text(encoding="utf-8")
    assert f"| {task.name} | {' | '.join(map(str, counts))} |" in sheet
    assert "CC0" in sheet


@each_split
@each_task
def test_every_label_has_its_share_of_the_rows(task: Task, split: str):
    labels = Counter(example.label for example in examples(task, split))
    low, high = task.label_range
    assert sorted(labels) == list(range(low, high + 1))
    shares = [count / labels.total() for count in labels.values()]
    assert max(abs(share - 1 / len(shares)) for share in shares) <= 0.02


@each_task
def test_ids_are_unique_within_a_task(task: Task):
    ids = [example.id for split in SPLITS for example in examples(task, split)]
    assert len(set(ids)) == len(ids)


@each_task
def test_no_text_appears_twice_in_a_split_or_in_two_of_them(task: Task):
    # Punctuation aside: of a text that differs in that alone, the other is known too.
    by_split = {split: [" ".join(text.casefold().split()) for text in texts(task, split)] for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not set(by_split[one]) & set(by_split[other])
    bare = Counter(re.sub(r"\W+", " ", text) for split in SPLITS for text in by_split[split])
    repeated = {text for text, count in bare.items() if count > 1}
    assert not repeated


@each_task
def test_no_text_and_no_pair_is_nearly_that_of_another_split(task: Task):
    for one, other in combinations(SPLITS, 2):
        similar = jaccard([words(t) for t in texts(task, one)], [words(t) for t in texts(task, other)])
        assert similar.max() <= 0.9
        rows = [[words(" ".join(e.texts)) for e in examples(task, split)] for split in (one, other)]
        assert jaccard(*rows).max() <= 0.9


@each_split
@each_task
def test_the_files_are_clean(task: Task, split: str):
    content = (DEMO / task.files[split]).read_bytes()
    text = content.decode("utf-8")
    assert text.endswith("\n")
    assert not re.search("\ufeff|\r|\n\n|  |[\x00-\x08\x0b-\x1f\x7f\ufffd\u00a0]", text)
    header, *lines = text.removesuffix("\n").split("\n")
    assert header.split("\t") == ["id", *task.text_columns, task.label_column]
    assert {line.count("\t") for line in lines} == {header.count("\t")}
    assert len(lines) == len(examples(task, split))
    for field in (field for line in lines for field in line.split("\t")):
        assert field
        assert field == field.strip()
    for one in texts(task, split):
        assert not re.search(r"\s[,.;:?!]|\b(\w+) \1\b", one), one


def overlaps(task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The share of common words of each pair, and its label."""
    rows = examples(task, split)
    shares = [
        len(words(left) & words(right)) / len(words(left) | words(right))
        for left, right in (example.texts for example in rows)
    ]
    return np.array(shares), np.array([example.label for example in rows])


@each_split
def test_no_threshold_on_word_overlap_solves_the_questions(split: str):
    shares, labels = overlaps(QQP, split)
    above = [((shares >= threshold) == labels).mean() for threshold in np.append(np.unique(shares), 2)]
    assert max(max(above), 1 - min(above)) < 0.65  # the best threshold, chosen on these very rows


@each_split
def test_word_overlap_does_not_grade_the_sentence_pairs(split: str):
    shares, labels = overlaps(STS, split)
    mean = [shares[labels == grade].mean() for grade in range(6)]
    assert mean[5] < min(mean[3], mean[4])
    assert np.corrcoef(shares, labels)[0, 1] < 0.6


def counts(task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What can be counted in a pair without knowing a word (lengths, common words), and its label."""
    shares, labels = overlaps(task, split)
    lengths = np.array([[len(words(text)) for text in one.texts] for one in examples(task, split)])
    total = lengths.sum(axis=1)
    return np.column_stack([np.ones_like(shares), shares, shares**2, lengths, shares * total]), labels


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("task", [QQP, STS], ids=lambda task: task.name)
def test_the_best_linear_rule_on_lengths_and_overlap_stays_far_from_solving_the_pairs(task: Task, split: str):
    known, labels = counts(task, "train")
    weights = np.linalg.lstsq(known, labels, rcond=None)[0]
    unknown, labels = counts(task, split)
    guesses = unknown @ weights
    if task.is_classification:
        assert ((guesses > 0.5) == labels).mean() < 0.75
    else:
        assert np.corrcoef(guesses, labels)[0, 1] < 0.75
