"""What the header and a model card say of a run's data: its origin, what it holds, what is odd in it."""

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from minibert.verify import git_blob_id
from tasks.base import Example, Task
from tasks.course import BLOB_IDS
from training.build import Splits
from training.config import Config

ORIGINS = {
    "demo": "the sentences that come with minibert (CC0)",
    "cs224n": "the files of Stanford's CS 224N course (2024)",
}
UNKNOWN = "files of the user's own"

DEMO_LIMITS = (
    "Written by hand for trying things out: small, tidy, in one hand's style, with balanced labels. It "
    "is no benchmark, and a score on it says nothing of a score elsewhere.",
    "Each label is what one writer meant; there were no other annotators, so their agreement is unknown.",
    "Length is a cue: duplicates, and pairs of a high grade, are a little longer than others.",
)
EDGE = 0.1  # of the range of scores; labels that stay so far from one of its ends do not fill it
SHOWN = 3  # of a longer list; the rest is counted
NOT_KNOWN = "minibert knows nothing of where these files are from or what is wrong with them: say it here."


def origin(config: Config, task: Task) -> str | None:
    """demo or cs224n, wherever the files lie; None of any others."""
    if task.own:
        return None
    if config.data in ORIGINS:
        return config.data
    files = {Path(config.data) / task.files[split]: task.files[split] for split in ("train", "dev")}
    # A folder may have been changed since the run began: then it is not the course's any more.
    known = all(path.is_file() and git_blob_id(path) == BLOB_IDS[name] for path, name in files.items())
    return "cs224n" if known else None


def limits(known: str | None, task: Task) -> tuple[str, ...]:
    """What is known to be wrong with a task's data."""
    if known is None:
        return (NOT_KNOWN,)
    return DEMO_LIMITS if known == "demo" else task.course_limits


def found(task: Task, splits: Splits) -> list[str]:
    """What the rows themselves say; their texts are counted, not told."""
    lines = [labels(task, splits.train, splits.dev)]
    again = len(repeated(splits)["dev"])
    lines.append(
        f"{again:,} of the {len(splits.dev):,} dev examples have the texts of a training example."
        if again
        else "No dev example has the texts of a training example."
    )
    if splits.skipped:
        lines.append(f"{len(splits.skipped):,} rows without a text or a label were skipped.")
    lines.append(f"A text has {words(splits.train):.0f} words in the mean.")
    return lines


def labels(task: Task, train: Sequence[Example], dev: Sequence[Example]) -> str:
    """How the labels are spread; of classes also what guessing the commonest gets."""
    if not task.is_classification:
        low, high = task.label_range
        mean_of = [f"{mean(one.label for one in part):.2f} in {name}" for name, part in _named(train, dev)]
        return f"Labels go from {low} to {high}, their mean is {' and '.join(mean_of)}."
    parts = []
    for name, part in _named(train, dev):
        counts = Counter(one.label for one in part)
        shares = (f"{counts[c] / len(part):.0%} of {name}" for c, name in enumerate(task.class_names))
        parts.append(f"{', '.join(shares)} in {name}")
    commonest = Counter(one.label for one in train).most_common(1)[0][0]
    right = sum(one.label == commonest for one in dev) / len(dev)
    name = task.class_names[int(commonest)]
    return f"Labels: {'; '.join(parts)}. Always {name} gets {right:.1%} of dev right."


def warnings(task: Task, splits: Splits) -> list[str]:
    """What in a task's data makes its scores mean something else than they seem to."""
    low, high = task.label_range
    lines = []
    for name, part in _named(splits.train, splits.dev):
        given = {one.label for one in part}
        lacking = [c for c in range(task.num_outputs) if c not in given] if task.is_classification else []
        edge = EDGE * (high - low)
        if len(given) == 1:
            lines.append(f"all {name} labels are {given.pop():g}")
        elif name == "train" and lacking:
            lines.append(f"no train label is {listed(map(str, lacking))}, of the classes {low} to {high}")
        elif name == "train" and (min(given) > low + edge or max(given) < high - edge):
            lines.append(f"train labels go from {min(given):g} to {max(given):g}, expected {low} to {high}")
    told = {
        "train": "train examples with an earlier one's texts and another label",
        "dev": "dev examples with the texts of train examples",
        "test": "test examples with the texts of train examples",
    }
    for split, pairs in repeated(splits).items():
        ids = listed(f"{reprlib.repr(one.id)} as {reprlib.repr(other.id)}" for one, other in pairs)
        lines += [f"{told[split]}: {len(pairs):,} ({ids})"] if pairs else []
    return lines


def repeated(splits: Splits) -> dict[str, list[tuple[Example, Example]]]:
    """By split the examples that have the texts of an earlier training example, and that one.

    Of train those alone whose labels differ. Case and the order of a pair make no other texts.
    """
    first: dict[tuple[str, ...], Example] = {}
    found = {"train": [], "dev": [], "test": []}
    for split, pairs in found.items():
        for one in getattr(splits, split) or ():
            texts = tuple(sorted(map(str.lower, one.texts)))
            other = first.setdefault(texts, one) if split == "train" else first.get(texts)
            if other and (split != "train" or other.label != one.label):
                pairs.append((one, other))
    return found


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _named(train: Sequence[Example], dev: Sequence[Example]) -> list[tuple[str, Sequence[Example]]]:
    return [("train", train), ("dev", dev)]


def words(examples: Sequence[Example]) -> float:
    return mean(len(text.split()) for one in examples for text in one.texts)
